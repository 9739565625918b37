"""Stages of the evaluation, from embeddings to metrics: prvr_tail, vcmr_tail.

Embeddings are drawn, every text near one event of its video. The reference is the plain way: a
batch of texts meets a batch of videos, everything is sorted, predictions are Python lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloaders.annotations import Query, Video
from scripts.benchmark.harness import Options, Stage, pyramid_of
from utils.evaluation.embed import Embeddings
from utils.evaluation.evaluator import evaluate_prvr, evaluate_vcmr, predict_moments
from utils.evaluation.moment_metrics import RECALL_RANKS, THRESHOLDS
from utils.evaluation.published import SPLIT_SIZES
from utils.evaluation.retrieval_metrics import RECALL_RANKS as VIDEO_RECALL_RANKS

WIDTH = 512  # D
QUERIES = 1024  # of a repetition; the reference's time grows with them, ours slightly less
BATCH = 16  # texts and videos that the reference compares at a time: the published setting
PER_VIDEO, PREDICTIONS, READ = 10, 1000, 100  # VCMR's published settings
TOLERANCE = 1e-3  # scores agree to 1e-6, so of some thousand texts one may rank differently


@dataclass
class Corpus:
    """What an evaluation starts from: T texts, V videos, N_e events of each."""

    embeddings: Embeddings
    target: Tensor  # int64 [T]
    queries: list[Query]
    videos: list[Video]
    proposals: Tensor  # [N_e, 2]


def _num_videos(options: Options) -> int:
    return options.videos or SPLIT_SIZES[options.split]["val"][0]


def draw(options: Options) -> Corpus:
    """A corpus of a split's size, with `options.texts` of its queries; equal for equal options."""
    num_videos, num_texts = _num_videos(options), options.texts or QUERIES
    proposals = pyramid_of(options).proposals
    generator = torch.Generator().manual_seed(options.seed)
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
    return Corpus(embeddings, target, queries, videos, proposals)


def prvr_tail(options: Options) -> Stage:
    """Ranks of the right videos among all, and their recalls."""

    def ours() -> Callable[[], dict[str, float]]:
        corpus = draw(options)
        return lambda: evaluate_prvr(corpus.embeddings, corpus.target)

    def reference() -> Callable[[], dict[str, float]]:
        corpus = draw(options)
        return lambda: plain_prvr(corpus)

    return Stage(
        **_sizes(options),
        ours=ours,
        reference=reference,
        compare=_largest_difference,
        tolerance=TOLERANCE,
        time_aim=5 if options.split == "activitynet" else None,
    )


def vcmr_tail(options: Options) -> Stage:
    """The best moments of the corpus for every text, and their recalls.

    Ours is what main.py computes: also moments with the right video given, video retrieval, and
    the levels of the pyramid. The reference makes VCMR's own numbers only.
    """

    def ours() -> Callable[[], tuple[dict[str, float], Tensor]]:
        corpus = draw(options)

        def run() -> tuple[dict[str, float], Tensor]:
            predictions = predict_moments(
                corpus.embeddings,
                corpus.queries,
                corpus.videos,
                corpus.proposals,
                per_video=PER_VIDEO,
                limit=READ,
            )
            rows = evaluate_vcmr(predictions, corpus.queries)
            seconds = predictions.seconds(predictions.videos, predictions.events)
            moments = (predictions.videos[..., None], seconds, predictions.scores[..., None])
            return rows["VCMR"], torch.cat(moments, dim=-1).cpu()

        return run

    def reference() -> Callable[[], tuple[dict[str, float], list]]:
        corpus = draw(options)
        return lambda: plain_vcmr(corpus)

    return Stage(
        **_sizes(options),
        ours=ours,
        reference=reference,
        compare=_compare_moments,
        tolerance=TOLERANCE,
        time_aim=12 if options.split in ("tvr", "activitynet") else None,
    )


