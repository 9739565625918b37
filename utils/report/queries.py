"""The report's queries: which are shown, and what templates/report.html shows of each."""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
import torch
from PIL import Image

from dataloaders import DataError
from dataloaders.annotations import Query
from dataloaders.clips import ClipSource, VideoFolder
from dataloaders.ffmpeg import read_packets
from utils.evaluation.predictions import MomentPredictions
from utils.pictures.draw import STYLES, QueryPicture, save_overview

SAMPLED = 32  # frames of a video that thumbnails are taken from
THUMBNAIL = 112  # pixels
RETRIEVED = 5  # videos of a query that are shown
DRAWING = {"quality": 88, "subsampling": 0}  # of JPEG; as PNG they are three times as large


class Thumbnails:
    """Small frames of videos, each video decoded once."""

    def __init__(self, clips: ClipSource | None) -> None:
        self.clips = clips
        self.failed: dict[str, str] = {}  # a message for every video that cannot be shown
        self.frames = functools.cache(self._frames)

    def _frames(self, vid_name: str) -> torch.Tensor | None:
        """uint8 [SAMPLED, 3, S, S]."""
        if self.clips is None:
            return None
        label = self.clips.label(vid_name)
        try:
            if self.clips.missing([vid_name]):
                raise DataError(f"{label}: no such video")
            if isinstance(self.clips, VideoFolder):  # only a frame store notes its frames' size
                track = read_packets(self.clips.path(vid_name), limit=2)
                side = min(track.width, track.height)
            else:
                side = self.clips.size
            frames = self.clips.load(vid_name, SAMPLED, side).float()
        except DataError as error:
            self.failed[vid_name] = str(error) if label in str(error) else f"{label}: {error}"
            return None
        side = min(THUMBNAIL, side)
        small = torch.nn.functional.interpolate(frames, size=(side, side), mode="area")
        return small.round().byte()


def image_uri(image: Image.Image, **options: object) -> str:
    """A picture as the value of src; options of JPEG, for PIL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", **options)
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

    def first_of_videos(order: torch.Tensor, shown: torch.Tensor) -> list[int]:
        rows: dict[int, int] = {}
        for row in order.argsort(descending=True, stable=True).tolist():
            if shown[row]:
                rows.setdefault(int(predictions.target[row]), row)
        return list(rows.values())[:count]

    return first_of_videos(lead, rank == 1), first_of_videos(rank, rank > 1)


def retrieved(predictions: MomentPredictions, row: int) -> list[dict]:
    """The first videos for a query, each with its best moment in seconds and its cosine."""
    hits: dict[int, dict] = {}
    videos = predictions.videos[row]
    times = predictions.seconds(videos, predictions.events[row]).tolist()
    scores = predictions.scores[row].tolist()
    for video, moment, score in zip(videos.tolist(), times, scores, strict=True):
        if len(hits) < RETRIEVED:
            hit = {"name": predictions.vid_names[video], "moment": moment, "score": score}
            hits.setdefault(video, hit | {"duration": float(predictions.durations[video])})
    return list(hits.values())


def query_card(
    predictions: MomentPredictions, row: int, query: Query, thumbnails: Thumbnails
) -> dict:
    """What the page shows of a query: the right video with its events, and those retrieved."""
    hits = retrieved(predictions, row)
    for hit in hits:
        hit["right"] = hit["name"] == query.vid_name
        frames = thumbnails.frames(hit["name"])
        if frames is not None:
            share = sum(hit["moment"]) / 2 / hit["duration"] if hit["duration"] else 0
            frame = frames[min(int(share * SAMPLED), SAMPLED - 1)]
            hit["picture"] = image_uri(Image.fromarray(frame.permute(1, 2, 0).numpy()))
    return {
        "query": query,
        "rank": int(predictions.target_rank[row]),
        "videos": len(predictions.vid_names),
        "hits": hits,
        **_events_picture(predictions, row, query, thumbnails.frames(query.vid_name)),
    }


def _events_picture(
    predictions: MomentPredictions, row: int, query: Query, frames: torch.Tensor | None
) -> dict[str, str]:
    """The right video's frames, true moments and all events by their cosine: src and alt."""
    if frames is None:
        frames = torch.full((SAMPLED, 3, 8, 8), 238, dtype=torch.uint8)  # grey
    proposals = predictions.proposals.numpy()
    scores = predictions.target_scores[row].nan_to_num(-1).numpy()
    # Levels differ in length; one level's events differ by rounding.
    levels = np.unique((proposals[:, 1] - proposals[:, 0]).round(5), return_inverse=True)[1]
    event = int(scores.argmax())
    picture = QueryPicture(
        query.duration, query.windows or (), frames[1::2],
        proposals.astype(float) * query.duration, levels + 1, event, scores, "cosine",
    )  # fmt: skip
    content = io.BytesIO()
    save_overview(content, picture, STYLES["readable"], format="jpeg", dpi=110, pil_kwargs=DRAWING)
    start, end = picture.spans[event]
    alt = (
        f"{len(scores)} events of the pyramid, cosine from {scores.min():.3f} to "
        f"{scores.max():.3f}; the highest is event {event}, {seconds(start, end)}; true moment: "
        + (", ".join(seconds(*window) for window in picture.windows) or "unknown")
    )
    return {"source": data_uri("image/jpeg", content.getvalue()), "alt": alt}


def seconds(start: float, end: float) -> str:
    """A moment in words."""
    return f"{start:.1f}–{end:.1f} s"
