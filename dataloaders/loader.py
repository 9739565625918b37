"""Batches read ahead by worker processes, which may die, hang, or get signals."""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from dataloaders import DataError
from dataloaders.annotations import Video
from dataloaders.clips import ClipSource
from dataloaders.video import DECODE_TIME_LIMIT

# Seconds within which a worker starts to read another clip, whatever the size of its batch: it
# gives up a clip after DECODE_TIME_LIMIT.
WORKER_TIME_LIMIT = 2 * DECODE_TIME_LIMIT
TIMED_OUT = "DataLoader timed out"  # begins the message of its error
PREFETCH = 2  # batches that a worker reads ahead


class ClipLoader:
    """Iterates over batches (dicts) of a split's videos, read ahead by worker processes.

    The workers start with an iteration and end with it, so that those of training and of evaluation
    never wait side by side. That costs less than a second for eight of them.

    What the workers read reaches this process through memory that they are forked with: neither
    /dev/shm, 64 MB in a container, which is less than one batch, nor Unix sockets, which a long
    TMPDIR has no room for. So nothing of that has to be set up where it runs.

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
        num_workers: int, batch_size: int,
    ):  # fmt: skip
        self.names = [video.vid_name for video in videos]
        self.clips = clips
        clips.check(self.names, size)
        self.num_frames = num_frames
        self.size = size
        self.num_workers = num_workers
        self.batch_size = batch_size  # the largest
        # Shared with the workers: the video that each is reading, -1 for none.
        self._being_read = _shared_memory(8 * max(num_workers, 1)).view(torch.int64).fill_(-1)

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
        shape = len(videos), self.num_frames, 3, self.size, self.size
        frames = worker.dataset.room(shape) if worker else torch.empty(shape, dtype=torch.uint8)
        try:
            for row, (video, generator) in enumerate(zip(videos, generators, strict=True)):
                self._being_read[slot] = video
                name = self.names[video]
                frames[row] = self.clips.load(name, self.num_frames, self.size, generator)
        finally:
            self._being_read[slot] = -1
        return frames

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[dict]:
        """The workers start reading now, not when the first batch is asked for.

        DataError: they cannot start.
        """
        slots = self.num_workers and PREFETCH * self.num_workers + 1
        loader = DataLoader(
            reader := _Reader(self, slots),
            batch_size=None,  # an item is a batch
            sampler=list(enumerate(self.keys)),
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH if self.num_workers else None,
            collate_fn=lambda batch: batch,  # not tensors, which go through /dev/shm
            pin_memory=torch.cuda.is_available(),
            timeout=WORKER_TIME_LIMIT if self.num_workers else 0,
            # DataLoader draws a seed for its workers that nothing here uses; drawn from a generator
            # of its own it leaves torch's global state alone, which resuming restores.
            generator=torch.Generator(),
        )
        with self.worker_errors(), _blocked_signals():
            try:
                if self.num_workers:
                    multiprocessing.Lock()  # where DataLoader cannot have one it shows a traceback
                batches = iter(loader)
            except OSError as error:
                raise DataError(
                    f"{self.num_workers} loader workers cannot start ({error}): do /dev/shm (of a"
                    " container: --shm-size, --ipc=host) and the limits on processes and memory"
                    " allow them? num_thread_reader 0 needs none"
                ) from error
            if workers := getattr(batches, "_workers", None):
                # multiprocessing waits for all workers at exit, but runs such finalizers before,
                # and none of them in processes that are forked meanwhile.
                Finalize(batches, _kill, (workers,), exitpriority=0)
            return self._checked(batches, reader)

    @contextlib.contextmanager
    def worker_errors(self) -> Iterator[None]:
        """For work with the batches: torch says that a worker died wherever the program is then.

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
                    " num_thread_reader or the batch size; otherwise prepare these"
                    " files again with `bash scripts/prepare.sh`"
                ) from error
            raise

    def _checked(self, batches: Iterator, reader: _Reader) -> Iterator[dict]:
        """Args: reader: of the batches; has to live as long as they are received."""
        try:
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, _Parcel):
                    batch = batch.open()
                if isinstance(batch, DataError):
                    command = self.clips.check_command
                    hint = f"; to find all clips that do not decode: `{command}`" if command else ""
                    raise DataError(f"{batch}{hint}")
                yield batch
        finally:  # now: later torch would raise of a dead worker wherever the program is then
            if hasattr(batches, "_workers"):
                batches._shutdown_workers()
                _kill(batches._workers)

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


def _shared_memory(size: int) -> torch.Tensor:
    """uint8 [size] that processes forked from now on share; only what is used takes memory.

    DataError: there is not so much.
    """
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    except OSError as error:
        raise DataError(
            f"no {size / 2**30:.1f} GiB of memory for what the loader workers read ahead"
            f" ({error.strerror}): lower num_thread_reader or the batch size"
        ) from error


class _Reader:
    """The batches of one iteration, as a data set: frames go through slots of shared memory.

    A worker writes batch n into slot n modulo their number. DataLoader hands it out after so many
    others have been received that the batch which was there before has been copied.

    Args:
        slots: 0 without workers.
    """

    def __init__(self, loader: ClipLoader, slots: int) -> None:
        self.loader = loader
        self.size = loader.batch_size * loader.num_frames * 3 * loader.size**2
        self.memory = _shared_memory(slots * self.size).view(slots, self.size) if slots else None
        _readers[id(self)] = self

    def __getitem__(self, item: tuple) -> dict | DataError | _Parcel:
        self.number, key = item
        try:
            batch = self.loader.batch(key)
        except DataError as error:  # raised, its message would be the worker's traceback
            return error
        if self.memory is None:
            return batch
        shape = batch.pop("frames").shape
        # Arrays, since torch would send tensors through /dev/shm.
        rest = {k: v.numpy() if torch.is_tensor(v) else v for k, v in batch.items()}
        return _Parcel(id(self), self.number, shape, rest)

    def room(self, shape: Sequence[int], number: int | None = None) -> torch.Tensor:
        """Where the frames of a batch are; in a worker, of the one that it reads."""
        number = self.number if number is None else number
        return self.memory[number % len(self.memory), : math.prod(shape)].view(shape)


_readers: WeakValueDictionary[int, _Reader] = WeakValueDictionary()  # by their ids


@dataclass
class _Parcel:
    """What a worker sends of a batch: which it is, by that where its frames are, and the rest."""

    reader: int
    number: int
    shape: torch.Size
    rest: dict

    def open(self, pin: bool = False) -> dict:
        """The batch, copied out of the slot."""
        shared = _readers[self.reader].room(self.shape, self.number)
        frames = torch.empty(self.shape, dtype=torch.uint8, pin_memory=pin).copy_(shared)
        rest = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                for k, v in self.rest.items()}  # fmt: skip
        return {"frames": frames} | rest

    def pin_memory(self) -> dict:
        """For DataLoader, whose thread opens it where there is a GPU to copy the frames to."""
        return self.open(pin=True)


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
