"""From nothing to a row of the paper: weights, annotations, videos, zero-shot rows, training,
evaluation, comparison, report. Run it through scripts/reproduce.sh, which has examples.

What was done is read off the files it left, and off logs/reproduction.json, which has the results:
for each row and step what was found or computed, and what it depends on. A step is done again when
that has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shlex
import signal
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from dataloaders import DataError
from dataloaders.annotations import TRAIN, VAL, Split
from dataloaders.clips import VideoFolder
from dataloaders.frame_store import FrameStore
from dataloaders.storage import lock
from models import ProPyConfig
from models.clip_weights import PUBLISHED_ARCHIVES, WEIGHTS_FILES, build_clip, weights_path
from modules.torch_files import sha256_of
from scripts import report
from scripts.data import check_videos, pack_frames
from utils import RunError
from utils.arguments import FLAG_OF_FIELD, build_parser, parse_args, plain
from utils.command import USER_ERRORS, Parser, run_command
from utils.evaluation.published import DATATYPES, PRVR_RESULTS, VCMR_RESULTS, split_size_warning
from utils.evaluation.rows import COSINE, DOT, VCMR
from utils.evaluation.tables import metrics_table
from utils.files import read_records, write_json
from utils.misc import git_revision
from utils.missing_videos import reduced_size
from utils.report.run_log import read_args, read_epochs
from utils.training.checkpoint import BEST, BEST_DOT
from utils.training.trainer import CHANGE_A_RUN

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "reproduction.json"
PRVR = "PRVR"
PUBLISHED = {PRVR: PRVR_RESULTS, VCMR: VCMR_RESULTS}
# Ours; the paper gives no spread. Points that a recall, and a sum of recalls, may differ.
TOLERANCE, SUM_TOLERANCE = 1.0, 2.0
# What is wrong with a video so that it cannot be used; the rest is reported.
UNUSABLE = {"missing", "unreadable", "changed"}
ZERO_SHOT = {PRVR: "best", VCMR: "events"}  # how CLIP alone scores: only events have times
# What this program sets itself, so that it is not taken from outside.
OWN = (
    "do_train", "do_eval", "do_plot", "resume", "load_from_pretrained", "zero_shot", "output_dir",
)  # fmt: skip
# Flags that make another model, besides those that make another run of it.
OF_MODEL = {FLAG_OF_FIELD.get(f.name, f.name) for f in fields(ProPyConfig)} | {"pyr_config_path"}


@dataclass
class Row:
    """A row of the paper's tables, or a data set's of your own.

    Attributes:
        name: of its runs' folders in `folder`.
        seeds: of its runs; None stands for the published one, in a folder without a number.
        settings: the flags of its script.
        video_dir: the clips, also where a frame store takes their place.
    """

    split: str
    task: str
    name: str
    folder: Path
    seeds: Sequence[int | None]
    settings: argparse.Namespace
    video_dir: Path

    @property
    def results(self) -> Path:
        return self.folder / RESULTS

    @property
    def command(self) -> str:
        own = f"split={self.name.partition('_')[2]} " * (self.split == "custom")
        return f"{own}bash scripts/reproduce.sh {self.split} --task {self.task}"

    def runs(self) -> Iterator[tuple[Path, dict[str, object]]]:
        """Folder and variables of each run."""
        for seed in self.seeds:
            suffix, own = ("", {}) if seed is None else (f"_seed{seed}", {"seed": seed})
            folder = self.folder / (self.name + suffix)
            yield folder, own | {"output_dir": folder, "subtask_type": self.task}

    def best_checkpoints(self) -> list[str]:
        """Of a run; that of events which are not normalised is for PRVR alone."""
        both = self.task == PRVR and self.settings.event_scores == "both"
        return [BEST, BEST_DOT] if both else [BEST]

    def annotations(self) -> dict[str, Path]:
        return {VAL: self.settings.prvr_val_annos, TRAIN: self.settings.prvr_train_annos}

    def splits(self) -> list[Split]:
        datatype = self.settings.datatype
        return [read_split(path, name, datatype) for name, path in self.annotations().items()]

    def names(self) -> list[str]:
        """Of the videos, of both splits."""
        videos = (video.vid_name for split in self.splits() for video in split.videos)
        return list(dict.fromkeys(videos))


# --- the launcher, which has the settings


def environment(outside: Mapping[str, str] = os.environ, **variables: object) -> dict[str, str]:
    """For a script: this process's or another one, with these variables of the launcher's."""
    return {**outside, **dict.fromkeys(OWN, ""), **{k: str(v) for k, v in variables.items()}}


def read_settings(
    split: str, outside: Mapping[str, str] = os.environ, **variables: object
) -> argparse.Namespace:
    """The flags that scripts/prvr_<split>.sh trains with in an environment. RunError: it does not
    come so far."""
    env = environment(outside, do_train=1, dry_run=1, **variables)
    done = subprocess.run(
        ["bash", f"scripts/prvr_{split}.sh"], cwd=ROOT, capture_output=True, text=True, env=env
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"scripts/prvr_{split}.sh: {done.stderr.strip()}")
    return parse_args(done.stdout.split("\0")[:-1])


def launch(row: Row, **variables: object) -> None:
    """main.py by the row's script, with these variables in place of its own."""
    run_program(["bash", f"scripts/prvr_{row.split}.sh"], **variables)


