"""The report's queries: which are shown, and the card of each with what was retrieved for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloaders import DataError
from dataloaders.annotations import Query
from dataloaders.ffmpeg import read_packets
from dataloaders.video import load_clip
from utils.evaluation.predictions import MomentPredictions
from utils.report import parts as parts

SAMPLED = 32  # frames of a video that thumbnails are taken from
STRIP = 12  # thumbnails of the right video
THUMBNAIL = 112  # pixels
RETRIEVED = 5  # videos of a query that are shown


@dataclass(frozen=True)
class Found:
    """A retrieved video with its best moment: start and end in seconds."""

    video: int
    start: float
    end: float
    score: float


class Thumbnails:
    """Small frames of the split's videos, each video decoded once.

    Attributes:
        failed: a message for every video that cannot be shown.
    """

    def __init__(self, video_dir: Path | None) -> None:
        self.video_dir = video_dir
        self.failed: dict[str, str] = {}
        self.frames = functools.cache(self._frames)

    def at(self, vid_name: str, share: float) -> np.ndarray | None:
        """The frame at a share of the video in [0, 1]: uint8 [S, S, 3]."""
        frames = self.frames(vid_name)
        return None if frames is None else frames[min(int(share * SAMPLED), SAMPLED - 1)]

    def strip(self, vid_name: str) -> list[np.ndarray]:
        """Frames evenly over the video, in the middle of the strip's parts."""
        frames = [self.at(vid_name, (i + 0.5) / STRIP) for i in range(STRIP)]
        return [frame for frame in frames if frame is not None]

    def _frames(self, vid_name: str) -> np.ndarray | None:
        if self.video_dir is None:
            return None
        path = self.video_dir / f"{vid_name}.mp4"
        try:
            if not path.is_file():
                raise DataError(f"{path}: no such video file")
            try:
                track = read_packets(path, limit=2)
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
            frames = load_clip(path, SAMPLED, min(track.width, track.height)).float()
        except DataError as error:
            self.failed[vid_name] = str(error)
            return None
        side = min(THUMBNAIL, frames.shape[-1])
        small = torch.nn.functional.interpolate(frames, size=(side, side), mode="area")
        return small.round().byte().permute(0, 2, 3, 1).numpy()


def best_and_worst(predictions: MomentPredictions, count: int) -> tuple[list[int], list[int]]:
    """Rows of queries to show, each of another video: two lists of at most `count`.

    Best: the right video at rank 1, far ahead of every other. Worst: the highest ranks.
    """
    rank = predictions.target_rank
    own = predictions.target_scores.nan_to_num(-torch.inf).amax(1)
    others = predictions.videos != predictions.target[:, None]
    next_best = torch.where(others, predictions.scores, -torch.inf).amax(1)
    lead = torch.where(rank == 1, own - next_best, -torch.inf)
    best = lead.argsort(descending=True, stable=True).tolist()
    worst = rank.argsort(descending=True, stable=True).tolist()
    target = predictions.target.tolist()
    return (
        _of_different_videos((row for row in best if rank[row] == 1), target, count),
        _of_different_videos((row for row in worst if rank[row] > 1), target, count),
    )


def _of_different_videos(rows: Sequence[int], target: Sequence[int], count: int) -> list[int]:
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(target[row], row)
        if len(first) == count:
            break
    return list(first.values())


def retrieved(predictions: MomentPredictions, row: int) -> list[Found]:
    """The first videos for a query, each with its best moment."""
    best: dict[int, Found] = {}
    times = predictions.seconds(predictions.videos[row], predictions.events[row])
    for video, (start, end), score in zip(
        predictions.videos[row].tolist(), times.tolist(), predictions.scores[row].tolist(),
        strict=True,
    ):  # fmt: skip
        best.setdefault(video, Found(video, start, end, score))
        if len(best) == RETRIEVED:
            break
    return list(best.values())


def query_card(
    predictions: MomentPredictions, row: int, query: Query, thumbnails: Thumbnails
) -> str:
    """One query: the right video with its pyramid, and the videos that were retrieved."""
    rank, videos = int(predictions.target_rank[row]), len(predictions.vid_names)
    badge = "good" if rank == 1 else "bad"
    return (
        f'<article class="card query" tabindex="-1"><h3>{parts.text(query.desc)}</h3>'
        f'<p><span class="badge {badge}">right video at rank {rank} of {videos}</span> '
        f'<span class="soft">query {parts.text(query.desc_id)}</span></p>'
        f"{_right_video(predictions, row, query, thumbnails)}"
        f"<h4>Retrieved videos, each with its best moment</h4>"
        f"{_found_list(predictions, row, query, thumbnails)}</article>"
    )


def _right_video(
    predictions: MomentPredictions, row: int, query: Query, thumbnails: Thumbnails
) -> str:
    scores = predictions.target_scores[row].nan_to_num(-1).numpy()
    proposals = predictions.proposals.numpy()
    event = int(scores.argmax())
    duration = float(predictions.durations[int(predictions.target[row])])
    frames = "".join(
        f'<img src="{parts.data_uri(frame)}" alt="" loading="lazy">'
        for frame in thumbnails.strip(query.vid_name)
    )
    windows = [(start, end, "true") for start, end in query.windows or ()]
    times = ", ".join(parts.seconds(start, end) for start, end, _ in windows)
    true_lane = parts.lane(duration, windows, f"true moment: {times}") if windows else ""
    return (
        f"<h4>The right video: {parts.text(query.vid_name)}, {duration:.1f} s</h4>"
        f'<div class="strip" aria-hidden="true">{frames}</div>{true_lane}'
        f"{parts.pyramid(proposals, scores, event, duration, 'cosine')}{parts.time_axis(duration)}"
        f"{parts.legend(scores, 'cosine', bool(windows))}"
    )


def _found_list(
    predictions: MomentPredictions, row: int, query: Query, thumbnails: Thumbnails
) -> str:
    items = []
    for place, found in enumerate(retrieved(predictions, row), start=1):
        name = predictions.vid_names[found.video]
        duration = float(predictions.durations[found.video])
        right = name == query.vid_name
        middle = (found.start + found.end) / 2 / duration if duration else 0.0
        frame = thumbnails.at(name, middle)
        picture = (
            '<span class="blank"></span>' if frame is None
            else f'<img src="{parts.data_uri(frame)}" alt="" loading="lazy">'
        )  # fmt: skip
        moments = [(found.start, found.end, "chosen")]
        moment = parts.seconds(found.start, found.end)
        lanes = parts.lane(duration, moments, f"retrieved moment: {moment}")
        if right and query.windows:
            windows = [(start, end, "true") for start, end in query.windows]
            lanes += parts.lane(duration, windows, "true moment, on the same time axis")
        mark = ' <span class="badge good">right video</span>' if right else ""
        items.append(
            f'<li{" class=right" if right else ""}><span class="place">{place}</span>{picture}'
            f'<div><div class="name">{parts.text(name)}{mark}</div>'
            f'<div class="when">{moment} of {duration:.1f} s · cosine {found.score:.3f}</div></div>'
            f'<div class="timeline">{lanes}</div></li>'
        )
    return f'<ol class="found">{"".join(items)}</ol>'
