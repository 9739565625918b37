"""Indexes of made-up vectors, and what a search of them should find, by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modules.pyramid import PromptPyramid
from utils.search.hits import FAILED
from utils.search.index import Entry, Events, Storage, new_token

PYRAMID = PromptPyramid.from_config({"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]})
N_E, WIDTH = PYRAMID.num_events, 16
LEVELS = (PYRAMID.level_of_event - 1).tolist()
MODEL = {
    "checkpoint": None, "clip_weights": None, "fingerprint": "f", "clip": "none", "events": N_E,
    "frames": 8, "width": WIDTH, "levels": LEVELS, "window_seconds": 8.0,
}  # fmt: skip


@dataclass
class Corpus:
    """Videos of random events, in a store and in arrays of their own."""

    seed: int = 0
    entries: list[Entry] = field(default_factory=list)
    events: dict[str, Events] = field(default_factory=dict)

    def draw(self, name: str, windows: int = 1, status: str = "indexed") -> Entry:
        """A video, not in a store yet."""
        self.seed += 1
        random = np.random.default_rng(self.seed)
        token = new_token()
        entry = Entry(
            id=token, path=f"/videos/{name}", name=name, size=1, mtime=1e9 + self.seed,
            duration=8.0 + 6 * (windows - 1), status=status,
            reason="broken" * (status == FAILED), row=new_token(), root="/videos",
            digest=f"{self.seed:x}", windows=windows * (status != FAILED),
        )  # fmt: skip
        vectors = random.standard_normal((windows * N_E, WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        starts = 6.0 * np.repeat(np.arange(windows), N_E)
        spans = np.tile(PYRAMID.proposals.numpy() * 8, (windows, 1)) + starts[:, None]
        self.events[token] = Events(
            video=np.full(windows * N_E, token, dtype=object),
            window=np.repeat(np.arange(windows), N_E),
            event=np.tile(np.arange(N_E), windows), level=np.tile(LEVELS, windows),
            start=spans[:, 0], end=spans[:, 1], vectors=vectors,
        )  # fmt: skip
        self.entries.append(entry)
        return entry

    def fill(self, storage: Storage, videos: int = 30) -> None:
        """Draw videos of one to four windows, and a failed one, and add them all."""
        for number in range(videos):
            entry = self.draw(f"{'ab'[number % 2]}/{number}.mp4", 1 + number % 4)
            storage.add(entry, self.events[entry.id])
        storage.add(self.draw("failed.mp4", status=FAILED), None)

    def cosines(self, query: np.ndarray) -> dict[str, np.ndarray]:
        """Of every video: [windows, N_e]."""
        return {
            entry.id: (self.events[entry.id].vectors @ query).reshape(-1, N_E)
            for entry in self.entries
            if entry.windows
        }


def queries(count: int = 5) -> np.ndarray:
    vectors = np.random.default_rng(99).standard_normal((count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
