"""Where clips come from: one small interface behind training, evaluation and plotting.

A folder of prepared videos is one source (here), a frame store another (dataloaders.frame_store).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dataloaders import DataError, listed
from dataloaders.video import PREPARE, load_clip, probe_clip

logger = logging.getLogger("propy.clips")

MANIFEST = "manifest.jsonl"  # beside the clips: what they were when they were prepared
MEASURES = ("bytes", "crc32", "frames")  # of the file, in every line
VIDEO_ENDING = re.compile(r"\.(mp4|m4v|mkv|webm|avi|mov|flv|wmv|mpe?g|3gp|ts)$", re.IGNORECASE)


def missing_names(
    names: Sequence[str], present: Collection[str], ending: str = ""
) -> dict[str, str]:
    """Which names are not among those present, in order, each with what there is to say of it: also
    what is there under a name that is easily confused with it.

    Args:
        names: of videos.
        present: names of clips, or of files if there is an ending.
    """
    missing = [name for name in names if name + ending not in present]
    alike = {_alike(name): name for name in sorted(present, reverse=True)} if missing else {}
    said = dict.fromkeys(missing, "missing")
    for name in missing:
        if other := alike.get(_alike(name)):
            pair = other, name + ending
            same = len({unicodedata.normalize("NFC", one) for one in pair}) == 1
            found, wanted = map(ascii if same else repr, pair)  # which look alike
            remedy = "correct vid_name, or name or prepare it so"
            said[name] += f", but {found} is there, not {wanted}: {remedy}"
    return said


def _alike(name: str) -> str:
    """The same for x, x.mp4, x.mp4.mp4 and X.MKV, in any Unicode normal form."""
    while ending := VIDEO_ENDING.search(name):
        name = name[: ending.start()]
    return unicodedata.normalize("NFC", name.casefold())


class ClipSource(ABC):
    """Clips by video name. Instances travel to worker processes, so they hold no open files."""

    kind: str  # what kind of thing the frames are read from: resuming says if it is another
    place: Path  # the folder or file
    remedy: str  # where clips are missing
    check_command = ""  # finds every clip that does not decode, if there is such a command

    @abstractmethod
    def missing(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the names that have no clip here, see `missing_names`.

        Cheap: no clip is opened.

        DataError: the source itself is not there or unusable.
        """

    @abstractmethod
    def label(self, name: str) -> str:
        """What messages call the clip: the file, and the clip in it if there are several."""

    @abstractmethod
    def load(
        self, name: str, num_frames: int, size: int, generator: np.random.RandomState | None = None
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

    def check(self, names: Sequence[str], size: int) -> None:
        """Raises a DataError that lists the clips which are not there, or do not fit ``size``.

        Cheap too: a folder's clips are only read when they are loaded.
        """
        if missing := self.missing(names):
            lines = listed([f"{name}: {reason}" for name, reason in missing.items()])
            count = f"{len(missing)} of {len(names)} clips are missing from the {self.kind}"
            raise DataError(f"{self.place}: {count}: {self.remedy}:\n{lines}")


def read_manifest(folder: Path) -> dict[str, dict]:
    """What preparation noted of every clip, by name: the last line of each counts.

    A line that a killed run left half-written is passed over: its clip did not get its name.

    DataError: it is there and cannot be read.
    """
    path, noted = folder / MANIFEST, {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            noted[str(entry["vid_name"])] = entry | {k: int(entry[k]) for k in MEASURES}
    return noted


def compare(path: Path, noted: Mapping | None, checksum: bool = False) -> None:
    """Compare a clip with what a manifest notes of it, if anything: its size, and with `checksum`
    the CRC-32 of its bytes, which all have to be read for that.

    DataError: it differs, or cannot be read; the message leaves its name to the caller.
    """
    if noted is None:
        return
    try:
        facts = {"bytes": path.stat().st_size}
        facts |= {"crc32": zlib.crc32(path.read_bytes())} if checksum else {}
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    for kind, fact in facts.items():
        if fact != noted[kind]:
            raise DataError(f"it is not as it was prepared: {kind} {fact}, not {noted[kind]}")


class VideoFolder(ClipSource):
    """A folder of ``<vid_name>.mp4``, prepared by ``scripts/prepare.sh``.

    Attributes:
        noted: see `read_manifest`; empty for a folder that has none, made earlier or by others.
    """

    kind = "video folder"
    remedy = "set video_dir, or make them with `bash scripts/prepare.sh`"

    def __init__(self, folder: str | Path):
        self.place = self.folder = Path(folder)
        self.noted = read_manifest(self.folder)
        if not self.noted and self.folder.is_dir():
            logger.info(
                "%s: no %s: whether clips are as they were prepared cannot be compared",
                *(self.folder, MANIFEST),
            )
        self.check_command = (
            ".venv/bin/python -m scripts.data.check_videos --decode"
            f" --video_dir {self.folder} --annotations …"
        )

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.mp4"

    def missing(self, names: Sequence[str]) -> dict[str, str]:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such video folder: set video_dir")
        present = {path.name for path in self.folder.iterdir()}  # one listing, however many names
        return missing_names(names, present, ".mp4")

    def label(self, name: str) -> str:
        return str(self.path(name))

    def probe(self, name: str, size: int) -> int | None:
        frames = probe_clip(self.path(name), size)
        self.compare(name)
        return frames

    def compare(self, name: str, checksum: bool = False) -> None:
        """As `compare`, of a clip by its name."""
        path = self.path(name)
        try:
            compare(path, self.noted.get(name), checksum)
        except DataError as error:
            raise DataError(f"{path}: {error}: {PREPARE}") from error

    def load(
        self, name: str, num_frames: int, size: int, generator: np.random.RandomState | None = None
    ) -> torch.Tensor:
        return load_clip(self.path(name), num_frames, size, generator)
