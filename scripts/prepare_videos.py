"""Turns videos as they are downloaded into the clips the programs read: <vid_name>.mp4, 3 fps.

Run it through scripts/prepare.sh. A clip appears only when it is complete and verified, so a run
may be interrupted at any time and the next one does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataloaders.annotations import AnnotationError, corpus_videos, read_annotations
from utils.ffmpeg import (
    DEFAULT_TIME_LIMIT,
    H264_ARGUMENTS,
    PARTIAL_PREFIX,
    PREPARED_FPS,
    PREPARED_SHORT_SIDE,
    FfmpegError,
    Track,
    decode_frames,
    input_arguments,
    kill_running,
    listing_arguments,
    parse_track,
    partial_file,
    publish,
    raw_input_arguments,
    read_packets,
    run_ffmpeg,
)

REPORT_NAME = "prepare_report.jsonl"
# What lies beside videos. Anything else is tried, as no list of video suffixes is complete.
TEXT_SUFFIXES = {".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".html", ".pdf", ".log"}
CAPTION_SUFFIXES = {".srt", ".vtt", ".ass"}
DATA_SUFFIXES = {".py", ".sh", ".yaml", ".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5", ".pkl"}
ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z"}
MEDIA_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".mp3", ".wav", ".flac", ".m4a"}
DOWNLOAD_SUFFIXES = {".part", ".ytdl", ".tmp", ".aria2", ".crdownload"}
OTHER_SUFFIXES = TEXT_SUFFIXES | CAPTION_SUFFIXES | DATA_SUFFIXES | ARCHIVE_SUFFIXES
OTHER_SUFFIXES |= MEDIA_SUFFIXES | DOWNLOAD_SUFFIXES
FRAME_SUFFIXES = {".jpg", ".jpeg"}
MAX_SIDE = 16384  # what H.264 can hold

# Sound and pictures rarely end together, and headers round: a second of difference between the
# video stream and the file's own duration says nothing about the pictures.
CLOCK_TOLERANCE = 1.0  # seconds
# A slot of 1/3 s is lost if the file has frames in it, but none decodes within this of its middle.
LOST_AFTER = 0.5  # seconds
WARN_BELOW = 0.95  # share of a video that decodes


class PrepareError(Exception):
    """An input that cannot be prepared, with the reason."""


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


def prepared_size(
    width: int, height: int, sample_aspect: Fraction = Fraction(1), authors_scale: bool = False
) -> tuple[int, int]:
    """Width and height of the prepared clip of an upright video.

    The short side becomes 224, the other keeps the aspect as displayed and is rounded down to an
    even number. With `authors_scale` a portrait video gets the width 224 and the height
    ⌊224·a/2⌋·2 < 224, a = width/height of the stored pixels: squashed, as in the authors' files.

    Raises:
        PrepareError: the aspect is too extreme for H.264.
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
        raise PrepareError(f"its aspect of {width}:{height} is too extreme to prepare")
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
    """Prepare one video file.

    Returns the fields of its line in the report: status, reason, frames, width, height, seconds
    (of the source) and decoded (the share of it that decodes).

    Raises:
        FfmpegError, PrepareError: it cannot be prepared; no output is left.
    """
    packets = read_packets(source, settings.time_limit)
    if len(packets.times) == 0:
        raise PrepareError(f"its video stream is empty ({packets.said or 'no packets'})")
    first = decode_frames(source, settings.time_limit, limit=1)
    size = prepared_size(first.width, first.height, first.sample_aspect, settings.authors_scale)
    start, seconds = video_clock(packets)
    arguments = [
        # The filters meet a change of resolution themselves: what follows is scaled to the same
        # size. Starting them anew, as is the default, would start the clock anew as well.
        *("-reinit_filter", "0", "-itsoffset", f"{-start:.6f}", *input_arguments(source)),
        *("-map", "0:V:0", *encode_arguments(size, seconds)),
    ]
    with partial_file(output) as part:
        arguments += [f"file:{part}", *listing_arguments()]
        done = run_ffmpeg(["-v", "level+error", "-y", *arguments], settings.time_limit)
        if done.status != 0:
            raise FfmpegError(f"cannot be converted: {done.reason}")
        decoded = parse_track(done)
        share = decoded_share(packets, decoded.times[:, 0], seconds)
        words = decoded.said or packets.said or "the file ends before its header says"
        reason = f"only {share:.0%} of it decodes: {words}"
        if share < settings.min_decoded:
            raise PrepareError(f"{reason} (get it anew, or see --min_decoded)")
        ends = [decoded.times[:, 1].max(), *([] if seconds is None else [seconds])]
        count = verify(part, size, ends, settings.time_limit)
        publish(part, output)
    return _result(count, size, ends[-1], share, reason if share < WARN_BELOW else None)


