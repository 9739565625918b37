"""Turns one downloaded video, or a folder of frames, into one verified clip of the prepared format.

prepare_videos.py does so for whole data sets. The clip keeps the file's clock: frame k shows what a
player shows in the third of a second after k/3 s.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dataloaders import DataError
from dataloaders.clips import MANIFEST
from dataloaders.ffmpeg import (
    DEFAULT_TIME_LIMIT,
    H264_ARGUMENTS,
    NO_ROOM,
    PREPARED_FPS,
    Completed,
    Track,
    count_damage,
    decode_frames,
    input_arguments,
    listing_arguments,
    parse_track,
    raw_input_arguments,
    read_packets,
    run_ffmpeg,
)
from dataloaders.prepared import (
    CLOCK_TOLERANCE,
    WARN_BELOW,
    clip_format,
    clip_length,
    clip_rate,
    decoded_share,
    prepared_size,
    video_clock,
)
from utils.files import append_line, atomic_write

FRAME_SUFFIXES = {".jpg", ".jpeg"}
TAGS = "setparams=range=tv:colorspace=smpte170m:color_primaries=unknown:color_trc=unknown"


@dataclass(frozen=True)
class Settings:
    """What is the same for every video of a run.

    Attributes:
        authors_scale: the size the authors' command gives portrait videos.
        min_decoded: share of a video that must decode for it to be kept.
        time_limit: seconds for each of the calls of ffmpeg that a video takes.
        strict: keep only what has nothing wrong with it.
    """

    authors_scale: bool = False
    min_decoded: float = 0.5
    time_limit: float = DEFAULT_TIME_LIMIT
    strict: bool = False


def prepare(source: Path, output: Path, settings: Settings) -> dict:
    """Prepare one input of either kind; `output` appears only when it is complete and verified.

    The manifest beside it has its line first: whenever a run is killed, a clip that is there
    without its line, or with another than its own, is one that was there before.

    Returns:
        The fields of its line in the report. ``status`` is done, partial, damaged, short or failed,
        all but the first with a ``reason``. All but the last have ``frames, width, height``, those
        of the source in ``seconds`` and the share of it that decodes in ``decoded``, the clip's
        ``bytes`` and ``crc32`` and, where something is wrong with the source, ``damaged`` (how many
        messages, and how many seconds of frames show it) and ``short`` (lengths that disagree).

    Raises:
        OutputError: the clip cannot be written.
    """
    convert = convert_frames if source.is_dir() else convert_video
    try:
        with atomic_write(output) as part:
            try:
                result = convert(source, part, settings)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise
                raise DataError(f"cannot be read: {error.strerror or error}") from error
            result |= file_facts(part)
            append_line(output.with_name(MANIFEST), manifest_line(output, result))
    except DataError as error:
        return {"status": "failed", "reason": str(error)}
    return result


def file_facts(clip: Path) -> dict[str, int]:
    data = clip.read_bytes()
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def manifest_line(clip: Path, result: dict) -> str:
    return json.dumps({"vid_name": clip.stem, **result})


def header_lengths(source: Path, packets: Track, seconds: float) -> tuple[float, float]:
    """The length that the header tells, and that of what it tells it of, both in seconds.

    An AVI's is that of its pictures, read here: FFmpeg corrects it by the size of a cut file. It
    counts frames; the shorter of two readings stands: intervals may be wrong, frames left out.
    Of other containers it is that of the longest stream, so sound may outlast the pictures.
    """
    with source.open("rb") as file:
        start = file.read(52)
    if start[:4] == b"RIFF" and start[24:28] == b"avih":
        interval, frames = (int.from_bytes(start[i : i + 4], "little") for i in (32, 48))
        return min(interval * frames / 1e6, frames * seconds / len(packets.times)), seconds
    return packets.container_seconds or math.nan, float(np.fmax(packets.file_seconds, seconds))


def convert_video(source: Path, output: Path, settings: Settings) -> dict:
    """Prepare one video file, see `prepare`.

    DataError: it cannot be prepared. OSError: there is no room.
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
        *("-reinit_filter", "0", "-itsoffset", f"{-start:.6f}"),
        *input_arguments(source, packets.codec),
        *("-map", "0:V:0", *encode_arguments(size, seconds)),
    ]
    done = _run([*arguments, f"file:{output}", *listing_arguments()], settings)
    decoded = parse_track(done)
    if not len(decoded.times):
        raise DataError(f"no frame of it decodes: {decoded.error or packets.error}")
    end = float(decoded.times[:, 1].max())
    length = end if seconds is None else seconds
    share = decoded_share(packets, decoded.times[:, 0], seconds)
    claimed, there = header_lengths(source, packets, length)
    if claimed - there > CLOCK_TOLERANCE:  # the file ends before its header says
        share *= there / claimed
    wrong: dict[str, str] = {}
    found: dict[str, dict] = {}
    if share < WARN_BELOW:
        words = decoded.error or packets.error or "the file ends before its header says"
        wrong["partial"] = f"only {share:.0%} of it decodes: {words}"
    if decoded.damaged or packets.damaged:
        messages, frames = count_damage(source, packets.codec, settings.time_limit)
        lost = max(0, len(packets.times) - len(decoded.times))
        touched = min(1.0, (frames + lost) / len(packets.times)) * length
        if messages:
            found["damaged"] = {"messages": messages, "seconds": round(float(touched), 2)}
            wrong["damaged"] = f"{messages} decoding errors, seen in {touched:.1f} s of its frames"
    lengths = {"header": claimed, "packets": there, "frames": end}
    if np.fmax(claimed - there, length - end) > CLOCK_TOLERANCE:
        found["short"] = {k: round(v, 2) for k, v in lengths.items() if not math.isnan(v)}
        told = ", ".join(f"{k} {v} s" for k, v in found["short"].items())
        wrong["short"] = f"its lengths disagree: {told}"
    ends = [end, *([] if seconds is None else [seconds])]
    return _verified(output, size, ends, share, wrong, settings) | found


