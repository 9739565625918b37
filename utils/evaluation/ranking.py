"""The best videos and moments of a corpus for every text, exact and in bounded memory.

The cosines [T, V, N_e] of a corpus do not fit into memory, so the reductions walk through them in
pieces. Symbols: T texts, V videos, N_e events of a video, D joint width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.similarity import unit, widen

CHUNK = 2**28  # cosines that there is to be memory for: 1 GiB of float32


CPU_BLOCK = 2**19  # cosines of one matrix product: 2 MiB, still in a cache when they are reduced


GPU_BLOCK = 2**23  # there a kernel is to be long compared with its launch


TEXT_BLOCK = 512  # texts of one matrix product in best_event_scores


LOW_HALF = 2**32 - 1


class TopMoments(NamedTuple):
    """The best moments of every text, best first, and the text's score with every video."""

    scores: Tensor  # float32 [T, K] cosines
    videos: Tensor  # int32 [T, K]
    events: Tensor  # int32 [T, K] index among the video's N_e events
    video_scores: Tensor  # float32 [T, V] cosine of each video's best event


@torch.no_grad()
def best_event_scores(
    texts: Tensor, events: Tensor, normalize_events: bool = True, chunk: int = CHUNK
) -> Tensor:
    """Score of every text with every video: the maximum of `event_scores` over the events.

    Needs, beside the result and normalised texts, the memory of `chunk` cosines (and at least that
    of one video with a block of texts).

    Returns:
        [T, V].
    """
    num_texts, (num_videos, num_events) = len(texts), events.shape[:2]
    step = max(1, _block(texts, chunk) // (num_events * min(num_texts, TEXT_BLOCK)))
    with torch.autocast(texts.device.type, enabled=False):
        texts = unit(texts)
        best = texts.new_empty(num_texts, num_videos)
        text_blocks = [_operand(x) for x in texts.split(TEXT_BLOCK)]
        for v in range(0, num_videos, step):
            some = events[v : v + step]
            some = _operand((unit(some) if normalize_events else widen(some)).flatten(0, 1))
            for row, block in enumerate(text_blocks):
                scores = _fast_product(block, some).unflatten(1, (-1, num_events))
                t = row * TEXT_BLOCK
                best[t : t + TEXT_BLOCK, v : v + step] = scores.amax(-1)
    return best


@torch.no_grad()
def paired_event_scores(
    texts: Tensor, events: Tensor, videos: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Cosines of every text with the events of a video of its own, `videos` int64 [T]: [T, N_e].

    Needs, beside the result, the memory of `chunk` numbers (at least of one video's events).
    """
    step = max(1, _block(texts, chunk) // events.shape[1:].numel())
    scores = widen(texts).new_empty(len(texts), events.shape[1])
    with torch.autocast(texts.device.type, enabled=False):
        for t in range(0, len(texts), step):
            own = unit(events[videos[t : t + step]])  # [t, N_e, D]
            scores[t : t + step] = (own @ unit(texts[t : t + step])[:, :, None]).squeeze(-1)
    return scores


@torch.no_grad()
def top_moments(
    texts: Tensor, events: Tensor, per_video: int = 10, limit: int = 1000, chunk: int = CHUNK
) -> TopMoments:
    """Weakly supervised moment retrieval: the best moments of the corpus for every text.

    Of each video count the `per_video` events with the highest cosine; of all of these the best
    `limit` are kept (fewer where there are fewer). Equal cosines: the earlier video first, then
    the earlier event; NaN last, as -inf. Ordered by float32 cosines, whatever the inputs' type.

    Needs, beside the result and a normalised copy of the inputs, the memory of `chunk` cosines
    (and at least that of one text). Arguments as in `event_scores`.

    Raises:
        ValueError: the corpus has 2^31 events or more.
    """
    num_videos, num_events = events.shape[:2]
    if num_videos * num_events >= 2**31:
        raise ValueError(f"{num_videos} videos × {num_events} events: the limit is 2^31 in all")
    per_video = min(per_video, num_events)
    limit = min(limit, num_videos * per_video)

    with torch.autocast(texts.device.type, enabled=False):
        texts = unit(texts.float())
        step = min(len(texts), max(1, chunk // (2 * num_videos * num_events)))
        wide = max(1, _block(texts, chunk) // (step * num_events))  # videos of one product
        blocks = [_operand(unit(x.float()).flatten(0, 1)) for x in events.split(wide)]
        may_be_nan = not (texts.sum() + events.sum()).isfinite()  # inf is NaN once normalised
        # texts whose candidates, int64 and a few copies, fit a block
        few = max(1, _block(texts, chunk) // (limit * num_events))
        buffer = texts.new_empty(step, num_videos, num_events)
        video_scores = texts.new_empty(len(texts), num_videos)
        keys = torch.empty(len(texts), limit, dtype=torch.int64, device=texts.device)
        for some, best, top in zip(
            texts.split(step), video_scores.split(step), keys.split(step), strict=True
        ):
            scores = buffer[: len(some)]
            _fill(scores, best, some, blocks)
            for i in range(0, len(some), few):
                part = slice(i, i + few)
                top[part] = _top_keys(scores[part], best[part], per_video, limit, may_be_nan)
    positions = _position(keys)
    return TopMoments(
        scores=_score(keys),
        videos=(positions // num_events).int(),
        events=(positions % num_events).int(),
        video_scores=video_scores,
    )


def _fill(scores: Tensor, video_scores: Tensor, texts: Tensor, blocks: list[Tensor]) -> None:
    """Write cosines [t, V, N_e] of unit vectors, and their maxima [t, V] while they are warm.

    Args:
        texts: [t, D].
        blocks: `_operand` of the events of some videos after another, [v·N_e, D].
    """
    texts, num_events, first = _operand(texts), scores.shape[-1], 0
    for block in blocks:
        some = _fast_product(texts, block).unflatten(1, (-1, num_events))  # [t, v, N_e]
        videos = slice(first, first + some.shape[1])
        scores[:, videos] = some
        video_scores[:, videos] = some.amax(-1)
        first = videos.stop


def _top_keys(
    scores: Tensor, video_scores: Tensor, per_video: int, limit: int, may_be_nan: bool
) -> Tensor:
    """Sort keys [t, limit] of the best moments, best first; scores [t, V, N_e]."""
    num_texts, num_videos, num_events = scores.shape
    if may_be_nan:
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        video_scores = scores.amax(-1)
    first = torch.arange(0, num_videos * num_events, num_events, device=scores.device)
    # K videos with a better best event hold K better moments: only the first K videos can count.
    first = _position(_keys(video_scores, first).topk(min(limit, num_videos)).values)  # [t, n]
    text = torch.arange(num_texts, device=scores.device)[:, None]
    event = torch.arange(num_events, device=scores.device)
    keys = _keys(scores[text, first // num_events], first[:, :, None], event)  # [t, n, N_e]
    keys = keys.topk(per_video, sorted=False).values.flatten(1)
    return keys.topk(limit).values


def _operand(x: Tensor) -> Tensor:
    """The same [n, D] for `_fast_product`: float32 on a CPU in oneDNN's hands.

    torch's own product there is MKL's, which runs at half the speed on AMD's processors.
    """
    suited = x.device.type == "cpu" and x.dtype == torch.float32
    return x.to_mkldnn() if suited and torch.backends.mkldnn.is_available() else x


def _fast_product(x: Tensor, y: Tensor) -> Tensor:
    """Products [n, m] of two operands [n, D] and [m, D], without a gradient."""
    return F.linear(x, y).to_dense() if x.is_mkldnn else x @ y.T


def _block(x: Tensor, chunk: int = CHUNK) -> int:
    """Cosines worth computing at once on the tensor's device, a small part of `chunk`."""
    return min(CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK, max(1, chunk // 16))


def _keys(scores: Tensor, *positions: Tensor) -> Tensor:
    """One int64 per score: larger for higher scores and, among equals, for lower positions.

    The upper half is the float32's bits, made monotone by flipping those of negative numbers; the
    lower half counts down with the (sum of the) positions. No two are equal, so topk meets no ties.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(2**31 - 1))
    keys = bits.long().bitwise_left_shift_(32).add_(LOW_HALF)
    for position in positions:
        keys.sub_(position)
    return keys


def _position(keys: Tensor) -> Tensor:
    return LOW_HALF - keys.bitwise_and(LOW_HALF)


def _score(keys: Tensor) -> Tensor:
    bits = (keys >> 32).int()
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(2**31 - 1)).view(torch.float32)
