"""Before a run starts: which videos can be used; and a record of those that it goes without.

Only headers are read here. A clip that breaks while it decodes is found later, by the loaders.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from dataloaders import DataError
from dataloaders.annotations import Video
from dataloaders.clips import ClipSource
from dataloaders.ffmpeg import PREPARED_FPS

logger = logging.getLogger(__name__)

MIN_THREADS = 8  # a look at a file is mostly waiting, on a net disk above all
# A clip with so many times more or fewer frames than its annotated length asks for is doubtful.
DOUBTFUL = 2.0


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

    def probe(video: Video) -> int | DataError | None:
        try:
            return clips.probe(video.vid_name, size)
        except DataError as error:
            return error

    doubtful = []
    if open_files:
        with ThreadPoolExecutor(max(num_threads, MIN_THREADS)) as pool:
            seen = tqdm(
                pool.map(probe, present),
                desc="check videos",
                total=len(present),
                unit="video",
                dynamic_ncols=True,
                leave=False,
            )
            for video, found in zip(present, seen, strict=True):
                if isinstance(found, DataError):
                    unusable[video.vid_name] = str(found)
                elif found is not None and not _plausible(found, video.duration):
                    doubtful.append(video.vid_name)
    return unusable, doubtful


def _plausible(frames: int, seconds: float) -> bool:
    expected = seconds * PREPARED_FPS
    return expected / DOUBTFUL - 1 <= frames <= expected * DOUBTFUL + 1
