"""Predicted moments of a whole split: in memory, as a compact HDF5 file, in others' formats.

A moment is kept as (video, event) and turned into seconds by the event's share of the video, so a
file needs ten bytes a moment before compression and says which level of the pyramid a moment is of.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dataloaders.annotations import Query
from utils import RunError
from utils.evaluation.hdf5 import Hdf5Writer, read_hdf5
from utils.files import atomic_write, writing

FORMAT = "ProPy moment predictions, version 1"
SAVED, EXPORTS = "predictions.h5", ("predictions_tvr.json", "predictions_qvhighlights.jsonl")
EXPORTED = 100  # predictions of a query in exports: as many as the public evaluations read
TEXTS = ("desc_ids", "vid_names")
NUMBERS = {
    "durations": np.float32, "proposals": np.float32,
    "videos": np.int32, "events": np.int16, "scores": np.float32,
    "target": np.int32, "target_rank": np.int32, "target_scores": np.float32,
}  # fmt: skip
PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


@dataclass(frozen=True)
class MomentPredictions:
    """Ranked moments of T queries over a corpus of V videos with N_e events each.

    Attributes:
        desc_ids: name of every query, as text.
        vid_names: name of every video.
        durations: float32 [V] seconds.
        proposals: float32 [N_e, 2] start and end of every event as a share of the video.
        per_video: moments of one video that count, the best.
        videos, events: int [T, K] the moments over the whole corpus, best first.
        scores: float32 [T, K] their cosines.
        target: int [T] the right video.
        target_rank: int [T] its rank among the videos by their best event, from 1.
        target_scores: float32 [T, N_e] cosines of the right video's events.
    """

    desc_ids: list[str]
    vid_names: list[str]
    durations: Tensor
    proposals: Tensor
    per_video: int
    videos: Tensor
    events: Tensor
    scores: Tensor
    target: Tensor
    target_rank: Tensor
    target_scores: Tensor

    def seconds(self, videos: Tensor, events: Tensor) -> Tensor:
        """Start and end of moments of any shape [...]: float32 [..., 2]."""
        return self.proposals[events.long()] * self.durations[videos.long()][..., None]

    def cpu(self) -> MomentPredictions:
        """The same, in the CPU's memory."""
        tensors = {name: x.cpu() for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **tensors)

    def first(self, count: int) -> MomentPredictions:
        """The first `count` moments of every query."""
        names = ("videos", "events", "scores")
        return replace(self, **{name: getattr(self, name)[:, :count] for name in names})

    def within_target(self) -> MomentPredictions:
        """What would be predicted if the corpus held the right video only, for single-video tasks.

        Its best `per_video` events; equal cosines: the earlier event first; NaN last.
        """
        scores = torch.where(self.target_scores.isnan(), -torch.inf, self.target_scores)
        scores, events = scores.sort(dim=1, descending=True, stable=True)
        best = replace(
            self, videos=self.target[:, None].expand_as(events), events=events, scores=scores
        )
        return best.first(self.per_video)

    def of(self, queries: Sequence[Query]) -> MomentPredictions:
        """These predictions, for these queries in this order.

        Raises:
            RunError: the queries are not exactly those that were predicted for, or one has
                another right video.
        """
        wanted = [str(query.desc_id) for query in queries]
        result = self
        if wanted != self.desc_ids:
            row = {name: number for number, name in enumerate(self.desc_ids)}
            _compare_queries(row, dict.fromkeys(wanted))
            result = self.rows(torch.tensor([row[name] for name in wanted]))
        for query, target in zip(queries, result.target.tolist(), strict=True):
            if query.vid_name != self.vid_names[target]:
                raise RunError(
                    f"query {query.desc_id!r} belongs to video {query.vid_name!r} in the "
                    f"annotations, to {self.vid_names[target]!r} in the predictions: use the "
                    "annotations that the predictions were made with"
                )
        return result

    def present(self, queries: Sequence[Query]) -> list[Query]:
        """Those of the queries whose videos are in the corpus, as it was with --allow_missing 1."""
        corpus = set(self.vid_names)
        return [query for query in queries if query.vid_name in corpus]

    def rows(self, rows: Tensor) -> MomentPredictions:
        """The predictions for some of the queries, int64 [T'] or bool [T]."""
        positions = torch.arange(len(self.desc_ids))[rows].tolist()
        names = ("videos", "events", "scores", "target", "target_rank", "target_scores")
        kept = {name: getattr(self, name)[rows.to(self.videos.device)] for name in names}
        return replace(self, desc_ids=[self.desc_ids[i] for i in positions], **kept)


def _compare_queries(predicted: Collection[str], wanted: Collection[str]) -> None:
    missing = [name for name in wanted if name not in predicted]
    surplus = [name for name in predicted if name not in wanted]
    for names, where in ((missing, "predictions"), (surplus, "annotations")):
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise RunError(
                f"{len(names)} queries are not in the {where} ({shown}): use the annotations that "
                "the predictions were made with"
            )


