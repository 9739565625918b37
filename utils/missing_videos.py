"""Which videos a run skips, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders import DataError, listed
from dataloaders.annotations import Query, Split
from dataloaders.clips import ClipSource
from dataloaders.preflight import probe_all
from utils.files import read_records, write_records

logger = logging.getLogger("propy.missing_videos")

LIST = "missing_videos.jsonl"


def require_videos(
    splits: Sequence[Split], clips: ClipSource, size: int, folder: Path, allow_missing: bool
) -> MissingVideos:
    """Probe all videos of a run, for frames of `size` pixels, before it starts.

    Args:
        folder: of the run, for the list of those that cannot be used.
        allow_missing: run without these.

    Raises:
        DataError: some cannot be used and the run is not to skip them, or none of a split can.
        OutputError: the list cannot be written.
    """
    found = []
    for split in splits:
        reasons, doubtful = probe_all(split.videos, clips, size)
        found.append((split, reasons))
        if doubtful:
            logger.warning(
                "%s: %d videos have less than half or more than twice the 3 frames a second that "
                "their annotated length asks for: were they prepared?\n%s",
                *(split.name, len(doubtful), listed(doubtful)),
            )
    missing = MissingVideos(folder, found)
    # A video may be in both splits.
    reasons = list(dict.fromkeys(reason for _, some in found for reason in some.values()))
    if reasons and not allow_missing:
        raise DataError(
            f"{len(reasons)} videos are missing or unreadable:\n{listed(reasons)}\n"
            f"{missing.path} has the whole list. Set --video_dir, make them with `bash "
            "scripts/prepare.sh` (a frame store's with scripts/data/pack_frames.py), or run "
            "without them: --allow_missing 1"
        )
    for split, reasons in found:
        if reasons:
            logger.warning("%s: %s", split.name, missing.summary(split.name))
        if not missing.remaining(split).queries:
            raise DataError(f"no video of {split.path} can be used: {missing.path} says why")
    return missing


class MissingVideos:
    """The videos that a run skips, decided before it starts, and listed in a file if there are any.

    Args:
        folder: of the run. The list in it, missing_videos.jsonl, has one JSON object a line: split,
            vid_name, queries, reason. Lines of an earlier run on other splits stay: an evaluation
            does not know about training's.
        splits: each split as annotated, and why some of its videos cannot be used, by their names.

    Raises:
        OutputError: the list cannot be written.
    """

    def __init__(self, folder: Path, splits: Sequence[tuple[Split, Mapping[str, str]]]) -> None:
        self.path = path = folder / LIST
        self._splits = {split.name: (split, split.without(missing)) for split, missing in splits}
        records = read_records(path) if path.is_file() else []
        records = [record for record in records if record.get("split") not in self._splits]
        for split, reasons in splits:
            counts = Counter(query.vid_name for query in split.queries)
            records += [
                {"split": split.name, "vid_name": name, "queries": counts[name], "reason": reason}
                for name, reason in reasons.items()
            ]
        if records:
            write_records(path, records)
        else:
            path.unlink(missing_ok=True)

    def remaining(self, split: Split) -> Split:
        """The split without them."""
        return self._splits[split.name][1]

    def counts(self, split: str) -> dict[str, int]:
        """For the records of a run: `missing_counts` of a split."""
        annotated, remaining = self._splits[split]
        return missing_counts(split, annotated.queries, remaining.queries)

    def summary(self, split: str) -> str | None:
        """The reduced size of a split, to stand beside its results; None if nothing is missing."""
        size = reduced_size(self.counts(split), split)
        return size and f"{size}: {self.path} lists what is missing"


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
    """What numbers were computed on, if `missing_counts` are in the record, else None."""
    sizes = []
    for what in ("videos", "queries"):
        left, lost = (record.get(f"{split}_{what}{end}") for end in ("", "_left_out"))
        if not (isinstance(left, int) and isinstance(lost, int) and lost):
            return None
        sizes.append(f"{left:,} of the {left + lost:,} {what}")
    return "on " + " and ".join(sizes)
