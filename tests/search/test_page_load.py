"""Many people at the page at once: nothing fails, and its memory does not grow."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[2]
CLIENTS, SECONDS = 200, 60.0
GROWTH = 24 * 2**20  # bytes that the last half of the minute may add
# Its search takes one product of 42,000 events and a query, as a real one does.
PROGRAM = """
import sys
import numpy as np
from tests.search.page_index import sample_index
from utils.search.server import serve
from pathlib import Path
index = sample_index(Path(sys.argv[1]))
events = np.random.default_rng(0).standard_normal((42_000, 512), np.float32)
real = index.search
def search(*args, **kwargs):
    events @ events[0]
    return real(*args, **kwargs)
index.search = search
serve(index, port=0)
"""


@pytest.mark.slow
def test_200_clients_for_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "videos")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+)/ ", process.stdout.readline())[1])
        watched = psutil.Process(process.pid)
        times, memory = asyncio.run(crowd(port, lambda: watched.memory_info().rss))
        process.terminate()
        assert process.wait(30) == 0
    middle = max(memory[len(memory) // 3 : 2 * len(memory) // 3])
    growth = max(memory[2 * len(memory) // 3 :]) - middle
    with capsys.disabled():
        for kind, spent in times.items():
            p50, p95 = np.percentile(spent, [50, 95]) * 1000
            print(f"\n{kind}: {len(spent)} answers, p50 {p50:.0f} ms, p95 {p95:.0f} ms", end="")
        print(f"\nmemory: {middle / 2**20:.0f} MiB in the middle, {growth / 2**20:+.0f} MiB after")
    assert all(len(spent) >= CLIENTS for spent in times.values())
    assert growth < GROWTH


async def crowd(port: int, memory) -> tuple[dict[str, list[float]], list[int]]:
    """Everyone searches, looks at thumbnails and a piece of a video, and thinks for a while."""
    end = time.monotonic() + SECONDS
    times: dict[str, list[float]] = {"search": [], "thumbnail": [], "video": []}
    sizes = []

    async def visitor(number: int) -> None:
        chance = random.Random(number)
        await asyncio.sleep(chance.uniform(0, 2))
        while time.monotonic() < end:
            query = chance.choice(["a red door", "boat", "camera"])
            content = await timed("search", f"/api/search?q={quote(query)}")
            video = chance.choice(
                [h for h in json.loads(content)["hits"] if not h["video"]["gone"]]
            )
            at = round(500 * (video["moments"][0]["start"] + video["moments"][0]["end"]))
            await timed("thumbnail", f"/thumb/{video['video']['id']}/{at}.jpg")
            await timed("video", f"/video/{video['video']['id']}", "bytes=0-4095", 206)
            await asyncio.sleep(chance.uniform(1, 3))

    async def timed(kind: str, path: str, part: str = "", status: int = 200) -> bytes:
        begun = time.monotonic()
        content = await get(port, path, part, status)
        times[kind].append(time.monotonic() - begun)
        return content

    async def watch() -> None:
        while time.monotonic() < end:
            sizes.append(memory())
            await asyncio.sleep(0.5)

    await asyncio.gather(watch(), *map(visitor, range(CLIENTS)))
    return times, sizes


async def get(port: int, path: str, part: str, status: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ask = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    writer.write((ask + (f"Range: {part}\r\n" if part else "") + "\r\n").encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, head
    return body
