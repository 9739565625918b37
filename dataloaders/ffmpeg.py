"""The one place that knows the ffmpeg program and the format of prepared clips.

Everything goes through the command line program, under a time limit: a decoder that crashes or
hangs on a broken file then costs one child process and a message, not the run. The messages of its
errors leave the file's name to the caller.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from itertools import chain
from pathlib import Path
from resource import RLIMIT_AS, prlimit
from typing import Any

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from dataloaders import DataError

PREPARED_FPS = 3
PREPARED_SHORT_SIDE = 224

# Every frame is a key frame: dataloaders/README.md says what that costs and buys.
H264_ARGUMENTS = [
    *("-c:v", "libx264", "-preset", "medium", "-crf", "23", "-pix_fmt", "yuv420p"),
    *("-g", "1"),
    # One thread per clip: clips are prepared side by side, and x264's result then depends on
    # nothing but its input.
    *("-threads", "1"),
]

DEFAULT_TIME_LIMIT = 1800.0  # seconds; an hour of 1080p decodes in less on one core
MAX_TIME_LIMIT = 1e6  # seconds; the system's timers overflow far above
# Address space of one ffmpeg, in bytes. 8K HEVC, the most demanding of all tried, takes 1.6 GB; a
# header that claims absurd sizes must not take the machine down.
MEMORY_LIMIT = 8 * 2**30
MAX_MESSAGES = 2**24  # bytes of ffmpeg's messages that are read
NO_TIMESTAMP = -(2**63)  # how ffmpeg prints a time it does not know
# Messages that end every failure and say less than the ones before them.
CLOSING_WORDS = (
    *("Error opening", "Error marking", "Error while opening", "Nothing was written"),
    *("Terminating thread", "Task finished", "Conversion failed", "Could not open encoder"),
    "file:",
)
# What is no fault of an input: no room for what is written, there or for temporary files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# FFmpeg's own decoder of VP9 makes pictures of any bytes; the pixels of sound ones are the same.
STRICTER_DECODERS = {"vp9": "libvpx-vp9"}
# Words about what is read; those of outputs, filters and encoders are not, and the others are calm.
DAMAGE = re.compile(
    r"^(?!\[(?:null|framecrc|mp4|rawvideo|out#|vost#|vf#|libx264))"
    r"(?:\[[^\[\]]*\] )*\[(?:error|fatal|warning\] .*[Cc]orrupt)",
    re.MULTILINE,
)
FRAME = re.compile(r"decoder -> .*keyframe:(\d)")
# Frames that a decoder may hold back: so many later ones can show what a message was about.
REORDERED = 16
DISCARDED = 0x4  # packet flag: decoded for the frames after it, but not shown (edit lists)


@functools.cache
def ffmpeg_program() -> str:
    """Path of the ffmpeg to use: $FFMPEG, or else the pinned one that imageio-ffmpeg brings.

    The one on PATH is not taken: versions differ in colours, rotation and durations.

    Raises DataError if it does not run.
    """
    chosen = os.environ.get("FFMPEG")
    try:
        program = chosen or get_ffmpeg_exe()
    except RuntimeError as error:
        raise DataError(f"imageio-ffmpeg brings no ffmpeg ({error}): set $FFMPEG to one") from error
    if not _works(program):
        lacking = "does not run or lacks the libx264 encoder"
        raise DataError(f"{'$FFMPEG is ' * bool(chosen)}{program!r}, which {lacking}: correct it")
    return program


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


@dataclass(frozen=True)
class Completed:
    """What one call of ffmpeg left behind.

    Attributes:
        status: exit status.
        output: what it wrote to standard output.
        messages: one a line, each with its level: ``[error] moov atom not found``.
    """

    status: int
    output: str
    messages: str

    @property
    def reason(self) -> str:
        """Its most telling error, on one line."""
        found = re.findall(r"\[(?:error|fatal)\] (.*)", self.messages)
        errors = [re.sub(r"\[[^\[\]]* @ 0x[0-9a-f]+\] ?", "", line).strip() for line in found]
        if any("matches no streams" in line for line in errors):
            return "it has no video stream"
        telling = [line for line in errors if not line.startswith(CLOSING_WORDS)]
        if telling:
            return telling[-1][:300]
        return errors[-1][:300] if errors else f"ffmpeg ended with status {self.status}"


_running: set[subprocess.Popen] = set()


def kill_running() -> None:
    """Kill every ffmpeg this process has under way; whoever waits for one gets a DataError."""
    for process in list(_running):
        process.kill()


@contextlib.contextmanager
def _started(arguments: list[str], **streams: Any) -> Iterator[subprocess.Popen]:
    """An ffmpeg with these arguments and those that every call needs; the block's end ends it."""
    command = [ffmpeg_program(), "-nostdin", "-hide_banner", "-nostats", *arguments]
    # A session of its own, so that Ctrl-C reaches this program only, which then cleans up.
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        _running.add(process)
        try:
            # It may be gone already, and a container may forbid this.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                prlimit(process.pid, RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
            yield process
        finally:
            process.kill()
            process.wait()
            _running.discard(process)


