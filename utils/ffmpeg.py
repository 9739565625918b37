"""The one place that knows the ffmpeg program and the format of prepared clips.

Everything goes through the command line program: a decoder that crashes or hangs on a broken file
then costs one child process, not the run.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import numpy as np

PREPARED_FPS = 3
PREPARED_SHORT_SIDE = 224

H264_ARGUMENTS = [
    *("-c:v", "libx264", "-preset", "medium", "-crf", "23", "-pix_fmt", "yuv420p"),
    *("-g", "1"),
    # One thread per clip: clips are prepared side by side, and x264's result then depends on
    # nothing but its input.
    *("-threads", "1"),
]


class FfmpegError(RuntimeError):
    """ffmpeg is missing, or could not do what was asked; the message carries its last words."""


@functools.cache
def ffmpeg_program() -> str:
    """Path of the ffmpeg to use: $FFMPEG, the one on PATH, or the one imageio-ffmpeg brings.

    Raises FfmpegError if $FFMPEG is set but does not run, or if none of them does.
    """
    chosen = os.environ.get("FFMPEG")
    if chosen:
        if _works(chosen):
            return chosen
        raise FfmpegError(
            f"$FFMPEG is {chosen!r}, which does not run or lacks the libx264 encoder; "
            "correct or unset it"
        )
    for candidate in (shutil.which("ffmpeg"), imageio_ffmpeg.get_ffmpeg_exe()):
        if candidate and _works(candidate):
            return candidate
    raise FfmpegError("no ffmpeg that runs; install one, or set $FFMPEG to its path")


def _works(program: str) -> bool:
    """Whether `program` runs and can write H.264 (some distributions build without libx264)."""
    try:
        result = subprocess.run(
            [program, "-hide_banner", "-encoders"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return b" libx264 " in result.stdout


def write_video(
    path: Path, frames: np.ndarray | Iterable[np.ndarray], fps: float = PREPARED_FPS
) -> None:
    """Write frames as a clip in the prepared format; `path` appears only when it is complete.

    Args:
        path: the .mp4 to write; replaced if it exists.
        frames: uint8 [n, H, W, 3] RGB, or an iterable of uint8 [H, W, 3]; H and W even, n > 0.
        fps: frames per second.

    Raises:
        ValueError: no frames, or a frame of another shape or dtype than the rule above.
        FfmpegError: ffmpeg failed.
    """
    path = Path(path)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    _check_frame(path, first, first.shape)
    height, width, _ = first.shape
    command = [ffmpeg_program(), "-nostdin", "-hide_banner", "-v", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "pipe:0", *H264_ARGUMENTS, "-f", "mp4"]
    part = partial_path(path)
    try:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [*command, f"file:{part}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            try:
                with process.stdin as pipe:
                    pipe.write(np.ascontiguousarray(first))
                    for frame in frames:
                        _check_frame(path, frame, first.shape)
                        pipe.write(np.ascontiguousarray(frame))
                status = process.wait()
            except BrokenPipeError:  # ffmpeg gave up; what it said is raised below
                status = process.wait()
            finally:
                process.kill()
                process.wait()
            if status != 0:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
                raise FfmpegError(f"{path}: ffmpeg could not write it: {said[-500:]}")
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def _check_frame(path: Path, frame: np.ndarray, shape: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(
            f"{path}: frames must be uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}"
        )
    if frame.shape != shape:
        raise ValueError(
            f"{path}: frame sizes differ: {list(shape)} first, then {list(frame.shape)}"
        )
    if frame.shape[0] % 2 or frame.shape[1] % 2:
        raise ValueError(f"{path}: H.264 4:2:0 needs even sizes, not {list(frame.shape[:2])}")


def partial_path(path: Path) -> Path:
    """A fresh hidden name beside `path` for a file that is still being written."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def publish(part: Path, path: Path) -> None:
    """Give the finished file its name, after its bytes are on the disk."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.chmod(0o666 & ~_umask())  # mkstemp's files are private, a corpus is not
    part.replace(path)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
