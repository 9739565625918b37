"""Turns one downloaded video, or a folder of frames, into one verified clip of the prepared format.

prepare_videos.py does so for whole data sets. The clip keeps the file's clock: frame k shows what a
player shows in the third of a second after k/3 s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dataloaders import DataError
from dataloaders.ffmpeg import (
    DEFAULT_TIME_LIMIT,
    H264_ARGUMENTS,
    PREPARED_FPS,
    PREPARED_SHORT_SIDE,
    Completed,
    Track,
    decode_frames,
    input_arguments,
    listing_arguments,
    parse_track,
    raw_input_arguments,
    read_packets,
    run_ffmpeg,
)
from utils.files import commit, temporary_sibling

FRAME_SUFFIXES = {".jpg", ".jpeg"}
MAX_SIDE = 16384  # what H.264 can hold

# Sound and pictures rarely end together, and headers round: a second of difference between the
# video stream and the file's own duration says nothing about the pictures.
CLOCK_TOLERANCE = 1.0  # seconds
# A slot of 1/3 s is lost if the file has frames in it, but none decodes within this of its middle.
LOST_AFTER = 0.5  # seconds
WARN_BELOW = 0.95  # share of a video that decodes


@dataclass(frozen=True)
class Settings:
    """What is the same for every video of a run.

    Attributes:
        authors_scale: the size the authors' command gives portrait videos.
        min_decoded: share of a video that must decode for it to be kept.
        time_limit: seconds for each of the calls of ffmpeg that a video takes.
    """

    authors_scale: bool = False
    min_decoded: float = 0.5
    time_limit: float = DEFAULT_TIME_LIMIT


def prepare(source: Path, output: Path, settings: Settings) -> dict:
    """Prepare one input of either kind; `output` appears only when it is complete and verified.

    Returns:
        The fields of its line in the report. ``status`` is done, partial or failed; the latter two
        have a ``reason``, the former two ``frames, width, height, seconds`` (of the source) and
        ``decoded`` (the share of it that decodes).
    """
    convert = convert_frames if source.is_dir() else convert_video
    try:
        with temporary_sibling(output) as part:
            result = convert(source, part, settings)
            commit(part, output)
    except (DataError, OSError) as error:
        return {"status": "failed", "reason": str(error)}
    return result


def prepared_size(
    width: int, height: int, sample_aspect: Fraction = Fraction(1), authors_scale: bool = False
) -> tuple[int, int]:
    """Width and height of the prepared clip of an upright video.

    The short side becomes 224, the other keeps the aspect as displayed and is rounded down to an
    even number. With `authors_scale` a portrait video gets the width 224 and the height
    ⌊224·a/2⌋·2 < 224, a = width/height of the stored pixels: squashed, as in the authors' files.

    Raises:
        DataError: the aspect is too extreme for H.264.
    """
    aspect = Fraction(width, height) * (1 if authors_scale else sample_aspect)
    short = PREPARED_SHORT_SIDE
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
    """Share of the video that decodes, between 0 and 1.

    Args:
        packets: what the container holds.
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
    share = float(np.mean(distance <= LOST_AFTER))
    claimed = packets.container_seconds or 0.0
    if claimed - seconds > CLOCK_TOLERANCE:  # the file ends before its header says
        share *= seconds / claimed
    return share


def convert_video(source: Path, output: Path, settings: Settings) -> dict:
    """Prepare one video file, see `prepare`.

    Raises:
        DataError: it cannot be prepared.
    """
    packets = read_packets(source, settings.time_limit)
    if len(packets.times) == 0:
        raise DataError(f"its video stream is empty ({packets.error or 'no packets'})")
    first = decode_frames(source, settings.time_limit, limit=1)
    size = prepared_size(first.width, first.height, first.sample_aspect, settings.authors_scale)
    start, seconds = video_clock(packets)
    arguments = [
        # The filters meet a change of resolution themselves: what follows is scaled to the same
        # size. Starting them again, as is the default, would start the clock again as well.
        *("-reinit_filter", "0", "-itsoffset", f"{-start:.6f}", *input_arguments(source)),
        *("-map", "0:V:0", *encode_arguments(size, seconds)),
    ]
    done = _run([*arguments, f"file:{output}", *listing_arguments()], settings)
    decoded = parse_track(done)
    share = decoded_share(packets, decoded.times[:, 0], seconds)
    words = decoded.error or packets.error or "the file ends before its header says"
    reason = f"only {share:.0%} of it decodes: {words}" if share < WARN_BELOW else None
    ends = [decoded.times[:, 1].max(), *([] if seconds is None else [seconds])]
    return _verified(output, size, ends, share, reason, settings)


