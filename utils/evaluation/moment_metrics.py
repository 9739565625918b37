"""Moment retrieval metrics: ranked moments and true windows in, recalls at IoU thresholds out.

A prediction is right if its video is right and its temporal IoU with the true window reaches the
threshold, both in float32. Every metric is a recall of the rank of the first right prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.evaluation.published import WINDOW_RULES
from utils.evaluation.retrieval_metrics import RECALL_RANKS as VIDEO_RECALL_RANKS

THRESHOLDS = (0.1, 0.3, 0.5, 0.7)
RECALL_RANKS = (1, 10, 100)
NEVER = torch.iinfo(torch.int32).max  # the rank of a right prediction that was not made


def pad_windows(windows: Sequence[Sequence[tuple[float, float]]]) -> Tensor:
    """The true windows of T queries, in seconds, as float32 [T, W, 2]; NaN fills shorter lists."""
    padded = torch.full((len(windows), max(map(len, windows), default=0), 2), torch.nan)
    for row, own in zip(padded, windows, strict=True):
        row[: len(own)] = torch.tensor(own)
    return padded


def temporal_iou(moments: Tensor, windows: Tensor) -> Tensor:
    """IoU of (start, end) pairs [..., 2], which broadcast: [...]. 0 where the union is 0.

    The union is taken as the span of both, which differs only where they are apart: there IoU is 0.
    """
    start, end = moments.unbind(-1)
    true_start, true_end = windows.unbind(-1)
    overlap = (torch.minimum(end, true_end) - torch.maximum(start, true_start)).clamp(min=0)
    union = torch.maximum(end, true_end) - torch.minimum(start, true_start)
    return torch.where(union == 0, 0, overlap / union)


def right_moments(moments: Tensor, windows: Tensor, window_rule: str = "half") -> Tensor:
    """Which moments of the right video are right, at each of THRESHOLDS: bool [T, P, thresholds].

    Args:
        moments: [T, P, 2] seconds.
        windows: [T, W, 2] seconds, NaN-padded, see `pad_windows`.
        window_rule: how many of a query's windows a prediction must reach, see WINDOW_RULES.
    """
    if window_rule not in WINDOW_RULES:
        raise ValueError(f"window_rule is one of {', '.join(WINDOW_RULES)}: {window_rule!r}")
    moments, windows = moments.float(), windows.float()
    thresholds = torch.tensor(THRESHOLDS, device=moments.device)
    shape = (*moments.shape[:2], len(THRESHOLDS))
    reached = torch.zeros(shape, dtype=torch.int32, device=moments.device)
    for window in windows.unbind(1):  # one at a time: a few queries have many
        reached += temporal_iou(moments, window[:, None])[..., None] >= thresholds
    needed = torch.ones(len(windows), dtype=torch.int64, device=windows.device)
    if window_rule == "half":
        needed = (~windows[..., 0].isnan()).sum(1).div(2, rounding_mode="floor").clamp(min=1)
    return reached >= needed[:, None, None]


def first_hits(
    videos: Tensor, moments: Tensor, target: Tensor, windows: Tensor, window_rule: str = "half"
) -> Tensor:
    """Rank, from 1, of the first right prediction at each threshold; NEVER where there is none:
    int64 [T, thresholds].

    Args:
        videos: int [T, P] predicted videos, best first; -1 where a query has fewer predictions.
        moments: [T, P, 2] their times in seconds.
        target: int64 [T] the right video.
        windows, window_rule: see `right_moments`.
    """
    hits = right_moments(moments, windows, window_rule) & (videos == target[:, None])[..., None]
    ranks = torch.arange(1, videos.shape[1] + 1, device=videos.device)[:, None]
    nothing = torch.full((len(hits), 1, len(THRESHOLDS)), NEVER, device=hits.device)
    return torch.cat([torch.where(hits, ranks, NEVER), nothing], dim=1).amin(1)


def moment_recalls(ranks: Tensor) -> dict[str, float]:
    """{"0.5-r10": %, …} of the ranks [T, thresholds] that `first_hits` gives."""
    return _recalls([ranks <= k for k in RECALL_RANKS])


def random_event_recalls(right: Tensor, num_candidates: int) -> dict[str, float]:
    """Expected recalls of all `num_candidates` events in random order: exact, nothing is drawn;
    `right`, bool [T, N_e, thresholds], says which events of the right video are right."""
    drawn = torch.arange(min(max(RECALL_RANKS), num_candidates), dtype=torch.float64)
    wrong = num_candidates - right.sum(1)[..., None].cpu()  # [T, thresholds, 1]
    missed = ((wrong - drawn).clamp(min=0) / (num_candidates - drawn)).cumprod(-1)
    return _recalls([1 - missed[..., min(k, len(drawn)) - 1] for k in RECALL_RANKS])


def _recalls(found: Sequence[Tensor]) -> dict[str, float]:
    """Of [T, thresholds] for each of RECALL_RANKS: whether it was found, or how probably."""
    return {
        recall_key(k, threshold): percentage(shares[:, column])
        for column, threshold in enumerate(THRESHOLDS)
        for k, shares in zip(RECALL_RANKS, found, strict=True)
    }


def video_recalls(ranks: Tensor) -> dict[str, float]:
    """{"r1": %, …} of the ranks of the right videos, int [T]."""
    return {recall_key(k): percentage(ranks <= k) for k in VIDEO_RECALL_RANKS}


def recall_key(k: int, threshold: float | None = None) -> str:
    """What a recall is called in a row: of moments "0.5-r10", of videos "r10"."""
    return f"r{k}" if threshold is None else f"{threshold}-r{k}"


def selection_score(metrics: dict[str, float]) -> float:
    """What chooses the best epoch: the sum of R@{1,10,100} at IoU 0.5 and 0.7."""
    return sum(metrics[recall_key(k, threshold)] for threshold in (0.5, 0.7) for k in RECALL_RANKS)


def percentage(share: Tensor) -> float:
    """The mean of numbers in [0, 1], in % with 2 decimals."""
    return round(100 * share.double().mean().item(), 2)
