"""Packs a folder of prepared clips into a frame store, one HDF5 file for main.py --frame_store.

    .venv/bin/python -m scripts.data.pack_frames --video_dir data/tvr/videos \\
        --frame_store data/tvr/frames.h5

An interrupted run, however it ended, is continued by the next one. Later runs pack what was added
to the folder or has changed; a finished store stays as it is until the extended one takes its
place, so there has to be room for both. In the end every byte is read again and checked.
With --shard several machines pack a part each; a run without it then joins them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from dataloaders import DataError
from dataloaders.annotations import read_videos
from dataloaders.clips import VideoFolder, compare
from dataloaders.ffmpeg import PREPARED_SHORT_SIDE
from dataloaders.frame_store import (
    DEFAULT_QUALITY,
    FrameStore,
    FrameStoreWriter,
    PackedClip,
    pack_clip,
)
from dataloaders.video import PREPARE
from utils.command import Parser, folder, new_file, number, run_command
from utils.misc import usable_cores
from utils.shards import Shard, add_shard_flag

Packed = tuple[PackedClip, bytes]
File = tuple[str, Path, Mapping | None]  # name, clip, and what the manifest notes of it


def pack_side_by_side(
    files: Sequence[File], size: int, quality: int, workers: int
) -> Iterator[Packed | DataError]:
    """Packs clips in worker processes; the result of each, in the order given.

    A clip that ends its process, as a decoder may on a damaged file, costs only itself.
    """
    waiting = deque(files)
    while waiting:
        running: deque[tuple[File, Future]] = deque()
        with _pool(workers) as pool, contextlib.suppress(BrokenProcessPool):
            while waiting or running:
                while waiting and len(running) < 2 * workers:  # bounds what waits in memory
                    job = pool.submit(_pack, waiting[0], size, quality)
                    running.append((waiting.popleft(), job))
                yield running[0][1].result()
                running.popleft()
        for file, _ in running:  # one of these it was
            with _pool(1) as pool:
                try:
                    result = pool.submit(_pack, file, size, quality).result()
                except BrokenProcessPool:
                    result = DataError(f"{file[1]}: its decoder crashed: {PREPARE}")
            yield result


def _pack(file: File, size: int, quality: int) -> Packed | DataError:
    name, path, noted = file
    try:
        compare(path, noted, checksum=True)
    except DataError as error:
        return DataError(f"{path}: {error}: {PREPARE}")
    try:
        return pack_clip(name, path, size, quality)
    except DataError as error:
        return error


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("fork"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])  # a killed one leaves its workers waiting
    os._exit(1)


def pack(
    store: Path, files: Sequence[File], size: int, quality: int, workers: int, shard: Shard
) -> list[str]:
    """Pack what is not packed yet, under a progress bar; returns the failures, a message each.

    Args:
        shard: whose clips these are. What it packs is kept beside the store, for the run without.

    Raises:
        DataError: the store, or what there is of it, cannot be continued with, or there is no room.
    """
    failures = []
    with FrameStoreWriter(store, size, quality, shared=bool(shard.label)) as writer:
        known = writer.clips
        todo = [f for f in files if f[0] not in known or not known[f[0]].same_source(f[1])]
        if todo:
            print(f"{len(todo)} clips to pack, {len(files) - len(todo)} are packed", flush=True)
        results = pack_side_by_side(todo, size, quality, workers)
        with contextlib.closing(results):
            for result in tqdm(results, total=len(todo), unit="clip", dynamic_ncols=True):
                if isinstance(result, DataError):
                    failures.append(str(result))
                else:
                    writer.add(*result)
        if shard.label:
            print(f"shard {shard.label} is packed: when all are, run without --shard to finish")
        elif writer.clips:
            if todo:
                print(f"writing {store}", flush=True)
            writer.finish()
    return failures


def summarise(store: FrameStore) -> None:
    """Read everything again, then print sizes."""
    clips = list(store.clips.values())
    for name in tqdm(store.clips, desc="verify", unit="clip", dynamic_ncols=True):
        store.jpegs(name)
    frames = sum(len(clip.lengths) for clip in clips)
    jpegs = sum(int(clip.lengths.sum()) for clip in clips)
    sources = sum(clip.source_bytes for clip in clips)
    whole = store.path.stat().st_size
    print(
        f"{store.path}: {len(clips):,} clips, {frames:,} frames of {store.size}×{store.size},"
        f" quality {store.quality}, all checksums right\n"
        f"{whole / 2**30:.3g} GiB, {jpegs / frames / 1024:.1f} KiB a frame, {whole / sources:.2f}"
        " times the clips' own files"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--video_dir", type=folder, required=True, help="folder of prepared clips")
    add("--frame_store", type=new_file, required=True, metavar="FILE", help="the store to make")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE",
        help="pack only the clips that these need (default: all of the folder)")  # fmt: skip
    add("--quality", type=number(int, 1, 95), default=DEFAULT_QUALITY,
        help="of the JPEGs, 1 to 95 (default: %(default)s)")  # fmt: skip
    add("--size", type=number(int, 1), default=PREPARED_SHORT_SIDE,
        help="side of the model's input, pixels (default: %(default)s)")  # fmt: skip
    add("--workers", type=number(int, 1), default=usable_cores(),
        help="clips at a time (default: %(default)s)")  # fmt: skip
    add_shard_flag(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all packed, 1 clips failed or are missing, 130 interrupted."""
    args = parse_arguments(arguments)
    names = [video.vid_name for video in read_videos(args.annotations)]
    present = sorted(path.stem for path in args.video_dir.glob("*.mp4"))
    if not present:
        raise DataError(
            f"{args.video_dir}: no .mp4 file in it: make them with `bash scripts/prepare.sh`"
        )
    clips = VideoFolder(args.video_dir)
    wanted = {name: clips.path(name) for name in names or present if args.shard.has(name)}
    missing = [name for name, path in wanted.items() if not path.is_file()]
    files = [(n, path, clips.noted.get(n)) for n, path in wanted.items() if path.is_file()]
    failures = []
    if files:
        settings = (args.size, args.quality, args.workers, args.shard)
        failures = pack(args.frame_store, files, *settings)
    if args.frame_store.is_file() and not args.shard.label:
        summarise(FrameStore(args.frame_store))
    for message in failures:
        print(f"failed: {message}")
    for name in missing:
        print(f"missing: {wanted[name]}")
    if failures or missing:
        print(f"{len(failures)} of {len(files)} clips failed, {len(missing)} are missing")
    return int(bool(failures or missing))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_command(main)
