"""Turns videos as they are downloaded into the clips the programs read: <vid_name>.mp4, 3 fps.

Run it through scripts/prepare.sh. A clip appears only when it is complete and verified, so a run
may be interrupted at any time and the next one does what is missing. Clips that are there already
are kept if their headers show nothing wrong, and made again if these are damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from dataloaders import DataError
from dataloaders.annotations import corpus_videos, read_annotations
from dataloaders.ffmpeg import DEFAULT_TIME_LIMIT, MAX_TIME_LIMIT, PREPARED_SHORT_SIDE, kill_running
from dataloaders.mp4 import ContainerError, read_header
from scripts.data.prepare import FRAME_SUFFIXES, WARN_BELOW, PrepareError, Settings, prepare
from utils import OutputError
from utils.files import PARTIAL_PREFIX, atomic_write
from utils.misc import usable_cores

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


def prepare_all(
    inputs: dict[str, list[Path]], output_dir: Path, settings: Settings, workers: int
) -> Iterator[dict]:
    """Prepare what is missing or unusable, side by side; yields the line of each input in turn."""
    jobs: dict[Future, tuple[str, Path]] = {}
    # Left at an interrupt: nothing new starts, and what is under way is ended and cleaned up.
    with ThreadPoolExecutor(workers) as pool, _ended_on_exit(pool, jobs):
        for name, (source, *others) in inputs.items():
            for other in others:
                reason = f"has the same name as {source}: rename or remove one of them"
                yield _line(name, other, {"status": "failed", "reason": reason})
            output = output_dir / f"{name}.mp4"
            jobs[pool.submit(prepare_if_needed, source, output, settings)] = name, source
        for job in as_completed(jobs):
            yield _line(*jobs[job], job.result())


def prepare_if_needed(source: Path, output: Path, settings: Settings) -> dict:
    """Prepare one input, unless a usable clip is there; `replaced` says why an old one was not.

    Only what is damaged is replaced: a sound video of another size may be somebody's original.
    """
    if not output.exists():
        return prepare(source, output, settings)
    try:
        return {"status": "kept", **look_at_output(output)}
    except ContainerError as error:
        if output.samefile(source):
            reason = f"{error}; it is input and output at once: give another --output_dir"
            return {"status": "failed", "reason": reason}
        result = prepare(source, output, settings)
        replaced = {} if result["status"] == "failed" else {"replaced": str(error)}
        return result | replaced
    except PrepareError as error:
        return {"status": "failed", "reason": str(error)}


def look_at_output(clip: Path) -> dict:
    """What the header of a clip says: frames, width and height.

    Raises:
        ContainerError: it is damaged.
        PrepareError: it is no clip, but something else that is in the way.
    """
    try:
        header = read_header(clip)
    except OSError as error:
        raise PrepareError(f"{clip}: {error.strerror}: remove or rename it") from error
    if PREPARED_SHORT_SIDE not in (header.width, header.height):
        raise PrepareError(
            f"{clip} has {header.width}x{header.height} pixels, so it is no prepared clip: remove "
            "it, or give another --output_dir"
        )
    return {"frames": header.num_frames, "width": header.width, "height": header.height}


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


def compare_with_annotations(
    needed: set[str], output_dir: Path, inputs: Collection[str]
) -> list[dict]:
    """Report lines for videos that are needed and missing, and for clips that nobody needs.

    A clip that is none of the inputs is looked at here: unusable, it is as good as missing.
    """
    present = {path.stem for path in output_dir.glob("*.mp4")}
    missing = [{"vid_name": name, "status": "missing"} for name in sorted(needed - present)]
    for name in sorted((needed & present).difference(inputs)):
        try:
            look_at_output(output_dir / f"{name}.mp4")
        except (ContainerError, PrepareError) as error:
            reason = f"its clip cannot be used ({error}), and no input has this name"
            missing.append({"vid_name": name, "status": "missing", "reason": reason})
    unused = [{"vid_name": name, "status": "unused"} for name in sorted(present - needed)]
    return missing + unused


def read_report(path: Path) -> dict[str, dict]:
    """What earlier runs said about the clips they made, by name.

    A line that is none of a report is passed over with a message: only what it said is lost.

    Raises:
        OSError: it cannot be read; a folder of that name, for one.
    """
    records = {}
    if not path.exists():
        return records
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["status"] in ("done", "partial"):
                record.pop("replaced", None)  # by that run
                records[str(record["vid_name"])] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            print(f"{path}:{number}: not a line of a report: passed over", file=sys.stderr)
    return records


def write_report(path: Path, lines: list[dict]) -> None:
    """Write the report, one JSON object a line; it replaces the earlier one in one step.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_write(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def remove_leftovers(output_dir: Path, time_limit: float) -> None:
    """Remove what killed runs left half-written: parts so old that no run can still write them."""
    for part in output_dir.glob(f"{PARTIAL_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > time_limit:
                part.unlink()


def summarise(lines: list[dict], ignored: list[Path]) -> None:
    """Print the counts and the first few lines of everything that is not as it should be."""
    again = [line for line in lines if "replaced" in line]
    for line in again[:10]:
        print(f"made again: {line['vid_name']}.mp4: {line['replaced']}")
    if len(again) > 10:
        print(f"made again: {len(again) - 10} more, see the report")
    for status in ("partial", "failed", "missing", "unused"):
        listed = [line for line in lines if line["status"] == status]
        for line in listed[:10]:
            reason = f": {line['reason']}" if "reason" in line else ""
            print(f"{status}: {line.get('input', line['vid_name'])}{reason}")
        if len(listed) > 10:
            print(f"{status}: {len(listed) - 10} more, see the report")
    if ignored:
        kinds = Counter(path.suffix.lower() for path in ignored).most_common()
        kinds = ", ".join(f"{count} {kind}" for kind, count in kinds)
        print(f"ignored, as their names are not those of videos: {kinds}")
    counts = Counter(line["status"] for line in lines)
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    some = f"; {len(again)} of them made again" if again else ""
    print(f"{counted}{some}" if counted else "no videos done")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
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
    add("--workers", type=int, default=usable_cores(),
        help="videos at a time; each takes about one core")  # fmt: skip
    add("--authors_scale", action="store_true",
        help="the sizes of the authors' files: portrait videos squashed, pixels taken as square; "
        "needs an --output_dir of its own")  # fmt: skip
    add("--min_decoded", type=float, default=0.5,
        help="share of a damaged video that must decode for it to be kept; what is kept with less "
        f"than {WARN_BELOW} is listed as partial")  # fmt: skip
    add("--time_limit", type=float, default=DEFAULT_TIME_LIMIT,
        help="seconds after which a video is given up")  # fmt: skip
    args = parser.parse_args(arguments)
    absent = [str(path) for path in args.inputs if not path.exists()]
    if absent:
        parser.error(f"--inputs: no such file or folder: {', '.join(absent)}")
    if args.workers < 1 or not 0 < args.time_limit <= MAX_TIME_LIMIT:
        parser.error(f"--workers and --time_limit must be above 0 (and below {MAX_TIME_LIMIT:g})")
    if not 0 < args.min_decoded <= 1:
        parser.error(f"--min_decoded is a share, above 0 and at most 1: {args.min_decoded:g}")
    return args


def run(
    args: argparse.Namespace,
    inputs: dict[str, list[Path]],
    earlier: dict[str, dict],
    lines: list[dict],
) -> None:
    """Prepare all inputs, under a progress bar; their report lines are added to `lines`.

    A clip that is kept has the line of the run that made it, if it is still that one.
    """
    settings = Settings(args.authors_scale, args.min_decoded, args.time_limit)
    results = prepare_all(inputs, args.output_dir, settings, args.workers)
    total = sum(map(len, inputs.values()))
    with contextlib.closing(results):
        for line in tqdm(results, total=total, unit="video", smoothing=0.05):
            known = earlier.get(line["vid_name"], {}) if line["status"] == "kept" else {}
            same = known.get("frames") == line.get("frames")
            lines.append(line | (known if same else {}))


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
        report = args.output_dir / REPORT_NAME
        earlier = read_report(report)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    interrupted = written = False
    try:
        run(args, inputs, earlier, lines)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what is done is kept, and the next run does the rest")
        for line in lines:
            earlier.pop(line["vid_name"], None)
    if args.annotations:
        lines += compare_with_annotations(needed, args.output_dir, inputs)
    try:
        # what an interrupted run did not come to is known to the next one as before
        write_report(report, [*lines, *(earlier.values() if interrupted else ())])
        written = True
    except OutputError as error:
        print(error, file=sys.stderr)
    summarise(lines, ignored)
    print(f"report: {report if written else 'not written'}")
    if interrupted:
        return 130
    failed = any(line["status"] in ("failed", "missing") for line in lines)
    return int(failed or not written)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