def _result(
    count: int, size: tuple[int, int], seconds: float, share: float, reason: str | None
) -> dict:
    result = {"status": "partial" if reason else "done", "frames": count}
    result |= {"width": size[0], "height": size[1]}
    result |= {"seconds": round(float(seconds), 3), "decoded": round(share, 4)}
    return result | ({"reason": reason} if reason else {})


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


def verify(part: Path, size: tuple[int, int], ends: list[float], time_limit: float) -> int:
    """Decode what was written and compare it with what it should be; gives its frame count.

    Args:
        size: width and height.
        ends: seconds at which the video may end: with its last decoded frame, or where the
            container ends it.

    Raises:
        PrepareError: wrong size, or a count that is off by more than half a frame interval.
    """
    written = decode_frames(part, time_limit)
    if (written.width, written.height) != size:
        found = f"{written.width}x{written.height}"
        raise PrepareError(f"written as {found} instead of {size[0]}x{size[1]}: report this")
    count = len(written.times)
    if count == 0:
        raise PrepareError("not one frame was written: it is too short, or tells no times")
    off = min(abs(count - end * PREPARED_FPS) for end in ends)
    if off > 0.5 + 0.05 and count > 1:  # times are rounded on their way
        wanted = " or ".join(f"{end:.2f}" for end in ends)
        raise PrepareError(f"{count} frames were written for {wanted} s at {PREPARED_FPS} fps")
    return count


def convert_frames(folder: Path, output: Path, settings: Settings) -> dict:
    """Prepare a folder of JPEG frames, taken as 3 fps in natural order; else as `convert_video`.

    A frame that does not decode shows the one before it, so that the others keep their times.
    """
    files = sorted(frame_files(folder), key=natural_key)
    frames = FrameReader(files)
    size = prepared_size(frames.width, frames.height, authors_scale=settings.authors_scale)
    seconds = len(files) / PREPARED_FPS
    arguments = raw_input_arguments(frames.width, frames.height, PREPARED_FPS)
    arguments += encode_arguments(size, seconds)
    with partial_file(output) as part:
        command = ["-v", "level+error", "-y", *arguments, f"file:{part}"]
        done = run_ffmpeg(command, settings.time_limit, feed=frames)
        if done.status != 0:
            raise FfmpegError(f"cannot be converted: {done.reason}")
        share = 1 - len(frames.broken) / len(files)
        reason = f"{len(frames.broken)} of {len(files)} frames are broken: {frames.broken[:3]}"
        if share < settings.min_decoded:
            raise PrepareError(f"{reason} (get it anew, or see --min_decoded)")
        count = verify(part, size, [seconds], settings.time_limit)
        publish(part, output)
    return _result(count, size, seconds, share, reason if frames.broken else None)


