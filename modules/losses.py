"""The training loss: InfoNCE in both directions over a batch of videos with all their captions; and
terms that may be added to it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.interaction import recomputed
from modules.similarity import unit

HARD_MARGIN = 0.2  # of cosines
ANGLE_WEIGHT = 2  # of angles against distances: 30 and 15 in MSC-PRVR
ANGLES = 2**24  # computed at a time
SAME = 1e-3  # texts nearer than this are one, as equal captions are up to rounding: no direction


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


def hardest_negative_loss(similarity: Tensor, text_to_video: Tensor) -> Tensor:
    """Mean over texts of max(0, 0.2 + hardest − own), hardest among the other videos for the text,
    and among other videos' texts for its video; both added (MS-SL, GMMFormer).

    Args:
        similarity: cosines, not scaled, of every text with every video, [T, B].
        text_to_video: int64 [T]; of two videos at least.
    """
    texts = torch.arange(len(similarity), device=similarity.device)
    videos = torch.arange(similarity.shape[1], device=similarity.device)
    own = text_to_video.unsqueeze(1) == videos  # [T, B]
    others = similarity.masked_fill(own, float("-inf"))
    right = similarity[texts, text_to_video]
    hardest_video, hardest_text = others.amax(dim=1), others.amax(dim=0)[text_to_video]
    hinges = [F.relu(HARD_MARGIN + hardest - right) for hardest in (hardest_video, hardest_text)]
    return sum(hinge.mean() for hinge in hinges)


def reversed_negative_loss(forward: Tensor, backward: Tensor) -> Tensor:
    """Mean softplus(S(t, reversed v) − S(t, v)): a text fits its video better than the same video
    played backwards (RTime's idea).

    Args:
        forward, backward: scaled scores [T] of texts with their videos, and with those reversed.
    """
    return F.softplus(backward - forward).mean()


def text_relation_loss(texts: Tensor, frozen: Tensor) -> Tensor:
    """Keeps the distances and angles among a batch's texts (TCPL of MSC-PRVR; Park et al., 2019).

    Huber losses, each a mean: of ‖x̂ᵢ − x̂ⱼ‖ over its mean, all pairs; and, twice, of the cosine of
    the angle at x̂ⱼ between x̂ᵢ and x̂ₖ, all triples.

    Args:
        texts: trained features [T, D], at least two.
        frozen: those of the frozen CLIP, [T, D].
    """
    students, teachers = unit(texts), unit(frozen)
    pairs = ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)

    def distances(x: Tensor) -> Tensor:
        d = (x.unsqueeze(0) - x.unsqueeze(1))[pairs].norm(dim=-1)
        return d / d.mean().clamp_min(SAME)

    loss = F.smooth_l1_loss(distances(students), distances(teachers))
    corners = torch.arange(len(texts), device=texts.device)
    for some in corners.split(ANGLES // len(texts) ** 2 + 1):
        angles = recomputed(_angle_losses, students, teachers, some)
        loss = loss + ANGLE_WEIGHT * angles / len(texts) ** 3
    return loss


def _angle_losses(students: Tensor, teachers: Tensor, corners: Tensor) -> Tensor:
    """Sum of the Huber losses of the angles at some of the points."""

    def angles(x: Tensor) -> Tensor:
        sides = F.normalize(x.unsqueeze(0) - x[corners].unsqueeze(1), dim=-1, eps=SAME)
        return sides @ sides.mT  # [n, T, T]

    return F.smooth_l1_loss(angles(students), angles(teachers), reduction="sum")
