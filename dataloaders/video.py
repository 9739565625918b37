"""Reads the sampled frames of one prepared clip with decord: uint8, as the model's square.

A clip gives the frames that were asked for or a DataError. decord by itself repeats a neighbour
where a frame does not come out, and miscounts where an edit list hides frames: both are caught.
"""

from __future__ import annotations

import contextlib
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from dataloaders import DataError
from dataloaders.ffmpeg import PREPARED_SHORT_SIDE, decode_chosen, decode_frames
from dataloaders.mp4 import Header, read_header
from dataloaders.sampling import sampled_indices

if TYPE_CHECKING:
    import decord

DECODE_TIME_LIMIT = 60.0  # seconds for one clip; a prepared one takes a fraction of a second
# decord raises when more than this share of the frames had to be replaced by neighbours: any at all
NO_REPLACED_FRAMES = 1e-9
# A seek takes about 1.6 ms at any frame size, as long as decoding this many pixels: small clips are
# faster read whole.
PIXELS_PER_SEEK = 140_000
# A damaged clip is replaced then. What is no clip may be somebody's original, which stays.
PREPARE = "prepare it again with `bash scripts/prepare.sh` (an original: into another folder)"

_timed_out: set[Path] = set()  # each has left a thread behind in this process: once is enough


def load_clip(
    path: str | Path, num_frames: int, size: int, generator: np.random.RandomState | None = None
) -> torch.Tensor:
    """The sampled frames of a clip, centre-cropped, and resized (bicubic, antialiased) if the model
    reads another size than clips are prepared in.

    n, which the frames are sampled from, is the number of frames that really decode, whatever the
    container says (the authors' program takes the smaller of the two, which may be 0).

    Args:
        path: a video file as ``scripts/prepare.sh`` writes it: 3 fps, short side 224, or ``size``;
            a portrait clip squashed to that width and a smaller height is accepted too.
        num_frames: N_f, frames to take.
        size: side of the square, pixels.
        generator: draws the training frames; None takes the evaluation frames.

    Returns:
        uint8 [N_f, 3, size, size], RGB.

    Raises:
        DataError: no such file, nothing that decodes, damage, another size than prepared, or the
            decoder did not finish within DECODE_TIME_LIMIT, now or earlier in this process.
    """
    state = generator.get_state() if generator is not None else None

    def choose(n: int) -> np.ndarray:
        if generator is not None:
            generator.set_state(state)  # it may have drawn from a number of frames that was wrong
        return sampled_indices(n, num_frames, generator)

    return _load(Path(path), size, choose)


def probe_clip(path: str | Path, size: int) -> int | None:
    """What shows without decoding: that `load_clip` has a file of the right kind and size to read.

    Less than a millisecond for what ``scripts/prepare.sh`` writes; a file without an index takes a
    call of ffmpeg.

    Returns:
        Number of frames that its header lists; None for a file without an index.

    Raises:
        DataError: as `load_clip`, for everything but damage to the frames themselves.
    """
    path = Path(path).absolute()
    with _named(path):
        header = _check_file(path)
        if header is None:
            track = decode_frames(path, DECODE_TIME_LIMIT, limit=1)
            _clip_side(track.height, track.width, size)
            return None
        if size not in (header.width, header.height):  # which is which depends on the rotation
            _clip_side(header.height, header.width, size)
        return header.num_frames


def load_every_frame(path: str | Path, size: int) -> torch.Tensor:
    """All frames that `load_clip` samples from: uint8 [n, 3, size, size].

    DataError: as `load_clip`.
    """
    return _load(Path(path), size, np.arange)


