"""`VideoIndex`: the index of a folder, from Python as from the programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataloaders.tokenizer import tokenize
from models.clip_weights import weights_path
from modules.similarity import unit
from utils import SearchError
from utils.misc import choose_device
from utils.search import progress
from utils.search.engine import Filter, StoredEvents, matches, rank_moments, rank_videos
from utils.search.hits import FAILED, Moment, Results, Video
from utils.search.index import Entry, Storage
from utils.search.indexer import Report, find_videos, index_videos
from utils.search.lance import LanceIndex
from utils.search.matrix import Matrix
from utils.search.model import choose_model, describe, fingerprint, lasting, load_model

DEFAULT_URI = "videos.index"
MEMORY_GIB = 4.0
RANKINGS = {"videos": rank_videos, "moments": rank_moments}
RECALL_QUERIES = 100
REFRESHES = 5  # of an index that changes while it is read


@dataclass(frozen=True)
class Snapshot:
    """The videos, by their ids, of a version of the index."""

    version: int = -1
    entries: dict[str, Entry] = field(default_factory=dict)

    def video(self, video_id: str) -> Entry:
        """SearchError: there is none of that id, or no longer."""
        if video_id not in self.entries:
            raise SearchError(f"the index has no video {video_id!r}")
        return self.entries[video_id]


class VideoIndex:
    """An index of videos: opened at once, its model loaded when it is first needed.

    Args:
        uri: a folder or ``s3://…`` (LanceDB), or ``http://host:19530`` (Milvus).
        checkpoint, clip_weights: files of the model; by default the index's own, and for a new
            index what `choose_model` finds.
        memory_gib: for the vectors. What needs more is searched by the store itself.
        approximate: search the store's approximate index instead, which is quicker and misses some.
        device: of the encoders; by default the GPU, or else the CPU.

    Raises:
        SearchError: it cannot be opened.
    """

    def __init__(
        self, uri: str | Path = DEFAULT_URI, checkpoint: str | Path | None = None,
        clip_weights: str | Path | None = None, *, memory_gib: float = MEMORY_GIB,
        approximate: bool = False, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        self.uri = str(uri)
        self.storage: Storage = open_storage(self.uri)
        self.memory_gib, self.approximate = memory_gib, approximate
        self._named = lasting(checkpoint, clip_weights)
        self._device = device
        self._snapshot, self._matrix, self._loaded = Snapshot(), None, False
        self._searching = threading.RLock()  # which may take long
        self._looking = threading.Lock()  # what is in the index: never waits for a search

    def __repr__(self) -> str:
        if not self.storage.model:
            return f"VideoIndex({self.uri!r}): empty"
        status = self.status()
        failed = f", {status['failed']} that failed" if status["failed"] else ""
        return (
            f"VideoIndex({self.uri!r}): {status['videos']} videos{failed}, "
            f"{status['hours']:.2f} h, {status['events']} events"
        )

    # ---------------------------------------------------------------------------------- searching

    def search(self, query: str, k: int = 10, by: str = "videos", **which: Any) -> Results:
        """The best k videos for a sentence, or the best k moments.

        Args:
            by: "videos", ranked by the model's read-out, each with its best moments; or "moments",
                ranked by event.
            which: the fields of `Filter`: within, since, until, min_seconds, max_seconds.

        Raises:
            SearchError: there is no index, the query is empty, or a filter is none.
            ModelError: its model cannot be loaded, or is another.
        """
        return self.search_many([query], k, by, **which)[0]

    def search_many(
        self, queries: Sequence[str], k: int = 10, by: str = "videos", **which: Any
    ) -> list[Results]:
        """`search` of many sentences at once, which is quicker; each with the mean time."""
        if k < 1 or by not in RANKINGS:
            raise SearchError(f"k is at least 1, and by is videos or moments: not {k} and {by!r}")
        if not all(map(str.strip, queries)):
            raise SearchError("the query is empty: say what to look for")
        with self._searching:
            self.load()
            started = time.perf_counter()
            rankings = self.search_embedded(self.encode_texts(queries), k, by, **which)
            seconds = (time.perf_counter() - started) / len(queries)
        return [
            replace(ranking, query=query, seconds=seconds)
            for query, ranking in zip(queries, rankings, strict=True)
        ]

    def search_embedded(
        self, texts: Tensor, k: int = 10, by: str = "videos", **which: Any
    ) -> list[Results]:
        """`search` of the embeddings of sentences, float32 [T, D] of length 1 on the CPU."""
        with self._searching:
            started = time.perf_counter()
            (now, source), wanted, only = self._source(), Filter(**which), None
            if wanted != Filter():
                only = {entry.id for entry in wanted.select(now.entries.values())}
            rank = RANKINGS[by]
            hits = [rank(scores, k, now.entries) for scores in source.scores(texts, only)]
            seconds = (time.perf_counter() - started) / max(1, len(texts))
            return [Results("", seconds, now.version, found) for found in hits]

    def load(self) -> None:
        """Load what the first search needs: model, vocabulary, events. It takes seconds, once."""
        with self._searching:
            if not self._loaded:
                self._source()
                self.encode_texts(["warm up"])
                self._loaded = True

    def timeline(self, query: str, video_id: str) -> list[Moment]:
        """Every event of a video with its score, in the order of time. SearchError: no video."""
        with self._searching:
            now, source = self._source()
            if now.video(video_id).status == FAILED:
                return []
            (scores,) = source.scores(self.encode_texts([query]), {video_id})
            rows = scores.events_of(video_id)
        order = np.lexsort((rows.end, rows.start))
        columns = (rows.start, rows.end, rows.scores, rows.level)
        return [Moment(*row) for row in zip(*(x[order].tolist() for x in columns), strict=True)]

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of sentences: float32 [T, D] of length 1 on the CPU."""
        tokens = tokenize(texts, self.model.config.max_words).to(self.device)
        return unit(self.model.encode_text(tokens)).float().cpu()

    # --------------------------------------------------------------------------------- what is in

    def videos(self, within: str | None = None) -> list[Video]:
        """All videos, also those that failed, or those whose name or path fits a pattern."""
        entries = self._now().entries.values()
        return [entry for entry in entries if within is None or matches(entry, within)]

    def video(self, video_id: str) -> Video:
        """The video of that id. SearchError: there is none, or no longer."""
        return self._now().video(video_id)

    @property
    def roots(self) -> list[str]:
        """The folders that were indexed."""
        return sorted({entry.root for entry in self._now().entries.values()})

    def status(self) -> dict:
        """Numbers of videos, failed ones, hours and events, the version, and ``indexing``: None or
        how far an indexer is (of indexes in a folder of this machine)."""
        now = self._now()
        entries = now.entries.values()
        windows = sum(entry.windows for entry in entries)
        failed = sum(entry.status == FAILED for entry in entries)
        return {
            "videos": len(entries) - failed,
            "failed": failed,
            "hours": sum(entry.duration for entry in entries) / 3600,
            "events": windows * self._description["events"],
            "version": now.version,
            "indexing": progress.read(self.uri),
        }

    def info(self) -> dict:
        """What is in it and what made it, to be printed."""
        own = self._description
        model = {name: own[name] for name in ("checkpoint", "fingerprint", "window_seconds")}
        model["clip_weights"] = own["clip_weights"] or own["clip"]
        return self.status() | {"roots": self.roots} | model

    def approximate_recall(self, queries: Sequence[str] | None = None, k: int = 10) -> float:
        """Which share of the k best videos the approximate index finds, the mean over queries.

        Without queries events of the index are, drawn at random: sentences are harder.

        SearchError: there is no approximate index.
        """
        with self._searching:
            texts = self.encode_texts(queries) if queries else self._some_events(RECALL_QUERIES)
            found, before = {}, self.approximate
            try:
                for self.approximate in (True, False):
                    results = self.search_embedded(texts, k)
                    found[self.approximate] = [{hit.video.id for hit in r} for r in results]
            finally:
                self.approximate = before
        pairs = zip(found[True], found[False], strict=True)
        return float(np.mean([len(some & all_) / len(all_) for some, all_ in pairs if all_]))

    def _some_events(self, count: int) -> Tensor:
        random = np.random.default_rng(0)
        entries = [entry for entry in self._now().entries.values() if entry.windows]
        if not entries:
            raise SearchError(f"{self.uri}: it has no events to draw queries from")
        drawn = random.choice(len(entries), min(count, len(entries)), replace=False)
        pieces = self.storage.vectors({entries[i].id for i in drawn})
        vectors = np.concatenate([piece.vectors for piece in pieces])
        return torch.from_numpy(vectors[random.integers(len(vectors), size=count)])

    def export(self, output: Path) -> int:
        """Write all events to a .parquet or .arrow file: path, video, window, event, level, start,
        end, vector. How many. SearchError: another kind of file."""
        from utils.search.export import export_events

        return export_events(self.storage, self._now().entries, output)

    # ----------------------------------------------------------------------------------- changing

    def add(
        self, paths: str | Path | Sequence[str | Path], *, rebuild: bool = False, **settings: Any
    ) -> Report:
        """Index the videos of files and folders that are new or have changed.

        Args:
            rebuild: forget what is in the index first, whatever model it was made with.
            settings: those of `utils.search.indexer.index_videos`.

        Raises:
            SearchError: a path is not there, the index is another model's, or cannot be written.
            OSError: there is no room for temporary files.
        """
        found = find_videos([paths] if isinstance(paths, str | Path) else paths)
        self.prepare(rebuild)
        return index_videos(found, self.storage, self.model, **settings)

    def remove(self, within: str) -> int:
        """Take the videos whose name or path fits a pattern out of the index; how many."""
        found = self.videos(within)
        self.storage.remove(found)
        return len(found)

    def optimize(self, approximate: bool = False) -> None:
        """Make the index smaller and quicker; `approximate`: also build its approximate index."""
        self._description  # noqa: B018  there is an index
        self.storage.optimize(approximate)

    def prepare(self, rebuild: bool = False) -> None:
        """Make the index unless it is there, for the model that is named or at hand.

        SearchError: it is there, for another model, and `rebuild` does not say to replace it.
        """
        if self.storage.model and not rebuild:
            self.model  # noqa: B018  refuses another
            return
        files = choose_model(**self._named)
        self.model = model = load_model(**files).to(self.device)
        self.storage.create(describe(model, files), rebuild)
        self._snapshot, self._matrix = Snapshot(), None
        self._check_model(model)  # another process may have made it first

    # ---------------------------------------------------------------------------------- its parts

    @cached_property
    def device(self) -> torch.device:
        """Where the encoders run."""
        return torch.device(self._device) if self._device else choose_device()

    @cached_property
    def model(self) -> nn.Module:
        """The index's model. ModelError: it cannot be loaded; SearchError: it is another."""
        own = {name: self._description[name] for name in self._named}
        files = own | {name: path for name, path in self._named.items() if path}
        for name, path in files.items():
            if path and not weights_path(path).is_file():
                raise SearchError(f"{self.uri}: its model, {path}, is not there: give --{name}")
        model = load_model(**files)
        self._check_model(model)
        return model.to(self.device)

    @property
    def _description(self) -> dict:
        if not self.storage.model:
            raise SearchError(
                f"{self.uri}: no index there: `bash scripts/search.sh index FOLDER --index "
                f"{self.uri}` makes one"
            )
        return self.storage.model

    def _check_model(self, model: nn.Module) -> None:
        own = self._description
        if fingerprint(model) != own["fingerprint"]:
            name = own["checkpoint"] or own["clip_weights"]
            raise SearchError(
                f"{self.uri}: made with another model ({name}), whose events do not compare: leave "
                "--checkpoint and --clip_weights away, or index again with --rebuild"
            )

    def _now(self, again: bool = False) -> Snapshot:
        """What indexers have made of it by now; `again`: read even if it seems unchanged."""
        self._description  # noqa: B018  there is an index
        with self._looking:
            version = self.storage.version()
            if version != self._snapshot.version or again:
                entries = {entry.id: entry for entry in self.storage.videos()}
                self._snapshot = Snapshot(version, entries)
            return self._snapshot

    def _source(self) -> tuple[Snapshot, Matrix | StoredEvents]:
        """What is searched, of which videos: the events in memory, in float16 if need be, or the
        store."""
        own, readout = self._description, self.model.readout
        for attempt in range(REFRESHES):
            now = self._now(again=attempt > 0)
            rows = sum(entry.windows for entry in now.entries.values()) * own["events"]
            room, size = self.memory_gib * 2**30, rows * own["width"]
            if self.approximate or 2 * size > room or self.storage.most_nearest:
                self._matrix = None
                known = now.entries.keys()
                return now, StoredEvents(
                    self.storage, known, readout, own["events"], self.approximate
                )
            dtype = torch.float32 if 4 * size <= room else torch.float16
            if self._matrix is None or self._matrix.dtype != dtype:
                levels = np.array(own["levels"], np.int8)
                self._matrix = Matrix(self.storage, dtype, readout, levels)
            if self._matrix.update(now.entries.values()):
                return now, self._matrix
        raise SearchError(f"{self.uri}: events of some videos are missing: index with --rebuild")


def open_storage(uri: str) -> Storage:
    """A store by its address: a folder or ``s3://…`` is LanceDB, ``http://host:port`` Milvus.

    SearchError: a package is missing, or it cannot be reached.
    """
    if uri.startswith(("http://", "https://")):
        from utils.search.milvus import MilvusIndex

        return MilvusIndex(uri)
    return LanceIndex(uri)
