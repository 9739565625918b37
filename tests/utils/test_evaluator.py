"""Evaluation: everything is embedded once, metrics keep to the memory they are given."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataloaders.annotations import VAL, Query, Split
from dataloaders.datasets import LoaderConfig
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
    evaluator.split, evaluator.loading = SimpleNamespace(videos=range(6)), LoaderConfig()
    recorder.pyramid = SimpleNamespace(num_events=4)
    embeddings = evaluator.embed(recorder, torch.device("cpu"))
    assert recorder.calls == [
        "start workers", "encode text", "encode text",
        *["wait for clips", "encode video"] * 2,
    ]  # fmt: skip
    assert embeddings.texts.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert embeddings.events[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made while it is entered; views of the inputs do not count."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.numel, self.inputs = 0, {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and (
                x.is_mkldnn or x.untyped_storage().data_ptr() not in self.inputs
            ):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    events = torch.randn(V, N_e, D, generator=generator)
    embeddings = Embeddings(events, torch.randn(T, D, generator=generator))
    return embeddings, Split(VAL, [Query(i, "", f"v{i % V}", 10.0, None) for i in range(T)])


@pytest.mark.parametrize("chunk", [2**12, 2**14, 2**16])
def test_metrics_keep_to_their_memory(corpus, chunk):
    """All cosines are 480,000, all scores of videos 60,000."""
    embeddings, split = corpus
    proposals = torch.rand(N_e, 2)
    ranks = rank_videos(embeddings, split.target)
    moments = predict_moments(embeddings, split, proposals, limit=5)
    with LargestTensor(embeddings.events, embeddings.texts) as of_ranks:
        assert rank_videos(embeddings, split.target, chunk=chunk).equal(ranks)
    assert of_ranks.numel <= max(chunk, N_e * T, embeddings.events.numel())
    with LargestTensor(embeddings.events, embeddings.texts) as of_moments:
        found = predict_moments(embeddings, split, proposals, limit=5, chunk=chunk)
    for name in ("videos", "events", "scores", "target_rank"):
        assert getattr(found, name).equal(getattr(moments, name)), name
    assert of_moments.numel <= max(chunk, V * N_e, embeddings.events.numel())


def test_equal_sums_of_recalls_tie_however_they_are_rounded():
    """So that of such epochs the later one is the best."""
    queries = [Query(0, "", "v", 1.0, None)]
    evaluator = Evaluator(Split(VAL, queries), torch.tensor([[0.0, 1.0]]), EvalConfig())
    sums = (178.6451612903226, 178.6451612903225, 178.6452)
    first, second, larger = (evaluator.score({"cosine": {"SumR": s}}) for s in sums)
    assert first == second < larger
