"""One page about a run: settings, results, curves, attention, best and worst queries.

What the sections hold is gathered here; templates/report.html shows it, and escapes every text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from dataloaders import DataError
from dataloaders.annotations import VAL, read_annotations
from dataloaders.clips import ClipSource, VideoFolder
from dataloaders.frame_store import FrameStore
from dataloaders.storage import open_hdf5
from utils import RunError
from utils.evaluation.moment_tables import MOMENT_COLUMNS, VIDEO_COLUMNS
from utils.evaluation.predictions import SAVED, load_predictions
from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS
from utils.evaluation.rows import (
    COSINE,
    DOT,
    RANDOM_EVENT,
    SVMR,
    VCMR,
    VR,
    WHOLE_VIDEO,
    Rows,
)
from utils.evaluation.tables import PRVR_COLUMNS
from utils.files import atomic_write, read_records, writing
from utils.misc import is_number
from utils.missing_videos import missing_counts, reduced_size
from utils.pictures.attention_store import ATTENTION
from utils.pictures.draw import VECTOR_TEXT
from utils.report import run_log
from utils.report.curves import PANEL, choose_names, draw_panel, published_values
from utils.report.queries import (
    Thumbnails,
    best_and_worst,
    data_uri,
    image_uri,
    query_card,
    templates,
)

ROOT = Path(__file__).resolve().parents[2]
MOMENT_TABLES = {
    VCMR: ("Moments among all videos (VCMR), in %", MOMENT_COLUMNS),
    SVMR: ("Moments, the right video given (SVMR), in %", MOMENT_COLUMNS),
    VR: ("Videos by type of query, in %", VIDEO_COLUMNS),
}
ROW_NAMES = {
    "": "ProPy",
    WHOLE_VIDEO: "the video as a whole",
    RANDOM_EVENT: "a random event",
    "half": "ProPy, half of the windows",
    "any": "ProPy, any window",
}
QUERIES = {
    "Best queries": "The right video first, by the largest lead",
    "Worst queries": "The right video furthest down the list",
}
SHOWN = 3  # evaluations, the last
PICTURE_WIDTH = 1600  # pixels of an overview in the page
DRAWING = {"quality": 88, "subsampling": 0}  # of JPEG; as PNG they are three times as large


@dataclass
class Run:
    """What a run's folder holds.

    Attributes:
        epochs: records of log.jsonl; evaluations: of eval.jsonl. Either may be empty, not both.
        notes: what is missing, for the reader.
    """

    folder: Path
    args: dict
    epochs: list[dict]
    evaluations: list[dict]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """RunError: not a folder of a run, or its files are damaged."""
        epochs = run_log.read_epochs(folder) if (folder / "log.jsonl").is_file() else []
        evaluated = folder / "eval.jsonl"
        evaluations = read_records(evaluated) if evaluated.is_file() else []
        if not epochs and not evaluations:
            raise RunError(f"{folder}: neither log.jsonl nor eval.jsonl: not the folder of a run")
        return cls(folder, run_log.read_args(folder), epochs, evaluations)

    @property
    def sizes(self) -> list[str]:
        """Of every source of `result_rows` its reduced size, "" where no video is missing."""
        best = [run_log.best_epoch(self.epochs)] if self.epochs else []
        return [reduced_size(record) or "" for record in best + self.evaluations[-SHOWN:]]

    def path(self, name: str) -> Path | None:
        """Of args.json. A relative one starts where main.py ran: here, or in the checkout."""
        value = self.args.get(name)
        if not value:
            return None
        path = Path(str(value))
        return path if path.exists() else ROOT / path


def write_page(run: Run, path: Path, **choices: object) -> None:
    """The page as a file. Args: choices: see `build`. OutputError: it cannot be written."""
    page = build(run, **choices)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")


def build(
    run: Run, annotations: Path | None, video_dir: Path | None, plots: Path | None, queries: int
) -> str:
    """The page of a run as HTML. What is missing is named at its end and in `run.notes`.

    Args:
        annotations, video_dir, plots: in place of what args.json names.
        queries: how many to show, of the best, the worst and those with pictures of attention.

    Raises:
        RunError: metrics are damaged, or `plots` is no folder of pictures.
    """
    sections: dict[str, tuple[str, object]] = {"Results": ("results", result_tables(run))}
    if run.epochs:
        sections["Curves"] = ("curves", curves(run))
    if drawn := overviews(run, plots, queries):
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
    name = run.folder.resolve().name
    page = templates().get_template("report.html")
    return page.render(name=name, facts=facts(run), sections=sections, notes=run.notes)


def result_rows(run: Run) -> dict[str, Rows]:
    """Rows of metrics as `Evaluator.run` gives them, by where they come from."""
    found = {}
    if run.epochs:
        best = run_log.best_epoch(run.epochs)
        rows: Rows = {}
        for name, value in best.items():
            if is_number(value) and name not in (*run_log.COUNTERS, *run_log.TRAINING):
                row, _, key = name.rpartition("/")
                rows.setdefault(row or COSINE, {})[key] = value
        found[_source(f"epoch {best['epoch']}", best)] = rows
    for record in run.evaluations[-SHOWN:]:
        name = f"{Path(str(record.get('checkpoint'))).name}, epoch {record.get('epoch')}"
        source = _source(f"evaluated {name}", record)
        found.pop(source, None)  # the newest comes last
        metrics = record.get("metrics", {})
        if not isinstance(metrics, dict) or not all(isinstance(r, dict) for r in metrics.values()):
            raise RunError(f"{run.folder / 'eval.jsonl'}: its metrics are not rows of numbers")
        found[source] = {
            row: {key: value for key, value in numbers.items() if is_number(value)}
            for row, numbers in metrics.items()
        }
    return found


def _source(name: str, record: Mapping) -> str:
    """Where a row comes from, with the reduced size where videos are missing."""
    size = reduced_size(record)
    return f"{name}, {size}" if size else name


def result_tables(run: Run) -> list[dict]:
    """All rows against the published ones: title, columns and rows of every table."""
    found = result_rows(run)
    videos: Rows = {}
    for source, rows in found.items():
        for row, name in ((COSINE, ""), (DOT, run_log.NOT_NORMALISED)):
            if row in rows:
                videos[source + name] = rows[row]
    shown = [("Video retrieval (PRVR), in %; ranks", PRVR_COLUMNS, videos, PRVR_RESULTS)]
    newest = list(found.values())[-1]
    size = f", {run.sizes[-1]}" if run.sizes[-1] else ""
    for task, (title, columns) in MOMENT_TABLES.items():
        own = {
            name.partition("/")[2]: newest[name] for name in newest if name.split("/")[0] == task
        }
        rows = {ROW_NAMES.get(name, name): row for name, row in own.items()}
        if len(rows) > (task == "VR"):  # alone it would repeat the table above
            shown.append((title + size, columns, rows, VCMR_RESULTS if task == "VCMR" else {}))
    levels = {n.split("/")[1]: row for n, row in newest.items() if n.startswith("levels/")}
    if levels:
        title = "Level of the best event, by length of the moment, in %; mean IoU in %"
        columns = {key: key for row in levels.values() for key in row}
        shown.append((title + size, columns, levels, {}))
    tables = []
    for title, columns, rows, published in shown:
        known = published.get(run_log.datatype(run.args))
        rows = rows | {"published": known} if known else rows
        tables.append({"title": title, "columns": columns, "rows": rows})
    return tables


def curves(run: Run) -> dict:
    """A chart for every number of log.jsonl but breakdowns."""
    published = published_values({run_log.datatype(run.args)})
    charts = []
    for name in choose_names(run_log.curve_names(run.epochs)):
        figure = Figure(figsize=PANEL, layout="constrained")
        draw_panel(figure.subplots(), {"": run.epochs}, name, published.get(name))
        content = io.BytesIO()
        with matplotlib.rc_context(VECTOR_TEXT):
            figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
        (first, start), (last, end) = (run_log.curve(run.epochs, name)[i] for i in (0, -1))
        alt = f"{run_log.label(name)}: {start:.4g} in epoch {first}, {end:.4g} in epoch {last}"
        alt += f", published {published[name]:g}" if name in published else ""
        charts.append({"source": data_uri("image/svg+xml", content.getvalue()), "alt": alt})
    return {
        "charts": charts,
        "best": run_log.best_epoch(run.epochs)["epoch"],
        "published": bool(published),
        "size": reduced_size(run.epochs[-1]),
    }


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
    found = {}
    for (title, order), rows in zip(
        QUERIES.items(), best_and_worst(predictions, count), strict=True
    ):
        cards = [query_card(predictions, row, asked[row], thumbnails) for row in rows]
        found[title] = {"cards": cards, "order": order, "size": size}
    return found


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


def overviews(run: Run, given: Path | None, limit: int) -> list[dict]:
    """Pictures of the queries that main.py --do_plot 1 drew last, with a checkpoint of this run.

    Args:
        given: a folder to take in any case; else the run's own is tried.

    Raises:
        RunError: `given` is no folder of pictures.
    """
    folder = given or run.path("plot_dir") or ROOT / "VIS" / run_log.datatype(run.args)
    path = folder / ATTENTION
    if not given and not path.is_file():
        return []
    try:
        with open_hdf5(path) as file:
            model, names = Path(str(file.attrs["model"])), list(file)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        message = f"{path}: {error}: draw again with main.py --do_plot 1"
        if given:
            raise RunError(message) from error
        run.notes.append(f"Attention: {message}")
        return []
    own = {(start / model.parent).resolve() for start in (Path.cwd(), ROOT)}
    if not given and run.folder.resolve() not in own:
        return []
    found = []
    for picture in [folder / "attention" / name for name in names]:
        if len(found) < limit and (picture / "overview.png").is_file():
            try:
                found.append(_overview(picture))
            except (KeyError, OSError, TypeError, ValueError) as error:
                message = f"{picture}: its picture or meta.json is corrupt: {error}"
                run.notes.append(f"Attention: {message}")
    return found


def _overview(folder: Path) -> dict:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    with Image.open(folder / "overview.png") as image:
        image.thumbnail((PICTURE_WIDTH, image.height), Image.LANCZOS)
        source = image_uri(image, **DRAWING)
    alt = (
        f"What event {meta['event']} of video {meta['video']} attends to: "
        "frames, attention over them, moments, pyramid and scores on one time axis"
    )
    return {"caption": meta["text"], "source": source, "alt": alt}


def facts(run: Run) -> dict[str, object]:
    """The head of the page; what is empty is not shown."""
    trained = run.args.get("trainable")
    return {
        "data set": run_log.datatype(run.args),
        "task": run.args.get("subtask_type"),
        "epochs": len(run.epochs),
        "best epoch": run_log.best_epoch(run.epochs)["epoch"] if run.epochs else None,
        "evaluated": "; ".join(dict.fromkeys(filter(None, run.sizes))),
        "trained parameters": f"{trained / 1e6:.2f} M" if is_number(trained) else None,
        "precision": run.args.get("used_precision"),
        "seed": run.args.get("seed"),
        "revision": str(run.args.get("git", ""))[:12],
    }
