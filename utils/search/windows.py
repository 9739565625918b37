"""How a video of any length is cut into windows of the length that the model was trained on.

Up to 1.5 W a video is one window: the published protocol. A longer one is cut into windows of W
seconds, three quarters of a window apart, the last one flush with the end. All lie on one grid of
N_f frames to W seconds, so neighbours share the frames where they overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dataloaders.ffmpeg import PREPARED_FPS
from dataloaders.prepared import clip_length

WINDOW_SECONDS = 64.0  # W of a model that does not know how long its training clips were
ONE_WINDOW = 1.5  # times W: so long a video is not cut


@dataclass(frozen=True)
class Window:
    """A stretch of a video that the model sees at once.

    Attributes:
        first: its first frame, a number on the video's grid.
        start, seconds: where it begins and how long it is.
    """

    first: int
    start: float
    seconds: float

    def times(self, proposals: np.ndarray, duration: float) -> np.ndarray:
        """Of events, given as shares of the window [N_e, 2], seconds of a video of that length."""
        return np.clip(self.start + proposals * self.seconds, 0, duration)


def cut_windows(seconds: float, window_seconds: float, num_frames: int) -> list[Window]:
    """The windows of a video of so many seconds, in order.

    Args:
        window_seconds: W.
        num_frames: N_f frames of a window.
    """
    if seconds <= ONE_WINDOW * window_seconds:
        return [Window(0, 0.0, seconds)]
    spacing = window_seconds / num_frames
    last = grid_length(seconds, window_seconds, num_frames) - num_frames
    stride = max(1, num_frames * 3 // 4)
    return [Window(i, i * spacing, window_seconds) for i in (*range(0, last, stride), last)]


def grid_length(seconds: float, window_seconds: float, num_frames: int) -> int:
    """Frames of the grid; the last one's time may end after the video does."""
    return math.ceil(seconds * num_frames / window_seconds - 1e-6)


def grid_step(window_seconds: float, num_frames: int) -> float:
    """Frames of a clip of 3 frames a second from one frame of the grid to the next."""
    return PREPARED_FPS * window_seconds / num_frames


def grid_frames(seconds: float, window_seconds: float, num_frames: int) -> np.ndarray:
    """Which frame of the clip of a video each frame of the grid is: int64, ascending.

    The middle one of its time, as the published protocol takes it: what it would take of a window
    that was cut out, `eval_indices`.
    """
    step = grid_step(window_seconds, num_frames)
    count = grid_length(seconds, window_seconds, num_frames)
    frames = (step / 2 + step * np.arange(count)).astype(np.int64)
    return frames.clip(max=clip_length(seconds) - 1)
