"""Which videos a run goes without, and why."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dataloaders.annotations import Query
from utils.files import append_line, atomic_write

logger = logging.getLogger("propy.missing_videos")


class LeftOut:
    """The videos that a run goes without, each recorded once and listed in a file.

    Args:
        path: the list, one JSON object a line: split, vid_name, queries, reason. Lines of an
            older one on these splits are removed; it appears with the first video.
        splits: the queries of each split as annotated, by its name.
    """

    def __init__(self, path: Path, splits: dict[str, Sequence[Query]]) -> None:
        self.path = path
        self._forget(splits)
        self._splits = splits
        self._queries = {
            split: Counter(query.vid_name for query in queries) for split, queries in splits.items()
        }
        self._names: dict[str, dict[str, None]] = {split: {} for split in splits}

    def add(self, split: str, reasons: Mapping[str, str]) -> list[str]:
        """Record videos by name with the reasons; returns those that were not known already.

        Raises:
            OutputError: the list cannot be written.
        """
        known = self._names[split]
        new = {name: reason for name, reason in reasons.items() if name not in known}
        known.update(dict.fromkeys(new))
        lines = [
            json.dumps(
                {
                    "split": split,
                    "vid_name": name,
                    "queries": self._queries[split][name],
                    "reason": reason,
                }
            )
            for name, reason in new.items()
        ]
        if lines:
            append_line(self.path, "\n".join(lines))
        return list(new)

    def _forget(self, splits: Collection[str]) -> None:
        """Take lines on these splits out of the list: an evaluation does not look at training's."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn: it is made again
                if json.loads(line)["split"] not in splits:
                    kept.append(line + "\n")
        if kept:
            with atomic_write(self.path) as part:
                part.write_text("".join(kept), encoding="utf-8")
        else:
            self.path.unlink()

    def leave_out(self, split: str, vid_name: str, reason: str) -> None:
        """Record a video that turned out not to decode, with a warning."""
        if self.add(split, {vid_name: reason}):
            logger.warning("%s is left out of the %s split: %s", vid_name, split, reason)

    def kept(self, split: str, queries: Sequence[Query]) -> list[Query]:
        """Those of the queries whose videos are not left out."""
        return [query for query in queries if query.vid_name not in self._names[split]]

    def numbers(self, split: str) -> dict[str, int]:
        """For the records of a run: `left_numbers` of a split."""
        queries = self._splits[split]
        return left_numbers(split, queries, self.kept(split, queries))

    def note(self, split: str) -> str | None:
        """The reduced size of a split, to stand beside its results; None if nothing is left out."""
        size = reduced_size(self.numbers(split), split)
        return size and f"{size}: {self.path} lists what is left out"


def left_numbers(split: str, queries: Sequence[Query], kept: Sequence[Query]) -> dict[str, int]:
    """What is left of a split and what is not: {} if all is there.

    ``<split>_videos``, ``<split>_videos_left_out``, and the same of queries.

    Args:
        queries: all that are annotated; kept: those whose videos are there.
    """
    if len(kept) == len(queries):
        return {}
    numbers = {}
    for what, left, all_ in (
        ("videos", *(len({query.vid_name for query in some}) for some in (kept, queries))),
        ("queries", len(kept), len(queries)),
    ):
        numbers |= {f"{split}_{what}": left, f"{split}_{what}_left_out": all_ - left}
    return numbers


def reduced_size(record: Mapping, split: str = "val") -> str | None:
    """What numbers were computed on, if the record says that videos were left out, else None.

    Args:
        record: with `utils.missing_videos.LeftOut.numbers` in it, or without.
    """
    parts = []
    for what in ("videos", "queries"):
        left, lost = (record.get(f"{split}_{what}{end}") for end in ("", "_left_out"))
        if not (isinstance(left, int) and isinstance(lost, int) and lost):
            return None
        parts.append(f"{left:,} of the {left + lost:,} {what}")
    return "on " + " and ".join(parts)