def center_crop(frames: torch.Tensor, size: int) -> torch.Tensor:
    """The square in the middle of each frame; a side below ``size`` is padded with black.

    Offsets are halved with round-half-even, an odd rest of padding goes to the bottom and the
    right: torchvision's rule, which the published models were trained with. Its own function costs
    every process a second and a half of importing.

    Args:
        frames: uint8 [n, H, W, 3].
        size: side of the square, pixels.

    Returns:
        uint8 [n, 3, size, size].
    """
    height, width = frames.shape[1:3]
    top, left = (round(max(0, side - size) / 2) for side in (height, width))
    square = frames[:, top : top + size, left : left + size].permute(0, 3, 1, 2)
    down, right = (max(0, size - side) for side in (height, width))  # what it lacks
    if down or right:
        padding = (right // 2, right - right // 2, down // 2, down - down // 2)
        square = functional.pad(square, padding)
    return square.contiguous()


def _load(path: Path, size: int, choose: Callable[[int], np.ndarray]) -> torch.Tensor:
    path = path.absolute()  # so that no name is taken for a protocol such as "concat:"
    with _named(path):
        frames = _within_time_limit(path, lambda: _decode(path, size, choose))
    side = _clip_side(*frames.shape[1:3], size)
    square = center_crop(torch.from_numpy(frames), side)
    if side == size:
        return square
    return functional.interpolate(square, (size, size), mode="bicubic", antialias=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever goes wrong within, as a DataError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        remedy = "see video_dir and `bash scripts/prepare.sh`"
        raise DataError(f"{path}: no such video file: {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}: {PREPARE}") from error
    except Exception as error:  # decord raises DECORDError, RuntimeError, StopIteration, …
        # decord's last words, without the times and places in its source that lead them in
        words = " ".join(re.sub(r"\[[\d:]+\] \S+:\d+:", "", str(error)).split())[-200:]
        reason = f"cannot be decoded ({words or 'no frame comes out'})"
        raise DataError(f"{path}: {reason}: {PREPARE}") from error


def _check_file(path: Path) -> Header | None:
    """The header of a file that lists its frames; refuses what decord should not even open.

    FFmpeg also follows playlists, text files that name other files or addresses: with one of them
    in its place a clip would show another video. Only the formats below are never taken for one.
    And decord ends the process where a header claims more frames than fit in memory.

    Returns:
        None for Matroska and MP4 in fragments: their headers do not say how many frames follow.
    """
    if not path.is_file():
        raise FileNotFoundError
    with path.open("rb") as file:
        start = file.read(8)
    if start[4:] == b"ftyp":
        try:
            header = read_header(path)
        except DataError as error:
            raise DataError(f"cannot be decoded ({error})") from error
        return None if header.fragmented else header
    if start[:4] != b"\x1a\x45\xdf\xa3":
        raise DataError("neither an MP4 nor a Matroska file" if start else "empty")
    return None


def _within_time_limit(path: Path, function: Callable[[], np.ndarray]) -> np.ndarray:
    # A thread, because a signal does not interrupt decord's C++ code. One that hangs is left behind
    # as a daemon: it cannot be stopped.
    result: Future[np.ndarray] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    if path not in _timed_out:
        threading.Thread(target=run, name=f"decode {path.name}", daemon=True).start()
        if wait([result], DECODE_TIME_LIMIT).not_done:
            _timed_out.add(path)
    if path in _timed_out:
        raise DataError(f"not decoded within {DECODE_TIME_LIMIT:g} seconds")
    _release(result.exception())
    return result.result()


def _release(error: BaseException | None) -> None:
    """Let go of what an error's frames hold: a reader that outlived it would end a process that is
    forked later, whose copy of the reader has no threads to join."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _decode(path: Path, size: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """The chosen frames of a file, uint8 [N_f, H, W, 3]."""
    if _check_file(path) is None:
        return _read_with_ffmpeg(path, size, choose)
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # broken files are reported here, once, by name
    # One decoding thread: the loader's workers are the parallelism.
    reader = decord.VideoReader(str(path), num_threads=1, fault_tol=NO_REPLACED_FRAMES)
    height, width, _ = reader.next().shape
    _clip_side(height, width, size)
    frames = _read_by_index(reader, choose, height * width)
    return _read_with_ffmpeg(path, size, choose) if frames is None else frames


def _clip_side(height: int, width: int, size: int) -> int:
    """The side that a clip was prepared with: the model's, or the usual one."""
    sides = (size, PREPARED_SHORT_SIDE)
    if min(height, width) in sides:
        return min(height, width)
    if width in sides and height < width:  # the authors' preparation squashes portraits
        return width
    wanted = " or ".join(map(str, dict.fromkeys(sides)))
    raise DataError(f"{width}×{height} pixels, but the short side has to be {wanted}")


def _read_by_index(
    reader: decord.VideoReader, choose: Callable[[int], np.ndarray], pixels: int
) -> np.ndarray | None:
    """Decodes only what the chosen frames need; None where the file's index is not to be trusted.

    decord indexes packets and seeks by their times. That is exact if every packet is a frame, which
    evenly spaced times from 0 on and a last frame that decodes vouch for. It is not if an edit list
    hides packets (a clip cut without encoding it again).
    """
    from decord import DECORDLimitReachedError

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
    except DECORDLimitReachedError:
        return None
    return frames[np.searchsorted(needed, chosen)]


def _read_with_ffmpeg(path: Path, size: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decodes a file in a process of its own, once to count and once to read: slower, and right for
    every file. Where there is no index, decord takes the number of frames from the duration that
    the file claims, and ends the process where that is absurd.
    """
    track = decode_frames(path, DECODE_TIME_LIMIT, by_number=True)
    if track.error or not len(track.times):
        raise DataError(f"cannot be decoded ({track.error or 'no frame comes out'})")
    _clip_side(track.height, track.width, size)
    chosen = choose(len(track.times))
    needed = np.unique(chosen)
    frames = decode_chosen(path, needed, DECODE_TIME_LIMIT, track.height, track.width)
    return frames[np.searchsorted(needed, chosen)]
