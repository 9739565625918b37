"""The training loss: InfoNCE in both directions over a batch of videos with all their captions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def video_text_loss(scores: Tensor, text_to_video: Tensor) -> Tensor:
    """Symmetric InfoNCE with several positives per video (ProPy, §3.5).

    Text to video: cross-entropy of each text over the videos. Video to text: log of the softmax
    mass that a video's own texts hold among all texts. The loss is the mean of the two means.

    Args:
        scores: scaled similarities of every text to every video, [T, B], float32 or wider.
        text_to_video: int64 [T], the video of each text; every video has at least one text.

    Returns:
        A scalar.
    """
    text_to_video_loss = F.cross_entropy(scores, text_to_video)
    videos = torch.arange(scores.shape[1], device=scores.device)
    own = text_to_video.unsqueeze(1) == videos  # [T, B]
    own_mass = scores.masked_fill(~own, float("-inf")).logsumexp(dim=0)
    video_to_text_loss = (scores.logsumexp(dim=0) - own_mass).mean()
    return (text_to_video_loss + video_to_text_loss) / 2
