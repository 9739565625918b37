"""An index's events in a file that DuckDB, Polars or pandas read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils import SearchError
from utils.files import atomic_write
from utils.search.index import COLUMNS, Entry, Events, Storage

WRITERS = {".parquet", ".arrow"}


def export_events(storage: Storage, entries: Mapping[str, Entry], output: Path) -> int:
    """Write the events of these videos, piece by piece; how many.

    SearchError: the file's suffix is neither .parquet nor .arrow. OutputError: it cannot be
    written.
    """
    if output.suffix not in WRITERS:
        raise SearchError(f"{output}: name a file that ends in .parquet or .arrow")
    import pyarrow as pa
    import pyarrow.parquet

    vector = pa.list_(pa.float32(), storage.model["width"])
    types = [pa.string(), pa.int32(), pa.int16(), pa.int8(), pa.float32(), pa.float32()]
    fields = [("path", pa.string()), *zip(COLUMNS, types, strict=True), ("vector", vector)]
    schema = pa.schema(fields)
    open_writer = pa.parquet.ParquetWriter if output.suffix == ".parquet" else pa.ipc.new_file
    count = 0
    with atomic_write(output) as part, open_writer(str(part), schema) as writer:
        for piece in storage.vectors():
            own = piece.take(np.array([token in entries for token in piece.video], dtype=bool))
            writer.write_table(_table(own, entries, schema))
            count += len(own)
    return count


def _table(rows: Events, entries: Mapping[str, Entry], schema):
    import pyarrow as pa

    vectors = np.ascontiguousarray(rows.vectors, np.float32).ravel()
    columns = [pa.array([entries[token].path for token in rows.video], pa.string())]
    columns += [pa.array(getattr(rows, x).tolist(), schema.field(x).type) for x in COLUMNS]
    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors), rows.vectors.shape[1]))
    return pa.table(columns, schema=schema)
