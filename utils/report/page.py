"""One page about a run: settings, results, curves, attention, best and worst queries.

What the sections hold is gathered here; templates/report.html shows it, and escapes every text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
from PIL import Image

from dataloaders import DataError
from dataloaders.annotations import VAL, read_annotations
from dataloaders.clips import ClipSource, VideoFolder
from dataloaders.frame_store import FrameStore
from utils import RunError
from utils.evaluation.moment_tables import COLUMNS
from utils.evaluation.predictions import SAVED, load_predictions
from utils.evaluation.rows import (
    COSINE,
    DOT,
    LEVELS,
    SVMR,
    VCMR,
    VR,
    ZERO_SHOT,
    Rows,
    breakdowns,
    rows_to_compare,
    scoring_of,
    video_rows,
)
from utils.evaluation.tables import PRVR_COLUMNS, cell
from utils.files import atomic_write, read_records, writing
from utils.missing_videos import missing_counts, reduced_size
from utils.pictures.draw import VECTOR_TEXT
from utils.report import run_log
from utils.report.curves import draw_curves, shown_names
from utils.report.queries import (
    DRAWING,
    Thumbnails,
    best_and_worst,
    data_uri,
    image_uri,
    query_card,
    seconds,
)

ROOT = Path(__file__).resolve().parents[2]
MOMENT_TABLES = {
    VCMR: "Moments among all videos (VCMR), in %",
    SVMR: "Moments, the right video given (SVMR), in %",
    VR: "Videos by type of query, in %",
}
QUERIES = {
    "Best queries": "The right video first, by the largest lead",
    "Worst queries": "The right video furthest down the list",
}
SHOWN = 3  # evaluations, the last
PICTURE_WIDTH = 1600  # pixels of an overview in the page


@dataclass
class Run:
    """What a run's folder holds."""

    folder: Path
    args: dict
    epochs: list[dict]  # records of log.jsonl
    evaluations: list[dict]  # of eval.jsonl; either may be empty, not both
    zero_shot: dict[str, Rows]  # of CLIP alone by scoring, as training logged them
    notes: list[str] = field(default_factory=list)  # what is missing, for the reader

    @classmethod
    def read(cls, folder: Path) -> Run:
        """RunError: not a folder of a run, or its files are damaged."""
        logged = (folder / "log.jsonl").is_file()
        epochs = run_log.read_epochs(folder) if logged else []
        evaluated = folder / "eval.jsonl"
        evaluations = read_records(evaluated) if evaluated.is_file() else []
        if not epochs and not evaluations:
            raise RunError(f"{folder}: neither log.jsonl nor eval.jsonl: not the folder of a run")
        zero_shot = run_log.read_zero_shot(folder) if logged else {}
        return cls(folder, run_log.read_args(folder), epochs, evaluations, zero_shot)

    @property
    def records(self) -> list[dict]:
        """Of what `result_rows` shows: the best epoch and the last evaluations."""
        best = [run_log.best_epoch(self.epochs)] if self.epochs else []
        return best + self.evaluations[-SHOWN:]

    def path(self, name: str) -> Path | None:
        """Of args.json. A relative one starts where main.py ran: here, or in the checkout."""
        value = self.args.get(name)
        if not value:
            return None
        path = Path(str(value))
        return path if path.exists() else ROOT / path


