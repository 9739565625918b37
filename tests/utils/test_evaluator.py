"""Evaluation: everything is embedded once, metrics keep to the memory they are given."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataloaders.annotations import VAL, Query, Split
from utils.evaluation.embed import Embeddings
from utils.evaluation.evaluator import CorpusEvaluator, EvalConfig, Evaluator
from utils.evaluation.ranking import predict_moments, rank_videos

T, V, N_e, D = 300, 200, 8, 16


class Recorder(nn.Module):
    """A model and a loader in one, which notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def encode_video(self, frames):
        self.calls.append("encode video")
        return frames.float()

    def encode_text(self, token_ids):
        self.calls.append("encode text")
        return token_ids.float()

    @staticmethod
    def worker_errors():
        return contextlib.nullcontext()

    def __len__(self) -> int:
        return 2

    def __iter__(self):
        self.calls.append("start workers")
        return self.batches()

    def batches(self):
        for i in range(2):
            self.calls.append("wait for clips")
            yield {"frames": torch.full((3, 4, 5), i), "indices": torch.arange(3 * i, 3 * i + 3)}


def test_each_is_encoded_once_and_texts_while_clips_are_decoded():
    recorder = Recorder()
    texts = [
        {"token_ids": torch.tensor([[2, 2], [0, 0]]), "indices": torch.tensor([2, 0])},
        {"token_ids": torch.tensor([[1, 1]]), "indices": torch.tensor([1])},
    ]
    evaluator = CorpusEvaluator.__new__(CorpusEvaluator)  # whose loader is the recorder
    evaluator.loader, evaluator.texts = recorder, texts
    embeddings = evaluator.embed(recorder, torch.device("cpu"))
    assert recorder.calls == [
        "start workers", "encode text", "encode text",
        *["wait for clips", "encode video"] * 2,
    ]  # fmt: skip
    assert embeddings.texts.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert embeddings.events[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made while it is entered; `peak` of those that lived together."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, int] = {}  # of a storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self.key(x) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and (key := self.key(x)) not in given - self.tensors.keys():
                size = x.numel() * x.element_size()
                if not x.is_mkldnn:
                    size = x.untyped_storage().nbytes()
                self.now += 0 if key in self.tensors else size
                self.tensors[key] = self.tensors.get(key, 0) + 1
                weakref.finalize(x, self.release, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def key(self, x: torch.Tensor) -> int:
        return id(x) if x.is_mkldnn else x.untyped_storage().data_ptr()

    def release(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key]
            self.now -= size


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    events = torch.randn(V, N_e, D, generator=generator)
    embeddings = Embeddings(events, torch.randn(T, D, generator=generator))
    return embeddings, Split(VAL, [Query(i, "", f"v{i % V}", 10.0, None) for i in range(T)])


CHUNKS = [2**12, 2**14, 2**16]  # all cosines are 480,000, all scores of videos 60,000


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ranks_keep_to_their_memory(corpus, chunk):
    embeddings, split = corpus
    target = split.target
    expected = rank_videos(embeddings, target)
    with LiveMemory() as memory:
        ranks = rank_videos(embeddings, target, chunk=chunk)
    assert ranks.equal(expected)
    one_video = 4 * N_e * T
    assert memory.peak <= 4 * chunk + 3 * embeddings.texts.nbytes + 2 * one_video


@pytest.mark.parametrize("chunk", CHUNKS)
def test_moments_keep_to_their_memory(corpus, chunk):
    embeddings, split = corpus
    proposals = torch.rand(N_e, 2)
    expected = predict_moments(embeddings, split, proposals, limit=5)
    with LiveMemory() as memory:
        found = predict_moments(embeddings, split, proposals, limit=5, chunk=chunk)
    for name in ("videos", "events", "scores", "target_rank"):
        assert getattr(found, name).equal(getattr(expected, name)), name
    result = 20 * T * 5 + 4 * T * (N_e + 4)
    inputs = embeddings.texts.nbytes + 2 * embeddings.events.nbytes
    one_text = 4 * V * N_e
    assert memory.peak <= 4 * chunk + inputs + 2 * result + 3 * one_text


def test_equal_sums_of_recalls_tie_however_they_are_rounded():
    """So that of such epochs the later one is the best."""
    queries = [Query(0, "", "v", 1.0, None)]
    evaluator = Evaluator(Split(VAL, queries), torch.tensor([[0.0, 1.0]]), EvalConfig())
    scores = [
        evaluator.score({"cosine": {"SumR": s}}) for s in (178.6451612903226, 178.6451612903225)
    ]
    assert scores[0] == scores[1]
    assert evaluator.score({"cosine": {"SumR": 178.6452}}) > scores[0]
