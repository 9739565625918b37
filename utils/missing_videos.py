"""Which videos a run skips, and why."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.annotations import Query
from utils.files import whole_file


class MissingVideos:
    """The videos that a run skips, decided before it starts, and listed in a file if there are any.

    Args:
        path: the list, one JSON object a line: split, vid_name, queries, reason. Lines of an
            earlier run on other splits stay: an evaluation does not know about training's.
        splits: the queries of each split as annotated, by its name.
        reasons: why a video cannot be used, by its name, for each split.

    Raises:
        OutputError: the list cannot be written.
    """

    def __init__(
        self,
        path: Path,
        splits: Mapping[str, Sequence[Query]],
        reasons: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.path = path
        self._splits = splits
        self._reasons = reasons
        lines = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a torn line is dropped
                    if json.loads(line)["split"] not in splits:
                        lines.append(line + "\n")
        for split, queries in splits.items():
            counts = Counter(query.vid_name for query in queries)
            for name, reason in reasons[split].items():
                record = {"split": split, "vid_name": name, "queries": counts[name]}
                lines.append(json.dumps(record | {"reason": reason}) + "\n")
        if lines:
            with whole_file(path) as part:
                part.write_text("".join(lines), encoding="utf-8")
        elif path.is_file():
            path.unlink()

    def remaining(self, split: str) -> list[Query]:
        """The queries whose videos are there."""
        return [q for q in self._splits[split] if q.vid_name not in self._reasons[split]]

    def counts(self, split: str) -> dict[str, int]:
        """For the records of a run: `missing_counts` of a split."""
        return missing_counts(split, self._splits[split], self.remaining(split))

    def summary(self, split: str) -> str | None:
        """The reduced size of a split, to stand beside its results; None if nothing is missing."""
        size = reduced_size(self.counts(split), split)
        return size and f"{size}: {self.path} lists what is left out"


def missing_counts(
    split: str, queries: Sequence[Query], remaining: Sequence[Query]
) -> dict[str, int]:
    """How much is left of a split's annotated queries, and how much is not; {} if all is there."""
    if len(remaining) == len(queries):
        return {}
    videos, all_videos = (len({q.vid_name for q in some}) for some in (remaining, queries))
    return {
        f"{split}_videos": videos,
        f"{split}_videos_left_out": all_videos - videos,
        f"{split}_queries": len(remaining),
        f"{split}_queries_left_out": len(queries) - len(remaining),
    }


def reduced_size(record: Mapping, split: str = "val") -> str | None:
    """What numbers were computed on, if the record says that videos were missing, else None.

    Args:
        record: with `missing_counts` in it, or without.
    """
    parts = []
    for what in ("videos", "queries"):
        left, lost = (record.get(f"{split}_{what}{end}") for end in ("", "_left_out"))
        if not (isinstance(left, int) and isinstance(lost, int) and lost):
            return None
        parts.append(f"{left:,} of the {left + lost:,} {what}")
    return "on " + " and ".join(parts)
