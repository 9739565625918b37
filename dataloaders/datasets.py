"""From queries and clips to batches: training items, evaluation videos, evaluation texts.

A training item is one video with all its captions. What it holds depends on (seed, epoch, item)
alone, never on the number of workers or on where a resumed epoch starts.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from dataloaders.annotations import Query, Video, corpus_videos
from dataloaders.clips import ClipSource
from dataloaders.frame_store import EncodedClips
from dataloaders.tokenizer import tokenize
from dataloaders.video import DECODE_TIME_LIMIT, VideoError

# Seconds within which a worker at work has another clip in hand than before, whatever the size of
# its batch: it gives up a clip after DECODE_TIME_LIMIT.
WORKER_TIME_LIMIT = 2 * DECODE_TIME_LIMIT


@dataclass(frozen=True)
class Unreadable:
    """An item whose clip could not be read."""

    vid_name: str
    error: VideoError


TIMED_OUT = "DataLoader timed out"  # begins the message of its error

# Called with the name of a video that a run goes without, and the reason.
LeaveOut = Callable[[str, str], None]


class ClipLoader:
    """Iterates over batches (dicts), read ahead by worker processes; ``len()`` batches in all.

    A clip that cannot be read raises its VideoError here, without the worker's traceback; or, with
    `leave_out`, is reported to that and missing from its batch, to which nothing else is added. A
    worker that dies (killed, out of memory, crashed in a decoder) or hangs (storage that does not
    answer any more) raises a VideoError that names the clips which were being read.
    """

    def __init__(
        self,
        dataset: _Clips,
        batches,
        collate,
        num_workers: int,
        pin_memory: bool,
        leave_out: LeaveOut | None,
    ):
        self._dataset = dataset
        self._batches = batches
        self._leave_out = leave_out
        self._has_workers = False  # they are started by the first iteration
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            timeout=WORKER_TIME_LIMIT if num_workers else 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            # DataLoader draws a seed for its workers that nothing here uses; drawn from a generator
            # of its own it leaves torch's global state alone, which resuming restores.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict]:
        """The workers start reading now, not when the first batch is asked for."""
        with self.worker_errors():
            if self._has_workers:
                return self._checked(iter(self._loader))
            self._has_workers = True
            with _blocked_signals():
                return self._checked(iter(self._loader))

    @contextlib.contextmanager
    def worker_errors(self) -> Iterator[None]:
        """For work with the batches: torch says that a worker died wherever the program is then.

        Raises:
            VideoError: names the clips that were being read.
        """
        try:
            yield
        except RuntimeError as error:
            self._raise_named(error)

    def _checked(self, batches: Iterator) -> Iterator[dict]:
        while (read := self._next(batches)) is not None:
            batch, unreadable = read
            for item in unreadable:
                if self._leave_out is None:
                    raise item.error
                self._leave_out(item.vid_name, str(item.error))
            if batch is not None:
                if isinstance(batch["frames"], EncodedClips):
                    batch["frames"] = batch["frames"].decode(self._dataset.clips.decode_on)
                yield batch
            else:
                self._refuse_empty(unreadable)

    def _next(self, batches: Iterator) -> tuple[dict | None, list[Unreadable]] | None:
        """What is next, None at the end; waits for as long as the workers go on reading."""
        in_hand = None
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                before, in_hand = in_hand, self._dataset.clips_in_hand()
                if TIMED_OUT not in str(error) or before == in_hand:
                    self._raise_named(error)

    def _raise_named(self, error: RuntimeError) -> NoReturn:
        """An error of DataLoader's about its workers, with the clips that they were reading."""
        clips = ", ".join(self._dataset.clips_in_hand()) or "none"
        if TIMED_OUT in str(error):
            raise VideoError(
                f"a loader worker hangs: nothing new for {WORKER_TIME_LIMIT:g} seconds; files being"
                f" read: {clips}. Does their storage still answer?"
            ) from error
        if "DataLoader worker" in str(error):
            raise VideoError(
                f"a loader worker died ({error}); files being read: {clips}. If memory ran out,"
                " lower num_thread_reader or the batch size; otherwise remove these files and"
                " prepare them again with `bash scripts/prepare.sh`"
            ) from error
        raise error

    def _refuse_empty(self, unreadable: list[Unreadable]) -> None:
        """A batch of which no clip could be read: an evaluation can do without it."""


