"""From queries and clips to batches: training items, evaluation videos, evaluation texts.

A training item is one video with all its captions. What it holds depends on (seed, epoch, item)
alone, never on the number of workers or on where a resumed epoch starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Sampler, default_collate

from dataloaders import DataError
from dataloaders.annotations import Query, Video, corpus_videos
from dataloaders.clips import ClipSource
from dataloaders.loader import ClipDataset, ClipLoader, LeaveOut, TrainingLoader, Unreadable
from dataloaders.tokenizer import tokenize


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
        DataError: clips are missing (here); a clip cannot be read (when iterating), or with
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
        DataError: clips are missing (here); without `leave_out`, a clip cannot be read (when
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


class _EvaluationClips(ClipDataset):
    """Item i: video i."""

    def __getitem__(self, item: int) -> dict | Unreadable:
        try:
            return {"frames": self._load(item), "indices": item}
        except DataError as error:
            return Unreadable(self.names[item], error)


class _TrainingClips(ClipDataset):
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
        except DataError as error:
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


def _collate(
    items: list[dict | Unreadable], make_batch: Callable[[list[dict]], dict]
) -> tuple[dict | None, list[Unreadable]]:
    """The batch of what could be read, if there is anything, and what could not."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    readable = [item for item in items if not isinstance(item, Unreadable)]
    return make_batch(readable) if readable else None, unreadable


def _evaluation_batch(items: list[dict]) -> dict:
    indices = torch.tensor([item["indices"] for item in items])
    # default_collate: in a worker, straight into shared memory
    return {"frames": default_collate([item["frames"] for item in items]), "indices": indices}


def _training_batch(items: list[dict], max_words: int) -> dict:
    counts = torch.tensor([len(item["captions"]) for item in items])
    return {
        "frames": default_collate([item["frames"] for item in items]),
        "token_ids": tokenize([text for item in items for text in item["captions"]], max_words),
        "text_to_video": torch.arange(len(items)).repeat_interleave(counts),
        "vid_names": [item["vid_name"] for item in items],
    }


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