def run_program(command: Sequence[str], **variables: object) -> None:
    """One of the project's programs, in a process of its own, which an interrupt lets save and end.

    RunError: it failed; its own message says why.
    """
    child = subprocess.Popen(command, cwd=ROOT, env=environment(**variables))
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt
    if status:
        raise RunError(f"{shlex.join(command)} ended with {status}; its own message says why")


# --- what has to be there


@cache
def find_weights(name: str) -> dict:
    """CLIP's file and its sha256. RunError: it is not there, or not the published one."""
    path = weights_path(name, ROOT / "CLIP_weights")
    by_name = path != Path(name)
    fetch = f"`bash scripts/download_clip.sh {name}`" if by_name else "copy it there"
    if not path.is_file():
        raise RunError(f"{path}: no CLIP weights there: {fetch}")
    found = {"file": str(path), "sha256": sha256_of(path)}
    if name in WEIGHTS_FILES and found["sha256"] not in PUBLISHED_ARCHIVES:
        raise RunError(
            f"{path}: not the published file (sha256 differs): move it away, then {fetch}"
        )
    return found


@cache
def read_split(path: Path, name: str, datatype: str) -> Split:
    """DataError: it cannot be read. RunError: it is not the standard split."""
    dataset = datatype.partition("_")[0]
    remedy = f"make it with `.venv/bin/python -m scripts.data.convert_annotations {dataset} FOLDER`"
    if not path.is_file() and datatype != "custom":
        raise RunError(f"{path}: no such file: {remedy} (annotations/README.md: where it is from)")
    split = Split.read(path, name)
    if warning := split_size_warning(datatype, name, len(split.videos), len(split.queries)):
        raise RunError(f"{path}: {warning}: {remedy}")
    return split


def find_clips(row: Row) -> VideoFolder | FrameStore:
    """A frame store that has all videos, if one is asked for, else the folder that has them.

    DataError: there is neither.
    """
    names, store = row.names(), row.settings.frame_store
    if store and store.is_file() and not (clips := FrameStore(store)).missing(names):
        return clips
    clips = VideoFolder(row.video_dir)
    remedy = f"`input_dir=FOLDER video_dir={row.video_dir} bash scripts/prepare.sh`"
    missing = clips.missing(names) if row.video_dir.is_dir() else names
    if missing and not row.settings.allow_missing:
        raise DataError(f"{row.video_dir}: {len(missing)} of {len(names)} videos missing: {remedy}")
    return clips


def finished(row: Row, folder: Path) -> bool:
    """Whether a run is trained to its end. RunError: it was with other settings."""
    if not (folder / "log.jsonl").is_file():
        return False
    before, settings = read_args(folder), decisive(row.settings)
    default = build_parser().get_default  # of what there was no flag for
    then = {name: before.get(name, default(name)) for name in settings}
    if other := [f"{k} {then[k]}, not {v}" for k, v in settings.items() if then[k] != v]:
        raise RunError(
            f"{folder}: was trained with {', '.join(other)}: move it away, or give those"
        )
    there = all((folder / name).is_file() for name in row.best_checkpoints())
    return there and read_epochs(folder)[-1]["epoch"] >= row.settings.epochs


# --- the steps: each yields what it found


def weights(row: Row) -> Iterator[dict]:
    name = row.settings.pretrained_clip_name
    path = weights_path(name, ROOT / "CLIP_weights")
    if path != Path(name) and not path.is_file():
        run_program(["bash", "scripts/download_clip.sh", name])
    yield find_weights(name)


