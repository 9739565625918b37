"""Batches read ahead by worker processes, which may die, hang, or get signals."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataloaders import DataError
from dataloaders.annotations import Video
from dataloaders.clips import ClipSource
from dataloaders.video import DECODE_TIME_LIMIT

# Seconds within which a worker at work has another clip in hand than before, whatever the size of
# its batch: it gives up a clip after DECODE_TIME_LIMIT.
WORKER_TIME_LIMIT = 2 * DECODE_TIME_LIMIT


@dataclass(frozen=True)
class Unreadable:
    """An item whose clip could not be read."""

    vid_name: str
    error: DataError


TIMED_OUT = "DataLoader timed out"  # begins the message of its error


# Called with the name of a video that a run goes without, and the reason.
LeaveOut = Callable[[str, str], None]


class ClipLoader:
    """Iterates over batches (dicts), read ahead by worker processes; ``len()`` batches in all.

    A clip that cannot be read raises its DataError here, without the worker's traceback; or, with
    `leave_out`, is reported to that and missing from its batch, to which nothing else is added. A
    worker that dies (killed, out of memory, crashed in a decoder) or hangs (storage that does not
    answer any more) raises a DataError that names the clips which were being read.
    """

    def __init__(
        self,
        dataset: ClipDataset,
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
            DataError: names the clips that were being read.
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
            raise DataError(
                f"a loader worker hangs: nothing new for {WORKER_TIME_LIMIT:g} seconds; files being"
                f" read: {clips}. Does their storage still answer?"
            ) from error
        if "DataLoader worker" in str(error):
            raise DataError(
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
        raise DataError(
            "no clip of a training batch can be read: check the video folder with"
            " `.venv/bin/python -m scripts.data.check_videos --decode`; the first:"
            f" {unreadable[0].error}"
        )


class ClipDataset(Dataset):
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
