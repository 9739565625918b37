"""HDF5 files whose write errors are seen, as on a full disk.

HDF5's own file drivers lose them: closing a file that could not be written may end the process by a
segmentation fault, or leave a file of wrong numbers behind. So HDF5 writes through a Python file
that takes everything, and remembers what the system did not.
"""

from __future__ import annotations

import io
from pathlib import Path

import h5py

from utils.files import writing


class _Taker(io.FileIO):
    """A file that takes every write; after the first that fails, none reaches the disk."""

    failed: OSError | None = None

    def write(self, data: memoryview) -> int:
        rest = memoryview(data)
        try:
            while rest and not self.failed:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failed = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            return size if self.failed else super().truncate(size)
        except OSError as error:
            self.failed = error
            return size


class Hdf5Writer:
    """A new HDF5 file. Leaving its context closes it.

    Args:
        part: where to; `path`: what it will be called, for messages.

    Attributes:
        file: to write to.

    Raises:
        OutputError: at the end of the context, or by `check`: something could not be written.
    """

    def __init__(self, part: Path, path: Path) -> None:
        self.path = path
        self._taker = _Taker(part, "w+")
        self.file = h5py.File(self._taker, "w")

    def check(self) -> None:
        """Whether all was written so far."""
        with writing(self.path):
            if self._taker.failed:
                raise self._taker.failed

    def __enter__(self) -> Hdf5Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._taker:
                self.file.close()
        finally:  # it may have stumbled over what it could not read again: this is the reason
            self.check()