def run_ffmpeg(
    arguments: list[str],
    time_limit: float = DEFAULT_TIME_LIMIT,
    feed: Iterable[bytes] = (),
    heard: re.Pattern | None = None,
) -> Completed:
    """Run ffmpeg to its end, or kill it at the time limit.

    Args:
        arguments: those that every call needs are added.
        time_limit: seconds.
        feed: pieces for its standard input, written as ffmpeg takes them.
        heard: keep only messages in which this is found.

    Raises:
        DataError: the time limit passed, or the process was killed.
        OSError: there is no room for what it writes.
    """
    timed_out = threading.Event()
    # Files rather than pipes: nothing has to be read for the child to go on, and a broken file's
    # million messages end on the disk.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with _started(arguments, stdin=subprocess.PIPE, stdout=output, stderr=errors) as process:
            timer = threading.Timer(time_limit, lambda: (timed_out.set(), process.kill()))
            timer.start()
            try:
                # A broken pipe: it gave up before it had read all; its status says why.
                with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                    for piece in feed:
                        pipe.write(piece)
                status = process.wait()
            finally:
                timer.cancel()
        if timed_out.is_set():
            raise DataError(f"not done within {time_limit:g} s, and stopped")
        messages = _read_back(errors, MAX_MESSAGES, heard)
        for code in NO_ROOM:
            told = status > 0 and os.strerror(code) in messages
            told |= status == 256 - code and not messages  # no room for these either
            if told or (status, code) == (-signal.SIGXFSZ, errno.EFBIG):
                places = f"there, or in {tempfile.gettempdir()} for temporary files"
                raise OSError(code, f"{os.strerror(code)} ({places})")
        if status < 0:
            raise DataError(f"ffmpeg was ended by signal {-status}")
        return Completed(status, _read_back(output), messages)


def stream_output(
    arguments: list[str], size: int, patience: float = DEFAULT_TIME_LIMIT
) -> Iterator[bytearray]:
    """What ffmpeg writes to standard output, in pieces of `size` bytes, as it comes.

    Args:
        arguments: as for `run_ffmpeg`.
        patience: seconds that a piece may take; the time that the caller takes does not count.

    Returns:
        By way of ``yield from``, ffmpeg's end: a `Completed` without output.

    Raises:
        DataError: a piece took longer, or the process was killed.
    """
    with tempfile.TemporaryFile() as errors:
        with _started(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        ) as process:
            while len(piece := _read_piece(process.stdout, size, patience)) == size:
                yield piece
            status = process.wait()
        if status < 0:
            raise DataError(f"ffmpeg was ended by signal {-status}")
        return Completed(status, "", _read_back(errors, MAX_MESSAGES))


