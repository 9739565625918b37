"""Saved embeddings: the same metrics without videos and weights; refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from dataloaders.annotations import VAL, Query, Split
from utils import RunError
from utils.evaluation.embed import Embeddings
from utils.evaluation.embeddings import SavedEmbeddings, load_embeddings, save_embeddings

QUERIES = [
    Query("a", "eins", "v1", 3.0, ((0.0, 1.0),)),
    Query(2, "zwei – 二", "v0", 5.5, None),
    Query("c", "drei", "v1", 3.0, None),
]
PROPOSALS = torch.tensor([[0.0, 1.0], [0.0, 0.5], [0.5, 1.0]])


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "ckpt.pth.tar"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def saved(checkpoint) -> SavedEmbeddings:
    torch.manual_seed(0)
    embeddings = Embeddings(torch.randn(2, 3, 4), torch.randn(3, 4))
    return SavedEmbeddings.from_split(
        embeddings, Split(VAL, QUERIES), PROPOSALS,
        max_words=32, checkpoint=checkpoint, epoch=7, readout="consensus",
    )  # fmt: skip


@pytest.fixture
def file(tmp_path, saved) -> Path:
    path = tmp_path / "embeddings.h5"
    save_embeddings(path, saved)
    return path


def test_what_is_saved_is_read(file, saved, checkpoint):
    read = load_embeddings(file)
    assert read.embeddings.events.equal(saved.embeddings.events)
    assert read.embeddings.texts.equal(saved.embeddings.texts)
    for name, value in vars(saved).items():
        if name != "embeddings":
            same = getattr(read, name) == value
            assert same.all() if torch.is_tensor(value) else same, name
    assert read.vid_names == ["v1", "v0"] and read.target.tolist() == [0, 1, 0]
    for path in (checkpoint, None):
        read.check(QUERIES, PROPOSALS, max_words=32, readout="consensus", checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": []}, "none of the annotated videos is in it"),
        ({"queries": QUERIES[:2]}, "3 queries, the annotations 2"),
        ({"queries": [QUERIES[0], QUERIES[2], QUERIES[1]]}, "desc_id of query 2 is '2'"),
        ({"queries": [*QUERIES[:2], replace(QUERIES[2], desc="vier")]}, "'drei', in the .* 'vier'"),
        ({"queries": [*QUERIES[:2], replace(QUERIES[2], vid_name="v0")]}, "vid_name of query 3"),
        ({"max_words": 64}, "--max_words 32, not 64"),
        ({"readout": "max"}, "--readout consensus, not max: give that"),
        ({"proposals": PROPOSALS[:2]}, "another pyramid, of 3 events"),
        ({"proposals": PROPOSALS / 2}, "another pyramid"),
    ],
)
def test_another_evaluation_is_refused(saved, change, message):
    now = {"queries": QUERIES, "proposals": PROPOSALS, "max_words": 32, "readout": "consensus"}
    now |= {"checkpoint": None} | change
    with pytest.raises(RunError, match=message):
        saved.check(now.pop("queries"), now.pop("proposals"), **now)


def test_another_checkpoint_of_that_name_is_refused(saved, checkpoint):
    checkpoint.write_bytes(b"weights after another epoch")
    with pytest.raises(RunError, match=r"another checkpoint than .*after epoch 7"):
        saved.check(QUERIES, PROPOSALS, max_words=32, readout="consensus", checkpoint=checkpoint)


def test_values_that_are_not_finite_are_refused(file):
    with h5py.File(file, "r+") as hdf5:
        hdf5["events"][1, 2, 3] = torch.nan
    with pytest.raises(RunError, match=rf"{file}: events has values .*not finite.*--save_emb"):
        load_embeddings(file)


@pytest.mark.parametrize("task", ["PRVR", "VCMR"])
def test_metrics_of_saved_embeddings_are_those_computed(trained, task):
    checkpoint, saved = trained.logs / "ckpt.best.pth.tar", trained.corpus / f"{task}.h5"
    evaluate = ("--do_eval", "1", "--subtask_type", task, "--event_scores", "both")
    trained.works(*evaluate, "--resume", str(checkpoint), "--save_embeddings", str(saved))
    elsewhere = ("--video_dir", "nowhere", "--pretrained_clip_name", "nothing.pt")
    trained.works(*evaluate, *elsewhere, "--load_embeddings", str(saved))
    computed, loaded = trained.lines("eval.jsonl")[-2:]
    assert computed == loaded and {"cosine", "dot"} <= computed["metrics"].keys()
    other = ("--resume", str(trained.corpus / "clip.pt"), "--load_embeddings", str(saved))
    told = trained.stops(*evaluate, *elsewhere, *other)
    assert f"error: {saved}: made with another checkpoint than" in told
