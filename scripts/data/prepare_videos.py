"""Turns videos as they are downloaded into the clips the programs read: <vid_name>.mp4, 3 fps.

Run it through scripts/prepare.sh. A clip appears only when it is complete and verified, so a run
may be interrupted at any time and the next one does what is missing. Clips that are there already
are kept if their bytes have the checksum that manifest.jsonl notes, or if they decode without an
error where it has no line of them (which gives them one), and made again if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from dataloaders import DataError, listed
from dataloaders.annotations import read_videos
from dataloaders.clips import MANIFEST, VideoFolder, compare
from dataloaders.ffmpeg import (
    DEFAULT_TIME_LIMIT,
    MAX_TIME_LIMIT,
    PREPARED_SHORT_SIDE,
    decode_frames,
    kill_running,
)
from dataloaders.mp4 import read_header
from scripts.data.convert_video import (
    FRAME_SUFFIXES,
    WARN_BELOW,
    Settings,
    file_facts,
    manifest_line,
    prepare,
)
from utils import OutputError
from utils.command import Parser, number, run_command
from utils.files import PARTIAL_PREFIX, append_line, write_records, writing
from utils.misc import usable_cores
from utils.shards import Shard, add_shard_flag

REPORT_NAME = "prepare_report.jsonl"
# What lies beside videos. Anything else is tried, as no list of video suffixes is complete.
NO_VIDEO = re.compile(
    r"\.(jpe?g|png|webp|gif|mp3|wav|flac|m4a|srt|vtt|ass|txt|md|jsonl?|[ct]sv|xml|html|pdf|log|py|sh"
    r"|yaml|np[yz]|pth?|h5|hdf5|pkl|zip|tar|t?gz|bz2|xz|7z|part|ytdl|tmp|aria2|crdownload)",
    re.IGNORECASE,
)


def find_inputs(paths: Iterable[Path], skip: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Find the videos and frame folders at and below the given paths.

    Args:
        paths: files, which are all taken, and folders, which are searched.
        skip: the output folder; nothing in it is an input.

    Returns:
        The sources of every vid_name (a file's name without its suffix, a frame folder's name; more
        than one source is for the caller to refuse), and the files that are no videos by suffix.

    Raises:
        DataError: a folder cannot be read.
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
            others = [file for file in files if NO_VIDEO.fullmatch(file.suffix)]
            videos = [file for file in files if file not in others]
            frames = [file for file in others if file.suffix.lower() in FRAME_SUFFIXES]
            if frames and not videos:
                found.setdefault(folder.resolve().name, []).append(folder)
                others = [file for file in others if file not in frames]
            for file in videos:
                found.setdefault(file.stem, []).append(file)
            ignored += others
    return found, ignored


def _fail(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def prepare_all(
    inputs: dict[str, list[Path]], output_dir: Path, settings: Settings, workers: int
) -> Iterator[dict]:
    """Prepare what is missing or damaged, side by side; yields the report's line of each input."""
    jobs: dict[Future, tuple[str, Path]] = {}
    clips = VideoFolder(output_dir)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for name, (source, *others) in inputs.items():
                for other in others:
                    reason = f"has the same name as {source}: rename one of them"
                    yield _line(name, other, {"status": "failed", "reason": reason})
                job = pool.submit(prepare_if_needed, name, source, clips, settings)
                jobs[job] = name, source
            for job in as_completed(jobs):
                yield _line(*jobs[job], job.result())
        finally:  # at an interrupt nothing new starts, and what is under way is ended
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in jobs):
                kill_running()
                time.sleep(0.02)


def _line(name: str, source: Path, result: dict) -> dict:
    return {"vid_name": name, "input": str(source), **result}


def prepare_if_needed(name: str, source: Path, clips: VideoFolder, settings: Settings) -> dict:
    """Prepare one input, unless a sound clip is there.

    Only what is damaged is replaced: a sound video of another size may be somebody's original.
    """
    reason = None
    output = clips.path(name)
    try:
        header = read_header(output)
        size = {"width": header.width, "height": header.height}
        if PREPARED_SHORT_SIDE in size.values():
            return keep(name, clips, settings) | size
        reason = f"has {header.width}x{header.height} pixels, so it is no prepared clip: rename it"
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = f"{error.strerror}: rename it"
    except DataError as error:
        if output.samefile(source):
            reason = f"{error}; it is input and output at once"
        else:
            tqdm.write(f"made again: {output}: {error}")
    if reason is None:
        return prepare(source, output, settings)
    return {"status": "failed", "reason": f"{output}: {reason}, or give another --output_dir"}


def keep(name: str, clips: VideoFolder, settings: Settings) -> dict:
    """The report's line of a clip that was there; what was wrong with its input is said again.

    DataError: it is damaged. OutputError: the manifest cannot be written.
    """
    path = clips.path(name)
    if result := clips.noted.get(name):
        compare(path, result, checksum=True)
    else:
        track = decode_frames(path, settings.time_limit)
        if track.damaged:
            raise DataError(f"it does not decode ({track.error})")
        result = {"status": "done", "frames": len(track.times), **file_facts(path)}
        append_line(path.with_name(MANIFEST), manifest_line(path, result))
    if result.get("status", "done") == "done":
        return result | {"status": "kept"}
    if settings.strict:
        reason = f"{path}: made of a damaged input: {result.get('reason')}: --strict: remove it"
        return {"status": "failed", "reason": reason}
    return result


