"""Everything that is read off one set of moment predictions, as rows of numbers and as tables.

VCMR: the moment among all videos. SVMR: the moment, the right video given. VR: the right video,
wherever the moment. These are the three tasks of TVR's evaluation (Lei et al., 2020, "TVR").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dataloaders.annotations import Query
from utils.evaluation import moment_metrics as mm
from utils.evaluation.predictions import MomentPredictions
from utils.evaluation.rows import (
    LEVELS,
    RANDOM_EVENT,
    SVMR,
    VCMR,
    VR,
    WHOLE_VIDEO,
    Rows,
    breakdowns,
    task_rows,
)
from utils.evaluation.tables import metrics_table

MOMENT_COLUMNS = {mm.recall_key(k, t): f"R{k}@{t}" for t in mm.THRESHOLDS for k in mm.RECALL_RANKS}
VIDEO_COLUMNS = {mm.recall_key(k): f"R@{k}" for k in mm.VIDEO_RECALL_RANKS}
COLUMNS = {VCMR: MOMENT_COLUMNS, SVMR: MOMENT_COLUMNS, VR: VIDEO_COLUMNS}
ALL_LEVELS = "all"  # the last row of `level_report`


def moment_report(
    predictions: MomentPredictions, queries: Sequence[Query], window_rule: str = "half"
) -> Rows:
    """Metrics by row, of the queries whose times are known. RunError: see `align`.

    Rows "VCMR", "SVMR" and "VR" (of all queries); "…/<type>" for every query type there is; for
    the moments also "…/half" or "…/any", the other window rule, if a query has several windows,
    "…/whole_video", the predicted videos as a whole, and "…/random_event", the expected result of
    all events in random order. "levels/…" are the rows of `level_report`. Without any times only
    the rows of VR.
    """
    predictions = predictions.align(queries)
    rows: Rows = {}
    timed = torch.tensor([query.windows is not None for query in queries])
    if timed.any():
        some = [query for query in queries if query.windows is not None]
        rows |= _moment_rows(predictions.select(timed), some, window_rule)
    ranks = predictions.target_rank
    rows[VR] = mm.video_recalls(ranks)
    for name, members in _by_type(queries).items():
        rows[f"{VR}/{name}"] = mm.video_recalls(ranks[members.to(ranks.device)])
    if any(query.windows for query in queries):
        levels = level_report(predictions, queries)
        rows |= {f"{LEVELS}/{name}": row for name, row in levels.items()}
    return rows


def _moment_rows(
    predictions: MomentPredictions, queries: Sequence[Query], window_rule: str
) -> Rows:
    rows: Rows = {}
    target, rank = predictions.target, predictions.target_rank
    windows = mm.pad_windows([query.windows or () for query in queries]).to(target.device)
    several = windows.shape[1] > 1
    other_rules = [rule for rule in mm.WINDOW_RULES if rule != window_rule] if several else []
    events, whole = _of_right_video(predictions)
    right_events = mm.right_moments(events, windows, window_rule)
    right_whole = mm.right_moments(whole[:, None], windows, window_rule)[:, 0]  # [T, thresholds]
    tasks = (
        (VCMR, predictions, rank, len(predictions.vid_names)),
        (SVMR, predictions.within_target(), torch.ones_like(rank), 1),
    )
    for task, moments, video_rank, num_videos in tasks:
        moments = moments.top(max(mm.RECALL_RANKS))
        seconds = moments.seconds(moments.videos, moments.events)
        ranks = mm.first_hits(moments.videos, seconds, target, windows, window_rule)
        rows[task] = mm.moment_recalls(ranks)
        for name, members in _by_type(queries).items():
            rows[f"{task}/{name}"] = mm.moment_recalls(ranks[members.to(ranks.device)])
        for rule in other_rules:
            hits = mm.first_hits(moments.videos, seconds, target, windows, rule)
            rows[f"{task}/{rule}"] = mm.moment_recalls(hits)
        ranks = torch.where(right_whole, video_rank[:, None], mm.NEVER)
        rows[f"{task}/{WHOLE_VIDEO}"] = mm.moment_recalls(ranks)
        candidates = num_videos * len(predictions.proposals)
        rows[f"{task}/{RANDOM_EVENT}"] = mm.random_event_recalls(right_events, candidates)
    return rows


def _of_right_video(predictions: MomentPredictions) -> tuple[Tensor, Tensor]:
    """Seconds of every event [T, N_e, 2] of each query's video, and of the whole of it [T, 2]."""
    target = predictions.target.long()
    events = torch.arange(len(predictions.proposals), device=target.device)
    durations = predictions.durations[target][:, None]
    return predictions.seconds(target[:, None], events), F.pad(durations, (1, 0))


