"""Turns the public annotation files of a data set into the lines the programs read.

    .venv/bin/python -m scripts.data.convert_annotations activitynet ~/Downloads/captions

writes annotations/activitynet/{train,val}.jsonl. The files' names, sources, counts and checksums
are in annotations/README.md. The order and the captions of the source are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from dataloaders import DataError
from dataloaders.annotations import TIME_TOLERANCE, corpus_videos, read_annotations
from utils.command import Parser, folder, run_command
from utils.evaluation.published import SPLIT_SIZES
from utils.files import commit, temporary_sibling

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def as_released(place: str | Path) -> Iterator[None]:
    """What is not there, or not what it should be, as a DataError that names the place."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        reason = (f"no field {error}" if isinstance(error, KeyError) else str(error))[:300]
        raise DataError(
            f"{str(place)[:500]}: not in the form in which it was released ({reason}): get the "
            "file again"
        ) from error


def activitynet_records(file: Path) -> Iterator[dict]:
    """ActivityNet Captions: ``{video: {"duration", "timestamps": [[s, e], …], "sentences"}}``.

    The second annotator's ids, of val_2.json, differ from the first's, to stand in one file.
    """
    annotator = "enc2" if file.name == "val_2.json" else "enc"
    with as_released(file):
        videos = json.loads(file.read_bytes()).items()
    for name, video in videos:
        with as_released(f"{file}: {name}"):
            pairs = list(zip(video["timestamps"], video["sentences"], strict=True))
            duration = video["duration"]
        for number, (window, sentence) in enumerate(pairs):
            named = {"vid_name": name, "desc_id": f"{name}#{annotator}#{number}"}
            yield named | {"desc": sentence, "duration": duration, "ts": window}


def charades_records(file: Path) -> Iterator[dict]:
    """Charades-STA: lines ``VIDEO start end##caption``, durations from the Charades tables."""
    durations = charades_durations(file.parent)
    counts: Counter[str] = Counter()
    for place, line in _lines(file):
        with as_released(place):
            head, caption = line.split("##", 1)
            name, start, end = head.split()
            window = [float(start), float(end)]
        if name not in durations:
            raise DataError(
                f"{place}: no length of video {name[:60]} in Charades_v1_train.csv or _test.csv: "
                f"put both into {file.parent}"
            )
        named = {"vid_name": name, "desc_id": f"{name}#enc#{counts[name]}"}
        yield named | {"desc": caption, "duration": durations[name], "ts": window}
        counts[name] += 1


def charades_durations(folder: Path) -> dict[str, float]:
    """Seconds of every video, from the column `length` of the Charades tables in a folder."""
    durations = {}
    for file in sorted(folder.glob("Charades_v1_*.csv")):
        with file.open(newline="", encoding="utf-8") as table, as_released(file):
            rows = csv.DictReader(table)
            for row in rows:
                with as_released(f"{file}:{rows.line_num}"):
                    durations[row["id"]] = float(row["length"])
    return durations


def json_records(file: Path, names: dict[str, str], optional: str = "") -> Iterator[dict]:
    """JSON lines of QVHighlights or TVR; `names` are theirs of our fields, one may be optional."""
    for place, line in _lines(file):
        with as_released(place):
            source = json.loads(line)
            record = {a: source[b] for a, b in names.items() if b in source or a != optional}
        yield record


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines(): captions may hold other characters that it takes for line ends.
    with as_released(file):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file}:{number}", line.removesuffix("\r")


# The original files of each split, and its standard numbers of videos and queries where they are
# known. The paper's splits are the original releases whole.
SPLITS: dict[str, dict[str, tuple[tuple[str, ...], tuple[int, int] | None]]] = {
    "activitynet": {
        "train": (("train.json",), SPLIT_SIZES["activitynet"]["train"]),
        "val": (("val_1.json",), SPLIT_SIZES["activitynet"]["val"]),
        "val_2": (("val_2.json",), None),
        "val_1_2": (("val_1.json", "val_2.json"), None),
    },
    "charades": {
        "train": (("charades_sta_train.txt",), SPLIT_SIZES["charades"]["train"]),
        "test": (("charades_sta_test.txt",), SPLIT_SIZES["charades"]["val"]),
    },
    "qvhighlights": {
        "train": (("highlight_train_release.jsonl",), SPLIT_SIZES["qvhighlights_val"]["train"]),
        "val": (("highlight_val_release.jsonl",), SPLIT_SIZES["qvhighlights_val"]["val"]),
        "test": (("highlight_test_release.jsonl",), SPLIT_SIZES["qvhighlights_test"]["val"]),
    },
    "tvr": {
        "train": (("tvr_train_release.jsonl",), SPLIT_SIZES["tvr"]["train"]),
        "val": (("tvr_val_release.jsonl",), SPLIT_SIZES["tvr"]["val"]),
    },
}
# Of the two annotators of ActivityNet the second, whom the paper does not use: need not be there.
OPTIONAL = {"val_2.json"}
# The same queries, published later with their windows: takes the first one's place if it is there.
BETTER = {"highlight_test_release.jsonl": "highlight_test_with_gt.jsonl"}
QVHIGHLIGHTS = {
    "vid_name": "vid", "desc_id": "qid", "desc": "query", "duration": "duration",
    "ts": "relevant_windows",
}  # fmt: skip
TVR = {name: name for name in (*QVHIGHLIGHTS, "type")}  # type: what a query is about
READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    "activitynet": activitynet_records,
    "charades": charades_records,
    "qvhighlights": partial(json_records, names=QVHIGHLIGHTS, optional="ts"),  # of its test split
    "tvr": partial(json_records, names=TVR),
}