class TrainingLoader(ClipLoader):
    """A ClipLoader whose order and frames change with the epoch."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch of the next iteration, which starts at its batch ``first_batch``.

        ``len()`` stays the number of batches of a whole epoch.

        Raises:
            ValueError: there is no such batch.
        """
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch is {first_batch}, but an epoch has {len(self)} batches")
        self._batches.epoch = epoch
        self._batches.first_batch = first_batch

    def _refuse_empty(self, unreadable: list[Unreadable]) -> None:
        raise VideoError(
            "no clip of a training batch can be read: check the video folder with"
            " `.venv/bin/python scripts/check_videos.py --decode`; the first:"
            f" {unreadable[0].error}"
        )


def training_loader(
    queries: Sequence[Query],
    clips: ClipSource,
    *,
    num_frames: int,
    size: int,
    max_words: int,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    leave_out: LeaveOut | None = None,
) -> TrainingLoader:
    """Shuffled batches of videos with all their captions; an incomplete last batch is dropped.

    A batch holds ``frames`` uint8 [B, N_f, 3, size, size], ``token_ids`` int64 [T, W] (0-padded),
    ``text_to_video`` int64 [T] (the text's row in ``frames``) and ``vid_names`` (B names). Captions
    of a video keep the order of the annotations.

    Args:
        leave_out: called for a video that cannot be read, whose place in its batch stays empty.

    Raises:
        VideoError: clips are missing (here); a clip cannot be read (when iterating), or with
            `leave_out` all those of a batch.
        ValueError: there are fewer videos than one batch takes.
    """
    dataset = _TrainingClips(queries, seed, clips, num_frames, size, num_workers)
    if len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} training videos do not fill one batch of {batch_size}:"
            " lower batch_size or add videos"
        )
    batches = _ShuffledBatches(len(dataset), batch_size, seed)
    collate = partial(_collate, make_batch=partial(_training_batch, max_words=max_words))
    return TrainingLoader(dataset, batches, collate, num_workers, pin_memory, leave_out)


def evaluation_video_loader(
    videos: Sequence[Video],
    clips: ClipSource,
    *,
    num_frames: int,
    size: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    leave_out: LeaveOut | None = None,
) -> ClipLoader:
    """The videos in their order, all of them, with the evaluation frames.

    A batch holds ``frames`` uint8 [B, N_f, 3, size, size] and ``indices`` int64 [B], which are
    positions in ``videos``.

    Args:
        leave_out: called for a video that cannot be read, whose index is then in no batch.

    Raises:
        VideoError: clips are missing (here); without `leave_out`, a clip cannot be read (when
            iterating).
    """
    dataset = _EvaluationClips(videos, clips, num_frames, size, num_workers)
    batches = [list(rows) for rows in _chunks(len(dataset), batch_size)]
    collate = partial(_collate, make_batch=_evaluation_batch)
    return ClipLoader(dataset, batches, collate, num_workers, pin_memory, leave_out)


