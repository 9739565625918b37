"""Variants over seeds against a base: means with their spread, exact paired tests, one page.

Nothing is called better inside the spread: neither by chance of the seeds nor by many looks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils import RunError
from utils.evaluation.rows import COSINE, SVMR, VCMR, VR, Rows
from utils.files import atomic_write
from utils.pictures.draw import VECTOR_TEXT, caption_fonts
from utils.report.curves import COLOURS
from utils.report.queries import data_uri

# Names of a run's numbers, with the heads of their columns; all metrics in %, higher is better.
CHOSEN_BY = "val/SumR"  # of the epoch that it chose, on videos that no other number here is of
TWIN = "twin"  # "twin/<query type>", of the demo: how often a video beats its twin
METRICS = {
    CHOSEN_BY: "SumR on val", "SumR": "SumR", "R1": "R@1", f"{VR}/appearance/r1": "appearance R@1",
    f"{VR}/motion/r1": "motion R@1", f"{VR}/order/r1": "order R@1",
    f"{TWIN}/motion": "motion vs twin", f"{TWIN}/order": "order vs twin",
    f"{VCMR}/0.5-r10": "VCMR R10@0.5", f"{VCMR}/0.7-r10": "VCMR R10@0.7",
    f"{SVMR}/0.5-r1": "SVMR R1@0.5", f"{SVMR}/0.7-r1": "SVMR R1@0.7",
}  # fmt: skip
COSTS = {
    "trainable": "trained, M", "gflop": "GFLOP a video", "step_time": "s a step",
    "memory_gib": "GiB at the peak",
}  # fmt: skip
MOST_SEEDS = 20  # 2^20 sums of signed differences
SURE = 0.05
EXPLAINED = (
    "Mean ± sample standard deviation over the seeds, which is the spread.",
    "Against the base, paired by seed: mean difference, seeds in which the variant is higher, and "
    "the two-sided p of the exact sign-flip permutation test, which with n seeds is at least "
    "2/2^n. “=” is a difference inside the larger of the two spreads; “higher” and “lower” are "
    f"outside it; “better” and “worse” have p ≤ {SURE} as well. Of many comparisons some come out "
    "so by chance.",
)


@dataclass(frozen=True)
class Variant:
    """One setting of an ablation; `asks` is the question that it answers."""

    name: str
    asks: str
    flags: list[str]  # of main.py


@dataclass(frozen=True)
class Compared:
    """One number of a variant over the seeds, and against the base's; values by seed."""

    values: dict[int, float]
    base: dict[int, float]

    def __str__(self) -> str:
        deviation = spread(self.values.values())
        return f"{self.mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")

    @property
    def mean(self) -> float:
        return mean(self.values.values())

    @property
    def differences(self) -> list[float]:
        """To the base, of the seeds that both have."""
        return [value - self.base[s] for s, value in self.values.items() if s in self.base]

    @property
    def verdict(self) -> str:
        """One of = higher lower better worse."""
        difference = mean(self.differences)
        spreads = [spread(self.values.values()), spread(self.base.values())]
        if None in spreads or abs(difference) <= max(spreads):
            return "="
        sure = sign_flip_test(self.differences) <= SURE
        return (("higher", "lower"), ("better", "worse"))[sure][difference < 0]

    @property
    def against(self) -> str:
        """The comparison in words."""
        if not self.differences:
            return "–"
        higher, p = sum(d > 0 for d in self.differences), sign_flip_test(self.differences)
        seeds = f"{higher} of {len(self.differences)}"
        return f"{mean(self.differences):+.2f} ({seeds}, p {p:.2g}) {self.verdict}"


