"""Time every stage of the program beside a plain reference that gives the same numbers.

    .venv/bin/python -m scripts.benchmark encode_video train_step
    .venv/bin/python -m scripts.benchmark all --device cuda --precision amp --json gpu.json
    .venv/bin/python -m scripts.benchmark search            # a program of its own: search.py

Weights are random and of the true size, inputs are drawn: nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from modules.readout import READOUTS
from scripts.benchmark import loader, model, tails
from scripts.benchmark.harness import Options, Stage, measure, ratio, relative_error, set_up, table
from utils.command import Parser, new_file, number, run_command

FRAMES, TEXTS = "{videos} videos of {frames} frames", "{texts} texts of up to {words} tokens"
CORPUS = "{texts} texts, {videos} videos"
# Cosines agree to 1e-6, so of some thousand texts one may rank differently.
STAGES = {
    "encode_video": Stage(model.encode_video, FRAMES, (1e-4, 0.1), videos=1),
    "encode_text": Stage(model.encode_text, TEXTS, (1e-4, 0.1), texts=64),
    "train_step": Stage(
        model.train, FRAMES + ", {texts} texts each", (2e-3, 0.5), videos=2, texts=4
    ),
    "prvr_tail": Stage(tails.prvr, CORPUS, (1e-3, 1e-3), texts=1024),
    "vcmr_tail": Stage(tails.vcmr, CORPUS, (1e-3, 1e-3), texts=1024),
}
for kind, prepare, tolerance, error in (
    ("loader", loader.by_index, 1e-6, loader.exact_error),
    ("store", loader.from_store, 0.04, relative_error),
):
    for seconds in (30, 120, 300):
        STAGES[f"{kind}_{seconds}s"] = Stage(
            partial(prepare, seconds),
            "{frames} frames of {videos} clips",
            (tolerance, tolerance),
            error,
            videos=4,
        )
GROUPS = {
    "loader": [name for name in STAGES if name.startswith(("loader_", "store_"))],
    "all": list(STAGES),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description="Time every stage of the program, in turns with a plain reference that gives "
        "the same numbers, and print how many times faster it is."
    )
    add = parser.add_argument
    # fmt: off
    add("stages", nargs="+", choices=[*STAGES, *GROUPS], metavar="STAGE",
        help=f"what to measure: {', '.join(STAGES)}; loader: all of loading; or all")
    add("--model", choices=list(model.SIZES), default="b32",
        help="CLIP's size; small is for a quick look (default b32)")
    add("--videos", type=number(int, 1),
        help="videos in a batch (default: encode_video 1, train_step 2, loading 4) or in the "
        "corpus of a tail (default: those of --split)")
    add("--texts", type=number(int, 1),
        help="texts of encode_text (default 64), a tail (1024), each video in train_step (4)")
    add("--words", type=number(int, 1), default=32, help="tokens of the longest text (default 32)")
    add("--frames", type=int, nargs="+", choices=[2**n for n in range(1, 10)], default=[32],
        metavar="N", help="frames of a video; several: one row for each (default 32)")
    add("--split", choices=["charades", "tvr", "activitynet"], default="charades",
        help="whose number of videos the tails have (default charades)")
    add("--readout", choices=list(READOUTS), default="max",
        help="by which the tails rank videos; seconds compare between two calls (default max)")
    add("--clips", type=Path, metavar="DIR",
        help="loading: a folder of prepared clips whose frames the measured clips show, since what "
        "they show counts (default: rendered ones)")
    add("--precision", choices=["fp32", "bf16", "amp"], default="fp32",
        help="of both sides: float32, or bfloat16 or float16 autocast (default fp32)")
    add("--device", choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)")
    add("--threads", type=number(int, 1), help="threads on the CPU (default: torch's own choice)")
    add("--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: processor time of all threads, which other programs disturb less (default wall)")
    add("--repeats", type=number(int, 1), default=5,
        help="timed repetitions of each side (default 5)")
    add("--memory", type=int, choices=[0, 1], default=1,
        help="1: measure memory, setting each side up once more in a process of its own (default)")
    add("--checkpoint_activations", type=int, choices=[0, 1], default=0,
        help="1: our train_step with main.py's --checkpoint_activations 1")
    add("--json", type=new_file, metavar="FILE", help="save every measured number")
    # fmt: on
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    values = vars(args) | {"frames": args.frames[0]}
    options = Options(**{field.name: values[field.name] for field in fields(Options)})
    set_up(options)
    cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    print(f"{machine}, torch {torch.__version__}; {args.model}, {args.precision}", flush=True)
    results = []
    for name in dict.fromkeys(s for chosen in args.stages for s in GROUPS.get(chosen, [chosen])):
        for frames in args.frames:
            row = f"{name}, {frames} frames" if len(args.frames) > 1 else name
            chosen = replace(options, frames=frames)
            result = measure(row, STAGES[name], chosen, args.repeats, bool(args.memory))
            results.append(result)
            print(f"{row}: {result['title']}: {ratio(result):.2f} × faster", flush=True)
    print("\n" + table(results))
    if args.json:
        record = {"machine": machine, "options": vars(args), "results": results}
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["search"]:
        from scripts.benchmark import search

        run_command(lambda: search.main(sys.argv[2:]))
    else:
        run_command(lambda: main(parse_args()))