def _read_piece(pipe: FileIO, size: int, patience: float) -> bytearray:
    """The next `size` bytes; fewer at the end. DataError: they take longer than `patience`."""
    piece, filled, deadline = bytearray(size), 0, time.monotonic() + patience
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while filled < size:
        if not ready.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise DataError(f"no frame within {patience:g} s, and stopped")
        count = pipe.readinto(memoryview(piece)[filled:])
        if not count:
            break
        filled += count
    del piece[filled:]
    return piece


def _read_back(file, limit: int = -1, heard: re.Pattern | None = None) -> str:
    file.seek(0)
    if heard is None:
        return file.read(limit).decode(errors="replace")
    return "".join(filter(heard.search, (line.decode(errors="replace") for line in file)))


@functools.cache
def _help() -> str:
    return run_ffmpeg(["-h", "long"], 60).output + run_ffmpeg(["-decoders"], 60).output


def input_arguments(path: Path, codec: str | None = None) -> list[str]:
    """Arguments that open a file for reading, whatever its name.

    One thread, because files are read side by side and every decoder thread holds frames of its own
    in memory.

    Args:
        codec: of its video stream, if that is known and what is read will be decoded.
    """
    decoder = STRICTER_DECODERS.get(codec)
    chosen = ["-c:v", decoder] if decoder and f" {decoder} " in _help() else []
    return ["-threads", "1", *chosen, "-i", f"file:{path}"]


@dataclass(frozen=True)
class Track:
    """The first video stream of a file, as its container tells it or as it decodes.

    Attributes:
        width, height: pixels; as stored if told by the container, upright if decoded.
        sample_aspect: width of a pixel over its height.
        times: float64 [n, 2], start and end in seconds of every packet or decoded frame, on the
            file's own clock, in the order of the file; NaN where the file does not say.
        container_seconds: the duration its header claims for the whole file, sound included.
        error: ffmpeg's most telling message, if anything went wrong on the way.
        damaged: whether any message is about what was read.
        file_seconds: where the last packet of all streams read ends; NaN if none tells its time.
        codec: FFmpeg's name of it.
    """

    width: int
    height: int
    sample_aspect: Fraction
    times: np.ndarray
    container_seconds: float | None
    error: str | None
    damaged: bool = False
    file_seconds: float = math.nan
    codec: str | None = None


def read_packets(
    path: Path, time_limit: float = DEFAULT_TIME_LIMIT, limit: int | None = None
) -> Track:
    """The video stream as the container tells it; nothing is decoded.

    Args:
        limit: stop after so many packets; two suffice for size and rate, and cost only the header.
            Without it sound and subtitles are read too, for `Track.file_seconds`.

    Raises:
        DataError: not a media file, no video stream, or the time limit passed.
    """
    copy = ["-c", "copy", "-copyinkf", *_first(limit), "-f", "framecrc", "pipe:1"]
    streams = ["-map", "0:V:0", *([] if limit else ["-map", "0:a?", "-map", "0:s?"])]
    done = run_ffmpeg(["-v", "level+info", *input_arguments(path), *streams, *copy], time_limit)
    if done.status != 0:
        raise DataError(f"cannot be read: {done.reason}")
    return parse_track(done)


def decode_frames(
    path: Path,
    time_limit: float = DEFAULT_TIME_LIMIT,
    limit: int | None = None,
    by_number: bool = False,
) -> Track:
    """The video stream as it decodes, rotated upright; the pixels themselves are dropped.

    Args:
        limit: stop after so many frames.
        by_number: list every frame once, whatever the file says of their times.

    Raises:
        DataError: as `read_packets`, and where not even the decoder's output is known.
    """
    arguments = ["-v", "level+info", *input_arguments(path)]
    arguments += ["-vf", "setpts=N", *every_frame()] if by_number else []
    return parse_track(run_ffmpeg([*arguments, *listing_arguments(limit)], time_limit))


