#!/usr/bin/env python3
"""Search your own videos: index folders, then ask in words, in the terminal or on a page.

    bash scripts/search.sh index ~/Videos
    bash scripts/search.sh find "a man opens a red door"
    bash scripts/search.sh serve

How it works, and clusters, security, sizes and times: utils/search/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from utils import OutputError, SearchError
from utils.command import Parser, run_command

DEFAULT_INDEX = "videos.index"

Adder = Callable[..., argparse.Action]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        args.run(args)
    except OSError as error:  # of temporary files and pictures
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{error.filename or args.index}: {error.strerror or error}") from error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="search.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable, summary: str, more: str = "") -> Adder:
        sub = commands.add_parser(
            run.__name__, help=summary, description=f"{summary} {more}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument(
            "--index", default=DEFAULT_INDEX, metavar="URI",
            help="a folder or s3://bucket/name (LanceDB), or http://host:19530 (Milvus)",
        )  # fmt: skip
        return sub.add_argument

    # fmt: off
    add = command(index, "Make an index of videos, or bring it up to date.",
                  "Unchanged files are skipped, changed ones replaced, moved ones recognised. "
                  "Stopped or killed at any time, the next run continues.")
    add("paths", nargs="+", type=Path, metavar="FOLDER|FILE")
    add_model(add)
    add("--prune", action="store_true", help="take videos out whose files are gone")
    add("--rebuild", action="store_true", help="forget what is in the index first")
    add("--workers", type=int, metavar="N", help="videos decoded side by side (default: cores)")
    add("--batch", type=int, metavar="N",
        help="windows encoded at once (default: 16 on a GPU, 4 on a CPU)")
    add("--time_limit", type=float, default=1800.0, metavar="S",
        help="seconds that a video's next frame may take")

    add = command(find, "Find videos or moments for a sentence.")
    add("query", help='such as "a man opens a red door"')
    add("--k", type=int, default=10, help="how many")
    add("--by", choices=("videos", "moments"), default="moments", help="what is ranked")
    add_filter(add)
    add("--json", action="store_true", help="print JSON")
    add("--pictures", type=Path, metavar="DIR", help="save a picture of every moment there")
    add_search(add)

    add = command(serve, "Open the page: search in a browser, videos play from the moment.",
                  "Ctrl-C ends it.")
    add("--port", type=int, default=8000, help="of the page")
    add("--host", default="127.0.0.1",
        help="address to listen on; any other than this machine's own needs a token")
    add("--token", default=os.environ.get("PROPY_SEARCH_TOKEN"),
        help="what visitors have to know (default: $PROPY_SEARCH_TOKEN)")
    add("--name", action="append", default=[], metavar="HOST",
        help="another name by which browsers call this machine, as behind a proxy; may be repeated")
    add("--open", action="store_true", help="open the page in this machine's browser")
    add_search(add)

    add = command(info, "Say what is in an index, what failed, and why.")
    add("--json", action="store_true", help="print JSON")
    add("--recall", action="store_true",
        help="measure how much --approximate finds of the ten best videos")
    add("--queries", type=Path, metavar="FILE",
        help="sentences for --recall, one a line (default: 100 events of the index)")
    add_search(add)

    add = command(remove, "Take videos out of the index; the files stay.")
    add("patterns", nargs="+", metavar="PATTERN", help="of names or paths, such as 'trip/*'")

    add = command(optimize, "Make an index smaller and quicker.")
    add("--approximate", action="store_true", help="build the index for --approximate as well")

    add = command(export, "Write all events with their vectors to a file.")
    add("output", type=Path, metavar="FILE.parquet|FILE.arrow")

    add = command(demo, "Index the demo's test videos and open the page.",
                  "Makes the demo first (`bash scripts/demo.sh`), unless it is there.")
    add("--port", type=int, default=8000, help="of the page")
    add("--no_page", action="store_true", help="index only")
    # fmt: on
    return parser.parse_args(argv)


def add_model(add: Adder) -> None:
    add("--checkpoint", metavar="FILE", help="of a trained model (default: the index's, or CLIP)")
    add("--clip_weights", metavar="FILE", help="of CLIP (default: what the checkpoint names)")


def add_search(add: Adder) -> None:
    add_model(add)
    add("--memory_gib", type=float, default=4.0, metavar="GIB",
        help="for the vectors; what needs more is searched on the disk")  # fmt: skip
    add("--approximate", action="store_true", help="quicker for millions, and may miss some")


def add_filter(add: Adder) -> None:
    # fmt: off
    add("--in", dest="within", metavar="PATTERN", help="only of such names or paths: 'trip/*'")
    add("--since", metavar="DAY", help="only files changed on that day or later: 2026-05-31")
    add("--until", metavar="DAY", help="only files changed on that day or earlier")
    add("--min_seconds", type=float, metavar="S", help="only videos so long or longer")
    add("--max_seconds", type=float, metavar="S", help="only videos so long or shorter")
    # fmt: on


def opened(args: argparse.Namespace):
    """The index, with the settings that the command has."""
    from utils.search import VideoIndex

    names = ("checkpoint", "clip_weights", "memory_gib", "approximate")
    return VideoIndex(args.index, **{k: v for k, v in vars(args).items() if k in names})


def index(args: argparse.Namespace) -> None:
    part = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if (args.rebuild or args.prune) and part[1] > 1:
        flag = "--rebuild: with one process, before" if args.rebuild else "--prune: with one, after"
        raise SearchError(f"{flag} the others index")
    report = opened(args).add(
        args.paths, prune=args.prune, rebuild=args.rebuild, workers=args.workers,
        batch=args.batch, time_limit=args.time_limit, part=part,
    )  # fmt: skip
    print(f"process {part[0]}: {report}" if part[1] > 1 else report)


def find(args: argparse.Namespace) -> None:
    which = ("within", "since", "until", "min_seconds", "max_seconds")
    videos = opened(args)
    results = videos.search(args.query, args.k, args.by, **{k: vars(args)[k] for k in which})
    if args.json:
        print(json.dumps(asdict(results), indent=1))
    else:
        print(results)
    if args.pictures:
        from utils.search.preview import write_thumbnail

        args.pictures.mkdir(parents=True, exist_ok=True)
        for rank, hit in enumerate(results, start=1):
            place = (hit.moments[0].start + hit.moments[0].end) / 2
            output = args.pictures / f"{rank:03d}.jpg"
            write_thumbnail(Path(hit.video.path), place, output)
            print(output)


def serve(args: argparse.Namespace) -> None:
    videos = opened(args)  # first: it says which packages are missing
    from utils.search.server import serve as serve_index

    serve_index(videos, args.host, args.port, args.token, open_browser=args.open, names=args.name)


def info(args: argparse.Namespace) -> None:
    videos = opened(args)
    facts = videos.info()
    if args.recall:
        queries = args.queries.read_text().splitlines() if args.queries else None
        facts["recall at 10"] = videos.approximate_recall(queries)
    failed = [video for video in videos.videos() if video.reason]
    if args.json:
        print(json.dumps(facts | {"reasons": {v.path: v.reason for v in failed}}, indent=1))
        return
    from utils.search.hits import printable

    facts["roots"] = ", ".join(map(printable, facts["roots"]))
    for name, value in facts.items():
        print(f"{name}: {f'{value:.3g}' if isinstance(value, float) else value}")
    for video in failed:
        print(f"  {video.status}: {printable(video.path)}: {video.reason}")


def remove(args: argparse.Namespace) -> None:
    videos = opened(args)
    for pattern in args.patterns:
        print(f"{pattern}: {videos.remove(pattern)} removed")


def optimize(args: argparse.Namespace) -> None:
    videos = opened(args)
    approximate, videos.approximate = videos.approximate, False
    videos.optimize(approximate)
    print(videos)


def export(args: argparse.Namespace) -> None:
    rows = opened(args).export(args.output)
    print(f"{args.output}: {rows} events")


def demo(args: argparse.Namespace) -> None:
    from scripts.demo import search as demo_search

    demo_search.run(args)


if __name__ == "__main__":
    run_command(main)
