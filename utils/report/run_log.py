"""Reading what runs left: args.json, log.jsonl, eval.jsonl; and what readers call the numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from utils import RunError
from utils.evaluation.rows import COSINE, DOT, NOT_NORMALISED, ZERO_SHOT, Rows
from utils.evaluation.tables import PRVR_COLUMNS
from utils.files import read_records

# Counters of log.jsonl, which make no curve.
COUNTERS = (
    *("epoch", "global_step", "steps", "skipped_steps", "best_epoch", "best_dot_epoch"),
    *("val_videos", "val_videos_left_out", "val_queries", "val_queries_left_out"),
)
# What training says of itself, besides shares of the gradient; every other number is a metric.
TRAINING = ("loss", "lr", "grad_norm", "data_time", "step_time", "memory_gib")
NAMES = {
    "loss": "training loss", "lr": "learning rate", "grad_norm": "gradient norm before clipping",
    "data_time": "waiting for data (s/step)", "step_time": "computing (s/step)",
    "memory_gib": "peak memory (GiB)", "MedR": "median rank", "MeanR": "mean rank",
    "R1": "R@1 (%)", "R5": "R@5 (%)", "R10": "R@10 (%)", "R100": "R@100 (%)",
}  # fmt: skip
OF_DOT = f"{DOT}/"  # before PRVR metrics of scores whose events are not normalised
MOMENT_RECALL = re.compile(r"(\w+)/([\d.]+)-r(\d+)")
LEVEL_SHARE = re.compile(r"gradient/level_(\d+)")  # of the pyramid, the bottom is 1
VIDEO_RECALL = re.compile(r"(\w+)/r(\d+)")


def read_args(folder: Path) -> dict:
    """args.json of a run; empty if there is none. RunError: it is not JSON."""
    path = folder / "args.json"
    if not path.is_file():
        return {}
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter: brackets without end
        raise RunError(f"{path}: not JSON: {error}") from error
    if not isinstance(args, Mapping):
        raise RunError(f"{path}: not an object of settings")
    return dict(args)


def datatype(args: Mapping) -> str:
    """The data set that args.json names, as a rule one of `published.DATATYPES`."""
    return str(args.get("datatype") or "custom")


def read_epochs(folder: Path) -> list[dict]:
    """log.jsonl by epoch, in order; of an epoch that was run again after resuming, the last.

    PRVR metrics of scores whose events are not normalised are named "dot/R1" and so on, whichever
    row of metrics the run put first. RunError: there is no log.jsonl, or it holds no epoch.
    """
    path = folder / "log.jsonl"
    records = [record for record in read_records(path) if _is_epoch(record.get("epoch"))]
    if not records:
        raise RunError(f"{path}: no finished epoch in it")
    by_epoch = {record["epoch"]: _name_rows(record) for record in records}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def read_zero_shot(folder: Path) -> dict[str, Rows]:
    """The rows of CLIP alone by scoring that training has logged; none in older logs.

    RunError: there is no log.jsonl.
    """
    records = read_records(folder / "log.jsonl")
    logged = [found for r in records if isinstance(found := r.get("zero_shot"), Mapping)]
    found = {
        scoring: numeric_rows(rows)
        for scoring, rows in (logged[-1] if logged else {}).items()
        if scoring in ZERO_SHOT and isinstance(rows, Mapping)
    }
    return {scoring: rows for scoring, rows in found.items() if rows}


def numeric_rows(rows: Mapping) -> Rows:
    """The finite numbers of rows of metrics; rows without any are left out."""
    found = {
        row: {key: value for key, value in numbers.items() if is_number(value)}
        for row, numbers in rows.items()
        if isinstance(numbers, Mapping)
    }
    return {row: numbers for row, numbers in found.items() if numbers}


def to_beat(zero_shot: Mapping[str, Rows]) -> dict[str, float]:
    """The best that any scoring of CLIP alone reaches, by the names of `read_epochs`."""
    found: dict[str, float] = {}
    for rows in zero_shot.values():
        for row, numbers in rows.items():
            for key, value in numbers.items():
                name = key if row == COSINE else f"{row}/{key}"
                better = min if key in ("MedR", "MeanR") else max
                found[name] = better(value, found.get(name, value))
    return found


def _name_rows(record: dict) -> dict:
    if record.get("row") != DOT:
        return record
    return {OF_DOT + key if key in PRVR_COLUMNS else key: value for key, value in record.items()}


def curve(epochs: list[dict], name: str) -> list[tuple[int, float]]:
    """(epoch, value) where the value is there and finite."""
    points = ((record["epoch"], record.get(name)) for record in epochs)
    return [(epoch, value) for epoch, value in points if is_number(value)]


def curve_names(epochs: list[dict]) -> list[str]:
    """All numbers that were logged: training first, then metrics in the order of the log."""
    found = dict.fromkeys(key for record in epochs for key in record if curve([record], key))
    first = [name for name in TRAINING if name in found]
    first += [name for name in found if LEVEL_SHARE.fullmatch(name)]
    return first + [name for name in found if is_metric(name)]


def is_metric(name: str) -> bool:
    """Whether a number of the log is one of retrieval, not of training."""
    return name not in (*COUNTERS, *TRAINING) and not LEVEL_SHARE.fullmatch(name)


def label(name: str) -> str:
    """What a reader calls a number of the log, with its unit."""
    plain = MOMENT_RECALL.sub(r"\1 R@\3, IoU ≥ \2 (%)", name.removeprefix(OF_DOT))
    plain = LEVEL_SHARE.sub(r"share of the gradient, level \1 (%)", plain)
    shown = NAMES.get(plain, VIDEO_RECALL.sub(r"\1 R@\2 (%)", plain))
    return shown + NOT_NORMALISED if name.startswith(OF_DOT) else shown


def best_epoch(epochs: list[dict]) -> dict:
    """The record that the run itself called the best; the last one if it did not say."""
    best = epochs[-1].get("best_epoch")
    return next((record for record in epochs if record["epoch"] == best), epochs[-1])


def _is_epoch(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def is_number(value: object) -> bool:
    """True for finite numbers, which True and False are not, of a size that can be drawn."""
    return type(value) in (int, float) and -1e300 < value < 1e300
