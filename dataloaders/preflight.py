"""Before a run starts: which videos can be used; and a record of those that it goes without.

Only headers are read here. A clip that breaks while it decodes is found later, by the loaders.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dataloaders.annotations import Query, Video
from dataloaders.clips import ClipSource
from dataloaders.video import VideoError
from utils.ffmpeg import PREPARED_FPS
from utils.files import append_line, whole_file
from utils.run_log import reduced_size

logger = logging.getLogger(__name__)

MIN_THREADS = 8  # a look at a file is mostly waiting, on a net disk above all
# A clip with so many times more or fewer frames than its annotated length asks for is doubtful.
DOUBTFUL = 2.0


class LeftOut:
    """The videos that a run goes without, each recorded once and listed in a file.

    Args:
        path: the list, one JSON object a line: split, vid_name, queries, reason. Lines of an
            older one on these splits are removed; it appears with the first video.
        splits: the queries of each split as annotated, by its name.
    """

    def __init__(self, path: Path, splits: dict[str, Sequence[Query]]) -> None:
        self.path = path
        self._forget(splits)
        self._splits = splits
        self._queries = {
            split: Counter(query.vid_name for query in queries) for split, queries in splits.items()
        }
        self._names: dict[str, dict[str, None]] = {split: {} for split in splits}

    def add(self, split: str, reasons: Mapping[str, str]) -> list[str]:
        """Record videos by name with the reasons; returns those that were not known already.

        Raises:
            OutputError: the list cannot be written.
        """
        known = self._names[split]
        new = {name: reason for name, reason in reasons.items() if name not in known}
        known.update(dict.fromkeys(new))
        lines = [
            json.dumps(
                {
                    "split": split,
                    "vid_name": name,
                    "queries": self._queries[split][name],
                    "reason": reason,
                }
            )
            for name, reason in new.items()
        ]
        if lines:
            append_line(self.path, "\n".join(lines))
        return list(new)

    def _forget(self, splits: Collection[str]) -> None:
        """Take lines on these splits out of the list: an evaluation does not look at training's."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn: it is made again
                if json.loads(line)["split"] not in splits:
                    kept.append(line + "\n")
        if kept:
            with whole_file(self.path) as part:
                part.write_text("".join(kept), encoding="utf-8")
        else:
            self.path.unlink()

    def leave_out(self, split: str, vid_name: str, reason: str) -> None:
        """Record a video that turned out not to decode, with a warning."""
        if self.add(split, {vid_name: reason}):
            logger.warning("%s is left out of the %s split: %s", vid_name, split, reason)

    def kept(self, split: str, queries: Sequence[Query]) -> list[Query]:
        """Those of the queries whose videos are not left out."""
        return [query for query in queries if query.vid_name not in self._names[split]]

    def numbers(self, split: str) -> dict[str, int]:
        """For the records of a run: `left_numbers` of a split."""
        queries = self._splits[split]
        return left_numbers(split, queries, self.kept(split, queries))

    def note(self, split: str) -> str | None:
        """The reduced size of a split, to stand beside its results; None if nothing is left out."""
        size = reduced_size(self.numbers(split), split)
        return size and f"{size}: {self.path} lists what is left out"


def left_numbers(split: str, queries: Sequence[Query], kept: Sequence[Query]) -> dict[str, int]:
    """What is left of a split and what is not: {} if all is there.

    ``<split>_videos``, ``<split>_videos_left_out``, and the same of queries.

    Args:
        queries: all that are annotated; kept: those whose videos are there.
    """
    if len(kept) == len(queries):
        return {}
    numbers = {}
    for what, left, all_ in (
        ("videos", *(len({query.vid_name for query in some}) for some in (kept, queries))),
        ("queries", len(kept), len(queries)),
    ):
        numbers |= {f"{split}_{what}": left, f"{split}_{what}_left_out": all_ - left}
    return numbers


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


def _plausible(frames: int, seconds: float) -> bool:
    expected = seconds * PREPARED_FPS
    return expected / DOUBTFUL - 1 <= frames <= expected * DOUBTFUL + 1
