"""What searching costs, beside what it cannot do without: `python -m scripts.benchmark search`.

A model with random weights, and an index of made-up vectors that grows from size to size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from dataloaders.ffmpeg import PREPARED_FPS, write_video
from models import ProPy, ProPyConfig
from models.clip import CLIP
from scripts.benchmark.harness import Options, peak_memory, set_up
from scripts.benchmark.loader import rendered
from scripts.benchmark.model import SIZES
from utils.command import Parser, new_file
from utils.search import VideoIndex, lance
from utils.search.index import Entry, Events, new_token
from utils.search.indexer import CPU_BATCH, GPU_BATCH, OPTIMIZE_EVERY
from utils.search.model import describe
from utils.search.windows import WINDOW_SECONDS, Window

WORDS = 49408  # of CLIP's tokenizer, which reads the queries
WINDOWS = 40  # of a made-up video: half an hour
TOGETHER = 64  # queries
K = 10


@dataclass(frozen=True)
class Sizes:
    """Numbers of windows: of the searched indexes, of the measured ones, of the one whose memory is
    measured; and of videos that are indexed, each of one window."""

    searched: Sequence[int] = (2_000, 20_000)
    grown: Sequence[int] = (1_000, 10_000)
    memory: int = 23_810  # × 42 = 1,000,020 events
    videos: int = 32


QUICK = Sizes((100, 200), (100, 200), 200, 1)


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, its aim, and the numbers that it is made of."""

    title: str
    measured: float
    aim: str
    met: bool
    numbers: dict[str, Any]


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    set_up(Options(threads=args.threads))
    sizes = QUICK if args.quick else Sizes()
    if args.large:
        sizes = replace(sizes, grown=(*sizes.grown, 100_000))
    rows = []
    with tempfile.TemporaryDirectory(prefix="propy-search-", dir=args.folder) as folder:
        for row in measure(Path(folder), args, sizes):
            rows.append(row)
            print(f"{row.title}: {row.measured:.3g} ({row.numbers})", flush=True)
    print("\n" + table(rows))
    if args.plot:
        draw_growth(rows, args.plot)
    if args.json:
        args.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts.benchmark search", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", choices=["b32", "b16", "l14", "small"], help="CLIP's size (default b32)")
    add("--quick", action="store_true", help="small sizes, to see that it works")
    add("--large", action="store_true", help="the index grows to 100,000 windows: 9 GB of disk")
    add("--repeats", type=int, default=10, help="timed repetitions of each side (default 10)")
    add("--threads", type=int, help="threads on the CPU (default: torch's own choice)")
    add("--folder", type=Path, help="where the index is made (default: for temporary files)")
    add("--plot", type=new_file, metavar="FILE", help="draw how the index grows")
    add("--json", type=new_file, metavar="FILE", help="save every measured number")
    # fmt: on
    args = parser.parse_args(argv)
    args.model = args.model or ("small" if args.quick else "b32")
    return args


