#!/usr/bin/env python3
"""One page about a run: settings, results, curves, best and worst queries. Needs no network.

    .venv/bin/python -m scripts.report logs/prvr_tvr

The queries come from predictions.h5, which main.py --do_eval 1 --save_predictions 1 leaves in the
run's folder; pictures of attention from the run's plot_dir, if main.py --do_plot 1 left some.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.command import Parser, number, run_command
from utils.report.page import Run, write_page


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("folder", type=Path, metavar="LOGDIR", help="folder of a run")
    add("--output", type=Path, help="the page (default LOGDIR/report.html)")
    add("--annotations", type=Path,
        help="annotations of predictions.h5 (default: the run's prvr_val_annos)")
    add("--video_dir", type=Path,
        help="prepared clips, for thumbnails (default: the run's, or its frame store)")
    add("--queries", type=number(int, 0), default=6, metavar="N",
        help="best, worst and drawn queries to show, N of each (default 6)")
    # fmt: on
    args = vars(parser.parse_args(argv))
    logging.basicConfig(format="%(message)s")
    folder, output = args.pop("folder"), args.pop("output")
    run, output = Run.read(folder), output or folder / "report.html"
    write_page(run, output, **args)
    for note in run.notes:
        print(f"left out: {note}", file=sys.stderr)
    print(output)


if __name__ == "__main__":
    run_command(main)
