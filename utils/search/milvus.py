"""An index on a Milvus server or cluster: the store for more events than one machine can search.

``http://host:19530`` is Milvus by pymilvus, ``http://host:19530#name`` one of several indexes
there; $MILVUS_TOKEN (``user:password``) is given to servers that ask. Events have a FLAT index: the
cluster computes all products, and results are those of the embedded store.
"""

from __future__ import annotations

import json
import os
import string
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urldefrag

import numpy as np

from utils import SearchError
from utils.search.index import (
    COLUMNS,
    FORMAT,
    INSTALL,
    ORPHANED_AFTER,
    Entry,
    Events,
    check_unchanged,
    current,
    token_seconds,
)

MOST_ROWS = 16384  # of one answer of Milvus, by its own limit
INSERTED = 2000  # events in one message, which may have 64 MB
WINDOWS_READ = 300  # windows of a video in one answer
NAME, FACTS, PATIENCE = 64, 60_000, 30.0  # bytes of an id and of a row's JSON; seconds
DTYPES = dict(zip(COLUMNS, (object, "i4", "i2", "i1", "f4", "f4"), strict=True))
# Rows of the collection of videos that are none.
MODEL, VERSION, PENDING = "model", "version", "pending"
KEY_LETTERS = f"{string.ascii_lowercase}{string.digits}-"


