"""Indexers and searchers as processes of their own, with a small CLIP that knows nothing.

Forks of a server that has imported all but LanceDB, whose threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from dataloaders.ffmpeg import write_video
from tests.golden_model import make_weights
from utils.search import VideoIndex

ROOT = Path(__file__).resolve().parents[2]


@cache
def clip_file(base: Path) -> Path:
    """Weights of a small CLIP, made once a session."""
    path = base / "search_clip.pt"
    torch.save(make_weights.torch_state(make_weights.make("tiny", 1, "fp16")), path)
    return path


def write_noise(path: Path, seed: int, frames: int = 36) -> None:
    """A video of 3 frames a second like no other; none of the 32 that are seen is seen twice, so no
    two events are equal."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (frames, 8, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, small.repeat(8, 1).repeat(8, 2))


@cache
def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.search.programs", "tests.search.preloaded"])
    return context


@contextmanager
def started(program: Callable, *arguments: object) -> Iterator[BaseProcess]:
    """A function of this module in a process; killed at the end unless it has ended."""
    process = _context().Process(target=program, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def add(uri: str, paths: list[Path], clip: Path, acknowledged: Path | None = None,
        settings: dict | None = None) -> None:  # fmt: skip
    """Index; a line in `acknowledged` for every video whose adding has returned."""
    torch.set_num_threads(1)
    index = VideoIndex(uri, clip_weights=clip)
    if acknowledged:
        real = index.storage.add

        def storage_add(entry, *rest) -> None:
            real(entry, *rest)
            with acknowledged.open("a") as file:
                file.write(entry.name + "\n")
                file.flush()
                os.fsync(file.fileno())

        index.storage.add = storage_add
    index.add(paths, quiet=True, **settings or {})


def watch(uri: str, results: Path) -> None:
    """Search again and again, a line of the number of videos found for every search."""
    torch.set_num_threads(1)
    index = VideoIndex(uri)
    with results.open("a", buffering=1) as file:
        while True:
            hits = index.search("anything at all", k=1000)
            file.write(f"{len(hits)} {hits.version}\n")
