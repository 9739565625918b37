"""Before a run starts: which videos can be used.

Only headers are read here. A clip that breaks while it decodes stops the run later, in a loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from dataloaders import DataError
from dataloaders.annotations import Video
from dataloaders.clips import ClipSource
from dataloaders.ffmpeg import PREPARED_FPS

THREADS = 16  # probing is mostly waiting, on a net disk above all
# A clip with so many times more or fewer frames than its annotated length asks for is doubtful.
DOUBTFUL = 2.0


def probe_all(
    videos: Sequence[Video], clips: ClipSource, size: int
) -> tuple[dict[str, str], list[str]]:
    """Probe every video of a split, for a model of square frames with sides of `size` pixels.

    Returns:
        Why videos cannot be used, by their names; and the names of doubtful ones, with far more or
        fewer frames than 3 a second.
    """
    missing = clips.missing([video.vid_name for video in videos])
    unusable = {name: f"{clips.label(name)}: {reason}" for name, reason in missing.items()}

    def probe(video: Video) -> int | DataError | None:
        try:
            return clips.probe(video.vid_name, size)
        except DataError as error:
            return error

    doubtful = []
    present = [video for video in videos if video.vid_name not in unusable]
    shown = {"desc": "check videos", "unit": "video", "dynamic_ncols": True, "leave": False}
    with ThreadPoolExecutor(THREADS) as pool:
        probed = tqdm(pool.map(probe, present), total=len(present), **shown)
        for video, found in zip(present, probed, strict=True):
            if isinstance(found, DataError):
                unusable[video.vid_name] = str(found)
            elif found is not None:
                expected = video.duration * PREPARED_FPS
                if not expected / DOUBTFUL - 1 <= found <= expected * DOUBTFUL + 1:
                    doubtful.append(video.vid_name)
    return unusable, doubtful
