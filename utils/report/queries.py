"""The report's queries: which are shown, and what templates/cards.html shows of each.

The macros serve any page that shows videos found for a text: `templates`, `Hit`, `Thumbnails`.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image

from dataloaders import DataError
from dataloaders.annotations import Query
from dataloaders.clips import ClipSource, VideoFolder
from dataloaders.ffmpeg import read_packets
from utils.evaluation.predictions import MomentPredictions
from utils.evaluation.tables import cell

SAMPLED = 32  # frames of a video that thumbnails are taken from
STRIP = 12  # thumbnails of the right video
THUMBNAIL = 112  # pixels
RETRIEVED = 5  # videos of a query that are shown
ROW_HEIGHT = 0.75  # rem of a pyramid's row


def templates() -> jinja2.Environment:
    """The pages of this folder, with what their macros call."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.globals |= {"extent": extent, "seconds": seconds}
    pages.filters |= {"cell": cell, "anchor": lambda title: title.lower().replace(" ", "-")}
    return pages


@dataclass(frozen=True)
class Hit:
    """A retrieved video with its best moment, as the macro found_list shows it.

    Attributes:
        start, end, duration: seconds; windows: true moments, of the right video.
        picture: the frame in the middle of the moment as a value of src, if it can be had.
    """

    name: str
    start: float
    end: float
    duration: float
    score: float
    picture: str | None = None
    right: bool = False
    windows: Sequence[tuple[float, float]] = ()


class Thumbnails:
    """Small frames of videos as values of src, each video decoded once.

    Attributes:
        failed: a message for every video that cannot be shown.
    """

    def __init__(self, clips: ClipSource | None) -> None:
        self.clips = clips
        self.failed: dict[str, str] = {}
        self.frames = functools.cache(self._frames)

    def at(self, vid_name: str, share: float) -> str | None:
        """The frame at a share of the video in [0, 1]."""
        frames = self.frames(vid_name)
        return None if frames is None else image_uri(frames[min(int(share * SAMPLED), SAMPLED - 1)])

    def strip(self, vid_name: str) -> list[str]:
        """Frames evenly over the video, in the middle of the strip's parts."""
        frames = [self.at(vid_name, (i + 0.5) / STRIP) for i in range(STRIP)]
        return [frame for frame in frames if frame is not None]

    def _frames(self, vid_name: str) -> np.ndarray | None:
        if self.clips is None:
            return None
        label = self.clips.label(vid_name)
        try:
            if self.clips.missing([vid_name]):
                raise DataError(f"{label}: no such video")
            frames = self.clips.load(vid_name, SAMPLED, self._side(vid_name)).float()
        except DataError as error:
            self.failed[vid_name] = str(error) if label in str(error) else f"{label}: {error}"
            return None
        side = min(THUMBNAIL, frames.shape[-1])
        small = torch.nn.functional.interpolate(frames, size=(side, side), mode="area")
        return small.round().byte().permute(0, 2, 3, 1).numpy()

    def _side(self, vid_name: str) -> int:
        """Of the clip's frames, which no one but a frame store notes."""
        if isinstance(self.clips, VideoFolder):
            track = read_packets(self.clips.path(vid_name), limit=2)
            return min(track.width, track.height)
        return self.clips.size


def image_uri(picture: np.ndarray | Image.Image, **options: object) -> str:
    """A picture, or uint8 [H, W, 3], as the value of src. Args: options: of JPEG, for PIL."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", **{"quality": 75} | options)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """A file as the value of src."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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

    def of_different_videos(rows: Iterable[int]) -> list[int]:
        first: dict[int, int] = {}
        for row in rows:
            first.setdefault(target[row], row)
        return list(first.values())[:count]

    return (
        of_different_videos(row for row in best if rank[row] == 1),
        of_different_videos(row for row in worst if rank[row] > 1),
    )


