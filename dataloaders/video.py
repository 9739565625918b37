"""Reads the sampled frames of one prepared clip with decord: uint8, cropped to the model's square.

A clip gives the frames that were asked for or a DataError. decord by itself repeats a neighbour
where a frame does not come out, and miscounts where an edit list hides frames: both are caught.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import decord
import numpy as np
import torch

from dataloaders import DataError
from dataloaders.ffmpeg import FfmpegError, count_frames, decode_chosen
from dataloaders.mp4 import ContainerError, Header, read_header
from dataloaders.sampling import eval_indices, train_indices

DECODE_TIME_LIMIT = 60.0  # seconds for one clip; a prepared one takes a fraction of a second
# decord raises when more than this share of the frames had to be replaced by neighbours: any at all
NO_REPLACED_FRAMES = 1e-9
# A seek takes about 1.6 ms at any frame size, as long as decoding this many pixels: small clips are
# faster read whole.
PIXELS_PER_SEEK = 140_000
PREPARE = "remove it and prepare it again with `bash scripts/prepare.sh`"

decord.logging.set_level(decord.logging.QUIET)  # broken files are reported here, once, by name

T = TypeVar("T")


def load_clip(
    path: str | Path,
    num_frames: int,
    size: int,
    generator: np.random.RandomState | None = None,
) -> torch.Tensor:
    """The sampled frames of a clip, centre-cropped.

    n, which the frames are sampled from, is the number of frames that really decode, whatever the
    container says (the authors' program takes the smaller of the two, which may be 0).

    Args:
        path: a video file as ``scripts/prepare.sh`` writes it: 3 fps, short side equal to ``size``;
            a portrait clip squashed to width ``size`` and a smaller height is accepted too.
        num_frames: N_f, frames to take.
        size: side of the square, pixels.
        generator: draws the training frames; None takes the evaluation frames.

    Returns:
        uint8 [N_f, 3, size, size], RGB.

    Raises:
        DataError: no such file, nothing that decodes, damage, another size than prepared, or the
            decoder did not finish within DECODE_TIME_LIMIT.
    """
    path = Path(path).absolute()  # so that no name is taken for a protocol such as "concat:"

    def choose(n: int) -> np.ndarray:
        if generator is None:
            return eval_indices(n, num_frames)
        return train_indices(n, num_frames, generator)

    frames = _within_time_limit(path, lambda: _decode(path, size, choose, generator))
    return center_crop(torch.from_numpy(frames), size)


def look_at_clip(path: str | Path, size: int) -> int | None:
    """What shows without decoding: that `load_clip` has a file of the right kind and size to read.

    Less than a millisecond for what ``scripts/prepare.sh`` writes; a file without an index takes a
    call of ffmpeg.

    Returns:
        Number of frames that its header lists; None for a file without an index.

    Raises:
        DataError: as `load_clip`, for everything but damage to the frames themselves.
    """
    path = Path(path).absolute()
    header = _check_file(path)
    if header is None:
        try:
            track = count_frames(path, DECODE_TIME_LIMIT, limit=1)
        except FfmpegError as error:
            raise DataError(f"{path}: cannot be decoded ({error}): {PREPARE}") from error
        _check_size(path, track.height, track.width, size)
        return None
    if size not in (header.width, header.height):  # which is which depends on the rotation
        _check_size(path, header.height, header.width, size)
    return header.num_frames


def load_every_frame(path: str | Path, size: int) -> torch.Tensor:
    """All frames that `load_clip` samples from: uint8 [n, 3, size, size].

    Raises:
        DataError: as `load_clip`.
    """
    path = Path(path).absolute()
    frames = _within_time_limit(path, lambda: _decode(path, size, np.arange, None))
    return center_crop(torch.from_numpy(frames), size)


def center_crop(frames: torch.Tensor, size: int) -> torch.Tensor:
    """The square in the middle of each frame; a side below ``size`` is padded with black.

    Offsets are halved with round-half-even, an odd rest of padding goes to the bottom and the
    right: torchvision's rule, which the published models were trained with.

    Args:
        frames: uint8 [n, H, W, 3] or [n, 3, H, W].
        size: side of the square, pixels.

    Returns:
        uint8 [n, 3, size, size].
    """
    if frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)
    n, channels, height, width = frames.shape
    source_y, target_y = _overlap(height, size)
    source_x, target_x = _overlap(width, size)
    square = frames.new_zeros((n, channels, size, size))
    square[:, :, target_y, target_x] = frames[:, :, source_y, source_x]
    return square


def _overlap(side: int, size: int) -> tuple[slice, slice]:
    """Which pixels of the frame are kept, and where they go in the square."""
    if side < size:
        start = (size - side) // 2
        return slice(0, side), slice(start, start + side)
    start = round((side - size) / 2)
    return slice(start, start + size), slice(0, size)


def _check_file(path: Path) -> Header | None:
    """The header of a file that lists its frames; refuses what decord should not even open.

    FFmpeg also follows playlists, text files that name other files or addresses: with one of them
    in its place a clip would show another video. Only the formats below are never taken for one.
    And decord ends the process where a header claims more frames than fit in memory.

    Returns:
        None for Matroska and MP4 in fragments: their headers do not say how many frames follow.
    """
    try:
        if not path.is_file():
            remedy = "see video_dir and `bash scripts/prepare.sh`"
            raise DataError(f"{path}: no such video file: {remedy}")
        with path.open("rb") as file:
            start = file.read(8)
        header = read_header(path) if start[4:] == b"ftyp" else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ContainerError as error:
        raise DataError(f"{path}: cannot be decoded ({error}): {PREPARE}") from error
    if start[4:] != b"ftyp" and start[:4] != b"\x1a\x45\xdf\xa3":
        what = "empty" if not start else "neither an MP4 nor a Matroska file"
        raise DataError(f"{path}: {what}: {PREPARE}")
    return None if header is None or header.fragmented else header


def _within_time_limit(path: Path, function: Callable[[], T]) -> T:
    # A thread, because a signal does not interrupt decord's C++ code. One that hangs is left behind
    # as a daemon: it cannot be stopped, and the DataError is about to end the run.
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"decode {path.name}", daemon=True)
    thread.start()
    thread.join(DECODE_TIME_LIMIT)
    if thread.is_alive():
        raise DataError(f"{path}: not decoded within {DECODE_TIME_LIMIT:g} seconds: {PREPARE}")
    if errors:
        _release(errors[0])
        raise errors[0]
    return result[0]


def _release(error: BaseException | None) -> None:
    """Let go of what an error's frames hold: a reader that outlived it would end a process that is
    forked later, whose copy of the reader has no threads to join."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _decode(
    path: Path,
    size: int,
    choose: Callable[[int], np.ndarray],
    generator: np.random.RandomState | None,
) -> np.ndarray:
    """The chosen frames of a file, uint8 [N_f, H, W, 3]."""
    header = _check_file(path)
    try:
        if header is None:
            return _read_with_ffmpeg(path, size, choose)
        reader = _open(path)
        height, width, _ = reader.next().shape
        _check_size(path, height, width, size)
        state = generator.get_state() if generator is not None else None
        frames = _read_by_index(reader, choose, height * width)
        if frames is None:
            if generator is not None:
                generator.set_state(state)
            frames = _read_in_order(path, choose)
        return frames
    except DataError:
        raise
    except Exception as error:  # decord raises DECORDError, RuntimeError, StopIteration, …
        raise DataError(f"{path}: cannot be decoded ({_reason(error)}): {PREPARE}") from error