def convert_frames(folder: Path, output: Path, settings: Settings) -> dict:
    """Prepare a folder of JPEG frames, taken as 3 fps in natural order, see `prepare`.

    A frame that does not decode shows the one before it, so that the others keep their times.

    DataError: it cannot be prepared.
    """
    files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    frames = FrameReader(sorted(files, key=natural_key))
    size = prepared_size(frames.width, frames.height, authors_scale=settings.authors_scale)
    seconds = len(files) / PREPARED_FPS
    arguments = raw_input_arguments(frames.width, frames.height, PREPARED_FPS)
    _run([*arguments, *encode_arguments(size, seconds), f"file:{output}"], settings, frames)
    broken = frames.broken
    reason = f"{len(broken)} of {len(files)} frames are broken: {broken[:3]}"
    wrong = {"partial": reason} if broken else {}
    share = 1 - len(broken) / len(files)
    return _verified(output, size, [seconds], share, wrong, settings)


def _run(arguments: list[str], settings: Settings, feed: Iterable[bytes] = ()) -> Completed:
    # However little decodes: what is enough is decided here.
    settled = ["-v", "level+warning", "-y", "-max_error_rate", "1"]
    done = run_ffmpeg([*settled, *arguments], settings.time_limit, feed)
    if done.status != 0:
        raise DataError(f"cannot be converted: {done.reason}")
    return done


def encode_arguments(size: tuple[int, int], seconds: float | None) -> list[str]:
    """Arguments that turn what is read into the prepared format."""
    filters = f"{clip_rate(seconds)},{clip_format(size)}"
    arguments = ["-filter_threads", "1", "-vf", f"{filters},setsar=1,{TAGS}"]
    arguments += ["-map_metadata", "-1", *H264_ARGUMENTS]
    arguments += ["-colorspace", "smpte170m", "-color_range", "tv"]
    if seconds is not None:
        # Some versions hold the last frame for as long as the gap before it.
        arguments += ["-frames:v", str(clip_length(seconds))]
    return [*arguments, "-f", "mp4"]


def _verified(
    written: Path, size: tuple[int, int], ends: list[float], share: float,
    wrong: dict[str, str], settings: Settings,
) -> dict:  # fmt: skip
    """The line of the report for what was written, once that decodes as it should.

    Args:
        size: width and height.
        ends: seconds at which the video may end: with its last decoded frame, or where the
            container ends it.
        share: of the source that decodes, between 0 and 1.
        wrong: what is wrong with the source, by status, the worst first.

    Raises:
        DataError: too little decodes, or the number of frames is off by more than half an interval.
    """
    reason = "; ".join(wrong.values())
    if share < settings.min_decoded:
        raise DataError(f"{reason or 'not all decodes'} (get it again, or see --min_decoded)")
    if wrong and settings.strict:
        raise DataError(f"{reason} (refused, as --strict asks)")
    track = decode_frames(written, settings.time_limit)
    count = len(track.times)
    if count == 0:
        raise DataError("not one frame was written: it is too short, or tells no times")
    if track.damaged:
        raise DataError(f"what was written does not decode ({track.error}): is the disk sound?")
    off = min(abs(count - end * PREPARED_FPS) for end in ends)
    if off > 0.5 + 0.05 and count > 1:  # times are rounded on their way
        wanted = " or ".join(f"{end:.2f}" for end in ends)
        raise DataError(f"{count} frames were written for {wanted} s at {PREPARED_FPS} fps")
    result = {"status": next(iter(wrong), "done"), "frames": count, "width": size[0]}
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