def retrieved(predictions: MomentPredictions, row: int) -> list[Hit]:
    """The first videos for a query, each with its best moment."""
    best: dict[int, Hit] = {}
    videos = predictions.videos[row].tolist()
    times = predictions.seconds(predictions.videos[row], predictions.events[row]).tolist()
    for video, (start, end), score in zip(
        videos, times, predictions.scores[row].tolist(), strict=True
    ):
        duration = float(predictions.durations[video])
        hit = Hit(predictions.vid_names[video], start, end, duration, score)
        best.setdefault(video, hit)
        if len(best) == RETRIEVED:
            break
    return list(best.values())


def query_card(
    predictions: MomentPredictions, row: int, query: Query, thumbnails: Thumbnails
) -> dict:
    """What the macro query_card shows: the right video with its pyramid, and those retrieved."""
    windows = query.windows or ()
    duration = float(predictions.durations[int(predictions.target[row])])
    hits = []
    for hit in retrieved(predictions, row):
        right = hit.name == query.vid_name
        middle = (hit.start + hit.end) / 2 / hit.duration if hit.duration else 0.0
        more = {"picture": thumbnails.at(hit.name, middle), "right": right}
        hits.append(vars(hit) | more | {"windows": windows if right else ()})
    scores = predictions.target_scores[row].nan_to_num(-1).numpy()
    return {
        "text": query.desc,
        "desc_id": query.desc_id,
        "rank": int(predictions.target_rank[row]),
        "videos": len(predictions.vid_names),
        "video": {
            "name": query.vid_name,
            "duration": duration,
            "windows": windows,
            "times": ", ".join(seconds(*window) for window in windows),
            "strip": thumbnails.strip(query.vid_name),
            "pyramid": pyramid(predictions.proposals.numpy(), scores, duration),
        },
        "hits": hits,
    }


def pyramid(proposals: np.ndarray, scores: np.ndarray, duration: float) -> dict:
    """Every event over its span, the bottom level lowest, coloured by score, the highest marked.

    Args:
        proposals: [N_e, 2] shares of the video.
        scores: [N_e].
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from utils.pictures.draw import event_rows

    scale = colormaps["cividis"]
    # Levels differ in length; one level's events differ by rounding.
    levels = np.unique((proposals[:, 1] - proposals[:, 0]).round(5), return_inverse=True)[1]
    rows, _ = event_rows(proposals.round(6).tolist(), levels.tolist())
    height = (max(rows) + 1) * ROW_HEIGHT
    chosen, low, high = int(scores.argmax()), float(scores.min()), float(scores.max())
    spans = [seconds(start * duration, end * duration) for start, end in proposals.tolist()]
    boxes = []
    for event, (start, end) in enumerate(proposals.tolist()):
        shade = (scores[event] - low) / ((high - low) or 1)
        top = height - (rows[event] + 1) * ROW_HEIGHT
        boxes.append({
            "chosen": event == chosen,
            "style": f"{extent(start, end, 1)};top:{top:.2f}rem;bottom:auto;"
            f"height:{ROW_HEIGHT - 0.1:.2f}rem;background:{to_hex(scale(shade))}",
            "title": f"event {event}, {spans[event]}: cosine {scores[event]:.3f}",
        })  # fmt: skip
    return {
        "boxes": boxes,
        "height": f"{height:.2f}",
        "low": f"{low:.3f}",
        "high": f"{high:.3f}",
        "stops": ",".join(to_hex(scale(x)) for x in np.linspace(0.0, 1.0, 9)),
        "summary": f"{len(scores)} events of the pyramid, cosine from {low:.3f} to {high:.3f}; "
        f"the highest is event {chosen}, {spans[chosen]}",
    }


def seconds(start: float, end: float) -> str:
    """A moment in words."""
    return f"{start:.1f}–{end:.1f} s"


def extent(start: float, end: float, whole: float) -> str:
    """Where a part of something lies on an axis of it, as CSS."""
    start, end = (min(max(time / whole, 0), 1) if whole else 0 for time in (start, end))
    return f"left:{100 * start:.3f}%;width:{100 * max(end - start, 0):.3f}%"