def annotations(row: Row) -> Iterator[dict]:
    for split in row.splits():
        sizes = {"videos": len(split.videos), "queries": len(split.queries)}
        yield {"file": str(split.path), "sha256": sha256_of(split.path)} | sizes


def videos(row: Row) -> Iterator[dict]:
    """The health report, of clips in a folder."""
    clips = find_clips(row)
    if isinstance(clips, FrameStore):
        print(f"{clips.path} has them all")
        yield {"frame_store": str(clips.path), "videos": len(row.names())}
        return
    found = hashlib.sha256()
    for name in row.names():
        path = clips.path(name)
        stat = path.stat() if path.is_file() else None
        found.update(repr((name, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    annotations = [sha256_of(file) for file in row.annotations().values()]
    inputs = {"files": found.hexdigest(), "annotations": annotations}
    yield once(row, "videos", inputs, lambda: health(row))


def health(row: Row) -> dict:
    """RunError: videos cannot be used, and the run is not to skip them."""
    listed = row.folder / f"{row.name}_videos.jsonl"
    on_clips(check_videos.main, row, "--report", listed)
    problems = read_records(listed)
    counts = Counter(problem["problem"] for problem in problems)
    bad = {problem["vid_name"] for problem in problems if problem["problem"] in UNUSABLE}
    if bad and not row.settings.allow_missing:
        raise RunError(
            f"{len(bad)} videos of {row.video_dir} cannot be used, {listed} says why: make them "
            "again with `bash scripts/prepare.sh`, or go without them: allow_missing=1"
        )
    return {"videos": len(row.names()), "problems": dict(counts), "listed": str(listed)}


def frame_store(row: Row) -> Iterator[dict]:
    store = row.settings.frame_store
    if store is None:
        print("none is asked for (frame_store=FILE)")
        return
    if not isinstance(find_clips(row), FrameStore):
        trust = os.environ.get("TRUST_CLIP_ARCHIVE") == "1"
        path = find_weights(row.settings.pretrained_clip_name)["file"]
        size = build_clip(path, trust, row.settings.clip_activation).sizes.input_resolution
        status = on_clips(pack_frames.main, row, "--frame_store", store, "--size", size)
        if status and not row.settings.allow_missing:
            raise RunError(f"{store}: not complete, what is printed above says why")
    yield {"file": str(store)}


def on_clips(program: Callable[[list[str]], int], row: Row, *flags: object) -> int:
    """One of the programs for clips, on the row's, in this process; its exit status."""
    folder, files = ("--video_dir", row.video_dir), ("--annotations", *row.annotations().values())
    status = program([str(flag) for flag in (*folder, *flags, *files)])
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return status


def zero_shot(row: Row) -> Iterator[dict]:
    scoring = ZERO_SHOT[row.task]
    variables = {"subtask_type": row.task, "zero_shot": scoring}
    yield evaluate(row, "zero-shot", row.folder / f"{row.name}_zero_shot_{scoring}", variables)


def training(row: Row) -> Iterator[dict]:
    for folder, variables in row.runs():
        if finished(row, folder):
            print(f"{folder} is trained")
        else:
            launch(row, do_train=1, do_eval=0, resume="auto", **variables)
        if not finished(row, folder):
            raise RunError(f"{folder}: training did not come to its end")
        yield {"folder": str(folder), "epochs": row.settings.epochs}


def evaluation(row: Row) -> Iterator[dict]:
    for folder, variables in row.runs():
        for name in row.best_checkpoints():
            more = {"resume": folder / name, "save_predictions": int(name == BEST)}
            yield evaluate(row, "evaluation", folder, variables | more)


def evaluate(row: Row, step: str, folder: Path, variables: Mapping[str, object]) -> dict:
    """What main.py --do_eval 1 with these variables adds to the folder's eval.jsonl."""
    variables = {"do_train": 0, "do_eval": 1} | variables | {"output_dir": folder}
    checkpoint = variables.get("resume")
    flags = vars(row.settings) | {name: str(value) for name, value in variables.items()}
    inputs = {name: flags[name] for name in sorted(flags) if name != "num_thread_reader"}
    inputs = json.loads(json.dumps(inputs, default=str))
    inputs["weights"] = find_weights(row.settings.pretrained_clip_name)["sha256"]
    inputs["annotations"] = sha256_of(row.settings.prvr_val_annos)
    inputs["trained"] = checkpoint and sha256_of(checkpoint)

    def act() -> dict:
        launch(row, **variables)
        record = read_records(folder / "eval.jsonl")[-1]
        rows = {k: row for k, row in record["metrics"].items() if k in (COSINE, DOT, VCMR)}
        sizes = {name: value for name, value in record.items() if name.startswith(f"{VAL}_")}
        of = {"checkpoint": record["checkpoint"], "epoch": record["epoch"], "git": record["git"]}
        return {"folder": str(folder)} | of | sizes | {"metrics": rows}

    return once(row, step, inputs, act)


def comparison(row: Row) -> Iterator[dict]:
    """Against the published row, of the mean over the seeds; of ActivityNet both rows."""
    published = PUBLISHED[row.task].get(row.settings.datatype)
    changed = other_settings(row) if published else []
    if published is None:
        print(f"{row.name}: there is no published row to compare with")
    elif changed:
        print(f"not the published settings: {', '.join(changed)}")
    done = load(row)[row.name]["evaluation"]
    kinds = {BEST: VCMR if row.task == VCMR else COSINE, BEST_DOT: DOT}
    for checkpoint in row.best_checkpoints():
        kind = kinds[checkpoint]
        some = [item for item in done if Path(item["checkpoint"]).name == checkpoint]
        found = compare(kind, [item["metrics"][kind] for item in some], published)
        if size := reduced_size(some[0]):
            print(size)
        if published:
            found["reproduced"] = found["within_tolerance"] and not (size or changed)
            found |= {"other_settings": changed, "reduced": size}
        yield found


def other_settings(row: Row) -> list[str]:
    """Those that change a run or its model and come from outside."""
    without = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    ours, published = (decisive(s) for s in (row.settings, read_settings(row.split, without)))
    return [f"{name} {value}" for name, value in ours.items() if value != published[name]]


def decisive(settings: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide a run's results or its model, but the seed, as args.json has them."""
    flags = plain(settings)
    return {
        name: flags[name] for name in sorted((CHANGE_A_RUN | OF_MODEL) - {"seed"} & flags.keys())
    }


def compare(
    kind: str, ours: Sequence[Mapping[str, float]], published: Mapping[str, float] | None
) -> dict:
    """Mean, spread and difference of the runs' metrics, printed as a table too."""
    keys = list(published or ours[0])
    mean = {key: statistics.fmean(run[key] for run in ours) for key in keys}
    found: dict = {"row": kind, "runs": len(ours), "ours": mean}
    table = {f"ours, {kind}" + f", mean of {len(ours)}" * (len(ours) > 1): mean}
    if len(ours) > 1:
        found["spread"] = {key: statistics.stdev(run[key] for run in ours) for key in keys}
        table["standard deviation"] = found["spread"]
    if published:
        difference = {key: mean[key] - published[key] for key in keys}
        limits = {key: SUM_TOLERANCE if key == "SumR" else TOLERANCE for key in keys}
        outside = [key for key in keys if round(abs(difference[key]), 6) > limits[key]]
        found |= {"published": published, "difference": difference, "tolerance": limits}
        found["within_tolerance"] = not outside
        table = {"published": published} | table | {"difference": difference}
    print(metrics_table(table, keys))
    if published:
        verdict = f"{', '.join(outside)} outside" if outside else "all within"
        print(f"{verdict} the tolerance: {TOLERANCE} points, SumR {SUM_TOLERANCE}")
    return found


def page(row: Row) -> Iterator[dict]:
    for folder, _ in row.runs():
        written, evaluated = folder / "report.html", folder / "eval.jsonl"
        if written.is_file() and written.stat().st_mtime_ns > evaluated.stat().st_mtime_ns:
            print("done before")
        else:
            report.main([str(folder)])
        yield {"page": str(written)}


STEPS: dict[str, Callable[[Row], Iterator[dict]]] = {
    "weights": weights,
    "annotations": annotations,
    "videos": videos,
    "frame store": frame_store,
    "zero-shot": zero_shot,
    "training": training,
    "evaluation": evaluation,
    "comparison": comparison,
    "report": page,
}


# --- what was done


def load(row: Row) -> dict[str, dict[str, list[dict]]]:
    """The results so far: row -> step -> what it found. RunError: they cannot be read."""
    if not row.results.is_file():
        return {}
    try:
        return json.loads(row.results.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{row.results}: not JSON ({error}): remove it") from error


def save(row: Row, step: str, found: list[dict]) -> None:
    """Put in what a step found; other processes may do other rows meanwhile."""
    with (row.folder / f".{RESULTS}.lock").open("a") as guard:
        lock(guard.fileno(), wait=True)
        results = load(row)
        results.setdefault(row.name, {})[step] = found
        results[row.name]["git"] = git_revision()
        write_json(row.results, results)


def once(row: Row, step: str, inputs: Mapping, act: Callable[[], dict]) -> dict:
    """What was found with these inputs before, by any row, or what is found now."""
    for steps in load(row).values():
        for item in steps.get(step, []):
            if item.get("inputs") == inputs:
                print("done before")
                return item
    return {"inputs": dict(inputs)} | act()


def reproduce(row: Row) -> None:
    """All steps of a row.

    DataError, ModelError, OutputError, RunError: one cannot be done.
    """
    row.folder.mkdir(parents=True, exist_ok=True)
    for number, (name, step) in enumerate(STEPS.items(), start=1):
        print(f"[{number}/{len(STEPS)}] {row.name}: {name}", flush=True)
        earlier, found = load(row).get(row.name, {}).get(name, []), []
        for item in step(row):
            found.append(item)
            if earlier[: len(found)] != found:
                save(row, name, found)
        if earlier != found:
            save(row, name, found)
    print(f"results: {row.results}")


def missing(row: Row) -> list[str]:
    """What is missing for a row, and what gets it."""
    found = []
    for what, look in {
        "weights": lambda: find_weights(row.settings.pretrained_clip_name),
        "annotations": row.splits,
        "videos": lambda: find_clips(row),
    }.items():
        try:
            look()
        except USER_ERRORS as error:
            found.append(f"{what}: {str(error).splitlines()[0]}")
            if what == "annotations":
                found.append(f"videos: {row.video_dir}: which are needed, the annotations say")
                break
    try:
        trained = all(finished(row, folder) for folder, _ in row.runs())
        compared = load(row).get(row.name, {}).get("comparison")
        if not (trained and compared):
            found.append(f"{'results' if trained else 'training'}: `{row.command}`")
    except USER_ERRORS as error:
        found.append(f"training: {error}")
    return found


def check(row: Row) -> bool:
    """Print what is missing; whether anything is."""
    found = missing(row)
    print(f"{row.name}: " + ("" if found else "done"), *found, sep="\n  " if found else "")
    return bool(found)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The rows of a split, or of all; a custom split has moments if its annotations have times."""
    rows = []
    for split in DATATYPES[:-1] if args.split == "all" else [args.split]:
        video_dir = read_settings(split, frame_store="").video_dir
        for task, published in PUBLISHED.items():
            settings = read_settings(split, subtask_type=task)
            known = split in published or (split == "custom" and (task == PRVR or timed(settings)))
            if known and args.task in (task, None):
                folder = args.logs or settings.output_dir.parent
                name = settings.output_dir.name
                rows.append(Row(split, task, name, folder, args.seeds, settings, video_dir))
    return rows


def timed(settings: argparse.Namespace) -> bool:
    path = settings.prvr_val_annos
    return path.is_file() and any(query.windows for query in Split.read(path, VAL).queries)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("what", nargs="+", metavar="[check] SPLIT",
        help=f"{', '.join(DATATYPES)} or all; check says what is missing, of all if none is named")
    add("--task", choices=[PRVR, VCMR], help="only this one's row (default: both)")
    add("--seeds", type=int, nargs="+", default=[None], metavar="N",
        help="a run with each of these, compared by their mean (default: one, the published seed)")
    add("--logs", type=Path, metavar="DIR", help=f"for runs and {RESULTS} (default: logs)")
    # fmt: on
    args = parser.parse_args(arguments)
    args.check = args.what[0] == "check"
    splits = (args.what[1:] or ["all"]) if args.check else args.what
    args.split = splits[0]
    if len(splits) > 1 or args.split not in (*DATATYPES, "all"):
        parser.error(f"give one split of {', '.join(DATATYPES)}, or all: not {' '.join(splits)}")
    if args.logs and not args.logs.is_dir():
        parser.error(f"--logs: no such folder: {args.logs}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all done, 1 a row cannot be finished, or `check` found something missing."""
    args = parse_arguments(arguments)
    logging.basicConfig(format="%(message)s")
    stopped = []
    for row in rows_of(args):
        if args.check:
            stopped += [row.name] if check(row) else []
            continue
        try:
            reproduce(row)
        except USER_ERRORS as error:
            print(f"{row.name} cannot be finished: {error}", flush=True)
            stopped.append(row.name)
    if stopped:
        print(f"not done: {', '.join(stopped)}; when that is fixed, the same command continues")
    return int(bool(stopped))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_command(main)
