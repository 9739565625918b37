"""HDF5 files whose write errors are seen, as on a full disk, and whose contents are checked.

HDF5's own file drivers lose write errors: closing a file that could not be written may end it by a
segmentation fault, or leave a file of wrong numbers behind. So HDF5 writes through a Python file
that takes everything, and remembers what the system did not.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from utils import RunError
from utils.files import writing


class _Taker(io.FileIO):
    """A file that takes every write. What comes after the first that fails stays in memory, to be
    read again: HDF5 would follow whatever it finds instead."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.failed: OSError | None = None
        self._lost: list[tuple[int, bytes]] = []  # where to, in the order of writing

    def write(self, data: memoryview) -> int:
        at, rest = self.tell(), memoryview(data)
        try:
            while rest and not self.failed:
                written = super().write(rest)
                at, rest = at + written, rest[written:]
        except OSError as error:
            self.failed = error
        if rest:
            self._lost.append((at, bytes(rest)))
        return len(data)

    def readinto(self, buffer: memoryview) -> int:
        start, view = self.tell(), memoryview(buffer)
        found = super().readinto(view)
        view[found:] = bytes(len(view) - found)
        for at, data in self._lost:
            low, high = max(at, start), min(at + len(data), start + len(view))
            if low < high:
                view[low - start : high - start] = data[low - at : high - at]
        return len(view)

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
        self._taker = _Taker(part)
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


def read_hdf5(
    path: Path,
    format_name: str,
    texts: Sequence[str],
    numbers: Mapping[str, type],
    attributes: Mapping[str, type],
) -> dict:
    """All contents of a file of one of this program's formats, by name, in memory.

    Args:
        format_name: what its attribute "format" has to say.
        texts: data sets [N], read as lists of str.
        numbers: data sets, read as tensors, and their NumPy types, of which the size may differ.
        attributes: and their types, int or str.

    Raises:
        RunError: it cannot be read, or something in it is missing or of another kind.
    """
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("format")
            if not isinstance(found, str) or found != format_name:
                raise RunError(f"not a file of {format_name!r}")
            contents = {name: _texts(file, name) for name in texts}
            contents |= {name: _numbers(file, name, kind) for name, kind in numbers.items()}
            return contents | {name: kind(file.attrs[name]) for name, kind in attributes.items()}
    except RunError:
        raise
    except KeyError as error:
        raise RunError(error.args[0]) from error
    except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(str(error)) from error


def _texts(file: h5py.File, name: str) -> list[str]:
    data = file[name]
    if (
        not isinstance(data, h5py.Dataset)
        or data.ndim != 1
        or not h5py.check_string_dtype(data.dtype)
    ):
        raise RunError(f"{name} is no list of texts")
    return data.asstr()[()].tolist()


def _numbers(file: h5py.File, name: str, kind: type) -> torch.Tensor:
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.shape in (None, ()):
        raise RunError(f"{name} is no array")
    if data.dtype.kind != np.dtype(kind).kind:
        raise RunError(f"{name} holds {data.dtype}, expected {np.dtype(kind)}")
    return torch.from_numpy(data[()])