def compare_with_annotations(
    needed: set[str], output_dir: Path, made: set[str], shard: Shard
) -> list[dict]:
    """Report lines for videos that are needed and missing, and for clips that no annotation needs.

    Args:
        made: names of clips that need no probing any more. Other clips that cannot be used are as
            good as missing.
    """
    clips = VideoFolder(output_dir)
    needed = {name for name in needed if shard.has(name)}
    present = {path.stem for path in output_dir.glob("*.mp4") if shard.has(path.stem)}
    lines = [{"vid_name": name, "status": "missing"} for name in sorted(needed - present)]
    for name in sorted((needed & present) - made):
        try:
            clips.probe(name, PREPARED_SHORT_SIDE)
            clips.compare(name, checksum=True)
        except DataError as error:
            lines.append({"vid_name": name, "status": "missing", "reason": str(error)})
    return lines + [{"vid_name": name, "status": "unused"} for name in sorted(present - needed)]


def remove_leftovers(output_dir: Path, time_limit: float) -> None:
    """Remove what killed runs left half-written: parts so old that no run can still write them."""
    for part in output_dir.glob(f"{PARTIAL_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > time_limit:
                part.unlink()


def summarise(lines: list[dict], ignored: list[Path]) -> None:
    """Print the counts and some lines of everything that is not as it should be."""
    for status in ("partial", "damaged", "short", "failed", "missing", "unused"):
        found = [line for line in lines if line["status"] == status]
        parts = [(line.get("input", line["vid_name"]), line.get("reason")) for line in found]
        if found:
            print(listed([": ".join(filter(None, (status, *part))) for part in parts]))
    if ignored:
        kinds = Counter(path.suffix.lower() for path in ignored).most_common()
        kinds = ", ".join(f"{count} {kind}" for kind, count in kinds)
        print(f"ignored, as their names are not those of videos: {kinds}")
    counts = Counter(line["status"] for line in lines)
    print(", ".join(f"{count} {status}" for status, count in counts.items()) or "no videos done")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--inputs", nargs="+", type=Path, required=True, metavar="PATH",
        help="video files, and folders to search for videos and for folders of JPEG frames at 3 "
        "fps; a name that begins with a dash is written ./-name")  # fmt: skip
    add("--output_dir", type=Path, required=True, help="where <vid_name>.mp4 goes")
    add("--annotations", nargs="*", type=Path, default=[], metavar="FILE",
        help="annotation files: say which of their videos are missing and which clips are "
        "used by none of them")  # fmt: skip
    add("--workers", type=number(int, 1), default=usable_cores(),
        help="videos at a time; each takes about one core")  # fmt: skip
    add("--authors_scale", action="store_true",
        help="the sizes of the authors' files: portrait videos squashed, pixels taken as square; "
        "needs an --output_dir of its own")  # fmt: skip
    add("--min_decoded", type=number(float, 1e-6, 1), default=0.5,
        help="share of a damaged video that must decode for it to be kept; what is kept with less "
        f"than {WARN_BELOW} is listed as partial")  # fmt: skip
    add("--strict", action="store_true",
        help="refuse inputs that are damaged or shorter than they say")  # fmt: skip
    add("--time_limit", type=number(float, 1e-6, MAX_TIME_LIMIT), default=DEFAULT_TIME_LIMIT,
        help="seconds after which a video is given up")  # fmt: skip
    add_shard_flag(parser)
    args = parser.parse_args(arguments)
    absent = [str(path) for path in args.inputs if not path.exists()]
    if absent:
        parser.error(f"--inputs: no such file or folder: {', '.join(absent)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all there, 1 something is missing, damaged or not written, 130 interrupted."""
    args = parse_arguments(arguments)
    needed = {video.vid_name for video in read_videos(args.annotations)}
    with writing(args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(args.output_dir, args.time_limit)
    found, ignored = find_inputs(args.inputs, skip=args.output_dir)
    settings = Settings(args.authors_scale, args.min_decoded, args.time_limit, args.strict)
    inputs = {name: sources for name, sources in found.items() if args.shard.has(name)}
    results = prepare_all(inputs, args.output_dir, settings, args.workers)
    lines: list[dict] = []
    status = 0
    try:
        with contextlib.closing(results):
            total = sum(map(len, inputs.values()))
            for line in tqdm(results, total=total, unit="video", smoothing=0.05):
                lines.append(line)
    except KeyboardInterrupt:
        status = 130
        print("interrupted: what is done is kept, and the next run does the rest")
    except (OutputError, DataError) as error:
        status = 1
        print(f"stopped: {error}. What is done is kept, and the next run does the rest")
    if args.annotations:
        made = {line["vid_name"] for line in lines if line["status"] != "failed"}
        lines += compare_with_annotations(needed, args.output_dir, made, args.shard)
    summarise(lines, ignored)
    report = args.output_dir / REPORT_NAME
    if args.shard.label:
        report = report.with_name(f"{report.stem}.{args.shard.label}{report.suffix}")
        print(f"shard {args.shard.label}; when all are done, run without --shard for all of them")
    write_records(report, lines)
    print(f"report: {report}")
    return status or int(any(line["status"] not in ("done", "kept", "unused") for line in lines))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_command(main)
