"""The best videos and moments of a corpus for every text, exact and in bounded memory.

The cosines [T, V, N_e] of a corpus do not fit into memory, so the reductions walk through them in
pieces. Symbols: T texts, V videos, N_e events of a video, D joint width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dataloaders.annotations import Split
from modules.readout import Readout, best_event
from modules.similarity import unit, widen
from utils.distributed import gather, own_share
from utils.evaluation.embed import Embeddings
from utils.evaluation.predictions import MomentPredictions
from utils.evaluation.retrieval_metrics import ranks_of

CHUNK = 2**28  # cosines that there is to be memory for: 1 GiB of float32
CPU_BLOCK = 2**19  # cosines of one matrix product: 2 MiB, still in a cache when they are reduced
GPU_BLOCK = 2**23  # there a kernel is to be long compared with its launch
TEXT_BLOCK = 512  # texts of one matrix product in video_scores
LOW_HALF = 2**32 - 1


class TopMoments(NamedTuple):
    """The best moments of every text, best first, and the text's score with every video."""

    scores: Tensor  # float32 [T, K] cosines
    videos: Tensor  # int32 [T, K]
    events: Tensor  # int32 [T, K] index among the video's N_e events
    video_scores: Tensor  # float32 [T, V] read-out of the cosines


@torch.no_grad()
def video_scores(
    texts: Tensor, events: Tensor, normalize_events: bool = True,
    chunk: int = CHUNK, readout: Readout = best_event,
) -> Tensor:  # fmt: skip
    """Score of every text with every video, [T, V]: the read-out of `event_scores`.

    Needs, beside the result and normalised texts, the memory of `chunk` cosines (and at least that
    of one video with a block of texts).
    """
    num_texts, (num_videos, num_events) = len(texts), events.shape[:2]
    step = max(1, _block(texts, chunk) // (num_events * min(num_texts, TEXT_BLOCK)))
    with torch.autocast(texts.device.type, enabled=False):
        texts = unit(texts)
        result = texts.new_empty(num_texts, num_videos)
        text_blocks = [_operand(x) for x in texts.split(TEXT_BLOCK)]
        for v in range(0, num_videos, step):
            some = events[v : v + step]
            some = _operand((unit(some) if normalize_events else widen(some)).flatten(0, 1))
            for own, block in zip(result.split(TEXT_BLOCK), text_blocks, strict=True):
                scores = _fast_product(block, some).unflatten(1, (-1, num_events))
                own[:, v : v + step] = readout(scores)
    return result


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
    texts: Tensor, events: Tensor, per_video: int = 10, limit: int = 1000,
    chunk: int = CHUNK, readout: Readout = best_event,
) -> TopMoments:  # fmt: skip
    """Weakly supervised moment retrieval: the best moments of the corpus for every text.

    Of each video count the `per_video` events with the highest cosine; of all of these the best
    `limit` are kept (fewer where there are fewer). Equal cosines: the earlier video first, then
    the earlier event; NaN last, as -inf. Ordered by float32 cosines, whatever the inputs' type.

    Needs, beside the result and a normalised copy of the inputs, the memory of `chunk` cosines
    (and at least that of one text).

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
        for some, own, top in zip(
            texts.split(step), video_scores.split(step), keys.split(step), strict=True
        ):
            scores = buffer[: len(some)]
            _fill(scores, own, some, blocks, readout)
            best = own if readout is best_event else best_event(scores)
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


def rank_videos(
    embeddings: Embeddings, target: Tensor, normalize_events: bool = True,
    chunk: int = CHUNK, readout: Readout = best_event,
) -> Tensor:  # fmt: skip
    """The rank of every text's video, `target` int64 [T], among all of the split, from 1: int64 [T]
    on the CPU. Memory: as `video_scores`."""
    own, events = own_share(len(target)), embeddings.events
    texts, count = embeddings.texts[own], len(target)
    # Half of the memory for a block's scores and the masks that they are ranked with.
    step = max(1, chunk // (4 * len(events)))
    blocks = zip(texts.split(step), target[own].to(texts.device).split(step), strict=True)
    ranks = [
        ranks_of(video_scores(some, events, normalize_events, chunk // 2, readout), right)
        for some, right in blocks
    ]
    return gather(torch.cat(ranks), count).cpu()


def predict_moments(
    embeddings: Embeddings, split: Split, proposals: Tensor,
    *, per_video: int = 10, limit: int = 1000, chunk: int = CHUNK, readout: Readout = best_event,
) -> MomentPredictions:  # fmt: skip
    """`top_moments` of the split that is embedded, every event of the corpus being a moment.

    Args:
        proposals: [N_e, 2], start and end of the events as a share of their video.
        readout: of a video's score, by which targets are ranked; moments are ranked by event.
    """
    device = embeddings.texts.device
    target = split.target.to(device)
    own = own_share(len(target))
    own_texts, own_target = embeddings.texts[own], target[own]
    step = max(1, chunk // (4 * len(split.videos)))  # as in `rank_videos`
    ranked = []
    for texts, right in zip(own_texts.split(step), own_target.split(step), strict=True):
        top = top_moments(texts, embeddings.events, per_video, limit, chunk // 2, readout)
        ranks = ranks_of(top.video_scores, right)
        ranked.append((top.videos, top.events, top.scores, ranks))
    found = [torch.cat(column) for column in zip(*ranked, strict=True)]
    found.append(paired_event_scores(own_texts, embeddings.events, own_target, chunk))
    names = ("videos", "events", "scores", "target_rank", "target_scores")
    columns = {n: gather(x, len(target)) for n, x in zip(names, found, strict=True)}
    return MomentPredictions(
        desc_ids=[str(query.desc_id) for query in split.queries],
        vid_names=[video.vid_name for video in split.videos],
        durations=torch.tensor([video.duration for video in split.videos], device=device),
        proposals=proposals.to(device),
        per_video=per_video,
        target=target,
        **columns,
    )


def _fill(
    scores: Tensor, video_scores: Tensor, texts: Tensor, blocks: list[Tensor], readout: Readout
) -> None:
    """Write cosines [t, V, N_e] of unit vectors, and their read-out [t, V] while they are warm, of
    texts [t, D] and `_operand`s of the events of some videos after another, [v·N_e, D]."""
    texts, num_events, first = _operand(texts), scores.shape[-1], 0
    for block in blocks:
        some = _fast_product(texts, block).unflatten(1, (-1, num_events))  # [t, v, N_e]
        videos = slice(first, first + some.shape[1])
        scores[:, videos] = some
        video_scores[:, videos] = readout(some)
        first = videos.stop


def _top_keys(scores: Tensor, best: Tensor, per_video: int, limit: int, may_be_nan: bool) -> Tensor:
    """Sort keys [t, limit] of the best moments, best first; scores [t, V, N_e], best [t, V]."""
    num_texts, num_videos, num_events = scores.shape
    if may_be_nan:
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best = best_event(scores)
    first = torch.arange(0, num_videos * num_events, num_events, device=scores.device)
    # K videos with a better best event hold K better moments: only the first K videos can count.
    first = _position(_keys(best, first).topk(min(limit, num_videos)).values)  # [t, n]
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


def _block(x: Tensor, chunk: int) -> int:
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
