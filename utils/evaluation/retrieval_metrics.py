"""Video retrieval metrics from a score matrix: a rank is a count, nothing is sorted.

Equal scores: the video earlier in the list first; NaN last. That is the order of a stable sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_RANKS = (1, 5, 10, 100)
ROW_BLOCK = 2**24  # scores compared at a time, so that the masks stay small


def ranks_of(scores: Tensor, target: Tensor) -> Tensor:
    """Rank of each text's own video among all videos, 1 the best: int64 [T].

    Args:
        scores: [T, V], floating point, higher is better.
        target: int64 [T], the column of the right video.

    Raises:
        ValueError: there is nothing to rank, or a target is not a column.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1] or not scores.numel():
        raise ValueError(f"scores {list(scores.shape)} and target {list(target.shape)} do not fit")
    if target.min() < 0 or target.max() >= scores.shape[1]:
        raise ValueError(f"a target is not one of the {scores.shape[1]} videos")
    step = max(1, ROW_BLOCK // scores.shape[1])
    blocks = zip(scores.split(step), target.split(step), strict=True)
    return torch.cat([1 + _count_ahead(*block) for block in blocks])


def _count_ahead(scores: Tensor, target: Tensor) -> Tensor:
    own = scores.gather(1, target[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    ahead = (scores > own) | ((scores == own) & earlier)  # a comparison with NaN is false
    lost = own.isnan()
    if lost.any():
        ahead |= lost & (~scores.isnan() | earlier)
    return ahead.sum(1)


def recall_metrics(ranks: Tensor) -> dict[str, float]:
    """R1, R5, R10, R100 in %, SumR their sum, and median and mean of the ranks, int64 [T]."""
    ranks = ranks.cpu()
    recalls = {f"R{k}": 100 * (ranks <= k).sum().item() / len(ranks) for k in RECALL_RANKS}
    return recalls | {
        "SumR": sum(recalls.values()),
        "MedR": ranks.double().quantile(0.5).item(),
        "MeanR": ranks.double().mean().item(),
    }
