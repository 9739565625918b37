"""Reads annotation files: one JSON object a line, every line checked before anything is used.

All problems of a file are reported at once, each with its line, the field and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dataloaders import DataError, listed

logger = logging.getLogger("propy.annotations")

TRAIN, VAL = "train", "val"  # names of the two splits of a run

MAX_CAPTION = 10_000  # characters; CLIP reads at most 77 tokens, so a longer text is a mistake
# Seconds: less between two times is rounding; so much between two durations of a video may come of
# writing whole seconds, more cannot.
TIME_TOLERANCE, ROUNDING = 1e-3, 1.0
MAX_SECONDS = 1e15  # what is more was never a time
MAX_NAME = 250  # bytes of a video name: file systems end at 255, ".mp4" included

# What some queries do, for a warning, and what becomes of it.
NEVER_HIT = (
    "have a window that is reversed, without length or after the end of the video, which no "
    "prediction can hit; they stay as they are"
)
OTHER_DURATION = "give their video another duration than its first line, which counts for the video"


@dataclass(frozen=True)
class Query:
    """One caption. Its text is part of `Split.summary`: another field makes another summary."""

    desc_id: str | int  # name of the caption, unique within its file
    desc: str
    vid_name: str  # its file is <video_dir>/<vid_name>.mp4
    duration: float  # seconds of the video, according to this line
    windows: tuple[tuple[float, float], ...] | None  # (start, end) in seconds; None: not known
    query_type: str | None = None  # TVR's: about the video (v), the subtitles (t) or both (vt)


@dataclass(frozen=True)
class Video:
    """One video of a split: its name and its duration in seconds."""

    vid_name: str
    duration: float


def read_videos(paths: Iterable[Path]) -> list[Video]:
    """The videos of several annotation files together. DataError: see `read_annotations`."""
    return corpus_videos(query for path in paths for query in read_annotations(path))


def corpus_videos(queries: Iterable[Query]) -> list[Video]:
    """The videos in the order of their first appearance, with the duration of that line."""
    videos: dict[str, Video] = {}
    for query in queries:
        videos.setdefault(query.vid_name, Video(query.vid_name, query.duration))
    return list(videos.values())


@dataclass(frozen=True)
class Split:
    """One split of a data set: its queries, in the order of the annotations, and their videos."""

    name: str  # what records and lists call it: TRAIN or VAL
    queries: Sequence[Query]  # T captions
    path: Path | None = None  # the annotation file, for messages

    @classmethod
    def read(cls, path: str | Path, name: str) -> Split:
        """The split in an annotation file. DataError: see `read_annotations`."""
        return cls(name, read_annotations(path), Path(path))

    @cached_property
    def videos(self) -> list[Video]:
        """V videos, in the order of their first appearance, with the duration of that line."""
        return corpus_videos(self.queries)

    @cached_property
    def target(self) -> Tensor:
        """int64 [T]: the column of each query's video."""
        column = {video.vid_name: index for index, video in enumerate(self.videos)}
        return torch.tensor([column[query.vid_name] for query in self.queries], dtype=torch.int64)

    def without(self, names: Collection[str]) -> Split:
        """The split without these videos and their queries."""
        names = set(names)
        return replace(self, queries=[q for q in self.queries if q.vid_name not in names])

    def summary(self) -> str:
        """Numbers of queries and videos, and the beginning of a hash that tells contents apart."""
        content = repr(list(self.queries)).encode("utf-8", "replace")
        digest = hashlib.sha256(content).hexdigest()[:12]
        return f"{len(self.queries):,} queries of {len(self.videos):,} videos, {digest}"


def read_annotations(path: str | Path, called: Path | None = None) -> list[Query]:
    """Reads an annotation file (UTF-8 JSONL) in the order of its lines.

    Messages call it by `called`, if that is where it will be.

    A line is ``{"vid_name": str, "desc_id": str|int, "desc": str, "duration": seconds, "ts": [s, e]
    or [[s, e], …], "type": str}``; ``ts`` and ``type`` may be absent, further fields are ignored.
    A byte order mark, CRLF and blank lines do no harm. Times past the duration stay as they are:
    the public data sets have many. A window that no prediction can hit stays too, as there are a
    few in the public training files, but a warning lists them: one whose end lies before its start,
    of no length, or all after the end of the video. So does one for durations of a video that
    differ a little.

    DataError: the file cannot be read, it is a data set's original file, or lines are wrong: all
    problems, up to a limit, as ``file:line: field: what: remedy``.
    """
    content = _read_bytes(Path(path))
    path = called or Path(path)
    queries: list[Query] = []
    problems: list[str] = []
    odd: dict[str, list[str]] = defaultdict(list)  # what is warned of, and where
    line_of_id: dict[str, int] = {}
    duration_of: dict[str, tuple[float, int]] = {}  # a video's first, and its line
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        query, wrong = _parse_line(line)
        if query is not None:
            # The exported results name a query by the text of its id, so 7 and "7" are the same.
            first = line_of_id.setdefault(str(query.desc_id), number)
            if first != number:
                wrong.append(f"desc_id: {query.desc_id!r} is also on line {first}: make it unique")
            if any(end <= start or start >= query.duration for start, end in query.windows or ()):
                odd[NEVER_HIT].append(f"{path}:{number}")
            known, first = duration_of.setdefault(query.vid_name, (query.duration, number))
            difference = abs(query.duration - known)
            if difference > TIME_TOLERANCE:
                what = f"{_show(query.vid_name)} has {known:g} s on line {first}"
                if difference > ROUNDING + TIME_TOLERANCE:
                    wrong.append(f"duration: {query.duration:g} s, but {what}: make them equal")
                else:
                    odd[OTHER_DURATION].append(f"{path}:{number}: {query.duration:g} s, but {what}")
            queries.append(query)
        problems += [f"{path}:{number}: {what}" for what in wrong]
    if problems:
        if release := next((name for name in RELEASES if re.match(RELEASES[name], content)), None):
            raise DataError(
                f"{path}: not converted yet, this is a file of {release} as it was released: "
                f".venv/bin/python -m scripts.data.convert_annotations {release} {path.parent}"
            )
        if re.match(TVR_TEST, content):
            raise DataError(
                f"{path}: TVR's public test file, which names no videos: what is evaluated is the "
                "val split, tvr_val_release.jsonl"
            )
        raise DataError(listed(problems))
    if not queries:
        raise DataError(f"{path}: no annotations in it: one JSON object a line is expected")
    for what, places in odd.items():
        logger.warning("%d of %d queries %s:\n%s", len(places), len(queries), what, listed(places))
    return queries