def write_page(
    run: Run, path: Path, annotations: Path | None, video_dir: Path | None, queries: int
) -> None:
    """The page of a run. What is missing is named at its end and in `run.notes`.

    Args:
        annotations, video_dir: in place of what args.json names.
        queries: how many to show, of the best, the worst and those with pictures of attention.

    Raises:
        RunError: metrics are damaged. OutputError: the page cannot be written.
    """
    sections: dict[str, tuple[str, object]] = {"Results": ("results", result_tables(run))}
    if run.epochs:
        sections["Curves"] = ("curves", curves(run))
    if drawn := overviews(run, queries):
        sections["Attention"] = ("attention", drawn)
    thumbnails = Thumbnails(open_clips(run, video_dir))
    try:
        for title, content in query_cards(run, annotations, thumbnails, queries).items():
            sections[title] = ("queries", content)
    except (RunError, DataError) as error:
        run.notes.append(f"Queries: {error}")
    run.notes += [f"Thumbnails: {message}" for message in thumbnails.failed.values()]
    if run.args:
        sections["Settings"] = ("settings", run.args)
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.globals |= {"cell": cell, "extent": extent, "seconds": seconds}
    content = pages.get_template("report.html").render(
        name=run.folder.resolve().name, facts=facts(run), sections=sections, notes=run.notes
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(content, encoding="utf-8")


def extent(moment: tuple[float, float], duration: float) -> str:
    """Where a moment lies on a video's axis, as CSS."""
    start, end = (min(max(time / duration, 0), 1) if duration else 0 for time in moment)
    return f"left:{100 * start:.3f}%;width:{100 * max(end - start, 0):.3f}%"


def result_rows(run: Run) -> dict[str, Rows]:
    """Rows of metrics as `Evaluator.run` gives them, by where they come from, the newest last."""
    found: dict[str, Rows] = {}
    for record in run.records:
        if "metrics" in record:
            rows = record["metrics"]
            name = f"evaluated {Path(str(record.get('checkpoint'))).name}, "
        else:
            rows, name = {}, ""
            for key, value in record.items():
                if run_log.is_metric(key):
                    row, _, key = key.rpartition("/")
                    rows.setdefault(row or COSINE, {})[key] = value
        if not isinstance(rows, dict) or not all(isinstance(r, dict) for r in rows.values()):
            raise RunError(f"{run.folder / 'eval.jsonl'}: its metrics are not rows of numbers")
        size = reduced_size(record)
        scoring = scoring_of(record.get("checkpoint"))
        source = ZERO_SHOT[scoring] if scoring else f"{name}epoch {record.get('epoch')}"
        source += f", {size}" if size else ""
        found.pop(source, None)
        found[source] = run_log.numeric_rows(rows)
    return found


def result_tables(run: Run) -> list[dict]:
    """All rows against the published ones: title, columns and rows of every table."""
    found, datatype = result_rows(run), run_log.datatype(run.args)
    zero_shot = any(scoring_of(record.get("checkpoint")) for record in run.records)
    compared, moments = rows_to_compare(datatype, run.zero_shot, zero_shot)
    videos: Rows = {}
    for source, rows in found.items():
        videos |= video_rows(source, rows)
    tables = []

    def add(title: str, columns: Mapping[str, str], rows: Rows) -> None:
        tables.append({"title": title, "columns": columns, "rows": rows})

    add("Video retrieval (PRVR), in %; ranks", PRVR_COLUMNS, videos | compared)
    newest = list(found.values())[-1]
    size = reduced_size(run.records[-1])
    size = f", {size}" if size else ""
    for task, title in MOMENT_TABLES.items():
        rows = breakdowns(newest, task)
        if task == VCMR and rows:
            rows |= moments
        if len(rows) > (task == VR):  # alone it would repeat the table above
            add(title + size, COLUMNS[task], rows)
    if levels := breakdowns(newest, LEVELS):
        title = "Level of the best event, by length of the moment, in %; mean IoU in %"
        columns = {key: key for row in levels.values() for key in row}
        add(title + size, columns, levels)
    return tables


def curves(run: Run) -> dict:
    """A picture of every number of log.jsonl but breakdowns."""
    runs = {"this run": run.epochs}
    content = io.BytesIO()
    with matplotlib.rc_context(VECTOR_TEXT):
        to_beat = run_log.to_beat(run.zero_shot)
        figure = draw_curves(runs, {run_log.datatype(run.args)}, to_beat)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    values = {name: [v for _, v in run_log.curve(run.epochs, name)] for name in shown_names(runs)}
    alt = "; ".join(f"{run_log.label(n)}: {v[0]:.4g} to {v[-1]:.4g}" for n, v in values.items())
    return {"source": data_uri("image/svg+xml", content.getvalue()), "alt": alt}


def query_cards(
    run: Run, annotations: Path | None, thumbnails: Thumbnails, count: int
) -> dict[str, dict]:
    """Cards of the best and the worst queries by title. DataError, RunError: none can be shown."""
    annotations = annotations or run.path("prvr_val_annos")
    if annotations is None:
        raise DataError("no annotations: name them with --annotations")
    predictions = load_predictions(run.folder / SAVED)
    asked = read_annotations(annotations)
    corpus = set(predictions.vid_names)
    present = [query for query in asked if query.vid_name in corpus]
    left, size = missing_counts(VAL, asked, present), ""
    if left and any(left.items() <= record.items() for record in run.evaluations):
        # An evaluation of this run says that it went without the others.
        asked, size = present, f", {reduced_size(left)}"
    predictions = predictions.align(asked)
    if run.args.get("event_scores") == DOT:
        size += ", ranked by cosine"  # as moments are, whatever the run's PRVR metrics
    chosen = zip(QUERIES.items(), best_and_worst(predictions, count), strict=True)
    return {
        title: {
            "cards": [query_card(predictions, row, asked[row], thumbnails) for row in rows],
            "order": order + size,
        }
        for (title, order), rows in chosen
    }


def open_clips(run: Run, video_dir: Path | None) -> ClipSource | None:
    """Where thumbnails come from; None, with a note, where that is not there."""
    store = run.path("frame_store")
    if store and video_dir is None:
        try:
            return FrameStore(store)
        except DataError as error:
            run.notes.append(f"Thumbnails: {error}")
            return None
    video_dir = video_dir or run.path("video_dir")
    if video_dir and video_dir.is_dir():
        return VideoFolder(video_dir)
    run.notes.append(f"Thumbnails: no video folder {video_dir or ''} (--video_dir)")
    return None


def overviews(run: Run, limit: int) -> list[dict]:
    """Pictures of main.py --do_plot 1, the newest first; each says which checkpoint it is of: one
    of a folder of this name, as runs on one split share the pictures' folder."""
    folder = run.path("plot_dir") or ROOT / "VIS" / run_log.datatype(run.args)
    found = []
    paths = sorted(folder.glob("attention/*/overview.png"), key=lambda path: -path.stat().st_mtime)
    for path in paths:
        if len(found) == limit:
            break
        try:
            meta = json.loads((path.parent / "meta.json").read_text(encoding="utf-8"))
            model = str(meta.get("model"))
            of_clip = model in {record.get("checkpoint") for record in run.evaluations}
            if not (of_clip or Path(model).parent.name == run.folder.resolve().name):
                continue
            with Image.open(path) as image:
                image.thumbnail((PICTURE_WIDTH, image.height), Image.LANCZOS)
                source = image_uri(image, **DRAWING)
            alt = (
                f"What event {meta['event']} of video {meta['video']} attends to: "
                "frames, attention over them, moments, pyramid and scores on one time axis"
            )
            found.append({"source": source, "alt": alt, "caption": meta["text"], "model": model})
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            message = f"{path.parent}: its picture or meta.json is corrupt: {error}"
            run.notes.append(f"Attention: {message}")
    return found


def facts(run: Run) -> dict[str, object]:
    """The head of the page; what is empty is not shown."""
    trained = run.args.get("trainable")
    return {
        "data set": run_log.datatype(run.args),
        "task": run.args.get("subtask_type"),
        "epochs": len(run.epochs),
        "best epoch": run.records[0].get("epoch") if run.epochs else None,
        "evaluated": "; ".join(dict.fromkeys(filter(None, map(reduced_size, run.records)))),
        "trained parameters": f"{trained / 1e6:.2f} M" if run_log.is_number(trained) else None,
        "precision": run.args.get("precision"),
        "seed": run.args.get("seed"),
        "revision": str(run.args.get("git", ""))[:12],
    }
