"""Batches read ahead by worker processes, which may die, hang, or get signals."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from dataloaders import DataError
from dataloaders.annotations import Video
from dataloaders.clips import ClipSource
from dataloaders.video import DECODE_TIME_LIMIT

# Seconds within which a worker starts to read another clip, whatever the size of its batch: it
# gives up a clip after DECODE_TIME_LIMIT.
WORKER_TIME_LIMIT = 2 * DECODE_TIME_LIMIT
TIMED_OUT = "DataLoader timed out"  # begins the message of its error


class ClipLoader:
    """Iterates over batches (dicts) of a split's videos, read ahead by worker processes.

    The workers start with an iteration and end with it, so that those of training and of evaluation
    never wait side by side. That costs less than a second for eight of them.

    A clip that cannot be read raises its DataError. So does a worker that dies (killed, out of
    memory, crashed in a decoder) or hangs (storage that does not answer any more), with the names
    of the clips which were being read.

    Attributes:
        keys: of the batches of the next iteration, in order.

    Raises:
        DataError: clips are missing.
    """

    keys: Sequence

    def __init__(
        self, videos: Sequence[Video], clips: ClipSource, num_frames: int, size: int,
        num_workers: int,
    ):  # fmt: skip
        self.names = [video.vid_name for video in videos]
        self.clips = clips
        clips.check(self.names, size)
        self.num_frames = num_frames
        self.size = size
        self.num_workers = num_workers
        # Shared with the workers: the video that each is reading, -1 for none.
        self._being_read = torch.full((max(num_workers, 1),), -1).share_memory_()

    def batch(self, key) -> dict:
        """Read the batch of a key, with ``frames``; in a worker."""
        raise NotImplementedError

    def load(
        self, videos: Sequence[int], generators: Sequence[np.random.RandomState | None]
    ) -> torch.Tensor:
        """The frames of videos, given as positions: uint8 [B, N_f, 3, size, size]; a generator each
        draws training frames, None takes evaluation frames."""
        worker = get_worker_info()
        slot = worker.id if worker else 0
        frames = []
        try:
            for video, generator in zip(videos, generators, strict=True):
                self._being_read[slot] = video
                name = self.names[video]
                frames.append(self.clips.load(name, self.num_frames, self.size, generator))
        finally:
            self._being_read[slot] = -1
        return default_collate(frames)  # in a worker: straight into shared memory

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key) -> dict | DataError:
        """For DataLoader, which replaces the message of an error by the worker's traceback."""
        try:
            return self.batch(key)
        except DataError as error:
            return error

    def __iter__(self) -> Iterator[dict]:
        """The workers start reading now, not when the first batch is asked for."""
        loader = DataLoader(
            self,
            batch_size=None,  # an item is a batch
            sampler=self.keys,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            timeout=WORKER_TIME_LIMIT if self.num_workers else 0,
            # DataLoader draws a seed for its workers that nothing here uses; drawn from a generator
            # of its own it leaves torch's global state alone, which resuming restores.
            generator=torch.Generator(),
        )
        with self.worker_errors(), _blocked_signals():
            batches = iter(loader)
            if workers := getattr(batches, "_workers", None):
                # multiprocessing waits for all workers at exit, but runs such finalizers before,
                # and none of them in processes that are forked meanwhile.
                Finalize(batches, _kill, (workers,), exitpriority=0)
            return self._checked(batches)

    @contextlib.contextmanager
    def worker_errors(self) -> Iterator[None]:
        """For work with the batches: torch says that a worker died wherever the program is then.

        Raises:
            DataError: names the clips that were being read.
        """
        try:
            yield
        except RuntimeError as error:
            clips = f"files being read: {', '.join(self._clips_being_read()) or 'none'}"
            if TIMED_OUT in str(error):
                raise DataError(
                    f"a loader worker hangs: nothing new for {WORKER_TIME_LIMIT:g} seconds;"
                    f" {clips}. Does their storage still answer?"
                ) from error
            if "DataLoader worker" in str(error):
                raise DataError(
                    f"a loader worker died ({error}); {clips}. If memory ran out, lower"
                    " num_thread_reader or the batch size; otherwise remove these files and"
                    " prepare them again with `bash scripts/prepare.sh`"
                ) from error
            raise

    def _checked(self, batches: Iterator) -> Iterator[dict]:
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, DataError):
                command = self.clips.check_command
                hint = f"; to find all clips that do not decode: `{command}`" if command else ""
                raise DataError(f"{batch}{hint}")
            yield batch

    def _next(self, batches: Iterator) -> dict | DataError | None:
        """What is next, None at the end; waits for as long as the workers continue to read."""
        being_read = None
        with self.worker_errors():
            while True:
                try:
                    return next(batches, None)
                except RuntimeError as error:
                    before, being_read = being_read, self._clips_being_read()
                    if TIMED_OUT not in str(error) or before == being_read:
                        raise

    def _clips_being_read(self) -> list[str]:
        videos = (video for video in self._being_read.tolist() if video >= 0)
        return [self.clips.label(self.names[video]) for video in videos]


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """They come afterwards; a worker that starts within never hears them. Ctrl-C and a scheduler's
    SIGTERM go to all processes of a run, but what a worker reads is needed for the current step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Those that have not ended by themselves, as one that hangs never does."""
    alive = [worker for worker in workers if worker.is_alive()]
    main = threading.current_thread() is threading.main_thread()  # the only one to set handlers
    if alive and main:  # torch's handler raises where a worker is killed
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in alive:
        worker.kill()
        worker.join()
    if alive and main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