def plain_prvr(corpus: Corpus) -> dict[str, float]:
    """A batch of texts with a batch of videos: unit vectors, all cosines, their maximum; then a
    full sort of every text's videos."""
    similarity = []
    for texts in corpus.embeddings.texts.split(BATCH):
        row = [
            _plain_cosines(texts, events).max(dim=-1).values.cpu().numpy()
            for events in corpus.embeddings.events.split(BATCH)
        ]
        similarity.append(np.concatenate(row, axis=1))
    similarity = np.concatenate(similarity)
    ranks = []
    for scores, target in zip(similarity, corpus.target.tolist(), strict=True):
        order = np.argsort(-scores, kind="stable")
        ranks.append(int(np.where(order == target)[0][0]) + 1)
    ranks = np.array(ranks)
    recalls = {f"R{k}": 100 * float(np.mean(ranks <= k)) for k in VIDEO_RECALL_RANKS}
    return recalls | {
        "SumR": sum(recalls.values()),
        "MedR": float(np.median(ranks)),
        "MeanR": float(np.mean(ranks)),
    }


def plain_vcmr(corpus: Corpus) -> tuple[dict[str, float], list[list[list[float]]]]:
    """A batch of texts with a batch of videos: unit vectors, all cosines, each video's best events
    in seconds; a full sort of every text's moments; lists [video, start, end, cosine] of 1000 for
    each; then query by query the IoU of the first 100.

    Returns:
        Recalls, and the lists.
    """
    durations = torch.tensor([video.duration for video in corpus.videos])
    device = corpus.embeddings.texts.device
    proposals, durations = corpus.proposals.to(device), durations.to(device)
    predictions = []
    for texts in corpus.embeddings.texts.split(BATCH):
        scores, moments, videos = [], [], []
        for first in range(0, len(corpus.videos), BATCH):
            some = slice(first, first + BATCH)
            best, event = _plain_cosines(texts, corpus.embeddings.events[some]).topk(PER_VIDEO)
            video = torch.arange(first, first + best.shape[1], device=device)
            scores.append(best.flatten(1))
            moments.append((proposals[event] * durations[some, None, None]).flatten(1, 2))
            videos.append(video[None, :, None].expand_as(event).flatten(1))
        scores, order = torch.cat(scores, dim=1).sort(dim=1, descending=True)
        moments, videos = torch.cat(moments, dim=1), torch.cat(videos, dim=1)
        for row, kept in enumerate(order[:, :PREDICTIONS]):
            columns = (videos[row, kept], moments[row, kept], scores[row, : len(kept)])
            predictions.append([
                [int(video), float(start), float(end), float(score)]
                for video, (start, end), score in zip(
                    *(column.cpu().numpy() for column in columns), strict=True
                )
            ])  # fmt: skip
    return _plain_recalls(predictions, corpus), predictions


def _plain_recalls(predictions: list[list[list[float]]], corpus: Corpus) -> dict[str, float]:
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
    return {f"{threshold}-r{k}": round(share * n, 2) for (threshold, k), n in hits.items()}


def _plain_cosines(texts: Tensor, events: Tensor) -> Tensor:
    """[t, v, N_e]"""
    texts = texts / texts.norm(dim=-1, keepdim=True)
    events = events / events.norm(dim=-1, keepdim=True)
    return torch.einsum("td,vnd->tvn", texts, events)


def _sizes(options: Options) -> dict:
    texts, videos = options.texts or QUERIES, _num_videos(options)
    events = pyramid_of(options).num_events
    return {
        "title": f"{texts} texts, {videos} videos of {events} events ({options.split})",
        "work": texts,
        "unit": "texts",
        "needed_flop": 2 * texts * videos * events * WIDTH,
    }


def _largest_difference(ours: dict[str, float], reference: dict[str, float]) -> float:
    """Of metrics, as a share of their size."""
    if ours.keys() != reference.keys():
        return float("nan")
    return max(abs(ours[name] - value) / max(1, abs(value)) for name, value in reference.items())


def _compare_moments(ours: tuple, reference: tuple) -> float:
    """Of metrics and of the ranked cosines; NaN if other moments stand where cosines differ."""
    metrics, moments = ours
    expected = torch.tensor([rows[:READ] for rows in reference[1]])  # [T, 100, 4]
    apart = (expected[..., -1] - moments[..., -1]).abs().max().item()
    other = (expected[..., :3] != moments[..., :3]).any(-1)
    # Two float32 products may order equal cosines differently, no others.
    if other.double().mean() > 0.01:
        return float("nan")
    return max(apart, _largest_difference(metrics, reference[0]))
