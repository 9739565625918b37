"""SIGINT and SIGTERM as a request that the training loop grants where nothing is lost by it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `timeout` and some schedulers send a signal to a process and to its group: one request.
DEBOUNCE_SECONDS = 1.0

T = TypeVar("T")


class Stopped(BaseException):
    """Training ended because of a signal; everything is saved. Not an error to be caught."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class DeferredSignals:
    """While entered, the first signal is only noted, or raises Stopped within ``immediate``; a
    second one ends the process as if there were no handler.

    Args:
        agree: of several processes, which may only stop together: the largest of their numbers.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self._agree = agree
        self.received: int | None = None
        self._time = 0.0
        self._immediate = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> DeferredSignals:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if there was a signal, in any of the processes, which all check here."""
        received = self.received or 0
        if self._agree is not None:
            received = self._agree(received)
        if received:
            raise Stopped(received)

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """A block in which nothing can be lost: a signal ends it where it is. Several processes
        have none, since the others would wait for this one."""
        if self._agree is not None:
            yield
            return
        self._immediate = True
        try:
            self.check()
            yield
        finally:
            self._immediate = False

    def immediate_between(self, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for the next one is such a block."""
        end = object()
        with self.immediate():
            iterator = iter(items)
        while True:
            with self.immediate():
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = number, time.monotonic()
            name = signal.Signals(number).name
            print(f"\n{name}: saving; a second signal ends at once", file=sys.stderr, flush=True)
            if self._immediate:
                raise Stopped(number)
        elif time.monotonic() - self._time > DEBOUNCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
