"""HDF5 files of a fixed layout, written whole and checked when they are read.

A layout names every field and what it holds, as in docstrings: "float32 V 2" is a data set [V, 2];
axes of one name have one size. "int32<V T" are indices of V, which an earlier field has. "text T"
is a list of str; "int" and "text" alone are attributes. Another size of a number is read too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloaders.storage import open_hdf5
from utils import RunError
from utils.files import atomic_write

Layout = Mapping[str, str]
PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


def write_hdf5(
    path: Path, name: str, layout: Layout, contents: Mapping[str, Any], packed: bool = False
) -> None:
    """Write the fields of a layout; `name` is the format's, `packed` compresses tables [a, b].

    On a full disk HDF5 itself may crash or leave wrong numbers. So the file is made in memory,
    which takes as much again as its contents, and its bytes are written like any others.

    OutputError: it cannot be written; what was there before is still there then.
    """
    import h5py  # slow to import

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs["format"] = name
        for field, description in layout.items():
            value, (kind, *axes) = contents[field], description.split()
            if not axes:
                file.attrs[field] = value
            elif kind == "text":
                file.create_dataset(field, data=value, dtype=h5py.string_dtype())
            else:
                options = PACKED if packed and len(axes) == 2 else {}
                dtype = kind.partition("<")[0]
                file.create_dataset(field, data=value.cpu(), dtype=dtype, **options)
    with atomic_write(path) as part:
        part.write_bytes(image.getbuffer())


def read_hdf5(path: Path, name: str, layout: Layout, remedy: str) -> dict[str, Any]:
    """All fields of a layout: tensors on the CPU, lists of str, and plain values. RunError, which
    ends in the remedy: no such file, not of the format `name`, a field is missing or does not fit.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file: {remedy}")
    sizes: dict[str, int] = {}
    try:
        with open_hdf5(path) as file:
            if str(file.attrs.get("format")) != name:
                raise ValueError(f"not a file of {name!r}")
            return {field: _read(file, field, layout[field], sizes) for field in layout}
    except (KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{path}: {error}: {remedy}") from error


def _read(
    file: Any, field: str, description: str, sizes: dict[str, int]
) -> list[str] | Tensor | int | str:
    """One field; `sizes` are those of the axes so far and get the new ones."""
    kind, *axes = description.split()
    if not axes:
        return {"int": int, "text": str}[kind](file.attrs[field])
    kind, _, indexed = kind.partition("<")
    dtype, shape = (getattr(file[field], name, None) for name in ("dtype", "shape"))
    if dtype is None or shape is None:
        raise ValueError(f"{field} is no array")
    if dtype.kind != np.dtype(object if kind == "text" else kind).kind:
        raise ValueError(f"{field} holds {dtype}, expected {kind}")
    for axis, size in zip(axes, shape, strict=False):
        sizes.setdefault(axis, int(axis) if axis.isdigit() else size)
    if [sizes.get(axis) for axis in axes] != list(shape):
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise ValueError(f"{field} is {list(shape)}, expected [{expected}]")
    if kind == "text":
        return file[field].asstr()[()].tolist()
    values = torch.from_numpy(file[field][()])
    if indexed and values.numel() and not 0 <= values.min() <= values.max() < sizes[indexed]:
        raise ValueError(f"{field} holds an index that is not one of the {sizes[indexed]}")
    return values
