"""Health report of a folder of prepared clips, against the annotations that need them.

    .venv/bin/python -m scripts.data.check_videos --video_dir data/charades/videos \\
        --annotations annotations/charades/*.jsonl

Reads only the headers, unless --decode asks for every frame. A broken file costs a message, within
a time limit.
"""

from __future__ import annotations

import argparse
import signal
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloaders import DataError, listed
from dataloaders.annotations import Video, read_videos
from dataloaders.clips import MANIFEST, VideoFolder, compare
from dataloaders.ffmpeg import (
    MAX_TIME_LIMIT,
    PREPARED_FPS,
    PREPARED_SHORT_SIDE,
    decode_frames,
    kill_running,
    read_packets,
)
from utils.command import Parser, folder, new_file, number, run_command
from utils.files import write_records
from utils.misc import usable_cores

# What can be wrong with a video, in the order of the summary.
PROBLEMS = ("missing", "unreadable", "changed", "size", "rate", "duration", "broken")


def check_size(width: int, height: int, authors_scale: bool = False) -> bool:
    """Whether a clip has a size that the preparation gives."""
    if width % 2 or height % 2:
        return False
    if authors_scale:  # portrait videos squashed to the width 224
        return height == PREPARED_SHORT_SIDE <= width or height < PREPARED_SHORT_SIDE == width
    return min(width, height) == PREPARED_SHORT_SIDE


def check_video(
    path: Path, duration: float, args: argparse.Namespace, noted: Mapping | None = None
) -> dict[str, str]:
    """Everything that is wrong with one clip: problem -> detail.

    Args:
        duration: seconds according to the annotations.
        args: `tolerance` in seconds, `decode`, `checksums`, `authors_scale`, `time_limit`. Without
            `decode` only the header and the first two packets are read.
        noted: what the manifest says of it.
    """
    if not path.is_file():
        return {"missing": "no such file"}
    try:
        track = read_packets(path, args.time_limit, limit=None if args.decode else 2)
        decoded = decode_frames(path, args.time_limit) if args.decode else None
    except DataError as error:
        return {"unreadable": str(error)}
    if len(track.times) == 0:
        return {"unreadable": "its video stream is empty"}
    found = {}
    try:
        compare(path, noted, args.checksums)
    except DataError as error:
        found["changed"] = str(error)
    if not check_size(track.width, track.height, args.authors_scale):
        found["size"] = f"{track.width}x{track.height}"
    # Of two packets only the lengths say something: they are stored in the order of decoding.
    starts = np.sort(track.times[:, 0])
    spans = np.diff(starts) if args.decode else track.times[:, 1] - track.times[:, 0]
    seconds = float(track.times[:, 1].max())
    if not args.decode and track.container_seconds is not None:
        seconds = track.container_seconds
    # Times are multiples of a unit that can be as coarse as a thousandth of a second.
    if not np.allclose(spans, 1 / PREPARED_FPS, rtol=0, atol=1.5e-3):
        found["rate"] = f"not constantly {PREPARED_FPS} fps"
    elif abs(seconds - duration) > args.tolerance + 0.5 / PREPARED_FPS:
        frames = round(seconds * PREPARED_FPS)
        said = f"the annotations say {duration:g} s"
        found["duration"] = f"{frames} frames are {seconds:.2f} s, {said}"
    if decoded is not None and (decoded.damaged or len(decoded.times) < len(track.times)):
        counts = f"{len(decoded.times)} of {len(track.times)} frames decode"
        found["broken"] = f"{counts}: {decoded.error}"
    return found


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--video_dir", type=folder, required=True, help="folder of prepared clips")
    add("--annotations", type=Path, nargs="+", required=True, metavar="FILE",
        help="annotation files that need them")  # fmt: skip
    add("--decode", action="store_true", help="decode every frame, too (about 0.1 s a clip)")
    add("--checksums", action="store_true",
        help="compare all bytes with what was prepared, not only their number")  # fmt: skip
    add("--tolerance", type=number(float, 0), default=1.0, metavar="SECONDS",
        help="difference between a clip and its annotated duration that is let pass, beyond half "
        "a frame interval (default: %(default)s)")  # fmt: skip
    add("--authors_scale", action="store_true", help="the clips were prepared with this switch")
    add("--report", type=new_file, metavar="FILE", help="write the problems there, as JSON lines")
    add("--workers", type=number(int, 1), default=usable_cores(),
        help="clips at a time (default: %(default)s)")  # fmt: skip
    add("--time_limit", type=number(float, 1e-6, MAX_TIME_LIMIT), default=60.0, metavar="SECONDS",
        help="after which a clip counts as unreadable (default: %(default)s)")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all well, 1 something is wrong, 130 interrupted."""
    args = parse_arguments(arguments)
    videos, clips = read_videos(args.annotations), VideoFolder(args.video_dir)

    def check(video: Video) -> list[dict]:
        name = video.vid_name
        found = check_video(clips.path(name), video.duration, args, clips.noted.get(name))
        return [{"vid_name": video.vid_name, "problem": p, "detail": d} for p, d in found.items()]

    problems: list[dict] = []
    checked, status = 0, 0
    with ThreadPoolExecutor(args.workers) as pool:
        try:
            for found in tqdm(pool.map(check, videos), total=len(videos), unit="video"):
                problems += found
                checked += 1
        except KeyboardInterrupt:
            status = 130
            pool.shutdown(wait=False, cancel_futures=True)
            kill_running()
    counts = Counter(problem["problem"] for problem in problems)
    for kind in (kind for kind in PROBLEMS if counts[kind]):
        some = [p for p in problems if p["problem"] == kind]
        print(listed([f"{kind}: {p['vid_name']}: {p['detail']}" for p in some]))
    unused = {path.stem for path in args.video_dir.glob("*.mp4")} - {v.vid_name for v in videos}
    if unused:
        print(f"{len(unused)} clips are used by none of the annotations: {min(unused)}, …")
    bad = len({problem["vid_name"] for problem in problems})
    kinds = "".join(f", {counts[kind]} {kind}" for kind in PROBLEMS if counts[kind])
    print(f"{checked} videos checked, {bad} with problems{kinds}")
    unknown = sum(v.vid_name not in clips.noted for v in videos)
    if unknown:
        print(f"{unknown} of them are not in a {MANIFEST}: there is nothing to compare them with")
    if checked < len(videos):
        print(f"interrupted: this is of the first {checked} of {len(videos)} videos only")
    if args.report:
        write_records(args.report, problems)
    return status or int(bool(problems))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_command(main)
