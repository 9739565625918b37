"""An index in a folder or an object store, by LanceDB: embedded, with nothing to set up.

Readers see whole versions of its tables, so that one process searches while others index.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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

if TYPE_CHECKING:
    import lancedb
    import pyarrow as pa

BATCH_ROWS = 2**14  # of what is read at once: 32 MiB of 512 float32
READERS = timedelta(minutes=10)  # so long old versions stay for those who read them
ATTEMPTS = 20  # to change a table that another process changes

T = TypeVar("T")


class LanceIndex:
    """A LanceDB of three tables: ``model`` (one row), ``videos`` and ``events``."""

    most_nearest = None

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._tables: dict[str, lancedb.table.Table] = {}
        self.model = None
        if "://" in uri or Path(uri).is_dir():
            self._connect()
            self._open()

    def create(self, model: dict, replace: bool = False) -> None:
        import pyarrow as pa

        self._connect()
        for name in ("model", "videos", "events") if replace else ():  # without model: no index
            self._db.drop_table(name, ignore_missing=True)
        kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
        videos = [(field.name, kinds[field.type]) for field in fields(Entry)]
        schemas = {"events": event_schema(model["width"]), "videos": pa.schema(videos)}
        for name, schema in schemas.items():
            self._db.create_table(name, schema=schema, exist_ok=True)
        row = [{"format": FORMAT, "model": json.dumps(model)}]
        with contextlib.suppress(ValueError):  # another process was quicker
            self._db.create_table("model", row)
        self._open()

    def version(self) -> int:
        return self._latest("videos").version

    def videos(self) -> list[Entry]:
        check_unchanged(self.uri, self.model, self._read_model())
        self._open_tables()  # they may have been replaced, for the same model
        return current(self._rows())[0]

    def add(self, entry: Entry, events: Events | None, replaced: Sequence[Entry] = ()) -> None:
        check_unchanged(self.uri, self.model, self._read_model())
        if events is not None:
            rows = event_table(events)
            self._change("events", lambda table: table.add(rows))
        self._change("videos", lambda table: table.add([asdict(entry)]))
        self._remove(replaced, keep={entry.id})

    def remove(self, entries: Sequence[Entry]) -> None:
        self._remove(entries)

    def nearest(
        self, query: np.ndarray, limit: int, only: Collection[str] | None = None,
        without: Collection[str] = (), approximate: bool = False,
    ) -> Events:  # fmt: skip
        table = self._latest("events")
        found = table.search(query, vector_column_name="vector").distance_type("dot").limit(limit)
        found = found.select([*COLUMNS, "_distance"])
        if not approximate:
            found = found.bypass_vector_index()
        elif not table.list_indices():
            raise SearchError(f"{self.uri}: it has no approximate index: make it with `optimize "
                              "--approximate`")  # fmt: skip
        clauses = [f"video NOT IN ({_listed(without)})"] if without else []
        if only is not None:
            clauses.append(f"video IN ({_listed(only)})")
        if clauses:
            found = found.where(" AND ".join(clauses))
        rows = found.to_arrow()
        return _events(rows, scores=1 - rows["_distance"].to_numpy())

    def vectors(self, only: Collection[str] | None = None) -> Iterator[Events]:
        import pyarrow as pa

        query = self._latest("events").search().select([*COLUMNS, "vector"])
        if only is not None:
            query = query.where(f"video IN ({_listed(only)})")
        for batch in query.to_batches(BATCH_ROWS):
            vectors = batch["vector"].flatten().to_numpy()
            rows = pa.Table.from_batches([batch])
            yield _events(rows, vectors=vectors.reshape(len(rows), -1))

    def optimize(self, approximate: bool = False) -> None:
        counting, replaced = current(self._rows())
        self._remove(replaced, keep={entry.id for entry in counting})
        rows = sum(entry.windows for entry in counting) * self.model["events"]
        if self._latest("events").count_rows() != rows:
            self._remove_orphans({entry.id for entry in counting})
        if approximate:
            from lancedb.index import HnswSq

            kind = HnswSq(distance_type="dot")
            self._change("events", lambda table: table.create_index("vector", config=kind))
        for name in ("events", "videos"):
            self._change(name, lambda table: table.optimize(cleanup_older_than=READERS))

    def _remove(self, entries: Sequence[Entry], keep: Collection[str] = ()) -> None:
        """Rows first; of events, those of ids that no other row has."""
        if not entries:
            return
        rows = _listed(entry.row for entry in entries)
        self._change("videos", lambda table: table.delete(f"row IN ({rows})"))
        if ids := {entry.id for entry in entries if entry.windows} - set(keep):
            self._change("events", lambda table: table.delete(f"video IN ({_listed(ids)})"))

    def _remove_orphans(self, known: set[str]) -> None:
        found: set[str] = set()
        for batch in self._latest("events").search().select(["video"]).to_batches(BATCH_ROWS):
            found.update(batch["video"].unique().to_pylist())
        old = {x for x in found - known if time.time() - token_seconds(x) > ORPHANED_AFTER}
        if old:
            self._change("events", lambda table: table.delete(f"video IN ({_listed(old)})"))

    def _rows(self) -> list[Entry]:
        return [Entry(**row) for row in self._latest("videos").to_arrow().to_pylist()]

    def _change(self, name: str, act: Callable[[Any], T]) -> T:
        """Change a table; where another process has changed what this would, once more."""
        for attempt in range(ATTEMPTS):
            try:
                return act(self._latest(name))
            except SearchError:
                raise
            except Exception as error:  # RuntimeError, OSError, ValueError: LanceDB has no other
                if "conflict" not in str(error).lower() or attempt == ATTEMPTS - 1:
                    raise SearchError(f"{self.uri}: cannot be changed: {_first(error)}") from error
                time.sleep(0.05 * (attempt + 1))
        raise AssertionError

    def _latest(self, name: str) -> lancedb.table.Table:
        with self._refused("cannot be read"):
            self._tables[name].checkout_latest()
        return self._tables[name]

    def _connect(self) -> None:
        try:
            import lancedb
        except ImportError as error:
            raise SearchError(f"{self.uri}: {INSTALL}requirements-search.txt` ({error})") from None
        with self._refused("cannot be opened"):
            self._db = lancedb.connect(self.uri)

    def _open(self) -> None:
        with self._refused("cannot be read"):
            found = set(self._db.list_tables().tables)
        if {"model", "videos", "events"} <= found:
            self._open_tables()
            self.model = self._read_model()

    def _open_tables(self) -> None:
        with self._refused("damaged, index again"):
            self._tables = {name: self._db.open_table(name) for name in ("videos", "events")}

    def _read_model(self) -> dict:
        with self._refused("damaged, index again"):
            row = self._db.open_table("model").to_arrow().to_pylist()[0]
        if row["format"] != FORMAT:
            raise SearchError(
                f"{self.uri}: its format is {row['format']}, this program's {FORMAT}: index again "
                "with --rebuild"
            )
        return json.loads(row["model"])

    @contextlib.contextmanager
    def _refused(self, what: str) -> Iterator[None]:
        """LanceDB's errors in the block, in these words."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise SearchError(f"{self.uri}: {what}: {_first(error)}") from error


def event_schema(width: int) -> pa.Schema:
    """Columns of events with vectors of that many float32."""
    import pyarrow as pa

    types = [pa.string(), pa.int32(), pa.int16(), pa.int8(), pa.float32(), pa.float32()]
    vector = pa.list_(pa.float32(), width)
    return pa.schema([*zip(COLUMNS, types, strict=True), ("vector", vector)])


def event_table(events: Events) -> pa.Table:
    import pyarrow as pa

    schema = event_schema(events.vectors.shape[1])
    vectors = np.ascontiguousarray(events.vectors, dtype=np.float32)
    columns = [pa.array(getattr(events, x).tolist(), schema.field(x).type) for x in COLUMNS]
    columns += [pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])]
    return pa.table(columns, schema=schema)


def _events(rows: pa.Table, **more: np.ndarray) -> Events:
    columns = {name: rows[name].to_numpy(zero_copy_only=False)
               for name in COLUMNS if name != "video"}  # fmt: skip
    ids = rows["video"].combine_chunks().dictionary_encode()
    names = np.array(ids.dictionary.to_pylist(), dtype=object)
    return Events(names[ids.indices.to_numpy()], **columns, **more)


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(f"'{token}'" for token in ids) or "''"


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
