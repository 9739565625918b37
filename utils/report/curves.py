"""Curves of one or several runs by epoch: a panel a number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS
from utils.missing_videos import reduced_size
from utils.report.run_log import OF_DOT, best_epoch, curve, curve_names, label

# Okabe and Ito's colours without yellow; with the line styles no two of 28 runs look the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
DASHES = ("-", "--", "-.", ":")
LEVELS = {"published": "--", "zero-shot CLIP": ":"}  # to compare with
COLUMNS = 4
PANEL = (3.6, 2.7)  # inches
WRAP = 34  # letters of a line, in a title or under a run's name


def shown_names(runs: Mapping[str, list[dict]]) -> list[str]:
    """What is drawn: all numbers but breakdowns, such as VCMR/random_event/0.5-r1."""
    found = dict.fromkeys(name for epochs in runs.values() for name in curve_names(epochs))
    return [name for name in found if name.removeprefix(OF_DOT).count("/") < 2]


def draw_curves(
    runs: Mapping[str, list[dict]], datatypes: set[str], to_beat: Mapping[str, float] | None = None
) -> Figure:
    """One panel for every number, a line a run, a ring on each run's best epoch.

    Args:
        runs: records by epoch of every run, under the run's name.
        datatypes: of the runs; published results are drawn too if it is one.
        to_beat: results of CLIP alone by name.
    """
    names = shown_names(runs)
    levels = {"published": published_values(datatypes), "zero-shot CLIP": to_beat or {}}
    columns = max(1, min(COLUMNS, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    size = (PANEL[0] * columns, PANEL[1] * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    handles: dict = {}
    for panel, name in zip(panels, names, strict=False):
        own = {label: values[name] for label, values in levels.items() if name in values}
        handles |= _draw_panel(panel, runs, name, own)
    handles = {run: handles[run] for run in runs if run in handles} | handles  # runs first
    sizes = {run: size for run, epochs in runs.items() if (size := reduced_size(epochs[-1]))}
    labels = [f"{run}\n{fill(sizes[run], WRAP)}" if run in sizes else run for run in handles]
    legend = figure.legend(
        handles.values(), labels, loc="outside lower center",
        ncols=max(1, min(len(handles), columns)), frameon=False,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _draw_panel(
    axes: Axes, runs: Mapping[str, list[dict]], name: str, levels: Mapping[str, float]
) -> dict:
    """One number of all runs, and its `levels`, of `LEVELS`, to compare with; returns what a legend
    shows, by its label."""
    handles = {}
    looks = itertools.cycle(itertools.product(DASHES, COLOURS))
    for (run, epochs), (dashes, colour) in zip(runs.items(), looks, strict=False):
        points = curve(epochs, name)
        if not points:
            continue
        marker = "." if len(points) < 40 else ""
        times, values = zip(*points, strict=True)
        (handles[run],) = axes.plot(times, values, color=colour, linestyle=dashes, marker=marker)
        best = best_epoch(epochs)
        if curve([best], name):
            (handles["best epoch"],) = axes.plot(
                best["epoch"], best[name], color=colour, marker="o", markersize=7,
                markerfacecolor="white", linestyle="none",
            )  # fmt: skip
    for level, value in levels.items():
        handles[level] = axes.axhline(value, color="0.5", linestyle=LEVELS[level], linewidth=1)
    axes.set_title(fill(label(name), WRAP), fontsize=10).set_parse_math(False)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92")
    axes.spines[["right", "top"]].set_visible(False)
    return handles


def published_values(datatypes: set[str]) -> dict[str, float]:
    """Published results under the names of the log, if all runs are of one data set."""
    if len(datatypes) != 1:
        return {}
    (name,) = datatypes
    videos = PRVR_RESULTS.get(name, {})
    moments = {f"VCMR/{key}": value for key, value in VCMR_RESULTS.get(name, {}).items()}
    return videos | {OF_DOT + key: value for key, value in videos.items()} | moments
