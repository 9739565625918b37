#!/usr/bin/env python3
"""One page about a run: settings, results, curves, best and worst queries. Needs no network.

    .venv/bin/python -m scripts.report logs/prvr_tvr

The queries come from predictions.h5, which main.py --do_eval 1 --save_predictions 1 leaves in the
run's folder; pictures of attention from the folder of main.py --do_plot 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import h5py
from PIL import Image

from dataloaders import DataError
from dataloaders.annotations import Query, read_annotations
from utils import OutputError, RunError
from utils.evaluation.moment_tables import MOMENT_COLUMNS, VIDEO_COLUMNS
from utils.evaluation.predictions import SAVED, MomentPredictions, load_predictions
from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS
from utils.evaluation.tables import PRVR_COLUMNS
from utils.files import atomic_write, read_records, writing
from utils.misc import is_number
from utils.missing_videos import missing_counts, reduced_size
from utils.pictures.attention_store import ATTENTION
from utils.report import parts as parts
from utils.report.queries import Thumbnails, best_and_worst, query_card
from utils.report.run_log import (
    COUNTERS,
    TRAINING,
    best_epoch,
    curve,
    curve_names,
    datatype,
    label,
    read_args,
    read_epochs,
)

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "utils/report/templates/report.html"
PUBLISHED = ("published",)  # rows of the tables to set apart
MOMENT_TABLES = {
    "VCMR": ("Moments among all videos (VCMR), in %", MOMENT_COLUMNS),
    "SVMR": ("Moments, the right video given (SVMR), in %", MOMENT_COLUMNS),
    "VR": ("Videos by type of query, in %", VIDEO_COLUMNS),
}
ROW_NAMES = {
    "": "ProPy",
    "whole_video": "the video as a whole",
    "random_event": "a random event",
    "half": "ProPy, half of the windows",
    "any": "ProPy, any window",
}
SHOWN = 3  # evaluations, the last
PICTURE_WIDTH = 1600  # pixels of an overview in the page
Rows = dict[str, dict[str, float]]


@dataclass
class Run:
    """What a run's folder holds.

    Attributes:
        epochs: records of log.jsonl; evaluations: of eval.jsonl. Either may be empty, not both.
    """

    folder: Path
    args: dict
    epochs: list[dict]
    evaluations: list[dict]
    notes: list[str] = field(default_factory=list)  # what is missing, for the reader

    @classmethod
    def read(cls, folder: Path) -> Run:
        """RunError: not a folder of a run, or its files are damaged."""
        epochs = read_epochs(folder) if (folder / "log.jsonl").is_file() else []
        evaluated = folder / "eval.jsonl"
        evaluations = read_records(evaluated) if evaluated.is_file() else []
        if not epochs and not evaluations:
            raise RunError(f"{folder}: neither log.jsonl nor eval.jsonl: not the folder of a run")
        return cls(folder, read_args(folder), epochs, evaluations)

    @property
    def sizes(self) -> list[str]:
        """Of every source of `result_rows` its reduced size, "" where no video was left out."""
        best = [best_epoch(self.epochs)] if self.epochs else []
        return [reduced_size(record) or "" for record in best + self.evaluations[-SHOWN:]]

    @property
    def datatype(self) -> str:
        """See `utils.report.run_log.datatype`."""
        return datatype(self.args)


def result_rows(run: Run) -> dict[str, Rows]:
    """Rows of metrics as `Evaluation.run` of main.py gives them, by where they come from."""
    found = {}
    if run.epochs:
        best = best_epoch(run.epochs)
        rows: Rows = {}
        for name, value in best.items():
            if is_number(value) and name not in (*COUNTERS, *TRAINING):
                row, _, key = name.rpartition("/")
                rows.setdefault(row or "cosine", {})[key] = value
        found[_source(f"epoch {best['epoch']}", best)] = rows
    for record in run.evaluations[-SHOWN:]:
        name = f"{Path(str(record.get('checkpoint'))).name}, epoch {record.get('epoch')}"
        source = _source(f"evaluated {name}", record)
        found.pop(source, None)  # the newest comes last
        found[source] = _rows(run.folder, record.get("metrics", {}))
    return found


def _rows(folder: Path, metrics: object) -> Rows:
    """The metrics of eval.jsonl; what is no finite number is a dash in the tables."""
    if not isinstance(metrics, dict) or not all(isinstance(row, dict) for row in metrics.values()):
        raise RunError(f"{folder / 'eval.jsonl'}: its metrics are not rows of numbers")
    return {
        name: {key: value for key, value in row.items() if is_number(value)}
        for name, row in metrics.items()
    }


def _source(name: str, record: Mapping) -> str:
    """Where a row comes from, with the reduced size where videos were left out."""
    size = reduced_size(record)
    return f"{name}, {size}" if size else name


def results_section(run: Run) -> str:
    """All rows against the published ones."""
    found = result_rows(run)
    videos: Rows = {}
    for source, rows in found.items():
        for row, name in (("cosine", ""), ("dot", ", events not normalised")):
            if row in rows:
                videos[source + name] = rows[row]
    videos |= _published(PRVR_RESULTS.get(run.datatype))
    tables = [parts.table("Video retrieval (PRVR), in %; ranks", videos, PRVR_COLUMNS, PUBLISHED)]
    newest = list(found.values())[-1] if found else {}
    size = f", {run.sizes[-1]}" if run.sizes[-1] else ""
    for task, (title, columns) in MOMENT_TABLES.items():
        rows = {_row_name(name): newest[name] for name in newest if name.split("/")[0] == task}
        if task == "VCMR" and rows:
            rows |= _published(VCMR_RESULTS.get(run.datatype))
        if task != "VR" or len(rows) > 1:  # alone it would repeat the table above
            tables.append(parts.table(title + size, rows, columns, PUBLISHED) if rows else "")
    levels = {n.split("/")[1]: row for n, row in newest.items() if n.startswith("levels/")}
    if levels:
        columns = {key: key for row in levels.values() for key in row}
        title = "Level of the best event, by length of the moment, in %; mean IoU in %"
        tables.append(parts.table(title + size, levels, columns))
    return "".join(f'<div class="card">{table}</div>' for table in tables if table)


def _row_name(name: str) -> str:
    """What a row of `utils.evaluation.moment_tables` is called in the tables."""
    return ROW_NAMES.get(name.partition("/")[2], name.partition("/")[2])


def _published(row: Mapping[str, float] | None) -> Rows:
    return {"published": dict(row)} if row else {}


def curves_section(run: Run) -> str:
    """A chart for every number of log.jsonl but breakdowns."""
    published = PRVR_RESULTS.get(run.datatype, {}) | {
        f"VCMR/{key}": value for key, value in VCMR_RESULTS.get(run.datatype, {}).items()
    }
    best = best_epoch(run.epochs)["epoch"]
    size = reduced_size(run.epochs[-1])
    charts = [
        parts.line_chart(label(name), curve(run.epochs, name), best, published.get(name))
        for name in curve_names(run.epochs)
        if name.count("/") < 2
    ]
    legend = f"By epoch. The ring is the best epoch, {best}"
    legend += "; the dashed line is the published result." if published else "."
    legend += f" Evaluated {size}." if size else ""
    return (
        f'<p class="soft">{legend}</p><div class="card"><div class="charts">{"".join(charts)}</div>'
        "</div>"
    )


def queries_sections(
    predictions: MomentPredictions, queries: Sequence[Query], thumbnails: Thumbnails, count: int,
    size: str,
) -> dict[str, str]:  # fmt: skip
    """Cards of the best and the worst queries. Args: size: what they are chosen from."""
    predictions = predictions.align(queries)
    sections = {}
    hint = (
        '<p class="soft hint">Keys <b>j</b> and <b>k</b> go to the next and the previous query.</p>'
    )
    for title, rows, what in zip(
        ("Best queries", "Worst queries"),
        best_and_worst(predictions, count),
        ("The right video first, by the largest lead", "The right video furthest down the list"),
        strict=True,
    ):
        cards = "".join(query_card(predictions, row, queries[row], thumbnails) for row in rows)
        sections[title] = f'<p class="soft">{what}{size}.</p>{hint}{cards or "<p>None.</p>"}'
    return sections


def attention_section(run: Run, folder: Path, limit: int) -> str:
    """Overviews of the queries that main.py --do_plot 1 drew last."""
    drawn = (folder / "attention" / name for name in drawn_queries(folder)[1])
    pictures = [path for path in drawn if (path / "overview.png").is_file()]
    return "".join(_overview(run, path) for path in pictures[:limit])


def drawn_queries(folder: Path) -> tuple[Path, list[str]]:
    """Of a folder of pictures: the checkpoint, and the queries' folders. RunError: spoiled."""
    path = folder / ATTENTION
    try:
        with h5py.File(path) as file:
            return Path(str(file.attrs["model"])), list(file)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise RunError(f"{path}: {error}: draw again with main.py --do_plot 1") from error


