"""What the pictures of a split are drawn from, in the layout of the authors' program.

attn.hdf5: per query [L, N_e, keys]; event_scores.hdf5: per query [N_e]; r1_ids.json. Written query
by query, so that a split of thousands of hits needs the memory of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataloaders.storage import if_supported, open_hdf5
from utils.files import commit, temporary_sibling, writing

if TYPE_CHECKING:
    import h5py

ATTENTION, SCORES, HITS = "attn.hdf5", "event_scores.hdf5", "r1_ids.json"
MAX_NAME = 150  # bytes; file systems end at 255
METADATA = 2**20  # bytes, more than HDF5 needs to note a data set
UNSAFE = re.compile(r'[/\\:*?"<>|%\x00-\x1f\x7f]|^\.|[. ]$')


def query_name(desc_id: str | int) -> str:
    """The query's key in the HDF5 files and its folder: its id, what neither can hold escaped.

    Ids such as "v_x#0" stay as they are. A slash would make a group in one and a folder in the
    other, and a leading dot means something to both: these become "%2F" and "%2E". What is too long
    for a file name is cut and ends in a hash. Different ids have different names.
    """
    name = UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", str(desc_id)) or "%"
    if len(name.encode()) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name.encode()[:MAX_NAME].decode(errors='ignore')}%~{digest}"


class AttentionStore:
    """Writes the three files of a folder; they appear under their names when all is done.

    Queries of one video share its attention, which is stored once and linked.

    Args:
        folder: exists already.
        attributes: how the attention was made, kept as attributes of attn.hdf5.

    Raises:
        OutputError: a file cannot be written; from `add`, or at the end.
    """

    def __init__(self, folder: Path, attributes: Mapping[str, str]) -> None:
        self.folder = folder
        self.attributes = attributes
        self._first_of_video: dict[str, str] = {}
        self._hits: list[tuple[str | int, str]] = []

    def __enter__(self) -> AttentionStore:
        with ExitStack() as stack, writing(self.folder):
            self._parts = {
                name: stack.enter_context(temporary_sibling(self.folder / name))
                for name in (ATTENTION, SCORES, HITS)
            }
            self._files = {
                name: stack.enter_context(open_hdf5(self._parts[name], "w"))
                for name in (ATTENTION, SCORES)
            }
            self._files[ATTENTION].attrs.update(self.attributes)
            self._stack = stack.pop_all()
        return self

    def add(
        self,
        desc_id: str | int,
        vid_name: str,
        attention: np.ndarray,
        scores: np.ndarray,
        rank: int,
    ) -> None:
        """One query.

        Args:
            attention: float32 [L, N_e, keys] of its video, in the column order of the model's
                ``visibility``.
            scores: float32 [N_e], of each event the highest score in any video.
            rank: of its video; the queries at rank 1 are listed in r1_ids.json.
        """
        key = query_name(desc_id)
        first = self._first_of_video.setdefault(vid_name, key)
        with writing(self.folder / ATTENTION):
            file = self._with_room(ATTENTION, attention.nbytes)
            if first != key:
                file[key] = file[first]
            else:
                # Most of it is exactly zero, what an event may not see: a chunk a layer, compressed
                file.create_dataset(
                    key, data=attention, chunks=(1, *attention.shape[1:]), compression="gzip",
                    compression_opts=1, shuffle=True,
                )  # fmt: skip
        with writing(self.folder / SCORES):
            self._with_room(SCORES, scores.nbytes).create_dataset(key, data=scores)
        if rank == 1:
            self._hits.append((desc_id, vid_name))

    def _with_room(self, name: str, size: int) -> h5py.File:
        """The file, which so many bytes more can be written to: HDF5 crashes on a full disk."""
        file = self._files[name]
        if hasattr(os, "posix_fallocate"):  # absent on macOS
            with self._parts[name].open("rb+") as part, if_supported():
                os.posix_fallocate(part.fileno(), file.id.get_filesize(), size + METADATA)
        return file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack, writing(self.folder):
            if kind is None:
                self._commit()

    def _commit(self) -> None:
        for name, file in self._files.items():
            file.flush()
            size = file.id.get_filesize()
            file.close()
            os.truncate(self._parts[name], size)  # room that was not needed
        self._parts[HITS].write_text(json.dumps(self._hits), encoding="utf-8")
        for name, part in self._parts.items():
            commit(part, self.folder / name)


def read_attention(folder: Path, desc_id: str | int) -> np.ndarray:
    """[L, N_e, keys] of a query. KeyError: it was not plotted."""
    return _read(folder / ATTENTION, desc_id)


def read_scores(folder: Path, desc_id: str | int) -> np.ndarray:
    """[N_e] of a query. KeyError: it was not plotted."""
    return _read(folder / SCORES, desc_id)


def _read(path: Path, desc_id: str | int) -> np.ndarray:
    with open_hdf5(path) as file:
        return file[query_name(desc_id)][()]
