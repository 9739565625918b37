"""`scripts/search.sh demo`: the demo's test videos indexed and the page opened, from nothing."""

from __future__ import annotations

import argparse

from scripts.demo import run as demo
from utils.search import VideoIndex
from utils.search.model import DEMO

INDEX = demo.ROOT / "demo" / "search.index"
EXAMPLE = "a large red circle slides left"


def run(args: argparse.Namespace) -> None:
    """Make the demo unless it is there, index its test videos, serve."""
    videos = demo.ROOT / "demo" / "videos"
    if not all(path.is_file() for path in DEMO.values()) or not videos.is_dir():
        print("the demo is made first: videos, a small CLIP and ProPy, some minutes", flush=True)
        demo.main([])
    index = VideoIndex(INDEX, **DEMO)
    print(index.add(sorted(videos.glob("test_*.mp4"))))
    print(index.search(EXAMPLE, k=5, by="moments"))
    if not args.no_page:
        from utils.search.server import serve

        serve(index, "127.0.0.1", args.port, None)
