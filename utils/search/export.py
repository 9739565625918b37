"""An index's events in a file that DuckDB, Polars or pandas read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils import SearchError
from utils.files import atomic_write
from utils.search.index import Entry, Storage
from utils.search.lance import event_schema, event_table

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

    schema = event_schema(storage.model["width"]).insert(0, pa.field("path", pa.string()))
    open_writer = pa.parquet.ParquetWriter if output.suffix == ".parquet" else pa.ipc.new_file
    count = 0
    with atomic_write(output) as part, open_writer(str(part), schema) as writer:
        for piece in storage.vectors():
            own = piece.take(np.array([token in entries for token in piece.video], dtype=bool))
            paths = pa.array([entries[token].path for token in own.video], pa.string())
            writer.write_table(event_table(own).add_column(0, "path", paths))
            count += len(own)
    return count
