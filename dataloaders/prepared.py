"""What a prepared clip shows of a video: which moments, in what size, and how much of it decodes.

Preparing a data set writes this to files, searching one's own videos reads it straight from them.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from dataloaders import DataError
from dataloaders.ffmpeg import PREPARED_FPS, PREPARED_SHORT_SIDE, Track

MAX_SIDE = 16384  # what H.264 can hold

# Sound and pictures rarely end together, and headers round: a second of difference between the
# video stream and the file's own duration says nothing about the pictures.
CLOCK_TOLERANCE = 1.0  # seconds
# A slot of 1/3 s is lost if the file has frames in it, but none decodes within this of its middle.
LOST_AFTER = 0.5  # seconds
WARN_BELOW = 0.95  # share of a video that decodes


def prepared_size(
    width: int, height: int, sample_aspect: Fraction = Fraction(1),
    authors_scale: bool = False, short: int = PREPARED_SHORT_SIDE,
) -> tuple[int, int]:  # fmt: skip
    """Width and height of the prepared clip of an upright video.

    The short side becomes `short`, the other keeps the aspect as displayed and is rounded down to
    an even number. With `authors_scale` a portrait video gets the width 224 and the height
    ⌊224·a/2⌋·2 < 224, a = width/height of the stored pixels: squashed, as in the authors' files.

    DataError: the aspect is too extreme for H.264.
    """
    aspect = Fraction(width, height) * (1 if authors_scale else sample_aspect)
    if aspect >= 1:
        size = int(short * aspect / 2) * 2, short
    elif authors_scale:
        size = short, max(int(short * aspect / 2) * 2, 2)
    else:
        size = short, int(short / aspect / 2) * 2
    if max(size) > MAX_SIDE:
        raise DataError(f"its aspect of {width}:{height} is too extreme to prepare")
    return size


def video_clock(packets: Track) -> tuple[float, float | None]:
    """When the video starts and how long it lasts, in seconds.

    The start is 0, or below where the container places frames before its own zero. Pictures that
    come later than sound do not move the start: times in annotations count from the file's zero.
    The duration is None if the container tells no times.
    """
    times = packets.times
    if np.isnan(times).any():
        return 0.0, None
    start = min(0.0, float(times[:, 0].min()))
    seconds = float(times[:, 1].max()) - start
    claimed = packets.container_seconds
    if claimed and 0 < seconds - claimed < CLOCK_TOLERANCE:
        seconds = claimed  # an edit list cuts the last frames, and players do not show them
    return start, seconds


def decoded_share(packets: Track, frames: np.ndarray, seconds: float | None) -> float:
    """Share of what the container holds that decodes, between 0 and 1.

    Args:
        frames: float64 [n], times of the decoded frames, from the start of the video.
        seconds: duration of what the container holds, None if it tells no times.
    """
    if seconds is None:
        return min(1.0, len(frames) / len(packets.times))
    starts = packets.times[:, 0] - min(0.0, packets.times[:, 0].min())
    middles = (np.unique(np.floor(starts * PREPARED_FPS)) + 0.5) / PREPARED_FPS
    frames = np.concatenate([[-np.inf], np.sort(frames), [np.inf]])
    after = np.searchsorted(frames, middles)
    distance = np.minimum(middles - frames[after - 1], frames[after] - middles)
    return float(np.mean(distance <= LOST_AFTER))


def clip_length(seconds: float) -> int:
    """Frames of the clip of a video: the last is there if at least half of its time is left."""
    return max(1, int(seconds * PREPARED_FPS + 0.5))


def clip_rate(seconds: float | None) -> str:
    """ffmpeg's filter that takes a frame from the middle of every third of a second.

    What is shorter than half of that still gives its one frame.
    """
    short = seconds is not None and seconds * PREPARED_FPS < 0.5
    return f"fps={PREPARED_FPS}:start_time=0" + (":eof_action=pass" if short else "")


def clip_format(size: tuple[int, int]) -> str:
    """ffmpeg's filters that give frames the size and the colours of a clip."""
    # One matrix and range for all clips: what readers assume that ignore tags. The scaler goes from
    # another matrix by way of RGB of 8 bits, which is too coarse without the flags.
    scale = f"scale={size[0]}:{size[1]}:flags=bicubic+accurate_rnd+full_chroma_int"
    return f"{scale}:out_color_matrix=bt601:out_range=tv,format=yuv420p"
