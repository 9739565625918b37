"""Choosing the queries to draw, encoding their videos again with attention, drawing them.

Leaves in the folder: attn.hdf5, event_scores.hdf5, r1_ids.json (`attention_store`) and per
query attention/<id>/ with meta.json, figures/<frame>.jpg, tree.jpg and the overview.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloaders.annotations import Query
from modules.similarity import event_scores
from utils import RunError
from utils.distributed import is_main
from utils.evaluation.embed import Embeddings
from utils.evaluation.evaluator import CorpusEvaluator
from utils.files import writing
from utils.pictures.attention_store import AttentionStore, query_name

if TYPE_CHECKING:  # it imports matplotlib, which most runs do without
    from utils.pictures.draw import QueryPicture

logger = logging.getLogger("propy.plots")

TEXT_BLOCK = 64  # texts compared with the whole corpus at a time


@dataclass(frozen=True)
class PlotSettings:
    """What is drawn, and how.

    Attributes:
        folder: where to.
        layer: whose attention is drawn, counted from 1; 0 the last.
        head: the attention head, counted from 1; 0 the mean of all.
        style: one of `utils.pictures.draw.STYLES`.
        file_format: of the overview, and of a further tree if it is a vector format.
    """

    folder: Path
    layer: int = 0
    head: int = 0
    style: str = "readable"
    file_format: str = "png"


@dataclass(frozen=True)
class ScoredQuery:
    """A chosen query and its scores.

    Attributes:
        row: of the query in the split.
        rank: of its video, from 1.
        own: float32 [N_e], with the events of its video.
        best: float32 [N_e], of each event the highest in any video.
    """

    row: int
    rank: int
    own: np.ndarray
    best: np.ndarray


def check_request(
    settings: PlotSettings, ids: Sequence[str], queries: Sequence[Query], model: nn.Module
) -> None:
    """What can be said before anything is computed.

    Raises:
        RunError: the model has no such layer or head, the split no such query.
    """
    layers = len(model.clip.visual.transformer.resblocks)
    counts = {"layer": (settings.layer, layers), "head": (settings.head, model.num_heads)}
    for name, (number, count) in counts.items():
        if not 0 <= number <= count:
            raise RunError(f"--plot_{name} {number}: the model has {name}s 1 to {count}")
    unknown = set(ids) - {str(query.desc_id) for query in queries}
    if unknown:
        raise RunError(
            f"--plot_ids: not in the split: {', '.join(sorted(unknown))}; its annotations have "
            f"desc_ids such as {queries[0].desc_id}"
        )


def plot_split(
    evaluator: CorpusEvaluator,
    embeddings: Embeddings,
    model: nn.Module,
    settings: PlotSettings,
    *,
    ids: Sequence[str],
    limit: int,
    seed: int,
    source: str,
) -> None:
    """Draw the queries with these ids, or `limit` of those with their video at rank 1.

    Args:
        embeddings: of the split that is evaluated.
        source: what the model is, kept in attn.hdf5.

    Raises:
        RunError: there is no query to draw. OutputError: something cannot be written.
    """
    split, normalize = evaluator.split, evaluator.normalize_events
    ranks = evaluator.ranks(embeddings)
    if not is_main():
        return
    chosen = choose_queries(ranks, split.queries, ids, limit, seed)
    videos = [split.videos[i] for i in split.target[chosen].unique().tolist()]
    plot_queries(
        model,
        evaluator.load_videos(videos),
        [video.vid_name for video in videos],
        score_queries(embeddings, chosen, split.target, ranks, normalize),
        split.queries,
        settings,
        score_name="cosine" if normalize else "product",
        source=source,
    )
    logger.info(
        "%d queries drawn, of %s the right video is ranked first: %s",
        len(chosen),
        f"{int((ranks == 1).sum()):,} of {len(split.queries):,}",
        settings.folder / "attention",
    )


def choose_queries(
    ranks: Tensor, queries: Sequence[Query], ids: Sequence[str], limit: int, seed: int
) -> list[int]:
    """Rows of the queries to draw, in order: those named, or those with their video at rank 1.

    Args:
        ranks: int64 [T].
        ids: query ids as text, of any rank. Empty: all queries at rank 1.
        limit: of these a random choice of so many; 0 for all. Named ones are all drawn.

    Raises:
        RunError: no query has its video at rank 1, or none of those named is left.
    """
    if ids:
        named = [row for row, query in enumerate(queries) if str(query.desc_id) in set(ids)]
        if not named:  # `check_request` has seen them, so their videos did not decode
            raise RunError(f"none of the videos of --plot_ids {' '.join(ids)} can be read")
        return named
    hits = (ranks.cpu() == 1).nonzero()[:, 0].tolist()
    if not hits:
        raise RunError(
            f"none of the {len(queries)} queries has its video at rank 1: name the queries to draw "
            "with --plot_ids"
        )
    if 0 < limit < len(hits):
        chosen = np.random.default_rng(seed).choice(len(hits), limit, replace=False)
        return [hits[i] for i in sorted(chosen)]
    return hits


def score_queries(
    embeddings: Embeddings,
    rows: Sequence[int],
    target: Tensor,
    ranks: Tensor,
    normalize_events: bool = True,
) -> list[ScoredQuery]:
    """Scores of the chosen queries with single events.

    Args:
        target: int64 [T], the right video of each text of the split.
    """
    drawn = []
    for block in torch.tensor(rows).split(TEXT_BLOCK):
        texts = embeddings.texts[block.to(embeddings.texts.device)]
        scores = event_scores(texts, embeddings.events, normalize_events)  # [t, V, N_e]
        for row, of_text in zip(block.tolist(), scores, strict=True):
            own, best = of_text[target[row]], of_text.amax(0)
            rank = int(ranks[row])
            drawn.append(ScoredQuery(row, rank, own.cpu().numpy(), best.cpu().numpy()))
    return drawn


@torch.inference_mode()
def plot_queries(
    model: nn.Module,
    batches: Iterable[dict],
    vid_names: Sequence[str],
    drawn: Sequence[ScoredQuery],
    queries: Sequence[Query],
    settings: PlotSettings,
    score_name: str = "cosine",
    source: str = "",
) -> None:
    """Write and draw the chosen queries, video by video.

    Args:
        batches: {frames, indices} of the chosen queries' videos.
        vid_names: what the indices mean.
        queries: of the whole split.

    Raises:
        OutputError: something cannot be written.
    """
    layers = len(model.clip.visual.transformer.resblocks)
    layer = (settings.layer or layers) - 1
    head = settings.head - 1 if settings.head else None
    heads = "mean" if head is None else str(settings.head)
    subtitle = f"layer {layer + 1} of {layers}, "
    subtitle += "mean of all heads" if head is None else f"head {heads}"
    of_video: dict[str, list[ScoredQuery]] = {}
    for one in drawn:
        of_video.setdefault(queries[one.row].vid_name, []).append(one)
    with writing(settings.folder):
        settings.folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    with (
        AttentionStore(settings.folder, {"model": source, "heads": heads}) as store,
        tqdm(total=len(drawn), desc="draw", unit="query", dynamic_ncols=True, leave=False) as bar,
    ):
        for batch in batches:
            frames = batch["frames"].to(model.visibility.device)
            _, attention = model.encode_video(frames, return_attention=True, head=head)
            for i, video in enumerate(batch["indices"].tolist()):
                of_one = attention[:, i].float().cpu().numpy()  # [L, N_e, keys]
                for one in of_video[vid_names[video]]:
                    query = queries[one.row]
                    store.add(query.desc_id, query.vid_name, of_one, one.best, one.rank)
                    picture = _picture(
                        model, query, one, batch["frames"][i], of_one[layer], score_name, subtitle
                    )
                    with writing(settings.folder / "attention" / query_name(query.desc_id)):
                        _draw(picture, one.rank, layer + 1, settings)
                    bar.update()


def _picture(
    model: nn.Module,
    query: Query,
    one: ScoredQuery,
    frames: Tensor,
    attention: np.ndarray,
    score_name: str,
    subtitle: str,
) -> QueryPicture:
    from utils.pictures.draw import EventAttention, QueryPicture

    event = int(one.own.argmax())
    row = EventAttention.from_row(attention[event], model.pyramid, model.num_prompts)
    shares = {
        "patches": row.patches.sum(),
        "class tokens": row.class_tokens.sum(),
        "events": row.events.sum(),
        "prompts": row.prompts,
    }
    parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    subtitle = (
        f"query {query.desc_id} · video {query.vid_name}, rank {one.rank} · event {event}, "
        f"{score_name} {one.own[event]:.3f} · {subtitle} · attention goes to {parts}"
    )
    return QueryPicture(
        query, subtitle, frames.cpu(), row, event, one.own, score_name, model.pyramid
    )


def _draw(picture: QueryPicture, rank: int, layer: int, settings: PlotSettings) -> None:
    from utils.pictures import draw

    folder = settings.folder / "attention" / query_name(picture.query.desc_id)
    style = draw.STYLES[settings.style]
    # Pictures of an earlier plot, perhaps of another layer, would contradict meta.json.
    for old in [*folder.glob("overview.*"), *folder.glob("tree.*"), *folder.glob("figures/*.jpg")]:
        old.unlink()
    draw.save_figures(folder / "figures", picture, style)
    draw.save_tree(folder / "tree.jpg", picture, style)
    if settings.file_format in ("svg", "pdf"):
        draw.save_tree(folder / f"tree.{settings.file_format}", picture, style)
    draw.save_overview(folder / f"overview.{settings.file_format}", picture, style)
    meta = _meta(picture, rank) | {"layer": layer, "head": settings.head or "mean"}
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    (folder / "meta.json").write_text(text + "\n", encoding="utf-8")


def _meta(picture: QueryPicture, rank: int) -> dict:
    """What meta.json says of the query, its video and the event that was drawn."""
    query, event, per_frame = picture.query, picture.event, picture.seconds_per_frame
    start, end = picture.pyramid.spans[event].tolist()
    windows = [list(window) for window in picture.windows]
    return {
        "desc_id": query.desc_id,
        "text": query.desc,
        "video": query.vid_name,
        "duration": query.duration,
        "rank": rank,
        "event": event,
        "level": int(picture.pyramid.level_of_event[event]),
        "score": float(picture.scores[event]),
        "proposal_frames": [start, end],
        "proposal_seconds": [start * per_frame, end * per_frame],
        "true_windows_seconds": windows,
        "true_windows_frames": [[time / per_frame for time in window] for window in windows],
        "strongest_event": picture.strongest,
    }
