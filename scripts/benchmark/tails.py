"""Stages of the evaluation, from embeddings to metrics, beside the plain way: a batch of texts
meets a batch of videos, everything is sorted, predictions are Python lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dataloaders.annotations import Query, Video
from models.reference import readout
from modules.pyramid import PromptPyramid
from modules.readout import Readout, readout_of
from scripts.benchmark.harness import Options
from scripts.benchmark.model import pyramid_of
from utils.evaluation.embed import Embeddings
from utils.evaluation.evaluator import vcmr_rows
from utils.evaluation.moment_metrics import RECALL_RANKS, THRESHOLDS
from utils.evaluation.ranking import predict_moments, rank_videos
from utils.evaluation.retrieval_metrics import recall_metrics

WIDTH = 512  # D
BATCH = 16  # texts and videos that the reference compares at a time: the published setting
PER_VIDEO, PREDICTIONS, READ = 10, 1000, 100  # VCMR's published settings


@dataclass
class Corpus:
    """What an evaluation starts from: T texts, V videos, N_e events of each."""

    embeddings: Embeddings
    target: Tensor  # int64 [T]
    queries: list[Query]
    videos: list[Video]
    pyramid: PromptPyramid
    readout: str

    @property
    def ranking(self) -> Readout:
        return readout_of(self.readout, self.pyramid, self.embeddings.texts.device)


def draw(options: Options) -> Corpus:
    """Embeddings with every text near one event of its video; equal for equal options."""
    num_videos, num_texts = options.videos, options.texts
    pyramid = pyramid_of(options.frames)
    proposals = pyramid.proposals
    generator = torch.Generator().manual_seed(0)
    events = torch.randn(num_videos, len(proposals), WIDTH, generator=generator)
    events += torch.randn(num_videos, 1, WIDTH, generator=generator)  # of one video, so alike
    target = torch.randint(num_videos, (num_texts,), generator=generator)
    event = torch.randint(len(proposals), (num_texts,), generator=generator)
    likeness = 0.25 * torch.rand(num_texts, 1, generator=generator)  # some are easy, some hopeless
    texts = torch.randn(num_texts, WIDTH, generator=generator) + likeness * events[target, event]
    durations = 20 + 200 * torch.rand(num_videos, generator=generator)
    videos = [Video(f"video {i}", duration) for i, duration in enumerate(durations.tolist())]
    windows = 0.9 * proposals[event] * durations[target, None]
    queries = [
        Query(row, "", videos[column].vid_name, videos[column].duration, (tuple(window),))
        for row, (column, window) in enumerate(zip(target.tolist(), windows.tolist(), strict=True))
    ]
    embeddings = Embeddings(events.to(options.device), texts.to(options.device))
    return Corpus(embeddings, target, queries, videos, pyramid, options.readout)


def prvr(options: Options, ours: bool) -> Callable[[], dict]:
    """Ranks of the right videos among all, and their recalls."""
    corpus = draw(options)
    if ours:
        ranking = {"readout": corpus.ranking}
        return lambda: recall_metrics(rank_videos(corpus.embeddings, corpus.target, **ranking))
    return partial(_plain_prvr, corpus)


def vcmr(options: Options, ours: bool) -> Callable[[], dict]:
    """The best moments of the corpus for every text, and their recalls.

    Ours is what main.py computes: also moments with the right video given, video retrieval, and
    the levels of the pyramid. The reference makes VCMR's own numbers only.
    """
    return partial(_our_vcmr if ours else _plain_vcmr, draw(options))


def _our_vcmr(corpus: Corpus) -> dict:
    predictions = predict_moments(
        corpus.embeddings, corpus, corpus.pyramid.proposals,
        per_video=PER_VIDEO, limit=READ, readout=corpus.ranking,
    )  # fmt: skip
    recalls = vcmr_rows(predictions, corpus.queries)["VCMR"]
    return recalls | {"cosines": predictions.scores.cpu()}


def _plain_prvr(corpus: Corpus) -> dict[str, float]:
    """Unit vectors, all cosines, their read-out; then a full sort of every text's videos."""
    similarity = []
    for texts in corpus.embeddings.texts.split(BATCH):
        row = [
            readout(corpus.readout, _cosines(texts, events), corpus.pyramid).cpu().numpy()
            for events in corpus.embeddings.events.split(BATCH)
        ]
        similarity.append(np.concatenate(row, axis=1))
    ranks = []
    for scores, target in zip(np.concatenate(similarity), corpus.target.tolist(), strict=True):
        order = np.argsort(-scores, kind="stable")
        ranks.append(int(np.where(order == target)[0][0]) + 1)
    return recall_metrics(torch.tensor(ranks))


def _plain_vcmr(corpus: Corpus) -> dict:
    """Unit vectors, all cosines, each video's best events in seconds; a full sort of every text's
    moments; lists [video, start, end, cosine] of 1000 for each; their recalls query by query.
    """
    device = corpus.embeddings.texts.device
    durations = torch.tensor([video.duration for video in corpus.videos], device=device)
    proposals, predictions = corpus.pyramid.proposals.to(device), []
    for texts in corpus.embeddings.texts.split(BATCH):
        scores, moments, videos = [], [], []
        for first in range(0, len(durations), BATCH):
            some = slice(first, first + BATCH)
            cosines = _cosines(texts, corpus.embeddings.events[some])
            best, event = cosines.topk(min(PER_VIDEO, len(proposals)))
            video = torch.arange(first, first + best.shape[1], device=device)
            scores.append(best.flatten(1))
            moments.append((proposals[event] * durations[some, None, None]).flatten(1, 2))
            videos.append(video[None, :, None].expand_as(event).flatten(1))
        scores, order = torch.cat(scores, dim=1).sort(dim=1, descending=True)
        moments, videos = torch.cat(moments, dim=1), torch.cat(videos, dim=1)
        for row, kept in enumerate(order[:, :PREDICTIONS]):
            columns = (videos[row, kept], moments[row, kept], scores[row, : len(kept)])
            columns = (column.cpu().numpy() for column in columns)
            predictions.append([
                [int(video), float(start), float(end), float(score)]
                for video, (start, end), score in zip(*columns, strict=True)
            ])  # fmt: skip
    hits = {(threshold, k): 0 for threshold in THRESHOLDS for k in RECALL_RANKS}
    for query, target, rows in zip(
        corpus.queries, corpus.target.tolist(), predictions, strict=True
    ):
        read = np.array(rows[:READ], dtype=np.float32)
        start, end = np.float32(query.windows[0])
        overlap = np.maximum(0, np.minimum(read[:, 2], end) - np.maximum(read[:, 1], start))
        iou = overlap / (np.maximum(read[:, 2], end) - np.minimum(read[:, 1], start))
        for threshold in THRESHOLDS:
            right = (iou >= np.float32(threshold)) & (read[:, 0] == target)
            for k in RECALL_RANKS:
                hits[threshold, k] += bool(right[:k].any())
    share = 100 / len(predictions)
    recalls = {f"{threshold}-r{k}": round(share * n, 2) for (threshold, k), n in hits.items()}
    return recalls | {"cosines": torch.tensor([[row[3] for row in x[:READ]] for x in predictions])}


def _cosines(texts: Tensor, events: Tensor) -> Tensor:
    """[t, v, N_e]"""
    texts = texts / texts.norm(dim=-1, keepdim=True)
    events = events / events.norm(dim=-1, keepdim=True)
    return torch.einsum("td,vnd->tvn", texts, events)
