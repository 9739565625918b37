"""What the pictures of a split are drawn from, in the layout of the authors' program.

attn.hdf5: per query [L, N_e, keys]; event_scores.hdf5: per query [N_e]; r1_ids.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from dataloaders.storage import if_supported, open_hdf5
from utils.evaluation.hdf5 import PACKED
from utils.files import atomic_write, commit, temporary_sibling, writing

ATTENTION, SCORES, HITS = "attn.hdf5", "event_scores.hdf5", "r1_ids.json"
MAX_NAME = 150  # bytes; file systems end at 255
METADATA = 2**20  # bytes, more than HDF5 needs to note a data set
UNSAFE = re.compile(r'[/\\:*?"<>|%\x00-\x1f\x7f]|^\.|[. ]$')


def query_name(desc_id: str | int) -> str:
    """The query's key in the HDF5 files and its folder: its id, what neither can hold escaped.

    Ids such as "v_x#0" stay as they are; "/" and a leading "." become "%2F" and "%2E". What is too
    long for a file name is cut and ends in a hash. Different ids have different names.
    """
    name = UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", str(desc_id)) or "%"
    if len(name.encode()) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name.encode()[:MAX_NAME].decode(errors='ignore')}%~{digest}"


@contextmanager
def attention_store(folder: Path, attributes: Mapping[str, str]) -> Iterator[Callable[..., None]]:
    """Gives `add`; the three files of a folder that exists appear when the block ends well.

    Attention is written query by query, so that thousands need the memory of one; queries of one
    video share theirs, which is stored once and linked.

    Args:
        attributes: how the attention was made, kept as attributes of attn.hdf5.

    Raises:
        OutputError: a file cannot be written.
    """
    path = folder / ATTENTION
    first_of_video: dict[str, str] = {}
    hits: list[tuple[str | int, str]] = []

    def add(
        desc_id: str | int, vid_name: str, attention: np.ndarray, scores: np.ndarray, rank: int
    ) -> None:
        """One query.

        Args:
            attention: float32 [L, N_e, keys] of its video, columns as in ``model.visibility``.
            scores: float32 [N_e], of each event the highest score in any video.
            rank: of its video; the queries at rank 1 are listed in r1_ids.json.
        """
        key = query_name(desc_id)
        first = first_of_video.setdefault(vid_name, key)
        with writing(path):
            # HDF5 crashes on a full disk: room for what it writes next is taken beforehand
            with part.open("rb+") as raw, if_supported():
                size = attention.nbytes + METADATA
                os.posix_fallocate(raw.fileno(), file.id.get_filesize(), size)
            if first != key:
                file[key] = file[first]
            else:  # most of it is exactly zero, what an event may not see: a chunk a layer, packed
                chunks = (1, *attention.shape[1:])
                file.create_dataset(key, data=attention, chunks=chunks, **PACKED)
        scores_file[key] = scores
        if rank == 1:
            hits.append((desc_id, vid_name))

    with ExitStack() as stack:
        with writing(path):
            part = stack.enter_context(temporary_sibling(path))
            file = stack.enter_context(open_hdf5(part, "w"))
            file.attrs.update(attributes)
        image = io.BytesIO()  # a few numbers a query
        scores_file = stack.enter_context(open_hdf5(image, "w"))
        yield add
        scores_file.close()
        with writing(path):
            file.flush()
            size = file.id.get_filesize()
            file.close()
            os.truncate(part, size)  # room that was not needed
            with atomic_write(folder / SCORES) as scores_part:
                scores_part.write_bytes(image.getbuffer())
            with atomic_write(folder / HITS) as hits_part:
                hits_part.write_text(json.dumps(hits), encoding="utf-8")
            commit(part, path)


def read_attention(folder: Path, desc_id: str | int, name: str = ATTENTION) -> np.ndarray:
    """[L, N_e, keys] of a query, or with `SCORES` its [N_e]. KeyError: it was not plotted."""
    with open_hdf5(folder / name) as file:
        return file[query_name(desc_id)][()]
