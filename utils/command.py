"""The way into every program and out of it: flags, streams, and how it ends."""

from __future__ import annotations

import argparse
import codecs
import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dataloaders import DataError
from modules import ModelError
from utils import OutputError, RunError, SearchError

# What a user can fix; everything else is a bug and keeps its traceback.
USER_ERRORS = (DataError, ModelError, RunError, OutputError, SearchError)
UNREAD = (errno.EPIPE, errno.EIO)  # of a pipe that ended, and of a terminal that was closed


class Parser(argparse.ArgumentParser):
    """Of a mistake it says one line, not sixty of usage."""

    def __init__(self, **settings: Any) -> None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec and spec.name.startswith("scripts."):
            settings = {"prog": f"python -m {spec.name.removesuffix('.__main__')}"} | settings
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains the flags)\n")


def number(kind: type, lowest: float, highest: float = math.inf) -> Callable[[str], float]:
    """A flag's type: a number of a kind, the bounds among what is allowed; NaN is not."""

    def parse(text: str) -> float:
        value = kind(text)
        if not lowest <= value <= highest:
            wanted = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"must be {wanted}: {text}")
        return value

    parse.__name__ = kind.__name__  # of argparse's message for what is no number
    return parse


def folder(text: str) -> Path:
    """A flag's type: a folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def new_file(text: str) -> Path:
    """A flag's type: a file that can be written, as far as its folder says."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"this is a folder, or in none that is there: {path}")
    return path


def run_command(program: Callable[[], int | None]) -> NoReturn:
    """The program as a command: what a user can fix ends it with a message.

    What it prints comes out on any terminal, and its work is done also where no one reads that.
    """
    _open_streams()
    try:
        status = program()
    except USER_ERRORS as error:
        status = f"error: {error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        status = f"error: this locale has no such file names ({error}): set PYTHONUTF8=1"
    sys.stdout.flush()
    lost = sys.stdout.lost
    if lost and lost.errno not in UNREAD and not status:
        status = f"error: standard output is incomplete: {lost.strerror}"
    sys.exit(status)


def _open_streams() -> None:
    """Standard streams that can be written to. In place of a closed one stands /dev/null, since the
    next file to be opened would get its number, and what libraries print there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, True)
            stream = os.fdopen(descriptor, "w" if number else "r", encoding="utf-8")
        if number:
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="backslashreplace" if utf8 else "replace")
            stream = _Stream(stream)
        setattr(sys, name, stream)


class _Stream:
    """Takes everything; once that cannot be written any more, it is dropped.

    Attributes:
        lost: why, None if nothing was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable, *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError as error:
            self.lost = self.lost or error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # for what is in its buffer still, and libraries
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
