"""Where clips come from: one small interface behind training, evaluation and plotting.

A folder of prepared videos is one source (here), a frame store another (dataloaders.frame_store).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dataloaders import DataError, listed
from dataloaders.video import load_clip, probe_clip


class ClipSource(ABC):
    """Clips by video name. Instances travel to worker processes, so they hold no open files."""

    kind: str  # what kind of thing the frames are read from: resuming says if it is another
    check_command = ""  # finds every clip that does not decode, if there is such a command

    @abstractmethod
    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the names that have no clip here, in order.

        Cheap: no clip is opened.

        Raises:
            DataError: the source itself is not there or unusable.
        """

    @abstractmethod
    def label(self, name: str) -> str:
        """What messages call the clip: the file, and the clip in it if there are several."""

    @abstractmethod
    def load(
        self,
        name: str,
        num_frames: int,
        size: int,
        generator: np.random.RandomState | None = None,
    ) -> torch.Tensor:
        """The sampled frames of a clip: uint8 [N_f, 3, size, size], RGB.

        Args:
            generator: draws the training frames; None takes the evaluation frames.

        Raises:
            DataError: the clip is missing or cannot be used; the message names it.
        """

    @abstractmethod
    def probe(self, name: str, size: int) -> int | None:
        """Whether a clip can be used, as far as shows without decoding it.

        Args:
            size: side of the square frames, pixels.

        Returns:
            The number of its frames, if that is known.

        Raises:
            DataError: it cannot.
        """

    @abstractmethod
    def missing_message(self, missing: Sequence[str], total: int) -> str:
        """One line: how many of ``total`` clips are missing, and the remedy."""

    def check(self, names: Sequence[str], size: int) -> None:
        """Raises a DataError that lists the clips which are not there, or do not fit ``size``.

        Cheap too: a folder's clips are only read when they are loaded.
        """
        missing = self.missing(names)
        if missing:
            raise DataError(f"{self.missing_message(missing, len(names))}:\n{listed(missing)}")


class VideoFolder(ClipSource):
    """A folder of ``<vid_name>.mp4``, prepared by ``scripts/prepare.sh``."""

    kind = "video folder"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.check_command = (
            ".venv/bin/python -m scripts.data.check_videos --decode"
            f" --video_dir {self.folder} --annotations …"
        )

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.mp4"

    def missing(self, names: Sequence[str]) -> list[str]:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such video folder: set video_dir")
        present = {path.name for path in self.folder.iterdir()}  # one listing, however many names
        return [name for name in names if self.path(name).name not in present]

    def missing_message(self, missing: Sequence[str], total: int) -> str:
        return (
            f"{self.folder}: {len(missing)} of {total} video files are missing: set video_dir,"
            " or make them with `bash scripts/prepare.sh`"
        )

    def label(self, name: str) -> str:
        return str(self.path(name))

    def probe(self, name: str, size: int) -> int | None:
        return probe_clip(self.path(name), size)

    def load(
        self,
        name: str,
        num_frames: int,
        size: int,
        generator: np.random.RandomState | None = None,
    ) -> torch.Tensor:
        return load_clip(self.path(name), num_frames, size, generator)
