"""Kept embeddings: the same metrics without videos and weights; refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from dataloaders.annotations import Query
from tests.corpus import TinyRun, make_run
from utils import RunError
from utils.evaluation.embed import Embeddings
from utils.evaluation.embeddings import KeptEmbeddings, load_embeddings, save_embeddings

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
def kept(checkpoint) -> KeptEmbeddings:
    torch.manual_seed(0)
    embeddings = Embeddings(torch.randn(2, 3, 4), torch.randn(3, 4))
    return KeptEmbeddings.of(
        embeddings, QUERIES, PROPOSALS, max_words=32, checkpoint=checkpoint, epoch=7
    )


@pytest.fixture
def file(tmp_path, kept) -> Path:
    path = tmp_path / "embeddings.h5"
    save_embeddings(path, kept)
    return path


def test_what_is_kept_is_read(file, kept, checkpoint):
    read = load_embeddings(file)
    for name, value in vars(kept).items():
        if torch.is_tensor(value):
            assert getattr(read, name).equal(value), name
        elif name != "embeddings":
            assert getattr(read, name) == value, name
    assert read.embeddings.events.equal(kept.embeddings.events)
    assert read.embeddings.texts.equal(kept.embeddings.texts)
    assert read.vid_names == ["v1", "v0"] and read.target.tolist() == [0, 1, 0]
    for path in (checkpoint, None):
        read.check(QUERIES, PROPOSALS, max_words=32, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": []}, "none of the annotated videos is in it"),
        ({"queries": QUERIES[:2]}, "3 queries, the annotations 2"),
        ({"queries": [QUERIES[0], QUERIES[2], QUERIES[1]]}, "desc_id of query 2 is '2'"),
        ({"queries": [*QUERIES[:2], replace(QUERIES[2], desc="vier")]}, "'drei', in the .* 'vier'"),
        ({"queries": [*QUERIES[:2], replace(QUERIES[2], vid_name="v0")]}, "vid_name of query 3"),
        ({"max_words": 64}, "--max_words 32, not 64"),
        ({"proposals": PROPOSALS[:2]}, "another pyramid, of 3 events"),
        ({"proposals": PROPOSALS / 2}, "another pyramid"),
    ],
)
def test_another_evaluation_is_refused(kept, change, message):
    now = {"queries": QUERIES, "proposals": PROPOSALS, "max_words": 32, "checkpoint": None} | change
    with pytest.raises(RunError, match=message):
        kept.check(now.pop("queries"), now.pop("proposals"), **now)


def test_another_checkpoint_of_that_name_is_refused(kept, checkpoint):
    checkpoint.write_bytes(b"weights after another epoch")
    with pytest.raises(RunError, match=r"another checkpoint than .*after epoch 7"):
        kept.check(QUERIES, PROPOSALS, max_words=32, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file: main.py --save_embeddings makes one"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "make the file again"),
        (lambda path: rewrite(path, "format", None), "not a file of 'ProPy embeddings, version 1'"),
        (lambda path: rewrite(path, "texts", torch.zeros(2, 4)), r"texts is \[2, 4\], expected"),
        (lambda path: rewrite(path, "events", torch.full((2, 3, 4), torch.nan)), "not finite"),
        (lambda path: rewrite(path, "target", torch.tensor([0, 2, 0])), "one of the 2 videos"),
        (lambda path: rewrite(path, "captions", None), "captions"),
        (lambda path: rewrite(path, "captions", torch.arange(3)), "captions is no list of texts"),
        (lambda path: rewrite(path, "events", torch.ones(2, 3, 4).int()), "events holds int32"),
        (lambda path: set_attribute(path, "epoch", "seven"), "'seven'"),
        (lambda path: set_attribute(path, "format", [1, 2]), "not a file of"),
    ],
)
def test_an_unusable_file_is_refused(file, damage, message):
    damage(file)
    with pytest.raises(RunError, match=message) as caught:
        load_embeddings(file)
    assert str(file) in str(caught.value)


def set_attribute(path: Path, name: str, value: object) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value


def rewrite(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    with h5py.File(path, "r+") as file:
        where = file.attrs if name in file.attrs else file
        del where[name]
        if tensor is not None:
            file[name] = tensor.numpy()


@pytest.mark.parametrize("task", ["PRVR", "VCMR"])
def test_metrics_of_kept_embeddings_are_those_computed(tmp_path_factory, task):
    run = make_run(tmp_path_factory.getbasetemp())
    checkpoint, kept = run.logs / "ckpt.best.pth.tar", run.corpus / f"{task}.h5"
    evaluate = ("--do_eval", "1", "--subtask_type", task, "--event_scores", "both")
    computed = metrics(run, *evaluate, "--resume", str(checkpoint), "--save_embeddings", str(kept))
    elsewhere = ("--video_dir", "nowhere", "--pretrained_clip_name", "nothing.pt")
    assert metrics(run, *evaluate, *elsewhere, "--load_embeddings", str(kept)) == computed
    assert {"cosine", "dot"} <= computed["metrics"].keys()
    other = ("--resume", str(run.corpus / "clip.pt"), "--load_embeddings", str(kept))
    refused = run.main(*evaluate, *elsewhere, *other)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"error: {kept}: made with another checkpoint than" in refused.stderr


def metrics(run: TinyRun, *flags: str) -> dict:
    done = run.main(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((run.logs / "eval.jsonl").read_text().splitlines()[-1])
