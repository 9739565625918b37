"""HDF5 files of a layout: read as written, refused where they do not fit; a full disk is named."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from utils import OutputError, RunError
from utils.evaluation.hdf5 import read_hdf5, write_hdf5

LAYOUT = {
    "epoch": "int", "source": "text", "names": "text V", "shares": "float32 V 2",
    "rows": "int32<V T", "scores": "float32 T V",
}  # fmt: skip
CONTENTS = {
    "epoch": 7,
    "source": "ckpt – 二",
    "names": ["v1", "v0", "zwei – 二"],
    "shares": torch.rand(3, 2),
    "rows": torch.tensor([0, 2, 1, 2]),
    "scores": torch.tensor([[1.0, -torch.inf, torch.nan]] * 4),
}


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def path(tmp_path, request) -> Path:
    path = tmp_path / "some.h5"
    write_hdf5(path, "Some, version 1", LAYOUT, CONTENTS, packed=request.param)
    return path


def read(path: Path) -> dict:
    return read_hdf5(path, "Some, version 1", LAYOUT, "make it again")


def test_what_is_written_is_read(path):
    found = read(path)
    assert list(found) == list(LAYOUT) and list(path.parent.iterdir()) == [path]
    for name, value in CONTENTS.items():
        if torch.is_tensor(value):
            assert np.array_equal(found[name], value, equal_nan=name == "scores"), name
        else:
            assert found[name] == value, name
    with h5py.File(path) as file:  # what other programs see
        assert file["rows"].dtype == np.int32 and file["names"].asstr()[2] == "zwei – 二"
        assert dict(file.attrs) == {"format": "Some, version 1", "epoch": 7, "source": "ckpt – 二"}


def test_no_rows_at_all(tmp_path):
    nothing = CONTENTS | {"rows": torch.zeros(0), "scores": torch.zeros(0, 3)}
    write_hdf5(tmp_path / "f.h5", "Some, version 1", LAYOUT, nothing)
    assert read(tmp_path / "f.h5")["scores"].shape == (0, 3)


def test_another_size_of_number_is_read_too(path):
    replace_field("rows", np.array([2, 2, 1, 0], np.int64))(path)
    assert read(path)["rows"].tolist() == [2, 2, 1, 0]


def replace_field(name, value, dtype=None):
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            attribute = name in file.attrs
            del (file.attrs if attribute else file)[name]
            if attribute and value is not None:
                file.attrs[name] = value
            elif value is not None:
                file.create_dataset(name, data=value, dtype=dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "no such file"),
        (lambda path: path.write_text("hello"), "file signature not found"),
        (replace_field("format", None), "not a file of 'Some, version 1'"),
        (replace_field("format", "Some, version 2"), "not a file of 'Some, version 1'"),
        (replace_field("format", [1, 2]), "not a file of"),
        (replace_field("epoch", "seven"), "'seven'"),
        (replace_field("epoch", None), "epoch"),
        (replace_field("scores", None), "scores"),
        (replace_field("scores", h5py.Empty("f")), "scores is no array"),
        (replace_field("names", [1, 2, 3]), "names holds int64, expected text"),
        (replace_field("names", [b"\xff"] * 3, h5py.string_dtype()), "invalid start byte"),
        (replace_field("rows", [0.0] * 4), "rows holds float64, expected int32"),
        (replace_field("rows", [0, 2, 3, 2]), "rows holds an index that is not one of the 3"),
        (replace_field("rows", [0, 2, -1, 2]), "rows holds an index that is not one of the 3"),
        (replace_field("rows", [[0, 2, 1, 2]]), r"rows is \[1, 4\], expected"),
        (replace_field("scores", [[1.0, 2.0]]), r"scores is \[1, 2\], expected \[4, 3\]"),
        (replace_field("shares", [[0.5]] * 3), r"shares is \[3, 1\], expected \[3, 2\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(path, change, message):
    change(path)
    with pytest.raises(RunError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).endswith(": make it again")


def test_a_file_that_was_cut_off_is_refused(path):
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match="make it again"):
            read(path)


@pytest.mark.parametrize("room", [0, 1_000, 7_999])
def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, room):
    path = tmp_path / "some.h5"
    path.write_bytes(b"earlier")
    large = CONTENTS | {"rows": torch.arange(3).repeat(1000), "scores": torch.rand(3000, 3)}
    with limited_file_size(room), pytest.raises(OutputError, match="File too large") as error:
        write_hdf5(path, "Some, version 1", LAYOUT, large)
    assert str(error.value).startswith(f"{path}: ")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"earlier"


@contextmanager
def limited_file_size(room: int):
    """Files end there as a disk does that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