# How original files begin; TVR's have our form.
RELEASES = {
    "activitynet": rb'\s*\{\s*"[^"]*"\s*:\s*\{\s*"(duration|timestamps|sentences)"\s*:',
    "charades": rb"\w+ [\d.]+ [\d.]+ ?##|id,([^\n]*,)?length\b",
    "qvhighlights": rb'\s*\{(?=[^\n]*"qid"\s*:)[^\n]*"vid"\s*:',
}
TVR_TEST = rb'\{"desc": "[^\n]*", "desc_id": \d+\}\r?(\n|$)'


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file: annotations/README.md says where from")
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_line(line: bytes) -> tuple[Query | None, list[str]]:
    """The query of a line, or None and what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, [f"line: byte {error.start + 1} is not UTF-8: save the file as UTF-8"]
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg}, column {error.colno})"
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets without end
        what = "not an annotation"
    else:
        if isinstance(record, dict):
            return _build_query(record)
        what = f"{_show(record)} is not a JSON object"
    return None, [f"line: {what}: write one JSON object a line"]


def _build_query(record: dict) -> tuple[Query | None, list[str]]:
    values, problems = {}, []
    for field, check in CHECKS.items():
        if field not in record and field not in OPTIONAL:
            problems.append(f"{field}: missing: every line needs {', '.join(REQUIRED)}")
            continue
        try:
            values[field] = check(record.get(field))
        except ValueError as error:
            problems.append(f"{field}: {error}")
    if problems:
        return None, problems
    values["windows"] = values.pop("ts")
    values["query_type"] = values.pop("type")
    return Query(**values), []


# HDF5 cannot hold NUL, XML its like, UTF-8 half a surrogate pair. Captions may have what all can:
# the public ones have line breaks, and texts that were read in a wrong encoding 128 to 159.
REFUSED = {chr(code) for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000))}
IN_CAPTIONS = frozenset("\t\n\r") | {chr(code) for code in range(128, 160)}


def _check_text(value: object, allowed: frozenset[str] = frozenset()) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_show(value)} is not a text: put it in double quotes")
    if refused := (set(value) & REFUSED) - allowed:
        shown = ", ".join(map(repr, sorted(refused)))
        raise ValueError(f"{_show(value)} holds {shown}, which cannot be stored: remove it")
    return value


def _check_name(value: object) -> str:
    name = _check_text(value)
    if not name.strip():
        raise ValueError("it is empty: name the video file, without its ending")
    if "/" in name or name in (".", ".."):
        remedy = "name a file of the video folder itself, without its ending"
        raise ValueError(f"{_show(name)} names a folder: {remedy}")
    if len(name.encode("utf-8")) > MAX_NAME:
        raise ValueError(f"{_show(name)} is longer than {MAX_NAME} bytes: shorten the file name")
    return name


def _check_id(value: object) -> str | int:
    if type(value) is int:
        return value
    if value == "":
        raise ValueError("it is empty: give the query a name of its own")
    return _check_text(value)


def _check_caption(value: object) -> str:
    caption = _check_text(value, IN_CAPTIONS)
    if not caption.strip():
        raise ValueError("the caption is empty: write one or remove the line")
    if len(caption) > MAX_CAPTION:
        raise ValueError(f"the caption has {len(caption)} characters: {MAX_CAPTION} is the limit")
    return caption


def _check_seconds(value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{_show(value)} is not a number: write seconds, without quotes")
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"{_show(value)} is not a time: write seconds from 0 on")
    return float(value)


def _check_duration(value: object) -> float:
    duration = _check_seconds(value)
    if duration == 0:
        raise ValueError("it is 0: write the length of the video in seconds")
    return duration


def _check_windows(value: object) -> tuple[tuple[float, float], ...] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{_show(value)} is no list: write [start, end] or [[start, end], …]")
    windows = value if isinstance(value[0], list) else [value]
    for window in windows:
        if not isinstance(window, list) or len(window) != 2:
            raise ValueError(f"{_show(window)} is no window: write [start, end] in seconds")
    return tuple((_check_seconds(start), _check_seconds(end)) for start, end in windows)


CHECKS = {
    "vid_name": _check_name,
    "desc_id": _check_id,
    "desc": _check_caption,
    "duration": _check_duration,
    "ts": _check_windows,
    "type": lambda value: None if value is None else _check_text(value),
}
OPTIONAL = ("ts", "type")
REQUIRED = tuple(field for field in CHECKS if field not in OPTIONAL)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
