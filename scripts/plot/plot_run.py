#!/usr/bin/env python3
"""main.py --do_plot 1 with the settings of a run, which its checkpoint holds.

    .venv/bin/python -m scripts.plot.plot_run logs/prvr_tvr --plot_limit 5

Flags of main.py after the run, and variables of their names, count more than the run's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import main as propy
from models import ProPyConfig
from utils import RunError
from utils.arguments import FLAG_OF_FIELD
from utils.command import Parser, run_command
from utils.training.checkpoint import BEST, read_checkpoint

NO_FLAGS = {"pyramid", "clip_seconds", "clip_head_widths", "clip_image_mean", "clip_image_std"}
# Of a run: what its pictures depend on.
FLAGS = (
    "datatype", "prvr_val_annos", "video_dir", "frame_store", "allow_missing", "pyr_config_path",
    *(FLAG_OF_FIELD.get(f.name, f.name) for f in fields(ProPyConfig) if f.name not in NO_FLAGS),
    "batch_size_val", "seed", "event_scores", "plot_dir",
)  # fmt: skip
VARIABLES = (
    *FLAGS, "num_thread_reader", "plot_limit", "plot_layer", "plot_head", "plot_style",
    "plot_format",
)  # fmt: skip


def flags_of(run: Path, given: Sequence[str] = ()) -> list[str]:
    """The flags that draw a run: those of its checkpoint, from outside, and `given`.

    Args:
        run: its folder or a checkpoint.

    Raises:
        ModelError, RunError: there is no checkpoint, or no settings are in it.
    """
    checkpoint = run / BEST if run.is_dir() else run
    stored = read_checkpoint(checkpoint).get("args")
    if not isinstance(stored, dict) or not stored:
        raise RunError(
            f"{checkpoint}: no settings in it, as in the authors' checkpoints: name a data set's: "
            f"do_train=0 do_plot=1 resume={checkpoint} bash scripts/prvr_<split>.sh"
        )
    outside = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if outside:
        shown = " ".join(f"{name}={value}" for name, value in outside.items())
        print(f"plot_run: from the environment: {shown}", file=sys.stderr)
    flags = {name: stored[name] for name in FLAGS if stored.get(name) is not None} | outside
    words = {word.partition("=")[0] for word in given} | {f"--{name}" for name in outside}
    for name, other in (("video_dir", "frame_store"), ("frame_store", "video_dir")):
        if f"--{other}" in words and name not in outside:
            flags.pop(name, None)  # a run has one of them
    work = ["--do_plot=1", f"--resume={checkpoint}", f"--output_dir={checkpoint.parent}"]
    return [*work, *(f"--{name}={value}" for name, value in flags.items()), *given]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, or a checkpoint of it")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="further flags of main.py")
    args = parser.parse_args(argv)
    propy.command_line(flags_of(args.run, args.flags))


if __name__ == "__main__":
    run_command(main)
