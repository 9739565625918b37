"""SIGINT and SIGTERM as a wish that the training loop grants where nothing is lost by it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `timeout` and some schedulers send a signal to a process and to its group: one wish, not two.
SAME_WISH = 1.0  # seconds

T = TypeVar("T")


class Stopped(BaseException):
    """Training ended because of a signal; everything is saved. Not an error to be caught."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """While entered, the first signal is only noted, or raises Stopped within ``at_once``; a
    second one ends the process as if there were no handler."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self._at_once = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if there was a signal."""
        if self.received is not None:
            raise Stopped(self.received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block in which nothing can be lost: a signal ends it where it is."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def at_once_between(self, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for the next one is such a block."""
        end = object()
        with self.at_once():
            iterator = iter(items)
        while True:
            with self.at_once():
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = number, time.monotonic()
            name = signal.Signals(number).name
            print(f"\n{name}: saving; a second signal ends at once", file=sys.stderr, flush=True)
            if self._at_once:
                raise Stopped(number)
        elif time.monotonic() - self._time > SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