def listing_arguments(limit: int | None = None, to: str = "pipe:1") -> list[str]:
    """Arguments of an output that lists the decoded frames for `parse_track`."""
    return ["-map", "0:V:0", "-c:v", "wrapped_avframe", *_first(limit), "-f", "framecrc", to]


@functools.cache
def every_frame() -> list[str]:
    """Arguments of an output that gets every frame once, whatever its time."""
    return ["-fps_mode" if "-fps_mode" in _help() else "-vsync", "passthrough"]  # before ffmpeg 5.1


def select_frames(indices: Iterable[int]) -> str:
    """ffmpeg's filter that lets frames of these numbers pass."""
    return "select=" + "+".join(rf"eq(n\,{i})" for i in indices)


def decode_chosen(
    path: Path, indices: np.ndarray, time_limit: float, height: int, width: int
) -> np.ndarray:
    """Some frames of a file, by their numbers in the order in which they decode.

    Args:
        indices: int64, ascending, without repeats.
        height, width: pixels, as `decode_frames` tells them.

    Returns:
        uint8 [len(indices), height, width, 3], RGB.

    Raises:
        DataError: as `read_packets`, or a frame is damaged or not there.
    """
    picked = ["-vf", f"{select_frames(indices)},setpts=N", *every_frame()]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "frames"
        output = ["-map", "0:V:0", *picked, "-pix_fmt", "rgb24", "-f", "rawvideo", f"file:{raw}"]
        done = run_ffmpeg(["-v", "level+error", *input_arguments(path), *output], time_limit)
        content = raw.read_bytes() if raw.exists() else b""
    if done.status != 0 or "[error]" in done.messages:
        raise DataError(done.reason)
    if len(content) != len(indices) * height * width * 3:
        raise DataError(f"{len(indices)} frames do not come out")
    return np.frombuffer(content, np.uint8).reshape(-1, height, width, 3)


def _first(limit: int | None) -> list[str]:
    return [] if limit is None else ["-frames:v", str(limit)]


def parse_track(done: Completed) -> Track:
    """Read ffmpeg's `framecrc` listing of one stream.

    It is made for machines: header lines ``#name 0: value``, then one line for each packet,
    ``stream, decoding time, time, duration, bytes, checksum, flags…``, in units of the time base.

    Raises DataError if it lists nothing, not even a header.
    """
    header: dict[str, str] = {}
    rows, file_seconds = [], [math.nan]
    for line in done.output.splitlines():
        if line.startswith("#"):
            name, _, value = line[1:].partition(": ")
            header[name] = value
        else:
            fields = line.split(",")
            start, length = int(fields[2]), int(fields[3])
            if start != NO_TIMESTAMP:
                unit = Fraction(header[f"tb {fields[0]}"])
                file_seconds.append(float((start + length) * unit))
            flags = next((f.strip() for f in fields[6:] if f.strip().startswith("F=")), "F=0x1")
            if fields[0] == "0" and not int(flags[2:], 16) & DISCARDED:
                rows.append((start, length))
    if "dimensions 0" not in header:
        raise DataError(f"no frame of it decodes: {done.reason}")
    unit = float(Fraction(header["tb 0"]))
    start, length = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    start = np.where(start == NO_TIMESTAMP, np.nan, start * unit)
    width, height = header["dimensions 0"].split("x")
    sample_aspect = Fraction(*map(int, header["sar 0"].split("/")))
    claimed = re.search(r"Duration: (\d+):(\d+):(\d+\.\d+)", done.messages)
    parts = [float(part) for part in claimed.groups()] if claimed else []
    seconds = float(np.dot([3600, 60, 1], parts)) if claimed else None
    return Track(
        width=int(width),
        height=int(height),
        sample_aspect=sample_aspect if sample_aspect > 0 else Fraction(1),
        times=np.stack([start, start + length * unit], axis=1),
        container_seconds=seconds,
        error=done.reason if "[error]" in done.messages else None,
        damaged=bool(DAMAGE.search(done.messages)),
        file_seconds=float(np.nanmax(file_seconds)) if len(file_seconds) > 1 else math.nan,
        codec=header.get("codec_id 0"),
    )


