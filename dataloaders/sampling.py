"""Which frames of a clip are used: pure functions of the frame count.

Training draws one frame of each of N_f equal segments, evaluation takes their middles (the rules of
the authors' program, which the published numbers were made with).
"""

from __future__ import annotations

import numpy as np


def train_indices(n: int, num_frames: int, generator: np.random.RandomState) -> np.ndarray:
    """One random frame per segment, the segments being q = n // N_f frames long.

    The frames from N_f·q on are never drawn: with N_f = 32 a clip of 32 to 63 frames always gives
    its first 32. That is how the published models were trained.

    Args:
        n: frames of the clip, at least 1.
        num_frames: N_f, frames to take.
        generator: numpy's legacy generator; one call of ``randint(q, size=N_f)`` is made if q > 0.

    Returns:
        int64 [N_f], ascending; if n < N_f all frames in order and the last one repeated.

    Raises:
        ValueError: n or num_frames is below 1.
    """
    _check(n, num_frames)
    q = n // num_frames
    if q == 0:
        return _all_then_last(n, num_frames)
    frames = np.arange(num_frames, dtype=np.int64)
    return frames * q + generator.randint(q, size=num_frames)


def eval_indices(n: int, num_frames: int) -> np.ndarray:
    """The middle frame of each of N_f equal segments of n / N_f frames: int(t/2 + t·i), t = n/N_f.

    Args:
        n: frames of the clip, at least 1.
        num_frames: N_f, frames to take.

    Returns:
        int64 [N_f], ascending; if n <= N_f all frames in order and the last one repeated.

    Raises:
        ValueError: n or num_frames is below 1.
    """
    _check(n, num_frames)
    if n <= num_frames:
        return _all_then_last(n, num_frames)
    step = n / num_frames
    return (step / 2 + step * np.arange(num_frames)).astype(np.int64)


def sampled_indices(n: int, num_frames: int, generator: np.random.RandomState | None) -> np.ndarray:
    """`train_indices`, or without a generator `eval_indices`."""
    if generator is None:
        return eval_indices(n, num_frames)
    return train_indices(n, num_frames, generator)


def share(count: int, part: int, parts: int) -> slice:
    """The part-th of so many contiguous, nearly equal cuts of `count` things."""
    return slice(part * count // parts, (part + 1) * count // parts)


def _all_then_last(n: int, num_frames: int) -> np.ndarray:
    return np.arange(num_frames, dtype=np.int64).clip(max=n - 1)


def _check(n: int, num_frames: int) -> None:
    if n < 1 or num_frames < 1:
        raise ValueError(f"cannot take {num_frames} frames out of {n}: both must be at least 1")
