"""Before a run starts: which videos can be used; and a record of those that it goes without.

Only headers are read here. A clip that breaks while it decodes is found later, by the loaders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dataloaders.annotations import Query, Video
from dataloaders.clips import MAX_LISTED, ClipSource
from dataloaders.video import VideoError
from utils.ffmpeg import PREPARED_FPS
from utils.logger import append_json

MIN_THREADS = 8  # a look at a file is mostly waiting, on a net disk above all
# A clip with so many times more or fewer frames than its annotated length asks for is doubtful.
DOUBTFUL = 2.0


class LeftOut:
    """The videos that a run goes without, each recorded once and listed in a file.

    Args:
        path: the list, one JSON object a line: split, vid_name, queries, reason. An older one is
            removed; it appears with the first video.
        splits: the queries of each split as annotated, by its name.
    """

    def __init__(self, path: Path, splits: dict[str, Sequence[Query]]) -> None:
        self.path = path
        self.path.unlink(missing_ok=True)
        self._queries = {
            split: Counter(query.vid_name for query in queries) for split, queries in splits.items()
        }
        self._names: dict[str, dict[str, None]] = {split: {} for split in splits}

    def add(self, split: str, vid_name: str, reason: str) -> bool:
        """Record a video; False if it is known already."""
        if vid_name in self._names[split]:
            return False
        self._names[split][vid_name] = None
        queries = self._queries[split][vid_name]
        record = {"split": split, "vid_name": vid_name, "queries": queries, "reason": reason}
        append_json(self.path, record)
        return True

    def kept(self, split: str, queries: Sequence[Query]) -> list[Query]:
        """Those of the queries whose videos are not left out."""
        return [query for query in queries if query.vid_name not in self._names[split]]

    def numbers(self) -> dict[str, int]:
        """For the records of a run, of every split that lacks videos: what is left and what is not.

        ``<split>_videos``, ``<split>_videos_left_out``, and the same of queries.
        """
        found = {}
        for split, names in self._names.items():
            if names:
                queries = self._queries[split]
                lost = sum(queries[name] for name in names)
                found[f"{split}_videos"] = len(queries) - len(names)
                found[f"{split}_videos_left_out"] = len(names)
                found[f"{split}_queries"] = sum(queries.values()) - lost
                found[f"{split}_queries_left_out"] = lost
        return found

    def note(self, split: str) -> str | None:
        """The reduced size of a split, to stand beside its results; None if nothing is left out."""
        names, queries = self._names[split], self._queries[split]
        if not names:
            return None
        total = sum(queries.values())
        lost = sum(queries[name] for name in names)
        return (
            f"without {len(names):,} of the {len(queries):,} videos, so on {total - lost:,} of the "
            f"{total:,} queries: {self.path} lists them"
        )


def find_unusable(
    videos: Sequence[Video], clips: ClipSource, size: int, *, open_files: bool, num_threads: int
) -> tuple[dict[str, str], list[str]]:
    """Look at every video of a split.

    Args:
        size: side of the model's square frames, pixels.
        open_files: read their headers; else only the missing ones are found.
        num_threads: files looked at side by side, at least.

    Returns:
        Why the unusable ones are, by name; and the names of doubtful ones, with far more or fewer
        frames than 3 a second.
    """
    missing = set(clips.missing([video.vid_name for video in videos]))
    unusable = {
        video.vid_name: f"{clips.label(video.vid_name)}: missing"
        for video in videos
        if video.vid_name in missing
    }
    present = [video for video in videos if video.vid_name not in missing]

    def look_at(video: Video) -> int | VideoError | None:
        try:
            return clips.look_at(video.vid_name, size)
        except VideoError as error:
            return error

    doubtful = []
    if open_files:
        with ThreadPoolExecutor(max(num_threads, MIN_THREADS)) as pool:
            seen = tqdm(
                pool.map(look_at, present),
                desc="check videos",
                total=len(present),
                unit="video",
                dynamic_ncols=True,
                leave=False,
            )
            for video, found in zip(present, seen, strict=True):
                if isinstance(found, VideoError):
                    unusable[video.vid_name] = str(found)
                elif found is not None and not _plausible(found, video.duration):
                    doubtful.append(video.vid_name)
    return unusable, doubtful


def listed(lines: Sequence[str]) -> str:
    """Some of the lines, and how many more there are."""
    more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n".join([*lines[:MAX_LISTED], *more])


def _plausible(frames: int, seconds: float) -> bool:
    expected = seconds * PREPARED_FPS
    return expected / DOUBTFUL - 1 <= frames <= expected * DOUBTFUL + 1