def count_damage(path: Path, codec: str | None, time_limit: float) -> tuple[int, int]:
    """How many messages about damage decoding a file gives, and how many frames are touched by it.

    Decoders conceal what they cannot read, and mark the frames where they do ("corrupt decoded
    frame"). The frames after it are predicted from it, up to the next key frame that is whole. A
    message without a marked frame (HEVC, AV1) counts for as many frames as a decoder holds back.
    A packet with a gap before it says nothing by itself (transport streams may be strung together),
    unless it is the last: the file was cut there.
    """
    arguments = ["-v", "repeat+level+info", "-debug_ts", "-max_error_rate", "1"]
    arguments += [*input_arguments(path, codec), "-map", "0:V:0", "-f", "null", "-"]
    heard = re.compile(f"{FRAME.pattern}|{DAMAGE.pattern}|demuxer -> ist_index")
    lines = run_ffmpeg(arguments, time_limit, heard=heard).messages.splitlines()
    key_frames = [found[1] == "1" for line in lines if (found := FRAME.search(line))]
    held_back = 1 if all(key_frames) else REORDERED
    messages = frames = left = packets = 0
    doubtful: list[int] = []
    carried = marked = False
    for line in lines:
        if found := FRAME.search(line):
            carried = marked or (carried and found[1] == "0")
            frames += carried or left > 0
            marked, left = False, max(left - 1, 0)
        elif "demuxer -> ist_index" in line:
            packets += 1
        elif re.search("[Pp]acket corrupt|corrupt input packet", line):
            doubtful.append(packets)
        elif packets:  # before that the streams were probed, those of sound as well
            messages += 1
            marked |= "corrupt decoded frame" in line
            left = 0 if marked else held_back
    cut = sum(0 < before >= packets - 2 for before in doubtful)
    return messages + cut, frames


def write_video(
    path: Path, frames: np.ndarray | Iterable[np.ndarray], fps: float = PREPARED_FPS
) -> None:
    """Write frames as a clip in the prepared format, straight to `path`.

    Args:
        path: replaced if it exists; of no use if this fails or is interrupted.
        frames: uint8 [n, H, W, 3] RGB, or an iterable of uint8 [H, W, 3]; H and W even, n > 0.
        fps: frames per second.

    Raises:
        ValueError: no frames, or of another dtype or shape.
        DataError: ffmpeg failed.
    """
    frames = iter(frames)
    if (first := next(frames, None)) is None:
        raise ValueError(f"{path}: no frames to write")

    def checked(frame: np.ndarray) -> bytes:
        one_size = frame.shape == (*first.shape[:2], 3) and not any(n % 2 for n in frame.shape[:2])
        if frame.dtype != np.uint8 or not one_size:
            wanted = "uint8 [H, W, 3] of one size, H and W even (4:2:0)"
            raise ValueError(f"{path}: frames are {wanted}, not {frame.dtype} {list(frame.shape)}")
        return frame.tobytes()

    arguments = ["-v", "level+error", *raw_input_arguments(first.shape[1], first.shape[0], fps)]
    arguments += [*H264_ARGUMENTS, "-f", "mp4", "-y", f"file:{path}"]
    done = run_ffmpeg(arguments, feed=map(checked, chain([first], frames)))
    if done.status != 0:
        raise DataError(f"{path}: cannot be written: {done.reason}")


def raw_input_arguments(width: int, height: int, fps: float) -> list[str]:
    """Arguments that read RGB frames of 8 bits from standard input."""
    size = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    return [*size, "-r", str(fps), "-i", "pipe:0"]