def evaluation_text_batches(
    queries: Sequence[Query], max_words: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """All captions, those of a length together so that little is padded.

    Returns:
        Batches of ``token_ids`` int64 [T, W], 0-padded to the longest of the batch, and ``indices``
        int64 [T], the captions' positions in ``queries``. Shorter ones first, else in their order.
    """
    token_ids = tokenize([query.desc for query in queries], max_words)
    behind = (token_ids.flip(1) != 0).int().argmax(1)  # 0 is a token too, but never the last one
    lengths = token_ids.shape[1] - behind
    return [
        {"token_ids": token_ids[rows, : lengths[rows].max()], "indices": rows}
        for rows in lengths.argsort(stable=True).split(batch_size)
    ]


class _Clips(Dataset):
    """Videos of a split whose clips are there; knows which of them its workers are reading."""

    def __init__(
        self,
        videos: Sequence[Video],
        clips: ClipSource,
        num_frames: int,
        size: int,
        num_workers: int,
    ):
        self.names = [video.vid_name for video in videos]
        self.clips = clips
        clips.check(self.names, size)
        self.num_frames = num_frames
        self.size = size
        # Shared with the workers: the item that each has in hand, -1 for none.
        self._in_hand = torch.full((max(num_workers, 1),), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.names)

    def clips_in_hand(self) -> list[str]:
        items = (item for item in self._in_hand.tolist() if item >= 0)
        return [self.clips.label(self.names[item]) for item in items]

    def _load(self, item: int, generator: np.random.RandomState | None = None):
        worker = get_worker_info()
        slot = worker.id if worker else 0
        self._in_hand[slot] = item
        try:
            return self.clips.load(self.names[item], self.num_frames, self.size, generator)
        finally:
            self._in_hand[slot] = -1


class _EvaluationClips(_Clips):
    """Item i: video i."""

    def __getitem__(self, item: int) -> dict | Unreadable:
        try:
            return {"frames": self._load(item), "indices": item}
        except VideoError as error:
            return Unreadable(self.names[item], error)


class _TrainingClips(_Clips):
    """Item (epoch, i): video i and all its captions."""

    def __init__(self, queries: Sequence[Query], seed: int, *clips):
        super().__init__(corpus_videos(queries), *clips)
        self.seed = seed
        captions: dict[str, list[str]] = {}
        for query in queries:
            captions.setdefault(query.vid_name, []).append(query.desc)
        self.captions = [captions[name] for name in self.names]

    def __getitem__(self, key: tuple[int, int]) -> dict | Unreadable:
        epoch, item = key
        generator = np.random.RandomState([self.seed, epoch, item])
        try:
            frames = self._load(item, generator)
        except VideoError as error:
            return Unreadable(self.names[item], error)
        return {"frames": frames, "captions": self.captions[item], "vid_name": self.names[item]}


class _ShuffledBatches(Sampler):
    """Batches of keys (epoch, item), in an order drawn from (seed, epoch)."""

    def __init__(self, num_items: int, batch_size: int, seed: int):
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        return self.num_items // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.RandomState([self.seed, self.epoch]).permutation(self.num_items)
        whole = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        for items in whole[self.first_batch :].tolist():
            yield [(self.epoch, item) for item in items]


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """They come afterwards. A process that is forked within never runs this one's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to all processes of a run: what a worker reads is still
    needed for the step in hand. Only the main process's own SIGTERM ends a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@atexit.register
def _end_workers_that_hang() -> None:
    """multiprocessing ends daemons, as loader workers are, by SIGTERM and waits for them; one that
    hangs hears SIGKILL only. Other processes are their starter's business."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _collate(
    items: list[dict | Unreadable], make_batch: Callable[[list[dict]], dict]
) -> tuple[dict | None, list[Unreadable]]:
    """The batch of what could be read, if there is anything, and what could not."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    readable = [item for item in items if not isinstance(item, Unreadable)]
    return make_batch(readable) if readable else None, unreadable


def _evaluation_batch(items: list[dict]) -> dict:
    indices = torch.tensor([item["indices"] for item in items])
    return {"frames": _stack([item["frames"] for item in items]), "indices": indices}


def _training_batch(items: list[dict], max_words: int) -> dict:
    counts = torch.tensor([len(item["captions"]) for item in items])
    return {
        "frames": _stack([item["frames"] for item in items]),
        "token_ids": tokenize([text for item in items for text in item["captions"]], max_words),
        "text_to_video": torch.arange(len(items)).repeat_interleave(counts),
        "vid_names": [item["vid_name"] for item in items],
    }


def _stack(clips: list[torch.Tensor | EncodedClips]) -> torch.Tensor | EncodedClips:
    if isinstance(clips[0], EncodedClips):
        return EncodedClips.stack(clips)
    return default_collate(clips)  # in a worker: straight into shared memory


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