def measure(folder: Path, args: argparse.Namespace, sizes: Sizes) -> Iterator[Row]:
    """The rows, as they are measured."""
    # Old versions stay some minutes for those who read them; here their disk does not count.
    lance.READERS = timedelta(0)
    yield indexing(folder, args.model, sizes.videos)
    uri = folder / "videos.index"
    index = new_index(uri, args.model)
    grown = {}
    for windows in sorted({*sizes.searched, *sizes.grown, sizes.memory}):
        seconds = grow(index, windows)
        if windows in sizes.grown:
            grown[windows] = disk_bytes(uri) / windows
            numbers = {"windows": windows, "MB": disk_bytes(uri) / 1e6,
                       "seconds to add the last ones": seconds}  # fmt: skip
            ratio = grown[windows] / grown[min(grown)]
            yield Row(f"bytes a window at {windows:,} over those at {min(grown):,}", ratio,
                      "≤ 1.1", ratio <= 1.1, numbers)  # fmt: skip
        if windows in sizes.searched:
            yield one_query(index, windows, args.repeats)
            yield queries_at_once(index, windows, max(1, args.repeats // 5))
            yield by_the_store(index, windows, max(1, args.repeats // 5))
        if windows == sizes.memory:
            yield memory(uri, args.model, windows * events_of(index))


# ---------------------------------------------------------------------------------- what is done


def one_query(index: VideoIndex, windows: int, repeats: int) -> Row:
    """From a sentence to hits, beside encoding it and one product over the same vectors."""
    index.load()
    vectors = np.concatenate([piece.vectors for piece in index.storage.vectors()])
    sides = {
        "search": lambda: index.search("a query", K),
        "encoding and product": lambda: vectors @ index.encode_texts(["a query"])[0].numpy(),
    }
    title = f"query to hits at {windows:,} windows, over text encoding and one product"
    return ratio_row(title, 1.5, sides, repeats)


def queries_at_once(index: VideoIndex, windows: int, repeats: int) -> Row:
    texts = [f"query number {i}" for i in range(TOGETHER)]
    sides = {
        "at once": lambda: index.search_many(texts, K),
        "one by one": lambda: [index.search(text, K) for text in texts],
    }
    title = f"{TOGETHER} queries at once at {windows:,} windows, over one by one"
    return ratio_row(title, 0.1, sides, repeats)


def by_the_store(index: VideoIndex, windows: int, repeats: int) -> Row:
    """What does not fit into memory: the store's own search, beside the least that streaming all
    vectors past the query would take. The files are in the system's cache for both."""
    stored = VideoIndex(index.uri, memory_gib=0)
    stored.model = index.model

    def stream() -> None:
        text = stored.encode_texts(["a query"])[0].numpy()
        for piece in stored.storage.vectors():
            piece.vectors @ text

    sides = {"store": lambda: stored.search("a query", K), "streamed": stream}
    title = f"query to hits by the store at {windows:,} windows, over streaming its vectors"
    return ratio_row(title, 1, sides, repeats)


def memory(uri: Path, model: str, events: int) -> Row:
    """What opening an index and searching it takes in float16, in a process of its own."""
    gigabytes = peak_memory(partial(search_in_float16, uri, model), Options()) / 1e9
    return Row(f"GB of memory for {events:,} events in float16", gigabytes, "≤ 2.2",
               gigabytes <= 2.2, {"events": events})  # fmt: skip


def search_in_float16(uri: Path, model: str) -> Callable[[], None]:
    index = VideoIndex(uri)
    index.model = build_model(model)
    float32 = index.status()["events"] * index.model.clip.sizes.embed_dim * 4
    index.memory_gib = 0.75 * float32 / 2**30  # too little for float32
    index.encode_texts(["what is loaded before"])

    def run() -> None:
        index.search("a query", K)
        assert index._matrix.dtype == torch.float16

    return run


def indexing(folder: Path, model: str, videos: int) -> Row:
    """Windows that are indexed in a second over those that the encoder alone would embed."""
    frames = round(WINDOW_SECONDS * PREPARED_FPS)
    (folder / "videos").mkdir()
    for number in range(videos):
        write_video(folder / "videos" / f"{number}.mp4",
                    rendered(frames, np.random.default_rng([0, number])))  # fmt: skip
    index = new_index(folder / "indexed", model)
    pixels = index.model.input_resolution
    batch = min(videos, CPU_BATCH if index.device.type == "cpu" else GPU_BATCH)
    drawn = torch.randint(256, (batch, 32, 3, pixels, pixels), dtype=torch.uint8)

    def encode() -> float:
        """Seconds for so many windows as there are videos."""
        started = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, videos, batch):
                index.model.encode_video(drawn[: videos - first].to(index.device)).cpu()
        return time.perf_counter() - started

    encode()  # does not count
    before = encode()
    report = index.add(folder / "videos", quiet=True)
    bare = (before + encode()) / 2
    numbers = {"videos": videos, "seconds": report.seconds, "of them waiting": report.waiting,
               "bare encoder": bare}  # fmt: skip
    share = bare / report.seconds
    return Row("indexing throughput over the bare encoder's", share, "≥ 0.85", share >= 0.85,
               numbers)  # fmt: skip


def ratio_row(title: str, most: float, sides: dict[str, Callable[[], Any]], repeats: int) -> Row:
    """The first side's seconds over the second's: the least of each of some repetitions in turns,
    after one that does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(repeats + 1):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[side].append(time.perf_counter() - started)
    least = {side: min(times) for side, times in seconds.items()}
    first, second = least.values()
    return Row(title, first / second, f"≤ {most}", first / second <= most, least)


# ------------------------------------------------------------------------------ what it is done on


def build_model(size: str) -> ProPy:
    torch.manual_seed(0)
    clip = CLIP(replace(SIZES[size], vocab_size=WORDS))
    clip.initialize()
    return ProPy(clip, ProPyConfig()).eval()


def new_index(uri: Path, size: str) -> VideoIndex:
    index = VideoIndex(uri)
    index.model = build_model(size).to(index.device)
    files = {"checkpoint": None, "clip_weights": None}
    index.storage.create(describe(index.model, files))
    return index


def events_of(index: VideoIndex) -> int:
    return index.model.pyramid.num_events


def grow(index: VideoIndex, windows: int) -> float:
    """Add made-up videos, as an indexer does, until there are so many windows; seconds."""
    started = time.perf_counter()
    first = index.status()["events"] // events_of(index)
    for done, there in enumerate(range(first, windows, WINDOWS), start=1):
        entry, events = draw_video(index, there, min(WINDOWS, windows - there))
        index.storage.add(entry, events)
        if done % OPTIMIZE_EVERY == 0:
            index.optimize()
    index.optimize()
    return time.perf_counter() - started


def draw_video(index: VideoIndex, seed: int, windows: int) -> tuple[Entry, Events]:
    pyramid, num_events = index.model.pyramid, events_of(index)
    shape = (windows * num_events, index.model.clip.sizes.embed_dim)
    vectors = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    starts = [i * WINDOW_SECONDS * 3 / 4 for i in range(windows)]
    duration = starts[-1] + WINDOW_SECONDS
    token = new_token()
    entry = Entry(
        id=token, path=f"/videos/{seed}.mp4", name=f"{seed}.mp4", size=1, mtime=1e9,
        duration=duration, row=new_token(), root="/videos", digest=str(seed), windows=windows,
    )  # fmt: skip
    proposals = pyramid.proposals.numpy()
    times = [Window(0, x, WINDOW_SECONDS).times(proposals, duration) for x in starts]
    start, end = np.concatenate(times).T
    levels = index.storage.model["levels"]
    return entry, Events(
        video=np.full(len(vectors), token, dtype=object),
        window=np.repeat(np.arange(windows), num_events),
        event=np.tile(np.arange(num_events), windows), level=np.tile(levels, windows),
        start=start, end=end, vectors=vectors,
    )  # fmt: skip


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Size of the index against its windows; on the line, each window takes what the first took."""
    grown = [row.numbers for row in rows if "MB" in row.numbers]
    windows, size = ([numbers[name] for numbers in grown] for name in ("windows", "MB"))
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(windows, [size[0] / windows[0] * count for count in windows], color="0.7")
    axes.loglog(windows, size, "o")
    axes.set(xlabel="windows", ylabel="MB on the disk", title="Growth of an index")
    axes.grid(color="0.92")
    figure.savefig(path, dpi=130)


def table(rows: Sequence[Row]) -> str:
    lines = ["| | measured | aim | met |", "|---|---|---|---|"]
    lines += [
        f"| {r.title} | {r.measured:.3g} | {r.aim} | {'yes' if r.met else 'no'} |" for r in rows
    ]
    return "\n".join(lines)
