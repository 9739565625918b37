"""A corpus small enough to train on in seconds, and a whole run on it: two epochs, evaluated with
predictions, three queries drawn.

Its query ids and captions are what pictures and pages have to survive.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from dataloaders.ffmpeg import write_video
from tests.forked_main import ForkedMain
from tests.golden_model import make_weights
from utils.files import write_records

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_CACHES = shutil.ignore_patterns("__pycache__")  # which tests beside a copying one fill
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128,) * 3}
IDS = ["v/0#0", "v/0#1", "v_1#0", "v_1#1", 7, "..", "3%2F#0", "<b>3</b>"]
CAPTIONS = {"v/0#1": "it costs $5 and then $6 <script>alert(1)</script> & more"}
PYRAMID = '{"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}'
# What fits the corpus; of a flag that is given twice the last counts.
FLAGS = (
    "--prvr_val_annos", "annos.jsonl", "--pretrained_clip_name", "clip.pt",
    "--pyr_config_path", "pyramid.json", "--adapter_channels", "16", "--batch_size", "2",
    "--num_thread_reader", "0", "--lr", "2e-3", "--log_zero_shot", "0",
)  # fmt: skip
TRAIN = ("--do_train", "1", "--prvr_train_annos", "annos.jsonl")


@dataclass(frozen=True)
class TinyRun:
    """main.py on a corpus: where everything is; `plots` is what was drawn."""

    corpus: Path
    logs: Path

    @property
    def plots(self) -> Path:
        return self.corpus / "plots"

    def main(self, *flags: str, **fault: object) -> subprocess.CompletedProcess:
        """With videos of a folder unless `flags` name a frame store; `fault`: see `ForkedMain`."""
        videos = () if "--frame_store" in flags else ("--video_dir", "videos")
        folders = ("--output_dir", str(self.logs), "--plot_dir", str(self.plots))
        return ForkedMain(self.corpus).run(*FLAGS, *videos, *folders, *flags, **fault)

    def works(self, *flags: str) -> str:
        """What a run prints that comes to its end."""
        done = self.main(*flags)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stops(self, *flags: str) -> str:
        """What a run says that stops with a message."""
        done = self.main(*flags)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    def lines(self, name: str = "log.jsonl") -> list[dict]:
        """Of a file of JSON lines that the run has left."""
        return [json.loads(line) for line in (self.logs / name).read_text().splitlines()]


def make_corpus(
    folder: Path,
    colours: Sequence[tuple[Sequence[int], Sequence[int]]],
    query: Callable[[int, int], tuple[str | int, str]],
    name: str = "{}",
) -> None:
    """Clips of one colour after another, two captions each, small CLIP weights, a pyramid.

    Args:
        query: the id and the caption of the half of a clip, given both as numbers.
        name: of a clip, with its number in it.
    """
    (folder / "videos").mkdir(parents=True)
    lines = []
    for index, clip in enumerate(colours):
        frames = np.empty((20, 64, 64, 3), np.uint8)
        frames[:10], frames[10:] = clip
        write_video(folder / "videos" / f"{name.format(index)}.mp4", frames)
        for half in range(2):
            desc_id, text = query(index, half)
            lines.append({
                "vid_name": name.format(index), "desc_id": desc_id, "duration": 20 / 3,
                "desc": text, "ts": [half * 3, half * 3 + 3],
            })  # fmt: skip
    write_records(folder / "annos.jsonl", lines)
    torch.save(make_weights.torch_state(make_weights.make("tiny", 1, "fp16")), folder / "clip.pt")
    (folder / "pyramid.json").write_text(PYRAMID)


def annotate(path: Path, names: Sequence[str], duration: float = 1) -> Path:
    """A file of annotations: a query of each of these videos."""
    lines = ({"vid_name": name, "desc_id": i, "desc": "x"} for i, name in enumerate(names))
    write_records(path, (line | {"duration": duration} for line in lines))
    return path


def in_process(act: Callable[[], object]) -> BaseProcess:
    """A process of its own that runs this and ends with what it returns."""
    process = get_context("fork").Process(target=lambda: sys.exit(act()))
    process.start()
    return process


def moving_noise(n: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames of a clip so that damage to its bytes shows: uint8 [H, W, 3]."""
    noise = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return (np.roll(noise, 8 * i, axis=1) for i in range(n))


@cache
def tiny_corpus(base: Path) -> Path:
    """Four clips; made once a session, whose temporary folder `base` is."""
    names = [*COLOURS, next(iter(COLOURS))]

    def query(index: int, half: int) -> tuple[str | int, str]:
        desc_id = IDS[2 * index + half]
        first, second = names[index : index + 2]
        text = f"a {(first, second)[half]} wall before a {second} one"
        return desc_id, CAPTIONS.get(desc_id, text)

    colours = [COLOURS[name] for name in names]
    folder = base / "tiny_run"
    make_corpus(folder, list(pairwise(colours)), query, "clip {}")
    return folder


@cache
def make_run(base: Path) -> TinyRun:
    """Made once a session, whose temporary folder `base` is."""
    run = TinyRun(tiny_corpus(base), base / "tiny_run" / "logs")
    run.works(
        *TRAIN, "--epochs", "2", "--do_eval", "1", "--save_predictions", "1", "--datatype", "tvr",
        "--do_plot", "1", "--plot_ids", "v/0#1", "..", "7",
    )  # fmt: skip
    return run