def _reason(error: Exception) -> str:
    """decord's last words, without the times and places in its source that lead them in."""
    text = re.sub(r"\[[\d:]+\] \S+:\d+:", "", str(error))
    return " ".join(text.split())[-200:] or "no frame comes out"


def _open(path: Path) -> decord.VideoReader:
    # One decoding thread: the loader's workers are the parallelism.
    return decord.VideoReader(str(path), num_threads=1, fault_tol=NO_REPLACED_FRAMES)


def _check_size(path: Path, height: int, width: int, size: int) -> None:
    squashed_portrait = width == size and height < size  # the authors' preparation of portraits
    if min(height, width) == size or squashed_portrait:
        return
    wanted = f"the short side has to be {size}"
    raise DataError(f"{path}: {width}×{height} pixels, but {wanted}: {PREPARE}")


def _read_by_index(
    reader: decord.VideoReader, choose: Callable[[int], np.ndarray], pixels: int
) -> np.ndarray | None:
    """Decodes only what the chosen frames need; None where the file's index is not to be trusted.

    decord indexes packets and seeks by their times. That is exact if every packet is a frame, which
    evenly spaced times from 0 on and a last frame that decodes vouch for. It is not if an edit list
    hides packets (a clip cut without encoding it anew).
    """
    n = len(reader)
    starts = reader.get_frame_timestamp(range(n))[:, 0]
    steps = np.diff(starts)
    evenly = np.allclose(steps, steps.mean(), rtol=0.02) if n > 1 else True
    if starts[0] < 0 or not evenly:
        return None
    chosen = choose(n)
    needed = np.union1d(chosen, [n - 1])
    if n * pixels < len(needed) * PIXELS_PER_SEEK:
        needed = np.arange(n)
    try:
        frames = reader.get_batch(needed).asnumpy()
    except decord.DECORDLimitReachedError:
        return None
    return frames[np.searchsorted(needed, chosen)]


def _read_in_order(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decodes the file from the start without seeking: slower, and right for every file."""
    n = sum(1 for _ in _frames_in_order(path))
    chosen = choose(n)
    wanted = set(chosen.tolist())
    frames = {i: f.asnumpy() for i, f in enumerate(_frames_in_order(path)) if i in wanted}
    return np.stack([frames[i] for i in chosen.tolist()])


def _read_with_ffmpeg(path: Path, size: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decodes a file without an index in a process of its own: once to count, once to read.

    decord takes the number of frames from the duration such a file claims, and ends the process
    where that is absurd.
    """
    track = count_frames(path, DECODE_TIME_LIMIT)
    if track.said or not len(track.times):
        raise DataError(
            f"{path}: cannot be decoded ({track.said or 'no frame comes out'}): {PREPARE}"
        )
    _check_size(path, track.height, track.width, size)
    chosen = choose(len(track.times))
    needed = np.unique(chosen)
    frames = decode_chosen(path, needed, DECODE_TIME_LIMIT, track.height, track.width)
    return frames[np.searchsorted(needed, chosen)]


def _frames_in_order(path: Path) -> Iterator[decord.nd.NDArray]:
    reader = _open(path)
    for _ in range(len(reader)):
        try:
            frame = reader.next()
        except (decord.DECORDLimitReachedError, StopIteration):  # what follows would be made up
            return
        yield frame
