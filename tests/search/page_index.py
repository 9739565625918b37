"""A small index for the page: real videos whose brightness tells the second, and made-up scores."""

from __future__ import annotations

import fnmatch
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataloaders.ffmpeg import H264_ARGUMENTS, raw_input_arguments, run_ffmpeg
from utils import SearchError
from utils.search.hits import Hit, Moment, Results, Video

FPS = 10
HOSTILE = "<img src=x onerror=document.title='gotcha'>.mp4"
CODECS = {
    "h264": H264_ARGUMENTS,
    "vp8": ["-c:v", "libvpx", "-b:v", "1M", "-deadline", "realtime"],
    "mpeg4": ["-c:v", "mpeg4", "-q:v", "3"],
    "hevc": ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:pools=1"],
}


def brightness(second: float) -> int:
    """Of every pixel in that second."""
    return 30 + 16 * int(second)


def write_sample(path: Path, codec: str, seconds: int = 12, size: tuple[int, int] = (90, 160)):
    """size: height, width."""
    levels = (brightness(i / FPS) for i in range(seconds * FPS))
    feed = (np.full((*size, 3), level, np.uint8).tobytes() for level in levels)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = raw_input_arguments(size[1], size[0], FPS)
    arguments = ["-v", "level+error", *raw, *CODECS[codec], "-y", f"file:{path}"]
    done = run_ffmpeg(arguments, feed=feed)
    assert done.status == 0, done.messages


@dataclass
class FakeIndex:
    """What the page asks of a VideoIndex. `shows`: by name the (start, end) that queries find."""

    roots: list[str]
    known: dict[str, Video] = field(default_factory=dict)
    shows: dict[str, tuple[float, float]] = field(default_factory=dict)
    version: int = 1
    indexing: dict | None = None
    delay: float = 0.0

    def put(self, name: str, duration: float, start: float, end: float) -> Video:
        video = Video(f"v{len(self.known)}", str(Path(self.roots[0], name)), name, 1, 0.0, duration)
        self.known[video.id] = video
        self.shows[name] = (start, end)
        return video

    def load(self) -> None:
        pass

    def search(
        self, query, k=10, by="videos", within=None, since=None, until=None, min_seconds=None,
        max_seconds=None,
    ) -> Results:  # fmt: skip
        if "fail" in query:
            raise ZeroDivisionError("a secret of the server")
        if "refuse" in query:
            raise SearchError("the index was made by another model: give --rebuild")
        time.sleep(self.delay)
        hits = []
        for video in self.videos(within):
            best = self._best(query, video)
            if by == "videos":
                hits.append(Hit(video, best[0].score, best))
            else:
                hits += [Hit(video, moment.score, [moment]) for moment in best]
        hits = [] if "nothing" in query else hits
        return Results(query, 0.01, self.version, sorted(hits, key=lambda h: -h.score)[:k])

    def _best(self, query: str, video: Video) -> list[Moment]:
        start, end = self.shows[video.name]
        high = 0.31 if any(word in video.name for word in query.split()) else 0.2
        high -= 0.001 * int(video.id[1:])
        return [Moment(start, end, high, 1), Moment(0.0, video.duration / 8, high - 0.05, 0)]

    def timeline(self, query: str, video_id: str) -> list[Moment]:
        video = self.video(video_id)
        best, found = self._best(query, video)[0], []
        for level, events in enumerate((32, 16, 8, 4, 2, 1)):
            length = video.duration / events
            for i in range(events):
                shared = min((i + 1) * length, best.end) - max(i * length, best.start)
                overlap = max(0.0, shared) / (length + best.end - best.start - max(0.0, shared))
                found.append(
                    Moment(
                        i * length, (i + 1) * length, 0.12 + overlap * (best.score - 0.12), level
                    )
                )
        return sorted(found, key=lambda m: m.start)

    def videos(self, within: str | None = None) -> list[Video]:
        videos = list(self.known.values())
        return [v for v in videos if within is None or fnmatch.fnmatchcase(v.name, within)]

    def video(self, video_id: str) -> Video:
        if video_id not in self.known:
            raise SearchError(f"no video {video_id}")
        return self.known[video_id]

    def status(self) -> dict:
        hours = sum(video.duration for video in self.known.values()) / 3600
        count = len(self.known)
        return {
            "videos": count, "failed": 0, "hours": hours, "events": 63 * count,
            "version": self.version, "indexing": self.indexing,
        }  # fmt: skip


def sample_index(folder: Path) -> FakeIndex:
    """Every kind of video the page meets: red door first for a query that says so."""
    index = FakeIndex([str(folder)])
    for name, codec, size, shown in [
        ("red door.mp4", "h264", (180, 320), (5.0, 7.5)),
        ("holiday/boat.webm", "vp8", (90, 160), (2.0, 4.0)),
        ("holiday/old camera.avi", "mpeg4", (90, 160), (6.0, 8.0)),
        ("holiday/new phone.mp4", "hevc", (90, 160), (4.0, 6.0)),
        (HOSTILE, "h264", (160, 90), (3.0, 5.0)),
    ]:
        write_sample(folder / name, codec, size=size)
        index.put(name, 12.0, *shown)
    index.put("lost.mp4", 12.0, 1.0, 2.0)
    outside = folder.with_name(folder.name + " secret.mp4")
    write_sample(outside, "h264", seconds=1)
    (folder / "link.mp4").symlink_to(outside)
    index.put("link.mp4", 1.0, 0.0, 1.0)
    return index


class Served:
    """An app behind a socket of this machine, in a thread.

    Attributes:
        port, url: where.
    """

    def __init__(self, app) -> None:
        import uvicorn

        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="critical", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Served:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
