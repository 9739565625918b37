"""Work on many files that several processes, on one machine or on many, share among themselves."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` parts, from 0.

    What belongs to it follows from the names alone, so that processes which list a folder at
    different times never work on the same file.
    """

    index: int = 0
    count: int = 1

    @property
    def label(self) -> str:
        """For the names of files that are this part's own; empty if there is but one part."""
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""

    def has(self, name: str) -> bool:
        digest = hashlib.sha256(os.fsencode(name)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


def add_shard_flag(parser: argparse.ArgumentParser) -> None:
    """``--shard i/n``; without it, what torchrun says in the environment, else everything."""
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N",
        default="{}/{}".format(os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)),
        help="do part I of N, counted from 0, while other processes or machines do the others; "
        "then run once without it (default: torchrun's rank, else all: %(default)s)",
    )  # fmt: skip


def _shard(text: str) -> Shard:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"I/N with I from 0 to N - 1, such as 0/2: not {text!r}")
    return Shard(int(match[1]), int(match[2]))