def _overview(run: Run, folder: Path) -> str:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        event, video, caption = (meta[key] for key in ("event", "video", "text"))
        with Image.open(folder / "overview.png") as image:
            source = parts.data_uri(image, PICTURE_WIDTH)
    except (KeyError, OSError, TypeError, ValueError) as error:
        run.notes.append(f"Attention: {folder}: its picture or meta.json is spoiled: {error}")
        return ""
    alt = (
        f"What event {event} of video {video} attends to: "
        "frames, attention over them, moments, pyramid and scores on one time axis"
    )
    return (
        '<figure class="card wide"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{parts.text(caption)}"><img class="picture" src="{source}" '
        f'alt="{parts.text(alt)}"></div></figure>'
    )


def facts(run: Run) -> str:
    """The head of the page."""
    shown = {
        "data set": run.datatype,
        "task": run.args.get("subtask_type"),
        "epochs": len(run.epochs) or None,
        "best epoch": best_epoch(run.epochs)["epoch"] if run.epochs else None,
        "evaluated": "; ".join(dict.fromkeys(filter(None, run.sizes))),
        "trained parameters": _millions(run.args.get("trainable")),
        "precision": run.args.get("used_precision"),
        "seed": run.args.get("seed"),
        "revision": str(run.args.get("git", ""))[:12] or None,
    }
    items = "".join(
        f"<li>{name} <b>{parts.text(value)}</b></li>" for name, value in shown.items() if value
    )
    return f'<h1>{parts.text(run.folder.resolve().name)}</h1><ul class="facts">{items}</ul>'


