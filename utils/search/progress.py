"""How far the indexers of an index are: a small file of each in the index's folder, for others to
read. An index elsewhere has none."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from utils.search.index import new_token

ALIVE = 60.0  # seconds without a sign after which an indexer is taken for killed
OFTEN = 1.0  # seconds from one sign to the next
PATTERN = "indexing-*.json"


class Progress:
    """This indexer's file. A sign that cannot be written is forgone."""

    def __init__(self, uri: str, total: int) -> None:
        folder = Path(uri)
        self._path = folder / f"indexing-{new_token()}.json" if folder.is_dir() else None
        self._facts = {"done": 0, "total": total, "name": ""}
        self._written = 0.0

    def show(self, done: int, name: str) -> None:
        """So many of its videos are done, and this is the latest."""
        self._facts |= {"done": done, "name": name}
        self.sign()

    def sign(self) -> None:
        """It is alive."""
        if self._path is None or time.monotonic() - self._written < OFTEN:
            return
        self._written = time.monotonic()
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(self._facts))
            part.replace(self._path)

    def close(self) -> None:
        """It has ended."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def read(uri: str) -> dict | None:
    """The sum of what the indexers say that are at work now; None: there is none."""
    facts = []
    for path in Path(uri).glob(PATTERN):
        with contextlib.suppress(OSError, ValueError):
            age = time.time() - path.stat().st_mtime
            if age < ALIVE:
                facts.append(json.loads(path.read_text()))
            elif age > 24 * 3600:
                path.unlink()
    if not facts:
        return None
    return {
        "done": sum(fact["done"] for fact in facts),
        "total": sum(fact["total"] for fact in facts),
        "name": facts[0]["name"],
    }
