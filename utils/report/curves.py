"""Curves of one or several runs by epoch: a panel a number, alone or side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS
from utils.missing_videos import reduced_size
from utils.report.run_log import OF_DOT, best_epoch, curve, label

# Okabe and Ito's colours without yellow; with the line styles no two of 28 runs look the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
DASHES = ("-", "--", "-.", ":")
COLUMNS = 4
PANEL = (3.6, 2.7)  # inches
WRAP = 34  # letters of a line, in a title or under a run's name


def draw_curves(runs: Mapping[str, list[dict]], names: Sequence[str], published: Mapping) -> Figure:
    """One panel for every number, a line a run, a ring on each run's best epoch.

    Args:
        runs: records by epoch of every run, under the run's name.
        names: what to draw, keys of the records.
        published: values to compare with, drawn as a grey line.
    """
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    size = (PANEL[0] * columns, PANEL[1] * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    handles: dict = {}
    for panel, name in zip(panels, names, strict=False):
        handles |= draw_panel(panel, runs, name, published.get(name))
    handles = {run: handles[run] for run in runs if run in handles} | handles  # runs first
    sizes = {run: size for run, epochs in runs.items() if (size := reduced_size(epochs[-1]))}
    labels = [f"{run}\n{fill(sizes[run], WRAP)}" if run in sizes else run for run in handles]
    figure.legend(
        handles.values(), labels, loc="outside lower center",
        ncols=min(len(handles), columns if sizes else COLUMNS), frameon=False,
    )  # fmt: skip
    return figure


def draw_panel(
    axes: Axes, runs: Mapping[str, list[dict]], name: str, published: float | None
) -> dict:
    """One number of all runs; returns what a legend shows, by its label."""
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
    axes.set_title(fill(label(name), WRAP), fontsize=10).set_parse_math(False)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92")
    axes.spines[["right", "top"]].set_visible(False)
    return handles


def choose_names(found: Sequence[str], patterns: Sequence[str] = ()) -> list[str]:
    """What is drawn: names that fit a pattern; without patterns all but breakdowns.

    Breakdowns are rows of rows, such as VCMR/random_event/0.5-r1, and what levels win. A pattern
    for SumR fits that of scores whose events are not normalised, too.
    """
    if not patterns:
        return [name for name in found if name.count("/") < 2]
    names = {name: (name, name.removeprefix(OF_DOT)) for name in found}
    return [n for n in found if any(fnmatchcase(some, p) for some in names[n] for p in patterns)]


def published_values(datatypes: set[str]) -> dict[str, float]:
    """Published results under the names of the log, if all runs are of one data set."""
    if len(datatypes) != 1:
        return {}
    (name,) = datatypes
    videos = PRVR_RESULTS.get(name, {})
    moments = {f"VCMR/{key}": value for key, value in VCMR_RESULTS.get(name, {}).items()}
    return videos | {OF_DOT + key: value for key, value in videos.items()} | moments