def _by_type(queries: Sequence[Query]) -> dict[str, Tensor]:
    """Which queries are of each type, in the order of first appearance; none if none has a type."""
    types = dict.fromkeys(query.query_type for query in queries if query.query_type)
    return {name: torch.tensor([q.query_type == name for q in queries]) for name in types}


def level_report(predictions: MomentPredictions, queries: Sequence[Query]) -> Rows:
    """Which levels of the pyramid win, for short and for long moments, the right video given.

    Every query's best event is compared with its true window (the longest, if there are several).
    A row holds the queries whose window is closest, in ratio, to the events of one level; levels
    are named by their events' share of the video.

    Returns:
        Rows by level, shortest first, and "all": {"queries": number, "won by 6.25%": % of them
        whose best event is of that level, …} and the mean IoU, in %, of "best event",
        "whole video", "random event" (the mean of all) and "closest event" (the best there is).
    """
    timed = torch.tensor([bool(query.windows) for query in queries])
    predictions = predictions.align(queries).select(timed)
    longest = [max(q.windows, key=lambda w: w[1] - w[0]) for q in queries if q.windows]
    windows = torch.tensor(longest, device=predictions.target.device)  # [T, 2]
    events, whole = _of_right_video(predictions)
    iou = 100 * mm.temporal_iou(events, windows[:, None])  # [T, N_e]
    best = predictions.within_target().events[:, :1]

    share = predictions.proposals[:, 1] - predictions.proposals[:, 0]  # [N_e]
    share = (share * 1e6).round() / 1e6  # a level's events differ by rounding
    levels, level_of_event = share.unique(return_inverse=True)
    level_of_best = level_of_event[best[:, 0]]
    true_share = ((windows[:, 1] - windows[:, 0]) / whole[:, 1]).clamp(min=1e-6)
    nearest = (levels.log() - true_share.log()[:, None]).abs().argmin(1)
    names = [f"{100 * level:.3g}%" for level in levels.tolist()]
    groups = {name: nearest == level for level, name in enumerate(names)}
    groups[ALL_LEVELS] = torch.ones_like(nearest, dtype=torch.bool)
    columns = {f"won by {n}": 100.0 * (level_of_best == level) for level, n in enumerate(names)}
    columns |= {
        "best event": iou.gather(1, best)[:, 0],
        "whole video": 100 * mm.temporal_iou(whole, windows),
        "random event": iou.mean(1),
        "closest event": iou.amax(1),
    }
    return {
        name: {"queries": int(members.sum())}
        | {head: round(column[members].mean().item(), 2) for head, column in columns.items()}
        for name, members in groups.items()
        if members.any()
    }


def moment_tables(rows: Rows, beside: Rows | None = None) -> list[str]:
    """The rows of `moment_report` as texts: a table a task, `beside` standing under VCMR's, and
    one of the levels, if there are times."""
    tasks = {task: task_rows(rows, task) for task in COLUMNS}
    if tasks[VCMR]:
        tasks[VCMR] |= beside or {}
    tables = (metrics_table(own, COLUMNS[task]) for task, own in tasks.items() if own)
    shown = ["\n\n".join(tables)]
    if levels := breakdowns(rows, LEVELS):
        title = "Best event of the right video: its level, mean IoU in %, by length of the moment"
        named = {n if n == ALL_LEVELS else f"moments of ≈ {n}": row for n, row in levels.items()}
        shown.append(f"{title}\n{metrics_table(named, list(levels[ALL_LEVELS]))}")
    return shown


def times_missing(queries: Sequence[Query]) -> str | None:
    """A sentence if moments cannot be scored for all of the queries, else None."""
    untimed = sum(query.windows is None for query in queries)
    scored = "cannot be scored" if untimed == len(queries) else "are scored for the others only"
    counts = f"{untimed:,} of {len(queries):,} queries"
    return f"{counts} have no times (ts): VCMR and SVMR {scored}" if untimed else None
