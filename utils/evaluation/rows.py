"""Rows of metrics and their names: the same in tables, log.jsonl and eval.jsonl.

A row is "<task>" or "<task>/<breakdown>": "VCMR/random_event", "VR/<query type>", "levels/6.25%".
"""

from __future__ import annotations

from collections.abc import Mapping

from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS, ZERO_SHOT_NAME, ZERO_SHOT_RESULTS

Rows = dict[str, dict[str, float]]

COSINE, DOT = "cosine", "dot"  # PRVR by normalised events, and by events as they are
VCMR, SVMR, VR, LEVELS = "VCMR", "SVMR", "VR", "levels"
# Names in tables of models: a trained one, and CLIP alone by models.zero_shot.SCORINGS.
PROPY = "ProPy"
ZERO_SHOT = {
    "mean": "zero-shot CLIP, mean frame",
    "best": "zero-shot CLIP, best frame",
    "events": "zero-shot CLIP, best event",
}
NOT_NORMALISED = ", events not normalised"  # after what a reader calls a row or number of DOT
WHOLE_VIDEO, RANDOM_EVENT = "whole_video", "random_event"  # baselines of VCMR and SVMR


def zero_shot_name(scoring: str, weights: object) -> str:
    """What stands for a checkpoint in records of CLIP alone; `scoring_of` reads it."""
    return f"{ZERO_SHOT[scoring]}: {weights}"


def scoring_of(checkpoint: object) -> str | None:
    """The zero-shot scoring that a record's checkpoint names; None for a trained model's."""
    title = str(checkpoint).partition(":")[0]
    return next((scoring for scoring, own in ZERO_SHOT.items() if own == title), None)


def video_rows(name: str, rows: Rows) -> Rows:
    """PRVR's rows of a model under the name that a table gives it."""
    titles = {COSINE: name, DOT: name + NOT_NORMALISED}
    return {titles[row]: numbers for row, numbers in rows.items() if row in titles}


def task_rows(rows: Rows, task: str) -> Rows:
    """A task's own row and its breakdowns."""
    return {name: row for name, row in rows.items() if name.partition("/")[0] == task}


def breakdowns(rows: Rows, task: str) -> Rows:
    """`task_rows` by what each breaks the task down to, the part after "/"; its own by its name."""
    return {name.partition("/")[2] or task: row for name, row in task_rows(rows, task).items()}


def rows_to_compare(
    datatype: str, baselines: Mapping[str, Rows], zero_shot: bool
) -> tuple[Rows, Rows]:
    """Rows that stand under a model's own in its tables, of videos and of moments.

    Args:
        baselines: rows of CLIP alone on the same split, by scoring.
        zero_shot: whether the model is CLIP alone itself. Only where either is, others' published
            row of CLIP alone stands there too.
    """
    videos: Rows = {}
    moments: Rows = {}
    for scoring, rows in baselines.items():
        videos |= video_rows(ZERO_SHOT[scoring], rows)
        if VCMR in rows:
            moments[ZERO_SHOT[scoring]] = rows[VCMR]
    if datatype in ZERO_SHOT_RESULTS and (baselines or zero_shot):
        videos[ZERO_SHOT_NAME] = ZERO_SHOT_RESULTS[datatype]
    for rows, results in ((videos, PRVR_RESULTS), (moments, VCMR_RESULTS)):
        if datatype in results:
            rows["published"] = results[datatype]
    return videos, moments