def _millions(count: object) -> str | None:
    return f"{count / 1e6:.2f} M" if is_number(count) else None


def make_page(run: Run, sections: Mapping[str, str]) -> str:
    """The whole page as HTML."""
    ids = {title: title.lower().replace(" ", "-") for title in sections}
    nav = "".join(f'<a href="#{ids[title]}">{parts.text(title)}</a>' for title in sections)
    body = facts(run) + "".join(
        f'<section id="{ids[title]}"><h2>{parts.text(title)}</h2>{content}</section>'
        for title, content in sections.items()
    )
    if run.notes:
        items = "".join(f"<li>{parts.text(note)}</li>" for note in run.notes)
        body += f'<section><h2>Left out</h2><ul class="card">{items}</ul></section>'
    title = parts.text(f"{run.folder.resolve().name}: ProPy")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=title, nav=nav, body=body)


def build(
    run: Run, annotations: Path | None, video_dir: Path | None, plots: Path | None, count: int
) -> str:
    """The page of a run. What is missing is left out, and named at its end."""
    sections = {"Results": results_section(run)}
    if run.epochs:
        sections["Curves"] = curves_section(run)
    if plots:
        sections["Attention"] = attention_section(run, plots, count)
    thumbnails = Thumbnails(video_dir if video_dir and video_dir.is_dir() else None)
    if thumbnails.video_dir is None:
        run.notes.append(f"Thumbnails: no video folder {video_dir or ''} (--video_dir)")
    try:
        if annotations is None:
            raise DataError("no annotations: name them with --annotations")
        predictions = load_predictions(run.folder / SAVED)
        queries = read_annotations(annotations)
        corpus = set(predictions.vid_names)
        present = [query for query in queries if query.vid_name in corpus]
        left, size = missing_counts("val", queries, present), ""
        if left and any(left.items() <= record.items() for record in run.evaluations):
            # An evaluation of this run says that it went without the others.
            queries, size = present, f", {reduced_size(left)}"
        sections |= queries_sections(predictions, queries, thumbnails, count, size)
    except (RunError, DataError) as error:
        run.notes.append(f"Queries: {error}")
    run.notes += [f"Thumbnails: {message}" for message in thumbnails.failed.values()]
    if run.args:
        table = parts.settings_table(run.args)
        summary = f"<summary>all {len(run.args)} settings</summary>"
        sections["Settings"] = f'<details class="card">{summary}{table}</details>'
    return make_page(run, sections)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="LOGDIR", help="folder of a run")
    parser.add_argument("--output", type=Path, help="the page (default LOGDIR/report.html)")
    parser.add_argument(
        "--annotations", type=Path,
        help="annotations of predictions.h5 (default: the run's prvr_val_annos)",
    )  # fmt: skip
    parser.add_argument(
        "--video_dir", type=Path, help="prepared clips, for thumbnails (default: the run's)"
    )
    parser.add_argument(
        "--plots", type=Path, metavar="DIR",
        help="pictures of main.py --do_plot 1 to show (default: the run's plot_dir, if they are of "
        "this run)",
    )  # fmt: skip
    parser.add_argument(
        "--queries", type=int, default=6, metavar="N",
        help="best, worst and drawn queries to show, N of each (default 6)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.queries < 0:
        parser.error(f"--queries must be at least 0: {args.queries}")
    logging.basicConfig(format="%(message)s")
    run = Run.read(args.folder)
    page = build(
        run,
        args.annotations or _path(run.args.get("prvr_val_annos")),
        args.video_dir or _path(run.args.get("video_dir")),
        checked_plots(args.plots) or own_plots(run),
        args.queries,
    )
    output = args.output or args.folder / "report.html"
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as part:
        part.write_text(page, encoding="utf-8")
    for note in run.notes:
        print(f"left out: {note}", file=sys.stderr)
    print(output)


def checked_plots(folder: Path | None) -> Path | None:
    """RunError: the folder is not one of --do_plot 1."""
    if folder is not None and not (folder / ATTENTION).is_file():
        raise RunError(f"{folder}: no {ATTENTION} in it: name the folder of main.py --do_plot 1")
    if folder is not None:
        drawn_queries(folder)
    return folder


def own_plots(run: Run) -> Path | None:
    """The run's plot folder, if what lies there was drawn with a checkpoint of the run."""
    folder = _path(run.args.get("plot_dir")) or ROOT / "VIS" / run.datatype
    if not (folder / ATTENTION).is_file():
        return None
    try:
        model, _ = drawn_queries(folder)
    except RunError as error:
        run.notes.append(f"Attention: {error}")
        return None
    beside = {(start / model.parent).resolve() for start in (Path.cwd(), ROOT)}
    return folder if run.folder.resolve() in beside else None


def _path(value: object) -> Path | None:
    """A path of args.json. A relative one starts where main.py ran: here, or in the checkout."""
    if not value:
        return None
    path = Path(str(value))
    return path if path.exists() else ROOT / path


if __name__ == "__main__":
    try:
        main()
    except (RunError, OutputError) as error:
        sys.exit(f"error: {error}")