def order_windows(record: dict) -> tuple[int, int]:
    """Put reversed windows of a record in order, in place.

    Returns how many were reversed, and how many reach beyond the duration, which stay as they are.
    """
    windows = record.get("ts") or []
    windows = windows if windows and isinstance(windows[0], list) else [windows] if windows else []
    reversed_windows = [window for window in windows if window[1] < window[0]]
    for window in reversed_windows:
        window.reverse()
    limit = record["duration"] + TIME_TOLERANCE
    return len(reversed_windows), sum(window[1] > limit for window in windows)


def convert(
    sources: Sequence[Path], output: Path, reader: Callable[[Path], Iterator[dict]]
) -> dict:
    """Convert one split; `output` appears only when it is complete and can be read.

    A video has the duration that the first source with it says.

    Returns the numbers of queries and videos, of windows reversed and reaching beyond the duration,
    of videos with two durations, and the sha256 of `output`.

    DataError: the source is not what it should be; names the place.
    """
    counts = Counter(reversed=0, beyond=0)
    lines = []
    durations: dict[str, float] = {}
    other_durations = set()
    for source in sources:
        known = dict(durations)  # of the sources before it
        for record in reader(source):
            name, duration = record["vid_name"], record["duration"]
            with as_released(f"{source}: query {record['desc_id']}"):
                if name in known:
                    record["duration"] = known[name]
                    if abs(duration - known[name]) > TIME_TOLERANCE:
                        other_durations.add(name)
                swapped, beyond = order_windows(record)
            durations[name] = record["duration"]
            counts.update(reversed=swapped, beyond=beyond)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(output) as part:
        part.write_bytes(content)
        try:
            queries = read_annotations(part, output)
        except DataError as error:
            shown = " and ".join(map(str, sources))
            raise DataError(f"{shown}: {str(error).replace(str(output), 'line')}") from error
        commit(part, output)
    videos, sha256 = len(corpus_videos(queries)), hashlib.sha256(content).hexdigest()
    counts["other_durations"] = len(other_durations)
    return {"videos": videos, "queries": len(queries), "sha256": sha256, **counts}


def describe(result: dict, published: tuple[int, int] | None) -> str:
    """What came out of a split, for the terminal."""
    text = f"{result['queries']} queries, {result['videos']} videos"
    if (result["videos"], result["queries"]) == published:
        text += ", as published"
    elif published:
        text += f"\n  WARNING: the published split has {published[1]} and {published[0]}"
    if result["reversed"]:
        text += f"\n  {result['reversed']} windows ended before they started: put in order"
    if result["beyond"]:
        text += f"\n  {result['beyond']} windows reach beyond the duration: left as they are"
    if result["other_durations"]:
        text += f"\n  {result['other_durations']} videos have two durations: the first's is taken"
    return f"{text}\n  sha256 {result['sha256']}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all splits found and converted, 1 one could not be, 2 wrong use."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=SPLITS, help="which data set")
    parser.add_argument("source", type=folder, help="folder that holds its original files")
    parser.add_argument("--output_dir", type=Path, metavar="DIR",
        help="where <split>.jsonl goes (default: annotations/<dataset>)")  # fmt: skip
    args = parser.parse_args(arguments)
    output_dir = args.output_dir or ROOT / "annotations" / args.dataset
    failed = False
    for name, (files, published) in SPLITS[args.dataset].items():
        sources, output = [args.source / file for file in files], output_dir / f"{name}.jsonl"
        for index, file in enumerate(files):
            if file in BETTER and (args.source / BETTER[file]).is_file():
                sources[index] = args.source / BETTER[file]
        absent = [source for source in sources if not source.is_file()]
        if any(source.name in OPTIONAL for source in absent):
            continue
        try:
            if absent:
                raise DataError(f"no {absent[0]}: see annotations/README.md for its source")
            result = convert(sources, output, READERS[args.dataset])
            made_of = " and ".join(source.name for source in sources)
            print(f"{output}: {describe(result, published)}\n  made of {made_of}")
        except (DataError, OSError) as error:
            print(f"{args.dataset} {name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    run_command(main)
