"""From queries and clips to batches: training items, evaluation videos, evaluation texts.

A training item is one video with all its captions. What it holds depends on (seed, epoch, item)
alone, never on the number of workers or on where a resumed epoch starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dataloaders import DataError
from dataloaders.annotations import Query, Split, Video
from dataloaders.clips import ClipSource
from dataloaders.loader import ClipLoader
from dataloaders.sampling import share
from dataloaders.tokenizer import tokenize


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made; the fields are main.py's flags of the same names."""

    max_words: int = 32
    batch_size: int = 24  # videos of a training batch
    batch_size_val: int = 16
    seed: int = 42
    num_thread_reader: int = 0  # worker processes


def check_batch_size(split: Split, batch_size: int) -> None:
    """DataError: the split has fewer videos than one batch takes, or a batch is one video, whose
    contrastive loss is 0."""
    if not 2 <= batch_size <= len(split.videos):
        counts = f"{split.path} has {len(split.videos)} videos, and one alone trains nothing"
        raise DataError(f"--batch_size {batch_size}: {counts}")


class TrainingLoader(ClipLoader):
    """Shuffled batches of videos with all their captions; an incomplete last batch is dropped.

    A batch holds ``frames`` uint8 [B, N_f, 3, size, size], ``token_ids`` int64 [T, W] (0-padded),
    ``text_to_video`` int64 [T] (the text's row in ``frames``) and ``vid_names`` (B names). Captions
    of a video keep the order of the annotations.

    DataError: clips are missing, or see `check_batch_size` (here); a clip cannot be read (when
    iterating).
    """

    def __init__(
        self, split: Split, clips: ClipSource, num_frames: int, size: int, config: LoaderConfig,
        part: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        check_batch_size(split, config.batch_size)
        workers, batch_size = config.num_thread_reader, config.batch_size
        super().__init__(split.videos, clips, num_frames, size, workers, batch_size)
        self.part = part
        self.max_words, self.seed = config.max_words, config.seed
        self.captions: list[list[str]] = [[] for _ in self.names]  # of each video
        for query, video in zip(split.queries, split.target.tolist(), strict=True):
            self.captions[video].append(query.desc)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.names) // self.batch_size

    @property
    def left_out(self) -> int:
        """Videos that an epoch does without, others every time: those of the last batch."""
        return len(self.names) % self.batch_size

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch of the next iteration, which starts at its batch ``first_batch``.

        ValueError: there is no such batch.
        """
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch is {first_batch}, but an epoch has {len(self)} batches")
        order = np.random.RandomState([self.seed, epoch]).permutation(len(self.names))
        whole = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        self.keys = [(epoch, videos) for videos in whole[first_batch:].tolist()]

    def batch(self, key: tuple[int, list[int]]) -> dict:
        epoch, videos = key
        own = videos[share(len(videos), *self.part)]
        generators = [np.random.RandomState([self.seed, epoch, video]) for video in own]
        texts = [text for video in videos for text in self.captions[video]]
        counts = torch.tensor([len(self.captions[video]) for video in videos])
        return {
            "frames": self.load(own, generators),
            "token_ids": tokenize(texts, self.max_words),
            "text_to_video": torch.arange(len(videos)).repeat_interleave(counts),
            "vid_names": [self.names[video] for video in videos],
        }


class EvaluationLoader(ClipLoader):
    """The videos in their order, all of them, with the evaluation frames.

    A batch holds ``frames`` uint8 [B, N_f, 3, size, size] and ``indices`` int64 [B], which are
    positions in ``videos``.

    DataError: clips are missing (here); a clip cannot be read (when iterating).
    """

    def __init__(
        self, videos: Sequence[Video], clips: ClipSource, num_frames: int, size: int,
        config: LoaderConfig,
        part: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        workers, batch_size = config.num_thread_reader, config.batch_size_val
        super().__init__(videos, clips, num_frames, size, workers, batch_size)
        keys = batches_of(len(videos), config)
        self.keys = keys[share(len(keys), *part)]

    def batch(self, key: list[int]) -> dict:
        return {"frames": self.load(key, [None] * len(key)), "indices": torch.tensor(key)}


def batches_of(count: int, config: LoaderConfig) -> list[list[int]]:
    """Positions of `count` videos in batches, the last of which may be smaller."""
    rows, size = range(count), config.batch_size_val
    return [list(rows[first : first + size]) for first in rows[::size]]


def evaluation_text_batches(
    queries: Sequence[Query], max_words: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """All captions, those of a length together so that little is padded.

    Returns:
        Batches of ``token_ids`` int64 [T, W], 0-padded to the longest of the batch, and ``indices``
        int64 [T], the captions' positions in ``queries``. Shorter ones first, else in their order.
    """
    token_ids = tokenize([query.desc for query in queries], max_words)
    padding = (token_ids.flip(1) != 0).int().argmax(1)  # 0 is a token too, but never the last one
    lengths = token_ids.shape[1] - padding
    return [
        {"token_ids": token_ids[rows, : lengths[rows].max()], "indices": rows}
        for rows in lengths.argsort(stable=True).split(batch_size)
    ]
