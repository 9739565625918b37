"""Reading a split, and what a run's log says of it."""

from __future__ import annotations

import logging
from pathlib import Path

from dataloaders.annotations import Split
from dataloaders.tokenizer import count_cut
from utils.evaluation.published import split_size_warning

logger = logging.getLogger("propy.splits")


def read_split(path: Path, name: str, datatype: str) -> Split:
    """Annotations of one split, with a warning if it is not the data set's standard one."""
    split = Split.read(path, name)
    videos, queries = len(split.videos), len(split.queries)
    logger.info("%s: %s videos, %s queries", path, f"{videos:,}", f"{queries:,}")
    if warning := split_size_warning(datatype, name, videos, queries):
        logger.warning("%s: %s", path, warning)
    return split


def log_cut(split: Split, max_words: int) -> None:
    """How many of a split's captions are not read to their end."""
    cut, captions = count_cut((q.desc for q in split.queries), max_words), len(split.queries)
    counts = (split.path, f"{cut:,}", f"{captions:,}", max_words)
    logger.info("%s: %s of %s captions are cut at --max_words %d", *counts)
