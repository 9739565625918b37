"""Trains for a while on a small made-up corpus and watches memory and open files.

    .venv/bin/python -m tests.fuzz.soak --steps 400 --workers 4

Every second the processes of the run are counted: proportional set size (memory shared between them
once) and open files. Leaves soak.csv in the output folder, and ends with exit status 1 if memory or
files grow over the second half of the training. Linux.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from tests.corpus import FLAGS, ROOT, TRAIN, make_corpus

CLIPS, BATCH = 40, 4
# What may be gained over the second half: the allocators' noise, far below any leak of clips.
MAX_GROWTH_MIB, MAX_GROWTH_FILES = 64.0, 4.0


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
    add("--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    add("--output_dir", type=Path, default=ROOT / "logs/soak", help="(default: logs/soak)")
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.workers < 0:
        parser.error("--steps must be at least 1, --workers at least 0")
    corpus, epochs = args.output_dir / "corpus", math.ceil(args.steps * BATCH / CLIPS)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    colours = np.random.RandomState(0).randint(256, size=(CLIPS, 2, 3))
    make_corpus(corpus, colours, lambda clip, half: (f"{clip}#{half}", f"wall {clip}"))
    command = [
        sys.executable, str(ROOT / "main.py"), *FLAGS, *TRAIN, "--video_dir", "videos",
        "--output_dir", "run", "--batch_size", str(BATCH), "--epochs", str(epochs),
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
    np.savetxt(args.output_dir / "soak.csv", samples, "%.1f", ",", header="seconds,MiB,files")
    half = samples[len(samples) // 2 :]
    mib, files = np.polyfit(half[:, 0], half[:, 1:], 1)[0] * (half[-1, 0] - half[0, 0])
    print(
        f"{args.steps} steps, {args.workers} workers; the second half gained {mib:+.1f} MiB at "
        f"{half[:, 1].mean():.0f} and {files:+.1f} open files: {args.output_dir}/soak.csv"
    )
    return int(mib > MAX_GROWTH_MIB or files > MAX_GROWTH_FILES)


if __name__ == "__main__":
    sys.exit(main())
