"""Cosines of texts and events; what a video's score is, modules.readout says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def event_scores(texts: Tensor, events: Tensor, normalize_events: bool = True) -> Tensor:
    """Cosine of every text with every event, in float32 or wider, under autocast too.

    Args:
        texts: [T, D] text features, of any length.
        events: [B, N_e, D] event embeddings, of any length.
        normalize_events: False leaves the events' lengths in, so longer vectors win; the authors'
            program evaluates PRVR on ActivityNet that way. Never meant for training or VCMR.

    Returns:
        [T, B, N_e], differentiable.
    """
    with torch.autocast(texts.device.type, enabled=False):
        rows = (unit(events) if normalize_events else widen(events)).flatten(0, 1)  # [B·N_e, D]
        return (unit(texts) @ rows.T).unflatten(1, events.shape[:2])


def unit(x: Tensor) -> Tensor:
    return F.normalize(widen(x), dim=-1)


def widen(x: Tensor) -> Tensor:
    """The same in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