def convert_frames(folder: Path, output: Path, settings: Settings) -> dict:
    """Prepare a folder of JPEG frames, taken as 3 fps in natural order, see `prepare`.

    A frame that does not decode shows the one before it, so that the others keep their times.

    Raises:
        DataError: it cannot be prepared.
    """
    files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    frames = FrameReader(sorted(files, key=natural_key))
    size = prepared_size(frames.width, frames.height, authors_scale=settings.authors_scale)
    seconds = len(files) / PREPARED_FPS
    arguments = raw_input_arguments(frames.width, frames.height, PREPARED_FPS)
    _run([*arguments, *encode_arguments(size, seconds), f"file:{output}"], settings, frames)
    broken = frames.broken
    reason = f"{len(broken)} of {len(files)} frames are broken: {broken[:3]}" if broken else None
    share = 1 - len(broken) / len(files)
    return _verified(output, size, [seconds], share, reason, settings)


def _run(arguments: list[str], settings: Settings, feed: Iterable[bytes] = ()) -> Completed:
    done = run_ffmpeg(["-v", "level+error", "-y", *arguments], settings.time_limit, feed)
    if done.status != 0:
        raise DataError(f"cannot be converted: {done.reason}")
    return done


def encode_arguments(size: tuple[int, int], seconds: float | None) -> list[str]:
    """Arguments that turn what is read into the prepared format."""
    # A frame is taken from the middle of its third of a second, the last one where at least half
    # of that is left. What is shorter than half still gives its one frame.
    short = seconds is not None and seconds * PREPARED_FPS < 0.5
    rate = f"fps={PREPARED_FPS}:start_time=0" + (":eof_action=pass" if short else "")
    arguments = ["-filter_threads", "1"]
    arguments += ["-vf", f"{rate},scale={size[0]}:{size[1]}:out_range=tv,setsar=1"]
    arguments += ["-map_metadata", "-1", *H264_ARGUMENTS]
    if seconds is not None:
        # Some versions hold the last frame for as long as the gap before it.
        arguments += ["-frames:v", str(max(1, int(seconds * PREPARED_FPS + 0.5)))]
    return [*arguments, "-f", "mp4"]


def _verified(
    written: Path,
    size: tuple[int, int],
    ends: list[float],
    share: float,
    reason: str | None,
    settings: Settings,
) -> dict:
    """The line of the report for what was written, once that decodes as it should.

    Args:
        size: width and height.
        ends: seconds at which the video may end: with its last decoded frame, or where the
            container ends it.
        share: of the source that decodes, between 0 and 1.
        reason: what is wrong with the source, if it is worth saying.

    Raises:
        DataError: too little decodes, or the number of frames is off by more than half an interval.
    """
    if share < settings.min_decoded:
        raise DataError(f"{reason or 'not all decodes'} (get it again, or see --min_decoded)")
    count = len(decode_frames(written, settings.time_limit).times)
    if count == 0:
        raise DataError("not one frame was written: it is too short, or tells no times")
    off = min(abs(count - end * PREPARED_FPS) for end in ends)
    if off > 0.5 + 0.05 and count > 1:  # times are rounded on their way
        wanted = " or ".join(f"{end:.2f}" for end in ends)
        raise DataError(f"{count} frames were written for {wanted} s at {PREPARED_FPS} fps")
    result = {"status": "partial" if reason else "done", "frames": count, "width": size[0]}
    result |= {"height": size[1], "seconds": round(float(ends[-1]), 3), "decoded": round(share, 4)}
    return result | ({"reason": reason} if reason else {})


class FrameReader:
    """The pixels of JPEG files, one after the other, all in the size of the first that decodes.

    `broken` fills with the names of those that do not decode. Raises DataError if none does.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.broken: list[str] = []
        self.current = next((image for image in map(_read_jpeg, files) if image), None)
        if self.current is None:
            raise DataError("none of its frames decodes")
        self.width, self.height = self.current.size

    def __iter__(self) -> Iterator[bytes]:
        for file in self.files:
            image = _read_jpeg(file)
            if image is None:
                self.broken.append(file.name)
            else:
                self.current = image.resize((self.width, self.height))
            yield self.current.tobytes()


def _read_jpeg(file: Path) -> Image.Image | None:
    try:
        with Image.open(file, formats=["JPEG"]) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def natural_key(path: Path) -> list:
    """Sort key that puts frame 9 before frame 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]