def save_predictions(path: Path, predictions: MomentPredictions) -> None:
    """Write an HDF5 file: the attributes of `MomentPredictions` as data sets of the same names.

    Raises:
        OutputError: it cannot be written. What was there before is still there then.
    """
    predictions = predictions.cpu()
    with atomic_write(path) as part, Hdf5Writer(part, path) as writer:
        writer.file.attrs["format"] = FORMAT
        writer.file.attrs["per_video"] = predictions.per_video
        for name in TEXTS:
            texts = getattr(predictions, name)
            writer.file.create_dataset(name, data=texts, dtype=h5py.string_dtype())
        for name, dtype in NUMBERS.items():
            values = getattr(predictions, name)
            packed = PACKED if values.ndim == 2 else {}
            writer.file.create_dataset(name, data=values, dtype=dtype, **packed)


def load_predictions(path: Path) -> MomentPredictions:
    """Read what `save_predictions` wrote.

    Raises:
        RunError: no such file, another format, or contents that contradict each other.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file: main.py --save_predictions 1 writes one")
    remedy = "write it again with main.py --save_predictions 1"
    try:
        found = read_hdf5(path, FORMAT, TEXTS, NUMBERS, {"per_video": int})
    except RunError as error:
        raise RunError(f"{path}: {error}: {remedy}") from error
    predictions = MomentPredictions(**found)
    wrong = _contradiction(predictions)
    if wrong:
        raise RunError(f"{path}: {wrong}: {remedy}")
    return predictions


def _contradiction(p: MomentPredictions) -> str | None:
    queries, videos, events = len(p.desc_ids), len(p.vid_names), len(p.proposals)
    moments = tuple(p.videos.shape)
    shapes = {
        "durations": (videos,), "proposals": (events, 2), "videos": (queries, *moments[1:]),
        "events": moments, "scores": moments, "target": (queries,), "target_rank": (queries,),
        "target_scores": (queries, events),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tuple(getattr(p, name).shape) != shape:
            return f"{name} is {list(getattr(p, name).shape)}, expected {list(shape)}"
    for name, size in (("videos", videos), ("target", videos), ("events", events)):
        values = getattr(p, name)
        if values.numel() and not 0 <= values.min() <= values.max() < size:
            return f"{name} holds an index that is not one of the {size}"
    if not (p.durations.isfinite() & (p.durations >= 0)).all():
        return "durations holds what is no length of a video"
    return None


def export_all(
    folder: Path, predictions: MomentPredictions, queries: Sequence[Query]
) -> list[Path]:
    """Write predictions_tvr.json and predictions_qvhighlights.jsonl into the folder.

    Raises:
        OutputError: they cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in EXPORTS]
    for export, path in zip((export_tvr, export_qvhighlights), paths, strict=True):
        export(path, predictions, queries)
    return paths


def export_tvr(path: Path, predictions: MomentPredictions, queries: Sequence[Query]) -> None:
    """TVR's submission format: up to 100 predictions of every query, for each of its three tasks.

    {"video2idx": {…}, "VCMR": [{"desc_id", "desc", "predictions": [[idx, st, ed, score], …]}, …],
    "SVMR": moments of the right video, "VR": distinct videos, with their best moment}.
    """
    predictions = predictions.of(queries).cpu()
    tasks = {
        "VCMR": _lists(predictions),
        "SVMR": _lists(predictions.within_target()),
        "VR": _lists(predictions, distinct_videos=True),
    }
    content: dict = {"video2idx": {name: i for i, name in enumerate(predictions.vid_names)}}
    for task, rows in tasks.items():
        content[task] = [
            {"desc_id": query.desc_id, "desc": query.desc, "predictions": row}
            for query, row in zip(queries, rows, strict=True)
        ]
    _write_lines(path, [content])


def export_qvhighlights(
    path: Path, predictions: MomentPredictions, queries: Sequence[Query]
) -> None:
    """QVHighlights' submission format: one line a query, with moments of the right video.

    {"qid", "query", "vid", "pred_relevant_windows": [[st, ed, score], …]}.
    """
    moments = _lists(predictions.of(queries).cpu().within_target())
    lines = (
        {
            "qid": query.desc_id,
            "query": query.desc,
            "vid": query.vid_name,
            "pred_relevant_windows": [window for _, *window in row],
        }
        for query, row in zip(queries, moments, strict=True)
    )
    _write_lines(path, lines)


def _lists(
    predictions: MomentPredictions, distinct_videos: bool = False
) -> Iterator[list[list[float]]]:
    """[[video, start, end, score], …] of every query, with the shortest decimals of the float32.

    The first 100 moments; or the best moments of the first 100 distinct videos.
    """
    columns = zip(predictions.videos, predictions.events, predictions.scores, strict=True)
    for videos, events, scores in columns:
        indices = videos.tolist()
        picked = range(len(indices))
        if distinct_videos:
            first = {video: i for i, video in reversed(list(enumerate(indices)))}
            picked = sorted(first.values())
        picked = list(picked[:EXPORTED])
        seconds = predictions.seconds(videos[picked], events[picked])
        # -inf, from a NaN cosine, is not JSON
        numbers = torch.cat([seconds, scores[picked, None].clamp(min=-1)], dim=1)
        decimals = numbers.numpy().astype(str).astype(float).tolist()
        yield [[indices[i], *row] for i, row in zip(picked, decimals, strict=True)]


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
