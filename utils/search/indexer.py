"""Makes an index of files and folders, or brings it up to date.

Threads decode videos side by side while the model encodes what they have decoded; a video is added
when its last window is. What was added is in the index for good, whenever the program ends.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloaders import DataError, listed
from dataloaders.ffmpeg import DEFAULT_TIME_LIMIT, NO_ROOM, kill_running
from modules.similarity import unit
from utils import SearchError
from utils.misc import usable_cores
from utils.search.decode import VideoFrames
from utils.search.hits import FAILED, INDEXED, printable
from utils.search.index import Entry, Events, Storage, new_token
from utils.search.progress import Progress
from utils.search.windows import Window

logger = logging.getLogger("propy.search")

# Of files in a folder; one that is named itself is tried whatever its name. What ffmpeg can open
# has no end, and most of it are no videos: sound, pictures, texts.
SUFFIXES = {
    *(".264", ".265", ".3g2", ".3gp", ".amv", ".asf", ".avi", ".dv", ".f4v", ".flv", ".gif"),
    *(".h264", ".h265", ".hevc", ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg"),
    *(".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm"),
    *(".ogv", ".qt", ".rm", ".rmvb", ".tod", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m"),
}
GPU_BATCH, CPU_BATCH = 16, 4  # windows that are encoded at once
OPTIMIZE_EVERY = 500  # videos
DIGEST_BYTES = 2**20  # of a file's head and of its tail


@dataclass
class Report:
    """What an indexing did.

    Attributes:
        added, changed, moved, unchanged, removed: numbers of videos.
        vanished: videos whose files are gone, but which are in the index still.
        failed, noted: files that could not be indexed, or in part, each with its reason.
        ignored: other files in the folders, counted by suffix.
        video_seconds: length of what was added or changed.
        seconds: of the whole, and of it those that the encoder waited for decoded frames.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    removed: int = 0
    vanished: int = 0
    failed: list[Entry] = field(default_factory=list)
    noted: list[Entry] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    video_seconds: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0
    encoding: float = 0.0

    def __repr__(self) -> str:
        names = ("added", "changed", "moved", "unchanged", "removed")
        counts = [f"{getattr(self, name)} {name}" for name in names if getattr(self, name)]
        lines = [", ".join(counts) or "nothing to index"]
        if self.video_seconds:
            lines[0] += (
                f"; {self.video_seconds / 3600:.2f} h of video in {self.seconds:.0f} s, "
                f"{self.video_seconds / self.seconds:.1f} × real time; the encoder waited for "
                f"frames {self.waiting / max(self.waiting + self.encoding, 1e-9):.0%} of its time"
            )
        if self.vanished:
            lines.append(f"{self.vanished} in the index are no longer there: --prune removes them")
        if self.ignored:
            kinds = ", ".join(f"{n} {kind or 'without'}" for kind, n in self.ignored.most_common(8))
            lines.append(f"not videos by their names: {kinds} (name a file itself to try it)")
        for title, entries in (("in part", self.noted), ("not indexed", self.failed)):
            if entries:
                rows = [f"  {printable(x.name)}: {x.reason}" for x in entries]
                lines.append(f"{title}: {len(entries)}\n{listed(rows)}")
        return "\n".join(lines)


@dataclass
class Job:
    """A file to be looked at, and what became of it.

    Attributes:
        old: the index's row of that path.
        entry: the row to be written.
        windows, encoded: that were decoded, and their events [N_e, D].
    """

    path: Path
    root: Path
    old: Entry | None
    entry: Entry | None = None
    moved_from: Entry | None = None
    windows: list[Window] = field(default_factory=list)
    encoded: list[np.ndarray] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(self.root))


@dataclass
class Found:
    """What is in files and folders.

    Attributes:
        roots: the files and folders, resolved.
        videos: (path, root) in order.
        ignored: other files, counted by suffix.
    """

    roots: list[Path] = field(default_factory=list)
    videos: list[tuple[Path, Path]] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)


def find_videos(paths: Iterable[str | Path]) -> Found:
    """The videos in folders, and files that are named. Hidden files and folders are left alone.
    SearchError: a path is not there."""
    found, videos = Found(), {}
    for path in map(Path, paths):
        root = path.expanduser().resolve()
        found.roots.append(root)
        if root.is_file():
            videos.setdefault(root, root.parent)
        elif not root.is_dir():
            raise SearchError(f"{path}: no such file or folder")
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(
                x for x in folders if not x.startswith(".") and not _is_index(Path(folder, x))
            )
            for name in sorted(names):
                suffix = Path(name).suffix.lower()
                if suffix in SUFFIXES and not name.startswith("."):
                    videos.setdefault(Path(folder, name), root)
                else:
                    found.ignored[suffix] += 1
    found.videos = sorted(videos.items())
    return found


def _is_index(folder: Path) -> bool:
    return (folder / "videos.lance").is_dir()


