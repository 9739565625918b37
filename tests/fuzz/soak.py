"""Trains for a while on a small made-up corpus and watches memory and open files.

    .venv/bin/python -m tests.fuzz.soak --steps 400 --workers 4

Every second the processes of the run are counted: proportional set size (memory shared between them
once) and open files. Leaves soak.csv in the output folder, and ends with exit status 1 if memory or
files grow over the second half of the training. Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from dataloaders.ffmpeg import write_video
from models.clip import CLIP, CLIPSizes

ROOT = Path(__file__).resolve().parents[2]
SIZE, BATCH, TEST_VIDEOS = 64, 4, 8
RENDERED = 40  # clips; further videos of the corpus are the same files under other names
# What may be gained over the second half: the allocators' noise, far below any leak of clips.
MAX_GROWTH_MIB, MAX_GROWTH_FILES = 64.0, 4.0


def make_corpus(folder: Path, videos: int) -> None:
    """Clips, annotations and the weights of a small CLIP, in an empty folder."""
    rng = np.random.default_rng(0)
    for number in tqdm(range(RENDERED), "clips"):
        noise = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        frames = (np.roll(noise, shift, axis=1) for shift in range(60 + 3 * number))
        write_video(folder / f"{number}.mp4", frames)
    for number in range(RENDERED, videos):
        (folder / f"{number}.mp4").symlink_to(f"{number % RENDERED}.mp4")
    for name, count in (("train", videos), ("test", TEST_VIDEOS)):
        line = {"duration": 20, "ts": [0, 9]}
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(2 * count):  # two captions a video
                query = {"vid_name": str(i // 2), "desc_id": i, "desc": f"noise {i}"}
                file.write(json.dumps(query | line) + "\n")
    clip = CLIP(CLIPSizes(64, 64, 2, 16, SIZE // 16, 64, 2, 77, 49408))
    clip.initialize()
    torch.save(clip.state_dict(), folder / "clip.pt")


def watch(process: subprocess.Popen, workers: int) -> np.ndarray:
    """[n, 3]: seconds, MiB and open files, once a second while the workers are up."""
    samples, started, root = [], time.monotonic(), psutil.Process(process.pid)
    with tqdm(desc="soak", unit="sample") as bar:
        while process.poll() is None:
            try:
                family = [root, *root.children(recursive=True)]
                mib = sum(member.memory_full_info().pss for member in family) / 2**20
                files = sum(member.num_fds() for member in family)
            except psutil.Error:  # one of them ended meanwhile
                continue
            if len(family) > workers:
                samples.append((time.monotonic() - started, mib, files))
                bar.set_postfix(MiB=f"{mib:.0f}", files=files, refresh=False)
            bar.update()
            time.sleep(1)
    return np.array(samples)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 flat, 1 growing, 2 the training failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of training (default: %(default)s)")
    add("--epochs", type=int, default=5, help="they are spread over (default: %(default)s)")
    add("--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    add("--output_dir", type=Path, default=ROOT / "logs/soak", help="(default: logs/soak)")
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.epochs < 1 or args.workers < 0:
        parser.error("--steps and --epochs must be at least 1, --workers at least 0")
    corpus, run = args.output_dir / "corpus", args.output_dir / "run"
    for folder in (corpus, run):
        shutil.rmtree(folder, ignore_errors=True)
    corpus.mkdir(parents=True)
    make_corpus(corpus, math.ceil(args.steps / args.epochs) * BATCH)
    command = [
        sys.executable, str(ROOT / "main.py"), "--do_train", "1", "--video_dir", ".",
        "--prvr_train_annos", "train.jsonl", "--prvr_val_annos", "test.jsonl",
        "--output_dir", str(run.absolute()), "--pretrained_clip_name", "clip.pt",
        "--adapter_channels", "32", "--batch_size", str(BATCH), "--epochs", str(args.epochs),
        "--num_thread_reader", str(args.workers),
    ]  # fmt: skip
    with (args.output_dir / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=corpus, stdout=output, stderr=subprocess.STDOUT)
        try:
            samples = watch(process, args.workers)
        finally:
            process.kill()
            process.wait()
    if process.returncode or len(samples) < 10:
        print(f"the training ended with {process.returncode}: {args.output_dir}/output.txt")
        return 2
    header = {"header": "seconds,MiB,files", "comments": ""}
    np.savetxt(args.output_dir / "soak.csv", samples, "%.1f", ",", **header)
    half = samples[len(samples) // 2 :]
    mib, files = np.polyfit(half[:, 0], half[:, 1:], 1)[0] * (half[-1, 0] - half[0, 0])
    print(
        f"{args.steps} steps, {args.workers} workers, {samples[-1, 0]:.0f} s; in the second half "
        f"memory gained {mib:+.1f} MiB ({mib / args.steps * 2000:+.1f} per 1000 steps) at "
        f"{half[:, 1].mean():.0f} MiB, open files {files:+.1f} at {half[:, 2].mean():.0f}\n"
        f"{args.output_dir}/soak.csv"
    )
    return int(mib > MAX_GROWTH_MIB or files > MAX_GROWTH_FILES)


if __name__ == "__main__":
    sys.exit(main())