class FrameReader:
    """The pixels of JPEG files, one after the other, all in the size of the first that decodes.

    `broken` fills with the names of those that do not decode. Raises PrepareError if none does.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.broken: list[str] = []
        self.current = next((image for image in map(_read_jpeg, files) if image), None)
        if self.current is None:
            raise PrepareError("none of its frames decodes")
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


def frame_files(folder: Path) -> list[Path]:
    """The JPEG files of a folder, in no order."""
    return [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]


def find_inputs(paths: Iterable[Path], skip: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Find the videos and frame folders at and below the given paths.

    Args:
        paths: files, which are all taken, and folders, which are searched.
        skip: the output folder; nothing in it is an input.

    Returns:
        The sources of every vid_name (a file's name without its suffix, a frame folder's name; more
        than one source is for the caller to refuse), and the files that are no videos by suffix.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = {skip.resolve()}
    found: dict[str, list[Path]] = {}
    ignored: list[Path] = []
    for path in paths:
        if path.is_file():
            found.setdefault(path.stem, []).append(path)
            continue
        for folder, subfolders, names in os.walk(path, onerror=_fail, followlinks=True):
            folder = Path(folder)
            if folder.resolve() in seen:  # the output folder, or a loop of links
                subfolders.clear()
                continue
            seen.add(folder.resolve())
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            files = [folder / name for name in sorted(names) if not name.startswith(".")]
            videos = [file for file in files if file.suffix.lower() not in OTHER_SUFFIXES]
            others = [file for file in files if file.suffix.lower() in OTHER_SUFFIXES]
            frames = [file for file in others if file.suffix.lower() in FRAME_SUFFIXES]
            if frames and not videos:
                found.setdefault(folder.resolve().name, []).append(folder)
                others = [file for file in others if file not in frames]
            for file in videos:
                found.setdefault(file.stem, []).append(file)
            ignored += others
    return found, ignored


def _fail(error: OSError) -> None:
    raise error


def prepare(source: Path, output: Path, settings: Settings) -> dict:
    """Prepare one input of either kind; a failure becomes its line in the report."""
    convert = convert_frames if source.is_dir() else convert_video
    try:
        return convert(source, output, settings)
    except (FfmpegError, PrepareError, OSError) as error:
        return {"status": "failed", "reason": str(error)}


def prepare_all(
    inputs: dict[str, list[Path]], output_dir: Path, settings: Settings, workers: int
) -> Iterator[dict]:
    """Prepare what is missing, side by side; yields the line of each input as it is done."""
    jobs: dict[Future, tuple[str, Path]] = {}
    # Left at an interrupt: nothing new starts, and what is under way is ended and cleaned up.
    with ThreadPoolExecutor(workers) as pool, _ended_on_exit(pool, jobs):
        for name, (source, *others) in inputs.items():
            for other in others:
                reason = f"has the same name as {source}: rename or remove one of them"
                yield _line(name, other, {"status": "failed", "reason": reason})
            output = output_dir / f"{name}.mp4"
            if output.exists():
                yield _line(name, source, {"status": "kept"})
            else:
                jobs[pool.submit(prepare, source, output, settings)] = name, source
        for job in as_completed(jobs):
            yield _line(*jobs[job], job.result())


@contextlib.contextmanager
def _ended_on_exit(pool: ThreadPoolExecutor, jobs: dict[Future, tuple[str, Path]]) -> Iterator:
    try:
        yield
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(job.done() for job in jobs):
            kill_running()
            time.sleep(0.02)


def _line(name: str, source: Path, result: dict) -> dict:
    return {"vid_name": name, "input": str(source), **result}


def compare_with_annotations(needed: set[str], output_dir: Path) -> list[dict]:
    """Report lines for videos that are needed and missing, and for clips that nobody needs."""
    present = {path.stem for path in output_dir.glob("*.mp4")}
    missing = [{"vid_name": name, "status": "missing"} for name in sorted(needed - present)]
    unused = [{"vid_name": name, "status": "unused"} for name in sorted(present - needed)]
    return missing + unused


def read_report(path: Path) -> dict[str, dict]:
    """What earlier runs said about the clips that exist, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {r["vid_name"]: r for r in records if r["status"] in ("done", "partial")}


