"""Writing and reading where the file system lacks locks, fsync and more."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import zlib

import numpy as np
import pytest
import torch

from dataloaders import DataError
from dataloaders.frame_store import FrameStore, FrameStoreWriter, PackedClip, encode_frame
from dataloaders.storage import open_hdf5, sync
from utils import OutputError
from utils.evaluation.hdf5 import read_hdf5, write_hdf5
from utils.files import append_line, atomic_write, check_outputs, locked_folder
from utils.pictures.attention_store import SCORES, attention_store, read_attention

LACKING = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524, errno.EPERM, errno.EINVAL]
CALLS = ["fsync", "posix_fadvise", "posix_fallocate", "chmod", "fchmod"]


def fail_with(number: int):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=LACKING, ids=errno.errorcode.get)
def poor_disk(request, monkeypatch):
    """A file system that offers nothing but reading, writing and renaming."""
    for name in CALLS:
        monkeypatch.setattr(os, name, fail_with(request.param))
    for name in ("lockf", "flock"):
        monkeypatch.setattr(fcntl, name, fail_with(request.param))


def test_a_run_s_files_can_be_written_and_read_back(poor_disk, tmp_path, caplog):
    with locked_folder(tmp_path / "run"):
        assert "no locks" in caplog.text
        check_outputs([tmp_path / "run/log.jsonl"])
        append_line(tmp_path / "run/log.jsonl", "{}")
        check_outputs([tmp_path / "run/log.jsonl"])
    with atomic_write(tmp_path / "text") as part:
        part.write_text("whole")
    assert (tmp_path / "text").read_text() == "whole"
    layout = {"numbers": "float32 N", "name": "text"}
    contents = {"numbers": torch.arange(3.0), "name": "x"}
    write_hdf5(tmp_path / "file.h5", "test", layout, contents)
    read = read_hdf5(tmp_path / "file.h5", "test", layout, "")
    assert read["name"] == "x" and torch.equal(read["numbers"], contents["numbers"])
    with attention_store(tmp_path, {}) as add:
        add("q", "v", np.ones((2, 3, 4), "f4"), np.zeros(3, "f4"), rank=1)
    assert read_attention(tmp_path, "q").sum() == 24
    assert read_attention(tmp_path, "q", SCORES).shape == (3,)
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".lock"]


def test_frames_are_packed(poor_disk, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    jpegs = [
        encode_frame(torch.full((3, 16, 16), level, dtype=torch.uint8), 90) for level in (9, 99)
    ]
    lengths = np.array([len(jpeg) for jpeg in jpegs], np.uint32)
    crc = np.array([zlib.crc32(jpeg) for jpeg in jpegs], np.uint32)
    path = tmp_path / "frames.h5"
    with FrameStoreWriter(path, 16, 90) as writer:
        writer.add(PackedClip("v", lengths, crc, "v.mp4", 1, 1), b"".join(jpegs))
        writer.finish()
    assert "no locks" in caplog.text
    store = FrameStore(path)
    assert store.jpegs("v") == jpegs
    assert store.load("v", 2, 16).float().mean((1, 2, 3)).tolist() == [9, 99]


def test_hdf5_takes_no_locks_of_its_own(tmp_path):
    """It would fail here as it does where there are none."""
    with open_hdf5(tmp_path / "a.h5", "w") as file:
        file["x"] = [1, 2]
    with (tmp_path / "a.h5").open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with open_hdf5(tmp_path / "a.h5") as file:
            assert file["x"][:].tolist() == [1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_does_not_keep_what_it_is_given_is_an_error(monkeypatch, tmp_path, number):
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with (tmp_path / "a").open("w") as file, pytest.raises(OSError):
        sync(file.fileno())
    with pytest.raises(OutputError, match="b: cannot be written"):
        check_outputs([tmp_path / "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_of_another_is_not_taken_for_none(monkeypatch, tmp_path):
    for number in (errno.EAGAIN, errno.EACCES):
        monkeypatch.setattr(fcntl, "lockf", fail_with(number))
        with pytest.raises(OutputError, match="another run"), locked_folder(tmp_path):
            pass
        with pytest.raises(DataError, match="another process is packing"):
            FrameStoreWriter(tmp_path / "f.h5", 16, 90)
