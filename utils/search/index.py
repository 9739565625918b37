"""Where an index is kept: one row per event, and one row per video that says which events count.

A video is added in two steps, its events first and its row last, and what has no row is not read.
So a killed indexer leaves a video whole or not at all, and a reader sees it replaced in one step.
`Storage` is what search asks of a store: utils.search.lance is an embedded one, in a folder or in
an object store; utils.search.milvus is over a cluster.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from utils import SearchError
from utils.search.hits import Video

FORMAT = 1
# Events without a video are another indexer's, who is about to write its row, or were left by one
# that was killed. After so long they are the latter.
ORPHANED_AFTER = 24 * 3600  # seconds
INSTALL = "a package is missing: `.venv/bin/python -m pip install -r "


@dataclass(frozen=True)
class Entry(Video):
    """A video with what the index needs to know of it besides.

    Attributes:
        row: which of the rows for a path, or for an id, was written last.
        root: the folder that was indexed.
        digest: of the file's size, head and tail.
        windows: how many it was cut into.
    """

    row: str = ""
    root: str = ""
    digest: str = ""
    windows: int = 0


@dataclass(frozen=True)
class Events:
    """Rows of events, one array for each column; `vectors` [n, D] of length 1, or `scores` [n]."""

    video: np.ndarray  # ids
    window: np.ndarray
    event: np.ndarray  # its number in the pyramid
    level: np.ndarray
    start: np.ndarray  # seconds
    end: np.ndarray
    vectors: np.ndarray | None = None
    scores: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.event)

    def take(self, which: Any) -> Events:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Events(**{k: None if v is None else v[which] for k, v in columns.items()})


COLUMNS = [f.name for f in fields(Events)][:6]


class Storage(Protocol):
    """What search asks of a store; ids and rows are hexadecimal, so filters need no quoting."""

    uri: str
    most_nearest: int | None  # rows that `nearest` can give
    model: dict | None  # `create`'s; None: there is no index yet

    def create(self, model: dict, replace: bool = False) -> None:
        """Make an empty index for a model unless there is one, or in its place."""

    def version(self) -> int:
        """Changes whenever the videos do; what is read next is at least as new."""

    def videos(self) -> list[Entry]:
        """Those that count, without the rows that later ones replace."""

    def add(self, entry: Entry, events: Events | None, replaced: Sequence[Entry] = ()) -> None:
        """Add a video, its row last, then remove what it replaces. Without events: a row only."""

    def remove(self, entries: Sequence[Entry]) -> None:
        """Remove videos, their rows first."""

    def nearest(
        self, query: np.ndarray, limit: int, only: Collection[str] | None = None,
        without: Collection[str] = (), approximate: bool = False,
    ) -> Events:  # fmt: skip
        """The events with the largest product with a vector, best first, of some videos."""

    def vectors(self, only: Collection[str] | None = None) -> Iterator[Events]:
        """All events, or those of some videos, in pieces."""

    def optimize(self, approximate: bool = False) -> None:
        """Make it smaller and quicker; `approximate`: also build the index for `nearest`."""


def new_token() -> str:
    """Hexadecimal, unique, and in the order of time."""
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


def token_seconds(token: str) -> float:
    """When `new_token` made it, in seconds since 1970."""
    return int(token[:16], 16) / 1e9


def current(entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The rows that count, and those that they replace: the last of a path and of an id counts."""
    paths, ids, counting, replaced = set(), set(), [], []
    for entry in sorted(entries, key=lambda entry: entry.row, reverse=True):
        new = entry.path not in paths and entry.id not in ids
        (counting if new else replaced).append(entry)
        paths.add(entry.path)
        ids.add(entry.id)
    return sorted(counting, key=lambda entry: (entry.root, entry.name)), replaced


def check_unchanged(uri: str, opened: dict, now: dict | None) -> None:
    """SearchError: another process has replaced the index by one of another model than it was
    opened with, so that sentences and events of now do not compare."""
    if now != opened:
        raise SearchError(f"{uri}: it is another model's by now: start this program again")