def write_report(path: Path, lines: list[dict]) -> None:
    """Write the report, one JSON object a line; it replaces the earlier one in one step."""
    with partial_file(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        publish(part, path)


def remove_leftovers(output_dir: Path, time_limit: float) -> None:
    """Remove what killed runs left half-written: parts so old that no run can still write them."""
    for part in output_dir.glob(f"{PARTIAL_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > time_limit:
                part.unlink()


def summarise(lines: list[dict], ignored: list[Path], report: Path) -> None:
    """Print the counts and the first few lines of everything that is not as it should be."""
    for status in ("partial", "failed", "missing", "unused"):
        listed = [line for line in lines if line["status"] == status]
        for line in listed[:10]:
            print(f"{status}: {line.get('input', line['vid_name'])}: {line.get('reason', '')}")
        if len(listed) > 10:
            print(f"{status}: {len(listed) - 10} more, see the report")
    if ignored:
        kinds = Counter(path.suffix.lower() for path in ignored).most_common()
        kinds = ", ".join(f"{count} {kind}" for kind, count in kinds)
        print(f"ignored, as their names are not those of videos: {kinds}")
    counts = Counter(line["status"] for line in lines)
    print(", ".join(f"{count} {status}" for status, count in counts.items()) or "no videos done")
    print(f"report: {report}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--inputs", nargs="+", type=Path, required=True, metavar="PATH",
        help="video files, and folders to search for videos and for folders of JPEG frames at 3 "
        "fps; a name that begins with a dash is written ./-name")  # fmt: skip
    add("--output_dir", type=Path, required=True, help="where <vid_name>.mp4 goes")
    add("--annotations", nargs="*", type=Path, default=[], metavar="FILE",
        help="annotation files: say which of their videos are missing and which clips are "
        "used by none of them")  # fmt: skip
    add("--workers", type=int, default=cores, help="videos at a time; each takes about one core")
    add("--authors_scale", action="store_true",
        help="give portrait videos the squashed size of the authors' files; needs an --output_dir "
        "of its own")  # fmt: skip
    add("--min_decoded", type=float, default=0.5,
        help="share of a damaged video that must decode for it to be kept; what is kept with less "
        f"than {WARN_BELOW} is listed as partial")  # fmt: skip
    add("--time_limit", type=float, default=DEFAULT_TIME_LIMIT,
        help="seconds after which a video is given up")  # fmt: skip
    args = parser.parse_args(arguments)
    absent = [str(path) for path in args.inputs if not path.exists()]
    if absent:
        parser.error(f"--inputs: no such file or folder: {', '.join(absent)}")
    if args.workers < 1 or args.time_limit <= 0:
        parser.error("--workers and --time_limit must be above 0")
    return args


def run(args: argparse.Namespace, inputs: dict[str, list[Path]], lines: list[dict]) -> None:
    """Prepare all inputs, under a progress bar; their report lines are added to `lines`."""
    settings = Settings(args.authors_scale, args.min_decoded, args.time_limit)
    earlier = read_report(args.output_dir / REPORT_NAME)
    results = prepare_all(inputs, args.output_dir, settings, args.workers)
    total = sum(map(len, inputs.values()))
    with contextlib.closing(results):
        for line in tqdm(results, total=total, unit="video", smoothing=0.05):
            known = earlier.get(line["vid_name"], {}) if line["status"] == "kept" else {}
            lines.append(line | known)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all there, 1 something failed or is missing, 2 wrong use, 130 interrupted."""
    args = parse_arguments(arguments)
    lines: list[dict] = []
    try:
        queries = [query for file in args.annotations for query in read_annotations(file)]
        needed = {video.vid_name for video in corpus_videos(queries)}
        args.output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(args.output_dir, args.time_limit)
        inputs, ignored = find_inputs(args.inputs, skip=args.output_dir)
    except (AnnotationError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    interrupted = False
    try:
        run(args, inputs, lines)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what is done is kept, and the next run does the rest")
    if args.annotations:
        lines += compare_with_annotations(needed, args.output_dir)
    write_report(args.output_dir / REPORT_NAME, lines)
    summarise(lines, ignored, args.output_dir / REPORT_NAME)
    if interrupted:
        return 130
    return int(any(line["status"] in ("failed", "missing") for line in lines))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
