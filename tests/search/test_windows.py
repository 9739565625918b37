"""How videos are cut: nothing is left out, nothing is seen twice as something else."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from dataloaders.sampling import eval_indices
from utils.search.windows import ONE_WINDOW, cut_windows, grid_frames, grid_length, grid_step

SECONDS = st.floats(0.01, 40_000)
LENGTHS = st.sampled_from([10.0, 30.0, 33.30223666666667, 64.0, 76.2, 118.0, 150.0])
FRAMES = st.sampled_from([8, 16, 32])


@given(SECONDS, LENGTHS, FRAMES)
@example(96.0, 64.0, 32)
@example(96.001, 64.0, 32)
def test_every_second_is_in_a_window(seconds: float, length: float, frames: int) -> None:
    windows = cut_windows(seconds, length, frames)
    assert windows[0].start == 0
    assert windows[-1].start + windows[-1].seconds >= seconds - 1e-4
    for one, other in pairwise(windows):
        assert one.start < other.start < one.start + one.seconds, "a gap, or two that are the same"


@given(SECONDS, LENGTHS, FRAMES)
def test_short_videos_are_one_window_and_long_ones_are_on_one_grid(
    seconds: float, length: float, frames: int
) -> None:
    windows = cut_windows(seconds, length, frames)
    if seconds <= ONE_WINDOW * length:
        assert [(w.start, w.seconds) for w in windows] == [(0, seconds)]
        return
    spacing = length / frames
    assert all(math.isclose(w.start, w.first * spacing) and w.seconds == length for w in windows)
    assert windows[-1].first + frames == grid_length(seconds, length, frames)
    shared = [one.first + frames - other.first
              for one, other in pairwise(windows)]  # fmt: skip
    assert all(count == frames // 4 for count in shared[:-1]) and frames // 4 <= shared[-1] < frames


@given(SECONDS, LENGTHS, FRAMES)
def test_the_grid_ends_with_the_video(seconds: float, length: float, frames: int) -> None:
    spacing = length / frames
    count = grid_length(seconds, length, frames)
    assert (count - 1) * spacing < seconds and count * spacing >= seconds - 1e-4
    chosen = grid_frames(seconds, length, frames)
    assert len(chosen) == count and (np.diff(chosen) >= 0).all()
    assert chosen[-1] <= max(0, round(seconds * 3))


@given(st.integers(2, 200), st.sampled_from([8, 16, 32]), st.integers(4, 60))
def test_a_window_has_the_frames_of_the_protocol(steps: int, frames: int, per_frame: int) -> None:
    """A whole window of the grid is what `eval_indices` takes of a clip of that window alone."""
    length = frames * per_frame / 3  # a whole number of the clip's frames from one to the next
    seconds = length * (1.5 + steps / 10)
    chosen = grid_frames(seconds, length, frames)
    for window in cut_windows(seconds, length, frames)[:-1]:
        own = chosen[window.first : window.first + frames] - window.first * per_frame
        assert own.tolist() == eval_indices(frames * per_frame, frames).tolist()


@given(SECONDS, LENGTHS, FRAMES)
def test_events_lie_in_the_video(seconds: float, length: float, frames: int) -> None:
    proposals = np.array([[0, 1], [0.5, 1], [0, 2 / frames], [1 - 2 / frames, 1]])
    for window in cut_windows(seconds, length, frames):
        times = window.times(proposals, seconds)
        assert (times >= 0).all() and (times <= seconds).all()
        assert (times[:, 0] < times[:, 1]).all()


@given(SECONDS, LENGTHS, FRAMES)
def test_what_ffmpeg_picks_are_the_frames_of_the_grid(
    seconds: float, length: float, frames: int
) -> None:
    """Its expression, in the same double precision: see `VideoFrames._on_grid`."""
    seconds = min(seconds, 3000.0)
    chosen = grid_frames(seconds, length, frames)
    step = float(repr(grid_step(length, frames)))
    n = np.arange(chosen[-1] + 1)
    picked = (np.ceil((n + 1) / step - 0.5) > np.ceil(n / step - 0.5)) | (n == chosen[-1])
    assert np.flatnonzero(picked).tolist() == np.unique(chosen).tolist()