def index_videos(
    found: Found, storage: Storage, model: nn.Module, *, prune: bool = False,
    workers: int | None = None, batch: int | None = None, part: tuple[int, int] = (0, 1),
    time_limit: float = DEFAULT_TIME_LIMIT, quiet: bool = False,
) -> Report:  # fmt: skip
    """Index those of some videos that are new or have changed.

    Args:
        storage: of an index that `model` made.
        prune: remove those of these folders that are no longer there.
        workers: videos that are decoded side by side (as many as there are cores).
        batch: windows that are encoded at once (16 on a GPU, 4 on a CPU).
        part: (r, n): of n processes the r-th, which does its share of the videos.
        time_limit: seconds that ffmpeg may take to the next frame of a video.
        quiet: no progress bar.

    Raises:
        SearchError: the index cannot be written.
        OSError: there is no room for temporary files.
    """
    started = time.perf_counter()
    run = Indexer(storage, model, workers or usable_cores(), batch, time_limit)
    run.report.ignored = found.ignored
    run.run(found.videos[part[0] :: part[1]], quiet)
    if part[0] == 0:
        run.prune(found.roots, prune)
    storage.optimize()
    run.report.seconds = time.perf_counter() - started
    return run.report


class Indexer:
    """One run of `index_videos`."""

    def __init__(
        self, storage: Storage, model: nn.Module, workers: int, batch: int | None, time_limit: float
    ) -> None:
        self.storage, self.model, self.device = storage, model, next(model.parameters()).device
        self.batch = batch or (GPU_BATCH if self.device.type == "cuda" else CPU_BATCH)
        self.workers, self.time_limit = workers, time_limit
        self.window_seconds = storage.model["window_seconds"]
        self.levels = np.array(storage.model["levels"], np.int8)
        self.proposals = self.model.pyramid.proposals.numpy()
        self.by_path = {entry.path: entry for entry in self.storage.videos()}
        self.by_digest = {entry.digest: entry for entry in self.by_path.values() if entry.digest}
        self.report = Report()
        self.decoded: queue.Queue = queue.Queue(2 * self.batch)
        self.stop = threading.Event()

    def run(self, files: Sequence[tuple[Path, Path]], quiet: bool) -> None:
        """Index what is new or changed of the files (path, root)."""
        jobs = []
        for path, root in files:
            old = self.by_path.get(_text(path))
            if old and _unchanged(old, path):
                self.report.unchanged += 1
                if old.status == FAILED:
                    self.report.failed.append(old)
            else:
                jobs.append(Job(path, root, old))
        if not jobs:
            return
        todo = iter(jobs)
        lock = threading.Lock()
        threads = [
            threading.Thread(target=self._decode_all, args=(todo, lock), daemon=True)
            for _ in range(min(self.workers, len(jobs)))
        ]
        progress = Progress(self.storage.uri, len(jobs))
        bar = tqdm(total=len(jobs), unit="video", dynamic_ncols=True, disable=quiet or None)
        try:
            for thread in threads:
                thread.start()
            for done, job in enumerate(self._finished(len(jobs), progress), start=1):
                self._commit(job)
                progress.show(done, job.name)
                self._show(bar)
                if done % OPTIMIZE_EVERY == 0:
                    self.storage.optimize()
        finally:
            self.stop.set()
            if any(thread.is_alive() for thread in threads):
                kill_running()
            progress.close()
            bar.close()

    def _show(self, bar: tqdm) -> None:
        hours = self.report.video_seconds / 3600
        speed = self.report.video_seconds / max(bar.format_dict["elapsed"], 1e-9)
        total = max(self.report.waiting + self.report.encoding, 1e-9)
        bar.set_postfix_str(
            f"{hours:.2f} h, {speed:.1f} × real time, waiting {self.report.waiting / total:.0%}",
            refresh=False,
        )
        bar.update()

    # ------------------------------------------------------------------------- threads: decoding

    def _decode_all(self, jobs: Iterator[Job], lock: threading.Lock) -> None:
        while not self.stop.is_set():
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            try:
                self._decode(job)
            except BaseException as error:  # raised again where it ends the run
                self._put((job, error))
                return
            self._put((job, None))

    def _decode(self, job: Job) -> None:
        """Put the windows of a video into the queue, and its row into the job."""
        path = _text(job.path)
        facts = {"row": new_token(), "path": path, "root": _text(job.root)}
        facts |= {"name": _text(Path(job.name)), "duration": 0.0, "status": FAILED}
        job.entry = Entry(id=new_token(), size=0, mtime=0.0, **facts)
        try:
            stat = job.path.stat()
            job.entry = replace(job.entry, size=stat.st_size, mtime=stat.st_mtime)
            digest = file_digest(job.path)
            job.entry = replace(job.entry, digest=digest)
            if self._recognise(job):
                return
            if path != str(job.path):
                raise DataError("its name is not UTF-8: rename it")
            video = VideoFrames(
                job.path, self.model.input_resolution, self.model.pyramid.num_frames,
                self.window_seconds, self.time_limit,
            )  # fmt: skip
            for window, frames in zip(video.windows, video, strict=True):
                job.windows.append(window)
                self._put((job, frames))
            after = job.path.stat()
            if (after.st_size, after.st_mtime) != (stat.st_size, stat.st_mtime):
                raise DataError("it changed while it was read: index again when it is complete")
            job.entry = replace(
                job.entry, status=INDEXED, reason=video.note, duration=video.seconds,
                windows=len(video.windows),
            )  # fmt: skip
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            job.entry = replace(job.entry, reason=f"cannot be read: {error.strerror or error}")
        except DataError as error:
            job.entry = replace(job.entry, reason=str(error))

    def _recognise(self, job: Job) -> bool:
        """Whether it is known by its content: touched, or moved here."""
        entry, old = job.entry, job.old
        if not old or old.digest != entry.digest:
            old = self.by_digest.get(entry.digest)
            if not old or Path(old.path).exists():
                return False
            if self.by_digest.pop(entry.digest, None) is None:  # another copy has taken its place
                return False
            job.moved_from = old
        kept = {"id": old.id, "duration": old.duration, "status": old.status}
        job.entry = replace(entry, **kept, reason=old.reason, windows=old.windows)
        return True

    def _put(self, item: tuple) -> None:
        while not self.stop.is_set():
            try:
                self.decoded.put(item, timeout=0.5)
            except queue.Full:
                continue
            return

    # ---------------------------------------------------------------------- main thread: encoding

    def _finished(self, count: int, progress: Progress) -> Iterator[Job]:
        """So many jobs, as they come to their ends."""
        pending: list[tuple[Job, Tensor]] = []
        ended: list[Job] = []
        while count:
            item = None
            try:
                item = self.decoded.get_nowait()
            except queue.Empty:
                if not pending:  # or else the encoder has something to do meanwhile
                    started = time.perf_counter()
                    item = self._wait(progress)
                    self.report.waiting += time.perf_counter() - started
            if item is not None:
                job, what = item
                if isinstance(what, BaseException):
                    raise what
                if what is None:
                    ended.append(job)
                else:
                    pending.append((job, what))
            if pending and (item is None or len(pending) == self.batch):
                self._encode(pending)
                pending = []
                progress.sign()
            waiting = {id(job) for job, _ in pending}
            for job in [job for job in ended if id(job) not in waiting]:
                ended.remove(job)
                count -= 1
                yield job

    def _wait(self, progress: Progress) -> tuple:
        while True:
            try:
                return self.decoded.get(timeout=1.0)
            except queue.Empty:
                progress.sign()

    @torch.inference_mode()
    def _encode(self, pending: list[tuple[Job, Tensor]]) -> None:
        started = time.perf_counter()
        frames = torch.stack([frames for _, frames in pending]).to(self.device)
        events = unit(self.model.encode_video(frames)).float().cpu().numpy()  # [B, N_e, D]
        for (job, _), own in zip(pending, events, strict=True):
            job.encoded.append(own)
        self.report.encoding += time.perf_counter() - started

    def _commit(self, job: Job) -> None:
        """Write what became of a file into the index."""
        entry, report = job.entry, self.report
        replaced = [x for x in (job.old, job.moved_from) if x]
        if entry.status == FAILED:
            report.failed.append(entry)
        elif job.moved_from:
            report.moved += 1
        elif not job.windows:
            report.unchanged += 1  # it was touched, no more
        else:
            report.changed += bool(job.old)
            report.added += not job.old
            report.video_seconds += entry.duration
            report.noted += [entry] if entry.reason else []
        events = self._events(job) if entry.status == INDEXED and job.windows else None
        self.storage.add(entry, events, replaced)

    def _events(self, job: Job) -> Events:
        windows, (num_events, width) = len(job.windows), job.encoded[0].shape
        duration = job.entry.duration
        times = np.concatenate([w.times(self.proposals, duration) for w in job.windows])
        return Events(
            video=np.full(windows * num_events, job.entry.id, dtype=object),
            window=np.repeat(np.arange(windows), num_events),
            event=np.tile(np.arange(num_events), windows),
            level=np.tile(self.levels, windows),
            start=times[:, 0],
            end=times[:, 1],
            vectors=np.stack(job.encoded).reshape(-1, width),
        )

    # -------------------------------------------------------------------------------------- after

    def prune(self, roots: Sequence[Path], remove: bool) -> None:
        """Count, or remove, videos of these folders whose files are gone."""
        places = tuple(_text(root) for root in roots)
        gone = [
            entry
            for entry in self.storage.videos()
            if (entry.path in places or entry.path.startswith(tuple(f"{x}/" for x in places)))
            and not Path(entry.path).exists()
        ]
        if remove:
            self.storage.remove(gone)
            self.report.removed = len(gone)
        else:
            self.report.vanished = len(gone)


def file_digest(path: Path) -> str:
    """Of a file's size, head and tail: what a moved file is known by."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for place in sorted({0, max(0, size - DIGEST_BYTES)}):
            file.seek(place)
            digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()


def _unchanged(entry: Entry, path: Path) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (entry.size, entry.mtime) == (stat.st_size, stat.st_mtime)


def _text(path: Path) -> str:
    """A path as Unicode; what is not, in a file's name, is replaced."""
    return str(path).encode("utf-8", "replace").decode()
