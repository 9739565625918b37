"""Trains for a while on a small made-up corpus and watches memory and open files.

    .venv/bin/python -m tests.fuzz.soak --steps 400 --workers 4

Every second the processes of the run are counted: proportional set size (memory shared between them
once) and open file descriptors. Leaves soak.csv and soak.png in the output folder, and ends with
exit status 1 if memory or files grow over the second half of the training. Linux.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataloaders.annotations import corpus_videos, read_annotations
from models.clip import CLIP, CLIPSizes
from scripts.demo.world import draw_clips, write_annotations, write_clips

ROOT = Path(__file__).resolve().parents[2]
SIZE, BATCH, TEST_VIDEOS = 64, 4, 8
RENDERED = 40  # clips; further videos of the corpus are the same files under other names
CLIP_SIZES = CLIPSizes(64, 64, 2, 16, SIZE // 16, 64, 2, 77, 49408)
# What may be gained over the second half: the allocators' noise, far below any leak of clips.
MAX_GROWTH_MIB, MAX_GROWTH_FILES = 64.0, 4.0


@dataclass(frozen=True)
class Sample:
    """One look at all processes of the run."""

    seconds: float
    processes: int
    main_mib: float
    workers_mib: float
    files: int

    @property
    def total_mib(self) -> float:
        return self.main_mib + self.workers_mib


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 flat, 1 growing, 2 the training failed."""
    args = parse_arguments(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    corpus = args.output_dir / "corpus"
    videos = math.ceil(args.steps / args.epochs) * BATCH
    make_corpus(corpus, videos)
    run = args.output_dir / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, str(ROOT / "main.py"), "--do_train", "1",
        "--prvr_train_annos", "train.jsonl", "--prvr_val_annos", "test.jsonl",
        "--video_dir", "videos", "--output_dir", str(run.absolute()),
        "--pretrained_clip_name", "clip.pt", "--adapter_channels", "32",
        "--batch_size", str(BATCH), "--epochs", str(args.epochs),
        "--num_thread_reader", str(args.workers),
    ]  # fmt: skip
    with (args.output_dir / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=corpus, stdout=output, stderr=subprocess.STDOUT)
        try:
            samples = watch(process, args.workers)
        finally:
            process.kill()
            process.wait()
    write_csv(args.output_dir / "soak.csv", samples)
    if process.returncode or len(samples) < 10:
        print(f"the training ended with {process.returncode}: {args.output_dir}/output.txt")
        return 2
    draw(args.output_dir / "soak.png", samples)
    return judge(samples, args)


def make_corpus(folder: Path, videos: int) -> None:
    """Videos, annotations and the weights of a small CLIP; what is there already is kept."""
    folder.mkdir(exist_ok=True)
    train, test = draw_clips("train", RENDERED, 0), draw_clips("test", TEST_VIDEOS, 0)
    if not (folder / "clip.pt").is_file():
        for clips in (train, test):
            for _ in tqdm(write_clips(folder / "videos", clips, SIZE), total=len(clips)):
                pass
        torch.manual_seed(0)
        clip = CLIP(CLIP_SIZES)
        clip.initialize()
        torch.save(clip.state_dict(), folder / "clip.pt")
    write_annotations(folder / "test.jsonl", test)
    parts = []
    for copy in range(math.ceil(videos / RENDERED)):
        write_annotations(folder / "part.jsonl", train)
        text = (folder / "part.jsonl").read_text().replace("train_", f"copy{copy}_")
        parts.append(text)
        for clip in train:
            link = folder / "videos" / f"{clip.vid_name.replace('train_', f'copy{copy}_')}.mp4"
            link.unlink(missing_ok=True)
            link.symlink_to(f"{clip.vid_name}.mp4")
    (folder / "part.jsonl").unlink()
    (folder / "all.jsonl").write_text("".join(parts))
    names = {video.vid_name for video in corpus_videos(read_annotations(folder / "all.jsonl"))}
    chosen = sorted(names)[:videos]
    lines = "".join(parts).splitlines(keepends=True)
    kept = [line for line in lines if any(f'"{name}"' in line for name in chosen)]
    (folder / "train.jsonl").write_text("".join(kept))


def watch(process: subprocess.Popen, workers: int) -> list[Sample]:
    """A sample a second from when the workers are up until the training ends."""
    samples: list[Sample] = []
    started = time.monotonic()
    with tqdm(desc="soak", unit="sample", mininterval=5) as bar:
        while process.poll() is None:
            sample = look(process.pid, time.monotonic() - started)
            if sample is not None and sample.processes > workers:
                samples.append(sample)
                bar.set_postfix(MiB=f"{sample.total_mib:.0f}", files=sample.files)
            bar.update()
            time.sleep(1)
    return samples


def look(pid: int, seconds: float) -> Sample | None:
    """None if a process ended while it was looked at."""
    pids = [pid, *descendants(pid)]
    try:
        sizes = [proportional_mib(p) for p in pids]
        files = sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in pids)
    except OSError:
        return None
    return Sample(seconds, len(pids), sizes[0], sum(sizes[1:]), files)


def descendants(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def proportional_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def growth(seconds: np.ndarray, values: np.ndarray) -> float:
    """What a straight line through the values gains from their first to their last moment."""
    return float(np.polyfit(seconds, values, 1)[0] * (seconds[-1] - seconds[0]))


def judge(samples: list[Sample], args: argparse.Namespace) -> int:
    """Print the numbers; 1 if something grows."""
    half = samples[len(samples) // 2 :]
    seconds = np.array([sample.seconds for sample in half])
    steps = args.steps / 2
    memory = growth(seconds, np.array([sample.total_mib for sample in half]))
    files = growth(seconds, np.array([sample.files for sample in half]))
    print(
        f"{args.steps} steps, {args.workers} workers, {samples[-1].seconds:.0f} s; in the second "
        f"half memory gained {memory:+.1f} MiB ({memory / steps * 1000:+.1f} per 1000 steps) at "
        f"{np.mean([sample.total_mib for sample in half]):.0f} MiB, open files {files:+.1f} at "
        f"{np.mean([sample.files for sample in half]):.0f}\n"
        f"{args.output_dir}/soak.png, soak.csv"
    )
    return int(memory > MAX_GROWTH_MIB or files > MAX_GROWTH_FILES)


def write_csv(path: Path, samples: list[Sample]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seconds", "processes", "main_mib", "workers_mib", "files"])
        for s in samples:
            row = [round(s.seconds, 1), s.processes, round(s.main_mib, 1), round(s.workers_mib, 1)]
            writer.writerow([*row, s.files])


def draw(path: Path, samples: list[Sample]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = [sample.seconds for sample in samples]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    top.plot(seconds, [sample.main_mib for sample in samples], label="main process")
    top.plot(seconds, [sample.workers_mib for sample in samples], label="its workers, together")
    top.plot(seconds, [sample.total_mib for sample in samples], label="all", color="black")
    top.set_ylabel("memory (PSS, MiB)")
    top.set_ylim(bottom=0)
    top.legend(loc="center right")
    bottom.plot(seconds, [sample.files for sample in samples], color="black")
    bottom.set_ylabel("open file descriptors")
    bottom.set_xlabel("seconds")
    bottom.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of training (default: %(default)s)")
    add("--epochs", type=int, default=5, help="they are spread over (default: %(default)s)")
    add("--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    add("--output_dir", type=Path, default=ROOT / "logs/soak", metavar="DIR",
        help="(default: logs/soak)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.epochs < 1 or args.workers < 0:
        parser.error("--steps and --epochs must be at least 1, --workers at least 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
