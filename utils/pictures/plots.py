"""Choosing the queries to draw, encoding their videos again with attention, drawing them.

Leaves in the folder: attn.hdf5, event_scores.hdf5, r1_ids.json (`attention_store`) and per
query attention/<id>/ with meta.json, figures/<frame>.jpg, tree.jpg and the overview.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from utils.pictures.attention_store import attention_store, query_name

logger = logging.getLogger("propy.plots")


@dataclass(frozen=True)
class PlotSettings:
    """What is drawn, and how."""

    folder: Path  # where to; it exists
    layer: int = 0  # whose attention is drawn, counted from 1; 0 the last
    head: int = 0  # of attention, counted from 1; 0 the mean of all
    style: str = "readable"  # one of `utils.pictures.draw.STYLES`
    file_format: str = "png"  # of the overview, and of a further tree if it is a vector format


def check_request(
    settings: PlotSettings, ids: Sequence[str], queries: Sequence[Query], model: nn.Module
) -> None:
    """What can be said before anything is computed. RunError: the model has no such layer or head,
    or no attention; the split no such query."""
    if not model.num_heads:
        logger.info("CLIP alone has no events that attend: frames, moments and scores are drawn")
        if settings.layer or settings.head:
            raise RunError("--plot_layer and --plot_head: CLIP alone has no attention to draw")
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


@torch.inference_mode()
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
        source: what the model is, kept in attn.hdf5 and meta.json.

    Raises:
        RunError: there is no query to draw. OutputError: something cannot be written.
    """
    from utils.pictures.draw import caption_fonts

    split, normalize = evaluator.split, evaluator.normalize_events
    ranks = evaluator.ranks(embeddings, normalize)
    if not is_main():
        return
    chosen = choose_queries(ranks, split.queries, ids, limit, seed)
    videos = [split.videos[i] for i in split.target[chosen].unique().tolist()]
    layers = len(model.clip.visual.transformer.resblocks)
    layer = settings.layer or layers
    head = settings.head - 1 if settings.head else None
    heads = "mean" if head is None else str(settings.head)
    how = f"layer {layer} of {layers}, {'mean of all heads' if head is None else f'head {heads}'}"
    meta = {"model": source, "layer": layer, "head": settings.head or heads}
    store = attention_store(settings.folder, {"model": source, "heads": heads})
    if not model.num_heads:
        how, meta, store = source, {"model": source}, contextlib.nullcontext(lambda *_: None)
    model.eval()
    queries = [split.queries[row] for row in chosen]
    with (
        store as add,
        tqdm(total=len(chosen), desc="draw", unit="query", dynamic_ncols=True, leave=False) as bar,
        caption_fonts("".join(f"{q.desc}{q.desc_id}{q.vid_name}" for q in queries)),
    ):
        for batch in evaluator.load_videos(videos):
            attention = _attention(model, batch["frames"].to(embeddings.events.device), head)
            for i, video in enumerate(batch["indices"].tolist()):
                for row, query in zip(chosen, queries, strict=True):
                    if query.vid_name != videos[video].vid_name:
                        continue
                    text = embeddings.texts[row : row + 1]
                    scores = event_scores(text, embeddings.events, normalize)[0]  # [V, N_e]
                    best, own = scores.amax(0).cpu().numpy(), scores[split.target[row]]
                    meta["rank"] = int(ranks[row])
                    add(query.desc_id, query.vid_name, attention[i], best, meta["rank"])
                    _draw_query(
                        model, query, batch["frames"][i], attention[i], own.cpu().numpy(),
                        "cosine" if normalize else "product", how, meta, settings,
                    )  # fmt: skip
                    bar.update()
    logger.info(
        "%d queries drawn, of %s the right video is ranked first: %s",
        len(chosen),
        f"{int((ranks == 1).sum()):,} of {len(split.queries):,}",
        settings.folder / "attention",
    )


def _attention(model: nn.Module, frames: Tensor, head: int | None) -> list[np.ndarray | None]:
    """Of every video [L, N_e, keys], or None if the model's events attend to nothing."""
    if not model.num_heads:
        return [None] * len(frames)
    _, attention = model.encode_video(frames, return_attention=True, head=head)
    return [of_video.float().cpu().numpy() for of_video in attention.unbind(1)]


def _draw_query(
    model: nn.Module, query: Query, frames: Tensor, attention: np.ndarray | None,
    scores: np.ndarray, score_name: str, how: str, meta: dict, settings: PlotSettings,
) -> None:  # fmt: skip
    """One query's folder.

    Args:
        attention: [L, N_e, keys] or None; scores: [N_e].
        how: which layer and heads; meta: what meta.json says besides the query and its event.
    """
    from utils.pictures import draw

    event, pyramid = int(scores.argmax()), model.pyramid
    subtitle = (
        f"query {query.desc_id} · video {query.vid_name}, rank {meta['rank']} · event {event}, "
        f"{score_name} {scores[event]:.3f} · {how}"
    )
    row = None
    if attention is not None:
        of_layer = attention[settings.layer - 1]  # of 0 the last
        seen = model.num_prompts, model.config.visibility
        row = draw.EventAttention.of_event(of_layer, event, pyramid, *seen)
        subtitle += (
            f" · attention goes to patches {row.patches.sum():.0%}, class tokens "
            f"{row.class_tokens.sum():.0%}, events {row.events.sum():.0%}, prompts "
            f"{row.prompts:.0%}"
        )
    per_frame = query.duration / pyramid.num_frames
    picture = draw.QueryPicture(
        query.duration, query.windows or (), frames.cpu(), pyramid.spans.numpy() * per_frame,
        pyramid.level_of_event.numpy(), event, scores, score_name, query.desc, subtitle, row,
    )  # fmt: skip
    folder = settings.folder / "attention" / query_name(query.desc_id)
    with writing(folder):
        # Pictures of an earlier plot, perhaps of another layer, would contradict meta.json.
        for pattern in ("overview.*", "tree.*", "figures/*.jpg"):
            for old in folder.glob(pattern):
                old.unlink()
        style, ending = draw.STYLES[settings.style], settings.file_format
        folder.mkdir(parents=True, exist_ok=True)
        if row:
            draw.save_figures(folder / "figures", picture, style)
            for name in ["tree.jpg"] + [f"tree.{ending}"] * (ending in ("svg", "pdf")):
                draw.save_tree(folder / name, picture, style)
            meta = meta | {"strongest_event": picture.strongest}
        draw.save_overview(folder / f"overview.{ending}", picture, style)
        meta = meta | {
            "desc_id": query.desc_id,
            "text": query.desc,
            "video": query.vid_name,
            "duration": query.duration,
            "event": event,
            "level": int(pyramid.level_of_event[event]),
            "score": float(scores[event]),
            "proposal_frames": pyramid.spans[event].tolist(),
            "proposal_seconds": picture.spans[event].tolist(),
            "true_windows_seconds": picture.windows,
            "true_windows_frames": [[t / per_frame for t in window] for window in picture.windows],
        }
        text = json.dumps(meta, indent=1, ensure_ascii=False)
        (folder / "meta.json").write_text(text + "\n", encoding="utf-8")
