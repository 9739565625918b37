#!/usr/bin/env python3
"""Time every stage of the program beside a plain reference that gives the same numbers.

    .venv/bin/python -m scripts.benchmark encode_video train_step
    .venv/bin/python -m scripts.benchmark all --device cuda --precision amp --json gpu.json
    .venv/bin/python -m scripts.benchmark encode_video --frames 16 32 64 --plot cost.png

Weights are random and of the true size, inputs are drawn: nothing has to be downloaded. The two
sides run in turns, A B A B …; the ratio of their minima is what other programs on the machine
disturb least.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from scripts.benchmark import harness, loader, model, tails

# Every stage by its name. A factory takes the options and returns a harness.Stage.
STAGES: dict[str, harness.Factory] = {
    "encode_video": model.encode_video,
    "encode_text": model.encode_text,
    "train_step": model.train_batch,
    "prvr_tail": tails.prvr_tail,
    "vcmr_tail": tails.vcmr_tail,
    **{f"loader_{s}s": partial(loader.loader, s) for s in loader.SECONDS},
    **{f"store_{s}s": partial(loader.store, s) for s in loader.SECONDS},
}
GROUPS = {
    "loader": [name for name in STAGES if name.startswith(("loader_", "store_"))],
    "all": list(STAGES),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time every stage of the program, in turns with a plain reference that gives "
        "the same numbers, and print how many times faster it is."
    )
    add = parser.add_argument
    # fmt: off
    add("stages", nargs="+", choices=[*STAGES, *GROUPS], metavar="STAGE",
        help=f"what to measure: {', '.join(STAGES)}; loader: all of loading; or all")
    add("--model", choices=list(model.SIZES), default="b32",
        help="CLIP's size; small is for a quick look (default b32)")
    add("--videos", type=int,
        help="videos in a batch (default: encode_video 1, train_step 2, loading 4)")
    add("--texts", type=int,
        help="texts: of a batch in encode_text (default 64), of each video in train_step (4)")
    add("--words", type=int, default=32, help="tokens of the longest text (default 32)")
    add("--frames", type=int, nargs="+", default=[32],
        help="frames of a video, a power of two; several: one row for each (default 32)")
    add("--overlap", choices=["published", "none", "all"], default="published",
        help="levels of the pyramid whose events overlap by half, which sets the number of events "
        "(default published: all but the lowest)")
    add("--split", choices=["charades", "tvr", "activitynet"], default="charades",
        help="size of the corpus in stages of the evaluation (default charades)")
    add("--clips", type=Path, metavar="DIR",
        help="loading: a folder of prepared clips whose frames the measured clips show, since what "
        "they show counts (default: rendered ones)")
    add("--precision", choices=["fp32", "bf16", "amp"], default="fp32",
        help="of both sides: float32, or bfloat16 or float16 autocast (default fp32)")
    add("--device", choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)")
    add("--threads", type=int, help="threads on the CPU (default: torch's own choice)")
    add("--repeats", type=int, default=5, help="timed repetitions of each side (default 5)")
    add("--memory", type=int, choices=[0, 1], default=1,
        help="1: measure memory, setting each side up once more in a process of its own (default)")
    add("--checkpoint_activations", type=int, choices=[0, 1], default=0,
        help="1: our train_step with main.py's --checkpoint_activations 1")
    add("--compile", type=int, choices=[0, 1], default=0,
        help="1: our encode_video and train_step with main.py's --compile 1")
    add("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    add("--json", type=Path, metavar="FILE", help="save every measured number")
    add("--plot", type=Path, metavar="FILE", help="draw the ratios, with the aims as marks")
    # fmt: on
    args = parser.parse_args(argv)
    for frames in args.frames:
        if frames < 2 or frames & (frames - 1):
            parser.error(f"--frames must be a power of two, at least 2: {frames}")
    for name in ("videos", "texts", "words", "threads", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1: {value}")
    for name in ("json", "plot"):
        file = getattr(args, name)
        if file and (file.is_dir() or not file.parent.is_dir()):
            parser.error(f"--{name}: this is a folder, or in none that is there: {file}")
    return args


def main(args: argparse.Namespace) -> None:
    options = harness.Options(
        model=args.model, videos=args.videos, texts=args.texts, overlap=args.overlap,
        words=args.words, split=args.split, clips=args.clips, precision=args.precision,
        device=args.device, threads=args.threads, seed=args.seed,
        compile=bool(args.compile), checkpoint_activations=bool(args.checkpoint_activations),
    )  # fmt: skip
    harness.set_up(options)
    print(f"{harness.machine(options)}; {args.model}, {args.precision}", flush=True)
    results = []
    for name in dict.fromkeys(s for chosen in args.stages for s in GROUPS.get(chosen, [chosen])):
        for frames in args.frames:
            row = f"{name}, {frames} frames" if len(args.frames) > 1 else name
            its_options = replace(options, frames=frames)
            result = harness.measure(
                row, STAGES[name], its_options, args.repeats, bool(args.memory)
            )
            results.append(result)
            print(f"{row}: {result.title}: {result.ratio():.2f} times faster", flush=True)
    print("\n" + harness.report(results, options))
    if args.json:
        harness.save_json(args.json, results, options)
    if args.plot:
        harness.save_plot(args.plot, results, options)


if __name__ == "__main__":
    try:
        main(parse_args())
    except harness.MismatchError as error:
        sys.exit(f"error: {error}")