class MilvusIndex:
    """Two collections, as LanceIndex has tables. A row of JSON for each video; besides, the model,
    a version that every change sets, and for every video under way a row by which what a killed
    indexer left is found."""

    most_nearest = MOST_ROWS

    def __init__(self, uri: str) -> None:
        try:
            from pymilvus import MilvusClient, MilvusException
        except ImportError as error:
            raise SearchError(f"{uri}: {INSTALL}requirements-milvus.txt` ({error})") from None
        self.uri, self._errors = uri, MilvusException
        address, name = urldefrag(uri)
        self._events, self._videos = f"{name or 'propy'}_events", f"{name or 'propy'}_videos"
        try:
            token = os.environ.get("MILVUS_TOKEN", "")
            self._client = MilvusClient(address, token=token, timeout=PATIENCE)
        except MilvusException as error:
            raise SearchError(f"{uri}: no Milvus answers there: {error.message}") from error
        self.model = None
        self._open()

    def create(self, model: dict, replace: bool = False) -> None:
        for name in (self._videos, self._events) if replace else ():
            self._call("drop_collection", name)
        self._collect(self._events, {
            "video": NAME, "window": "INT32", "event": "INT16", "level": "INT8", "start": "FLOAT",
            "end": "FLOAT",
        }, model["width"])  # fmt: skip
        self._collect(self._videos, {"facts": FACTS}, 2)
        if not self._rows([MODEL]):
            self._write(MODEL, {"format": FORMAT, "model": model})
            self._set_version()
        self._open()

    def version(self) -> int:
        (facts,) = self._rows([VERSION])
        return facts["version"]

    def videos(self) -> list[Entry]:
        check_unchanged(self.uri, self.model, self._read_model())
        return current(self._entries())[0]

    def add(self, entry: Entry, events: Events | None, replaced: Sequence[Entry] = ()) -> None:
        check_unchanged(self.uri, self.model, self._read_model())
        pending = f"{PENDING}-{entry.id}"
        if events is not None:
            self._write(pending, {"id": entry.id})
            rows = list(_rows_of(events))
            for first in range(0, len(rows), INSERTED):
                self._call("upsert", self._events, rows[first : first + INSERTED])
        self._write(entry.row, asdict(entry))
        self._delete(self._videos, "key", [pending])
        self._remove(replaced, keep={entry.id})
        self._set_version()

    def remove(self, entries: Sequence[Entry]) -> None:
        self._remove(entries)
        self._set_version()

    def nearest(
        self, query: np.ndarray, limit: int, only: Collection[str] | None = None,
        without: Collection[str] = (), approximate: bool = False,
    ) -> Events:  # fmt: skip
        if approximate:
            raise SearchError(f"{self.uri}: on Milvus every search is exact, without --approximate")
        clauses = [f"video not in {json.dumps(list(without))}"] if without else []
        if only is not None:
            clauses.append(f"video in {json.dumps(list(only) or [''])}")
        (found,) = self._call(
            "search", self._events, [query.tolist()], anns_field="vector", limit=limit,
            filter=" and ".join(clauses), output_fields=COLUMNS, consistency_level="Strong",
            search_params={"metric_type": "IP"},
        )  # fmt: skip
        scores = np.array([row["distance"] for row in found], np.float32)
        return _events_of([row["entity"] for row in found], scores=scores)

    def vectors(self, only: Collection[str] | None = None) -> Iterator[Events]:
        for entry in self.videos():
            if not entry.windows or (only is not None and entry.id not in only):
                continue
            for first in range(0, entry.windows, WINDOWS_READ):
                part = f"window >= {first} and window < {first + WINDOWS_READ}"
                rows = self._query(
                    self._events, f'video == "{entry.id}" and {part}', [*COLUMNS, "vector"]
                )
                rows.sort(key=lambda row: (row["window"], row["event"]))
                yield _events_of(rows, vectors=np.array([row["vector"] for row in rows], "f4"))

    def optimize(self, approximate: bool = False) -> None:
        if approximate:
            raise SearchError(f"{self.uri}: on Milvus every search is exact, without --approximate")
        counting, replaced = current(self._entries())
        self._remove(replaced, keep={entry.id for entry in counting})
        for token in self._keys(PENDING):
            if time.time() - token_seconds(token.split("-")[1]) > ORPHANED_AFTER:
                self._delete(self._events, "video", [token.split("-")[1]])
                self._delete(self._videos, "key", [token])
        for name in (self._events, self._videos):
            self._call("flush", name)

    def _remove(self, entries: Sequence[Entry], keep: Collection[str] = ()) -> None:
        self._delete(self._videos, "key", [entry.row for entry in entries])
        ids = {entry.id for entry in entries if entry.windows} - set(keep)
        self._delete(self._events, "video", sorted(ids))

    def _collect(self, name: str, columns: dict[str, Any], width: int) -> None:
        """A collection of such columns, a key, and vectors, unless it is there."""
        from pymilvus import DataType

        if self._call("has_collection", name):
            return
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=NAME)
        for column, kind in columns.items():
            if isinstance(kind, int):
                schema.add_field(column, DataType.VARCHAR, max_length=kind)
            else:
                schema.add_field(column, DataType[kind])
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        self._call("create_collection", name, schema=schema, index_params=index,
                   consistency_level="Strong")  # fmt: skip

    def _open(self) -> None:
        if not self._call("has_collection", self._videos):
            return
        for name in (self._events, self._videos):
            self._call("load_collection", name)
        self.model = self._read_model()

    def _read_model(self) -> dict | None:
        rows = self._rows([MODEL])
        if rows and rows[0]["format"] != FORMAT:
            raise SearchError(f"{self.uri}: its format is another version's: --rebuild")
        return rows[0]["model"] if rows else None

    def _entries(self) -> list[Entry]:
        keys = [key for key in self._keys() if not key.startswith((MODEL, VERSION, PENDING))]
        return [
            Entry(**facts)
            for first in range(0, len(keys), INSERTED)
            for facts in self._rows(keys[first : first + INSERTED])
        ]

    def _keys(self, prefix: str = "") -> list[str]:
        """Of all rows of videos that begin so. An answer that is full may lack any: then by the
        next character."""
        page = self._query(self._videos, f'key like "{prefix}%"', ["key"])
        if len(page) < MOST_ROWS:
            return [row["key"] for row in page]
        return [key for letter in KEY_LETTERS for key in self._keys(prefix + letter)]

    def _rows(self, keys: Sequence[str]) -> list[dict]:
        found = self._query(self._videos, f"key in {json.dumps(list(keys))}", ["facts"])
        return [json.loads(row["facts"]) for row in found]

    def _query(self, name: str, clause: str, columns: list[str]) -> list[dict]:
        return list(self._call(
            "query", name, filter=clause, output_fields=columns, limit=MOST_ROWS,
            consistency_level="Strong",
        ))  # fmt: skip

    def _write(self, key: str, facts: dict) -> None:
        row = {"key": key, "facts": json.dumps(facts), "vector": [0.0, 0.0]}
        if len(row["facts"]) > FACTS:
            raise SearchError(f"{facts.get('path', key)!r}: its name is too long for Milvus")
        self._call("upsert", self._videos, [row])

    def _set_version(self) -> None:
        self._write(VERSION, {"version": time.time_ns()})

    def _delete(self, name: str, column: str, values: Sequence[str]) -> None:
        if values:
            self._call("delete", name, filter=f"{column} in {json.dumps(list(values))}")

    def _call(self, name: str, *arguments: Any, **settings: Any) -> Any:
        try:
            return getattr(self._client, name)(*arguments, **settings)
        except self._errors as error:
            raise SearchError(f"{self.uri}: Milvus: {error.message}") from error


def _rows_of(events: Events) -> Iterator[dict]:
    columns = [getattr(events, name).tolist() for name in COLUMNS]
    for *values, vector in zip(*columns, events.vectors.tolist(), strict=True):
        row = dict(zip(COLUMNS, values, strict=True))
        key = f"{row['video']}-{row['window']:06x}-{row['event']:04x}"
        yield {"key": key, "vector": vector, **row}


def _events_of(rows: Iterable[dict], **more: np.ndarray) -> Events:
    rows = list(rows)
    columns = {name: np.array([row[name] for row in rows], dtype) for name, dtype in DTYPES.items()}
    return Events(**columns, **more)