def spread(values: Collection[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return stdev(values) if len(values) > 1 else None


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences: the share of all their 2^n signs with which the sum is at
    least as far from 0. Exact. RunError: more than MOST_SEEDS."""
    if len(differences) > MOST_SEEDS:
        raise RunError(f"{len(differences)} seeds: at most {MOST_SEEDS} can be compared exactly")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-9 * max(1.0, float(np.abs(differences).sum()))
    return float((np.abs(sums) >= abs(sum(differences)) - rounding).mean())


def numbers_of(rows: Rows) -> dict[str, float]:
    """The metrics of an evaluation under the names of METRICS: those of PRVR without a row."""
    return {
        key if row == COSINE else f"{row}/{key}": value
        for row, numbers in rows.items()
        for key, value in numbers.items()
    }


@dataclass(frozen=True)
class Ablation:
    """Results of variants, the first of which is the base.

    Attributes:
        results: numbers by their name, by seed, by the name of the variant; at least one.
        notes: what a reader has to know besides EXPLAINED.
    """

    title: str
    variants: list[Variant]
    results: Mapping[str, Mapping[int, Mapping[str, float]]]
    notes: Sequence[str] = ()

    def compared(self, number: str) -> dict[str, Compared]:
        """By variant, of those that have this number."""
        values = {
            name: {seed: run[number] for seed, run in sorted(runs.items()) if number in run}
            for name, runs in self.results.items()
        }
        base = values.get(self.variants[0].name, {})
        return {name: Compared(own, base) for name, own in values.items() if own}

    @cached_property
    def metrics(self) -> dict[str, dict[str, Compared]]:
        """Those of METRICS that there are."""
        found = {name: self.compared(name) for name in METRICS}
        return {name: cells for name, cells in found.items() if cells}

    def tables(self) -> list[dict]:
        """Title, heads and rows of texts: results, comparisons, costs."""
        base, heads = self.variants[0].name, [METRICS[name] for name in self.metrics]
        costs = [self.compared(name) for name in COSTS]
        measured: dict[str, list[str]] = {}
        against: dict[str, list[str]] = {}
        for name in self.results:
            cells = [found.get(name) for found in self.metrics.values()]
            measured[name] = ["–" if cell is None else str(cell) for cell in cells]
            against[name] = ["–" if cell is None else cell.against for cell in cells]
        return [
            {
                "title": "Results, in %",
                "heads": ["variant", "seeds", *heads],
                "rows": [[n, str(len(self.results[n])), *texts] for n, texts in measured.items()],
            },
            {
                "title": f"Against {base}, paired by seed",
                "heads": ["variant", *heads],
                "rows": [[name, *texts] for name, texts in against.items() if name != base],
            },
            {
                "title": "What each asks, and costs",
                "heads": ["variant", "asks", "flags", *COSTS.values()],
                "rows": [
                    [v.name, v.asks, " ".join(v.flags) or "–"]
                    + [f"{cost[v.name].mean:.3g}" if v.name in cost else "–" for cost in costs]
                    for v in self.variants
                    if v.name in self.results
                ],
            },
        ]

    def markdown(self) -> str:
        """All tables and notes."""
        parts = [f"# {self.title}"]
        for table in self.tables():
            lines = [table["heads"], ["---"] * len(table["heads"]), *table["rows"]]
            cells = (" | ".join(text.replace("|", "\\|") for text in line) for line in lines)
            parts.append(f"{table['title']}:\n\n" + "\n".join(f"| {line} |" for line in cells))
        return "\n\n".join([*parts, *EXPLAINED, *self.notes]) + "\n"

    def csv(self) -> str:
        """A line for every number of every variant, the values of the seeds in the last field."""
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        heads = ["variant", "number", "seeds", "mean", "sd", "difference", "p", "verdict", "values"]
        writer.writerow(heads)
        for number in [*self.metrics, *COSTS]:
            for name, cell in self.compared(number).items():
                own = [len(cell.values), cell.mean, spread(cell.values.values())]
                against = ["", "", ""]
                if number in METRICS and name != self.variants[0].name and cell.differences:
                    p = sign_flip_test(cell.differences)
                    against = [mean(cell.differences), p, cell.verdict]
                values = " ".join(f"{seed}:{value:.6g}" for seed, value in cell.values.items())
                writer.writerow([name, number, *own, *against, values])
        return content.getvalue()

    def draw(self) -> Figure:
        """A panel a metric, a line a variant: every seed, the mean, and the spread around it."""
        names, base = list(self.results), self.variants[0].name
        columns = min(4, len(self.metrics))
        rows = -(-len(self.metrics) // columns)
        size = (2.2 + 2.4 * columns, rows * (0.9 + 0.3 * len(names)))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for panel in panels[len(self.metrics) :]:
            panel.set_visible(False)
        for panel, (metric, cells) in zip(panels, self.metrics.items(), strict=False):
            for name, cell in cells.items():
                y, colour, values = names.index(name), COLOURS[name != base], cell.values.values()
                panel.plot([*values], [y] * len(values), "o", color=colour, alpha=0.35, ms=4)
                bar = {"fmt": "D", "color": colour, "markersize": 5, "capsize": 3}
                panel.errorbar(cell.mean, y, xerr=spread(values), **bar)
            if base in cells:
                panel.axvline(cells[base].mean, color="0.6", linestyle="--", linewidth=1)
            panel.set_title(METRICS[metric], fontsize=10)
            panel.grid(axis="x", color="0.92")
            panel.spines[["right", "top"]].set_visible(False)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        panels[0].set_yticks(range(len(names)), names)
        for label in panels[0].get_yticklabels():
            label.set_parse_math(False)
        return figure

    def write(self, folder: Path) -> list[Path]:
        """table.md, table.csv, table.html and plot.png; returns their paths. OutputError: one
        cannot be written."""
        vector, pixels = io.BytesIO(), io.BytesIO()
        with matplotlib.rc_context(VECTOR_TEXT), caption_fonts("".join(self.results)):
            figure = self.draw()
            figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
            figure.savefig(pixels, format="png", dpi=130)
        loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
        pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        page = pages.get_template("ablation.html").render(
            title=self.title, tables=self.tables(), notes=[*EXPLAINED, *self.notes],
            picture=data_uri("image/svg+xml", vector.getvalue()),
        )  # fmt: skip
        contents = {
            "table.md": self.markdown().encode(), "table.csv": self.csv().encode(),
            "table.html": page.encode(), "plot.png": pixels.getvalue(),
        }  # fmt: skip
        for name, content in contents.items():
            with atomic_write(folder / name) as part:
                part.write_bytes(content)
        return [folder / name for name in contents]
