"""HDF5 files on a full disk: an error that names the file, and nothing that looks like one."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders.annotations import Query
from utils import OutputError
from utils.evaluation.embed import Embeddings
from utils.evaluation.embeddings import KeptEmbeddings, load_embeddings, save_embeddings
from utils.evaluation.evaluator import Reading, predict_moments
from utils.evaluation.hdf5 import Hdf5Writer
from utils.evaluation.predictions import load_predictions, save_predictions
from utils.files import atomic_write
from utils.pictures.attention_store import ATTENTION, SCORES, AttentionStore, read_attention

QUERIES = [Query(f"q{i}", f"text {i}", f"v{i % 20}", 9.0, None) for i in range(60)]
EMBEDDINGS = Embeddings(torch.rand(20, 3, 64), torch.rand(60, 64))
PROPOSALS = torch.tensor([[0.0, 1.0], [0.0, 0.5], [0.5, 1.0]])
ATTENDED = np.random.default_rng(0).random((20, 2, 3, 50), np.float32)


def embeddings(folder: Path) -> bool:
    path = folder / "e.h5"
    kept = KeptEmbeddings.of(
        EMBEDDINGS, QUERIES, PROPOSALS, max_words=8, checkpoint=Path(__file__), epoch=1
    )
    save_embeddings(path, kept)
    return load_embeddings(path).embeddings.events.equal(EMBEDDINGS.events)


def predictions(folder: Path) -> bool:
    videos = Reading(QUERIES, PROPOSALS, moments=True).videos
    predicted = predict_moments(EMBEDDINGS, QUERIES, videos, PROPOSALS)
    save_predictions(folder / "p.h5", predicted)
    return load_predictions(folder / "p.h5").scores.equal(predicted.scores)


def attention(folder: Path) -> bool:
    with AttentionStore(folder, {"model": "m"}) as store:
        for query, attended in zip(QUERIES, ATTENDED, strict=False):
            store.add(query.desc_id, query.desc, attended, attended[0, 0], 1)
    return all(np.array_equal(read_attention(folder, f"q{i}"), a) for i, a in enumerate(ATTENDED))


def rereading(folder: Path) -> bool:
    """HDF5 reads back what it has written: where it gets something else, it crashes at random."""
    values, path = np.arange(20_000), folder / "r.h5"
    with atomic_write(path) as part, Hdf5Writer(part, path) as writer:
        for name in "ab":
            writer.file[name] = values
        writer.file["a"][::7] = -1
        values = values.copy()
        values[::7] = -1
        if not np.array_equal(writer.file["a"], values):
            os._exit(3)
    return True


@pytest.mark.parametrize(
    "write", [embeddings, predictions, attention, rereading], ids=lambda f: f.__name__
)
def test_a_full_disk_is_named_and_leaves_no_file(write: Callable, tmp_path) -> None:
    """At whatever byte it is full; files of the system end there as a disk does."""
    ends = set()
    for room in range(0, 400_000, 8_000):
        folder = tmp_path / str(room)
        folder.mkdir()
        ends.add(end := in_a_child_with(room, write, folder))
        files = {path.name for path in folder.iterdir()}
        assert (end, bool(files)) in {("refused", False), ("written", True)}, (room, end, files)
    assert ends == {"refused", "written"}


def in_a_child_with(room: int, write: Callable, folder: Path) -> str:
    child = os.fork()
    if child == 0:
        end = 2
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            end = 0 if write(folder) else 3
        except OutputError as error:
            named = any(name in str(error) for name in ("e.h5", "p.h5", "r.h5", ATTENTION, SCORES))
            end = 1 if named and "File too large" in str(error) else 4
        finally:
            os._exit(end)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends = {0: "written", 1: "refused", 3: "wrong numbers", 4: "unnamed", -11: "segmentation fault"}
    return ends.get(status, f"another error, {status}")
