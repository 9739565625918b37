#!/usr/bin/env python3
"""Loss, learning rate and every metric by epoch, of one or several runs over each other.

.venv/bin/python -m scripts.plot.plot_curves logs/prvr_tvr
.venv/bin/python -m scripts.plot.plot_curves logs/a logs/b --select loss 'VCMR/0.5*' --output ab.pdf
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import OutputError, RunError
from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS
from utils.files import atomic_write, writing
from utils.missing_videos import reduced_size
from utils.report.run_log import (
    best_epoch,
    curve,
    curve_names,
    datatype,
    label,
    read_args,
    read_epochs,
)

# Okabe and Ito's colours without yellow; with the line styles no two of 28 runs look the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
DASHES = ("-", "--", "-.", ":")
COLUMNS = 4
WRAP = 32  # letters of a line under a run's name


def plot_curves(runs: Mapping[str, list[dict]], names: Sequence[str], published: Mapping) -> Figure:
    """One panel for every number, a line a run, a dot on each run's best epoch.

    Args:
        runs: records by epoch of every run, under the run's name.
        names: what to draw, keys of the records.
        published: values to compare with, drawn as a grey line.
    """
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    handles: dict = {}
    for panel, name in zip(panels, names, strict=False):
        handles |= _draw_panel(panel, runs, name, published.get(name))
    handles = {run: handles[run] for run in runs if run in handles} | handles  # runs first
    sizes = {run: size for run, epochs in runs.items() if (size := reduced_size(epochs[-1]))}
    labels = [f"{run}\n{fill(sizes[run], WRAP)}" if run in sizes else run for run in handles]
    figure.legend(
        handles.values(), labels, loc="outside lower center",
        ncols=min(len(handles), columns if sizes else COLUMNS), frameon=False,
    )  # fmt: skip
    return figure


def _draw_panel(
    axes: Axes, runs: Mapping[str, list[dict]], name: str, published: float | None
) -> dict:
    handles = {}
    for (run, epochs), (dashes, colour) in zip(
        runs.items(), itertools.cycle(itertools.product(DASHES, COLOURS)), strict=False
    ):
        points = curve(epochs, name)
        if not points:
            continue
        marker = "." if len(points) < 40 else ""
        (line,) = axes.plot(
            *zip(*points, strict=True), color=colour, linestyle=dashes, marker=marker
        )
        handles[run] = line
        best = curve([best_epoch(epochs)], name)
        if best:
            handles["best epoch"] = axes.plot(
                *zip(*best, strict=True), color=colour, marker="o", markersize=7,
                markerfacecolor="white", linestyle="none",
            )[0]  # fmt: skip
    if published is not None:
        handles["published"] = axes.axhline(published, color="0.5", linestyle="--", linewidth=1)
    axes.set_title(label(name), fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92")
    axes.spines[["right", "top"]].set_visible(False)
    return handles


def choose_names(found: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """What is drawn: names that fit a pattern; without patterns all but breakdowns.

    Breakdowns are rows of rows, such as VCMR/random_event/0.5-r1, and what levels win.
    """
    if patterns:
        return [name for name in found if any(fnmatchcase(name, p) for p in patterns)]
    return [name for name in found if name.count("/") < 2]


def published_values(datatypes: set[str]) -> dict[str, float]:
    """Published results under the names of the log, if all runs are of one data set."""
    if len(datatypes) != 1:
        return {}
    (name,) = datatypes
    moments = {f"VCMR/{key}": value for key, value in VCMR_RESULTS.get(name, {}).items()}
    return PRVR_RESULTS.get(name, {}) | moments


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    depth = next(
        (d for d in range(1, 20) if len({p.parts[-d:] for p in paths}) == len(set(paths))), 20
    )
    return ["/".join(path.parts[-depth:]) for path in paths]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOGDIR", help="folders of runs")
    parser.add_argument(
        "--output",
        type=Path,
        help="picture: .png, .svg or .pdf (default <first LOGDIR>/curves.png)",
    )
    parser.add_argument(
        "--select", nargs="+", default=[], metavar="PATTERN",
        help="numbers to draw, such as loss SumR 'VCMR/0.5*' (default: all but breakdowns by "
        "query type, level and baseline)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.output and args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {args.output}: its ending is to be .png, .svg or .pdf")
    logging.basicConfig(format="%(message)s")
    runs = {
        name: read_epochs(folder)
        for name, folder in zip(run_names(args.folders), args.folders, strict=True)
    }
    found = list(dict.fromkeys(name for epochs in runs.values() for name in curve_names(epochs)))
    names = choose_names(found, args.select)
    if not names:
        raise RunError(f"nothing fits {' '.join(args.select)}; there is: {', '.join(found)}")
    datatypes = {datatype(read_args(folder)) for folder in args.folders}
    figure = plot_curves(runs, names, published_values(datatypes))
    output = args.output or args.folders[0] / "curves.png"
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as part:
        figure.savefig(part, dpi=130, format=output.suffix[1:].lower())
    print(output)


if __name__ == "__main__":
    try:
        main()
    except (RunError, OutputError) as error:
        sys.exit(f"error: {error}")
