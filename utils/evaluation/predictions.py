"""Predicted moments of a whole split: in memory, as a compact HDF5 file, in others' formats.

A moment is saved as (video, event) and turned into seconds by the event's share of the video, so a
file needs ten bytes a moment before compression and says which level of the pyramid a moment is of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.annotations import Query
from utils import RunError
from utils.evaluation.hdf5 import read_hdf5, write_hdf5
from utils.evaluation.rows import SVMR, VCMR, VR
from utils.files import atomic_write, writing

OTHERS = "use the annotations that the predictions were made with"
SAVED, EXPORTS = "predictions.h5", ("predictions_tvr.json", "predictions_qvhighlights.jsonl")
EXPORTED = 100  # predictions of a query in exports: as many as the public evaluations read
FORMAT = "ProPy moment predictions, version 1"
LAYOUT = {
    "per_video": "int", "desc_ids": "text T", "vid_names": "text V", "durations": "float32 V",
    "proposals": "float32 N_e 2", "videos": "int32<V T K", "events": "int16<N_e T K",
    "scores": "float32 T K", "target": "int32<V T", "target_rank": "int32 T",
    "target_scores": "float32 T N_e",
}  # fmt: skip
REMEDY = "write it with main.py --save_predictions 1"


@dataclass(frozen=True)
class MomentPredictions:
    """Ranked moments of T queries over a corpus of V videos with N_e events each."""

    desc_ids: list[str]  # name of every query, as text
    vid_names: list[str]
    durations: Tensor  # float32 [V] seconds
    proposals: Tensor  # float32 [N_e, 2] start and end of every event as a share of the video
    per_video: int  # moments of one video that count, the best
    videos: Tensor  # int [T, K] of the moments over the whole corpus, best first
    events: Tensor  # int [T, K]
    scores: Tensor  # float32 [T, K] their cosines
    target: Tensor  # int [T] the right video
    target_rank: Tensor  # int [T] its rank among the videos by their best event, from 1
    target_scores: Tensor  # float32 [T, N_e] cosines of the right video's events

    def seconds(self, videos: Tensor, events: Tensor) -> Tensor:
        """Start and end of moments of any shape [...]: float32 [..., 2]."""
        return self.proposals[events.long()] * self.durations[videos.long()][..., None]

    def top(self, count: int) -> MomentPredictions:
        """The first `count` moments of every query."""
        names = ("videos", "events", "scores")
        return replace(self, **{name: getattr(self, name)[:, :count] for name in names})

    def within_target(self) -> MomentPredictions:
        """What would be predicted if the corpus held the right video only, for single-video tasks.

        Its best `per_video` events; equal cosines: the earlier event first; NaN last.
        """
        scores = torch.where(self.target_scores.isnan(), -torch.inf, self.target_scores)
        scores, events = scores.sort(dim=1, descending=True, stable=True)
        videos = self.target[:, None].expand_as(events)
        return replace(self, videos=videos, events=events, scores=scores).top(self.per_video)

    def select(self, rows: Tensor) -> MomentPredictions:
        """The predictions for some of the queries, int64 [T'] or bool [T]."""
        positions = torch.arange(len(self.desc_ids))[rows].tolist()
        names = ("videos", "events", "scores", "target", "target_rank", "target_scores")
        selected = {name: getattr(self, name)[rows.to(self.videos.device)] for name in names}
        return replace(self, desc_ids=[self.desc_ids[i] for i in positions], **selected)

    def align(self, queries: Sequence[Query]) -> MomentPredictions:
        """The predictions in the order of the queries, which are those predicted for. RunError:
        they are not, or one has another right video."""
        names, result = [str(query.desc_id) for query in queries], self
        if names != self.desc_ids:
            row = {name: number for number, name in enumerate(self.desc_ids)}
            _refuse([name for name in names if name not in row], "predictions")
            _refuse(sorted(row.keys() - set(names)), "annotations")
            result = self.select(torch.tensor([row[name] for name in names]))
        for query, target in zip(queries, result.target.tolist(), strict=True):
            if query.vid_name != self.vid_names[target]:
                raise RunError(
                    f"query {query.desc_id!r} belongs to video {query.vid_name!r} in the "
                    f"annotations, to {self.vid_names[target]!r} in the predictions: {OTHERS}"
                )
        return result


def _refuse(names: list[str], where: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        raise RunError(f"{len(names)} queries are not in the {where} ({shown}): {OTHERS}")


def save_predictions(path: Path, predictions: MomentPredictions) -> None:
    """Write an HDF5 file: the attributes under their names. OutputError: see `write_hdf5`."""
    write_hdf5(path, FORMAT, LAYOUT, vars(predictions), packed=True)


def load_predictions(path: Path) -> MomentPredictions:
    """Read what `save_predictions` wrote. RunError: no such file, another format, or contents that
    contradict each other."""
    predictions = MomentPredictions(**read_hdf5(path, FORMAT, LAYOUT, REMEDY))
    if not (predictions.durations.isfinite() & (predictions.durations >= 0)).all():
        raise RunError(f"{path}: durations holds what is no length of a video: {REMEDY}")
    return predictions


def export_all(
    folder: Path, predictions: MomentPredictions, queries: Sequence[Query]
) -> list[Path]:
    """Write EXPORTS into the folder. OutputError: they cannot be written; RunError: see `align`."""
    predictions = predictions.align(queries)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in EXPORTS]
    for path, records in zip(paths, (_tvr, _qvhighlights), strict=True):
        with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
            for record in records(predictions, queries):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return paths


def _tvr(predictions: MomentPredictions, queries: Sequence[Query]) -> Iterator[dict]:
    """TVR's submission format, one record: its three tasks, up to 100 predictions of every query.

    "VR" are distinct videos, each with its best moment.
    """
    tasks = {
        VCMR: _lists(predictions),
        SVMR: _lists(predictions.within_target()),
        VR: _lists(predictions, distinct_videos=True),
    }
    yield {"video2idx": {name: i for i, name in enumerate(predictions.vid_names)}} | {
        task: [
            {"desc_id": query.desc_id, "desc": query.desc, "predictions": row}
            for query, row in zip(queries, rows, strict=True)
        ]
        for task, rows in tasks.items()
    }


def _qvhighlights(predictions: MomentPredictions, queries: Sequence[Query]) -> Iterator[dict]:
    """QVHighlights' submission format: one record a query, with moments of the right video."""
    for query, row in zip(queries, _lists(predictions.within_target()), strict=True):
        yield {
            "qid": query.desc_id,
            "query": query.desc,
            "vid": query.vid_name,
            "pred_relevant_windows": [window for _, *window in row],
        }


def _lists(
    predictions: MomentPredictions, distinct_videos: bool = False
) -> Iterator[list[list[float]]]:
    """[[video, start, end, score], …] of every query, with the shortest decimals of the float32:
    the first 100 moments, or the best moments of the first 100 distinct videos."""
    seconds = predictions.seconds(predictions.videos, predictions.events)
    scores = predictions.scores.clamp(min=-1)[..., None]  # -inf, of a NaN cosine, is not JSON
    moments = torch.cat([seconds, scores], dim=-1).cpu().numpy()  # [T, K, 3]
    for row, numbers in zip(predictions.videos.cpu(), moments, strict=True):
        videos = row.tolist()
        picked = range(len(videos))
        if distinct_videos:
            picked = sorted({v: i for i, v in reversed(list(enumerate(videos)))}.values())
        picked = list(picked)[:EXPORTED]
        decimals = numbers[picked].astype(str).astype(float).tolist()
        yield [[videos[i], *own] for i, own in zip(picked, decimals, strict=True)]
