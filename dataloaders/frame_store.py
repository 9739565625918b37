"""The frame store: every frame of a corpus of prepared clips as JPEG, in one HDF5 file.

A clip's frames are fetched by position, without decoding anything else, so that reading costs the
same for a clip of any length. The format is described at `FrameStore`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from dataloaders import DataError
from dataloaders.clips import ClipSource, missing_names
from dataloaders.ffmpeg import decode_frames
from dataloaders.sampling import sampled_indices
from dataloaders.storage import commit, if_supported, lock, open_hdf5, temporary_sibling
from dataloaders.video import DECODE_TIME_LIMIT, PREPARE, load_every_frame

logger = logging.getLogger("propy.frame_store")

FORMAT, VERSION = "propy frames", 1
LOCK_NAME = "packing.lock"  # in the folder of what is being packed
PACK = "make it with `.venv/bin/python -m scripts.data.pack_frames`"
# Chroma at full resolution: with half of it quality 90 loses 2.5 dB more, and the same loss takes
# more bytes (measured on real clips; dataloaders/README.md).
SUBSAMPLING = 0
DEFAULT_QUALITY = 90


@dataclass(frozen=True, eq=False)
class PackedClip:
    """One clip as it lies in a store, and what it was made from.

    Attributes:
        lengths: uint32 [n], bytes of every frame's JPEG.
        checksums: uint32 [n], CRC-32 of every frame's JPEG.
        source, source_bytes, source_mtime_ns: the clip's file; its change time in nanoseconds.
        first_byte: where in the store's file the first JPEG starts.
    """

    name: str
    lengths: np.ndarray
    checksums: np.ndarray
    source: str
    source_bytes: int
    source_mtime_ns: int
    first_byte: int = 0

    def same_source(self, path: Path) -> bool:
        """Whether the file it was made from has not changed since."""
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.source_bytes, self.source_mtime_ns)


def pack_clip(name: str, path: Path, size: int, quality: int) -> tuple[PackedClip, bytes]:
    """Decode a prepared clip, crop every frame to the model's square, and encode it as JPEG.

    DataError: the clip cannot be used.
    """
    stat = path.stat()
    frames = load_every_frame(path, size)
    decoded = decode_frames(path, DECODE_TIME_LIMIT)
    if decoded.damaged:
        raise DataError(f"{path}: decodes with errors ({decoded.error}): {PREPARE}")
    jpegs = [encode_frame(frame, quality) for frame in frames]
    clip = PackedClip(
        name=name,
        lengths=np.array([len(jpeg) for jpeg in jpegs], np.uint32),
        checksums=np.array([zlib.crc32(jpeg) for jpeg in jpegs], np.uint32),
        source=path.name,
        source_bytes=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
    )
    return clip, b"".join(jpegs)


def encode_frame(frame: torch.Tensor, quality: int) -> bytes:
    """uint8 [3, S, S] RGB as JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return buffer.getvalue()


def decode_jpegs(jpegs: Sequence[bytes]) -> torch.Tensor:
    """JPEGs as uint8 [n, 3, S, S] RGB."""
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    return torch.stack(decode_jpeg(encoded, mode=ImageReadMode.RGB))


class FrameStore(ClipSource):
    """A finished store, for reading.

    The file is HDF5, with attributes ``format``, ``version``, ``size`` (side of the frames, pixels)
    and ``quality`` (JPEG's), and the datasets

    - ``jpeg``, uint8 [bytes], contiguous: the JPEGs of all frames, a clip's in the order of time;
    - ``frame_bytes`` and ``frame_crc32``, uint32 [frames]: length and checksum of each;
    - ``first_frame`` and ``first_byte``, int64 [clips]: where a clip starts in these, in ``jpeg``;
    - ``num_frames``, int64 [clips], and ``name``, the clip's;
    - ``source`` and ``source_…``: what it was made from, see `PackedClip`.

    The index is read once; frames are then read from the file by their offset, without HDF5, whose
    handles do not survive a fork. Nothing stays open. A file that was extended meanwhile has its
    index read again.

    Attributes:
        clips: everything but the frames, by name, as the file was when it was opened.

    Raises:
        DataError: no such file, no frame store, a damaged one, or one of another version.
    """

    kind = "frame store"
    remedy = "add them with `.venv/bin/python -m scripts.data.pack_frames`"

    def __init__(self, path: str | Path):
        self.place = self.path = Path(path)
        if not self.path.is_file():
            unfinished = packing_path(self.path).is_dir()
            state = "is not finished" if unfinished else "no such frame store"
            raise DataError(f"{self.path}: {state}: {PACK}")
        with self._opened() as file:
            self.clips = self._places = self._read_index(file)
            self._identity = file_identity(file)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _read_index(self, opened: BinaryIO) -> dict[str, PackedClip]:
        try:
            with open_hdf5(opened) as file:
                found = file.attrs.get("format"), int(file.attrs.get("version", 0))
                if found != (FORMAT, VERSION):
                    raise DataError(
                        f"{self.path}: format and version are {found}, but this program reads"
                        f" {(FORMAT, VERSION)}: {PACK}"
                    )
                self.size, self.quality = int(file.attrs["size"]), int(file.attrs["quality"])
                return _read_clips(file)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[-200:]
            raise DataError(
                f"{self.path}: no readable frame store ({reason}): give another, or {PACK}"
            ) from error

    def missing(self, names: Sequence[str]) -> dict[str, str]:
        return missing_names(names, self.clips)

    def label(self, name: str) -> str:
        return f"{self.path}: clip {name!r}"

    def probe(self, name: str, size: int) -> int:
        return len(self.clips[name].lengths)  # `check` has the size, reading verifies every frame

    def check(self, names: Sequence[str], size: int) -> None:
        if size != self.size:
            raise DataError(
                f"{self.path}: its frames are {self.size}×{self.size} pixels, but the model reads"
                f" {size}×{size}: make another with"
                f" `.venv/bin/python -m scripts.data.pack_frames --size {size}`"
            )
        super().check(names, size)

    def load(
        self, name: str, num_frames: int, size: int, generator: np.random.RandomState | None = None
    ) -> torch.Tensor:
        self.check([name], size)
        chosen = sampled_indices(self.probe(name, size), num_frames, generator)
        needed, positions = np.unique(chosen, return_inverse=True)
        try:
            frames = decode_jpegs(self.jpegs(name, needed))
        except RuntimeError as error:
            raise DataError(f"{self.label(name)}: cannot be decoded ({error}): {PACK}") from error
        if frames.shape[1:] != (3, size, size):
            raise DataError(f"{self.label(name)}: frames of shape {[*frames.shape[1:]]}: {PACK}")
        return frames[torch.from_numpy(positions)]

    def jpegs(self, name: str, frames: np.ndarray | None = None) -> list[bytes]:
        """Frames of a clip as they are stored, with their checksums verified.

        Args:
            frames: int64 [n], positions in the clip; None for all.

        Raises:
            DataError: the file is cut short, damaged, or has other frames than when it was opened.
        """
        with self._opened() as file:
            if file_identity(file) != self._identity:  # extended; frames may lie elsewhere now
                self._places, self._identity = self._read_index(file), file_identity(file)
            clip = self._places.get(name)
            if not (clip and np.array_equal(clip.checksums, self.clips[name].checksums)):
                raise DataError(f"{self.label(name)}: changed while it was in use: start again")
            try:
                return read_frames(file, clip, frames)
            except DataError as error:
                remedy = f"remove the file and {PACK}"
                raise DataError(f"{self.label(name)}: {error}: {remedy}") from error


def _read_clips(file) -> dict[str, PackedClip]:
    """The index of an open HDF5 file."""
    starts = file["first_frame"][1:]
    columns = {
        "name": file["name"].asstr()[:],
        "lengths": np.split(file["frame_bytes"][:], starts),
        "checksums": np.split(file["frame_crc32"][:], starts),
        "source": file["source"].asstr()[:],
        **{f: file[f][:].tolist() for f in ("source_bytes", "source_mtime_ns")},
        "first_byte": (file["jpeg"].id.get_offset() + file["first_byte"][:]).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    clips = (PackedClip(**dict(zip(columns, row, strict=True))) for row in rows)
    return {clip.name: clip for clip in clips}


def read_frames(file: BinaryIO, clip: PackedClip, frames: np.ndarray | None = None) -> list[bytes]:
    """As `FrameStore.jpegs`, from an open file.

    All are announced before the first is read, so that the system fetches them side by side.

    DataError: one is damaged; without the name of file and clip.
    """
    frames = np.arange(len(clip.lengths)) if frames is None else frames
    lengths = clip.lengths.astype(np.int64)
    starts = (clip.first_byte + lengths.cumsum() - lengths)[frames].tolist()
    places = list(zip(lengths[frames].tolist(), starts, strict=True))
    with if_supported():
        for length, start in places:
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
    jpegs = [os.pread(file.fileno(), length, start) for length, start in places]
    for frame, jpeg in zip(frames, jpegs, strict=True):
        if zlib.crc32(jpeg) != clip.checksums[frame]:
            raise DataError(f"frame {frame} is damaged (its checksum differs)")
    return jpegs


def file_identity(file: BinaryIO) -> tuple[int, ...]:
    """Differs once a file was replaced or written to."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class FrameStoreWriter:
    """Builds a frame store, or extends one; whatever ends the process, what was added is kept.

    Each clip becomes a file of its own in the folder ``<store>.packing``: a line that describes it,
    followed by its JPEGs. `finish` writes them and what an earlier store has to a new file, in the
    order of their names, which takes the store's place in one step: until then readers have the
    earlier one. So there has to be room for both.

    Args:
        path: the store.
        size, quality: of the frames, see `FrameStore`.
        shared: other processes, also on other machines, may add clips at the same time, if they are
            told so too. None of them may `finish`.

    Attributes:
        clips: what is packed already, by name.

    Raises:
        DataError: what is there has another size or quality, or cannot be read; or another
            process is packing it.
    """

    def __init__(self, path: Path, size: int, quality: int, shared: bool = False):
        self.path, self._packing = path, packing_path(path)
        self._settings = {"format": FORMAT, "version": VERSION, "size": size, "quality": quality}
        if path.is_file():
            check_settings(path, vars(FrameStore(path)), self._settings)
        with self._writing():
            self._lock = self._take_lock(shared)
        try:
            self._store = FrameStore(path) if path.is_file() else None
            self._added = {clip.name: clip for clip in self._read_packing()}
        except BaseException:
            self._lock.close()
            raise
        self.clips = (self._store.clips if self._store else {}) | self._added

    def __enter__(self) -> FrameStoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def add(self, clip: PackedClip, jpegs: bytes) -> None:
        """Keep a clip; it replaces one of the same name."""
        arrays = {"lengths": clip.lengths.tolist(), "checksums": clip.checksums.tolist()}
        line = json.dumps(self._settings | vars(clip) | arrays).encode() + b"\n"
        path = self._file_of(clip.name)
        with self._writing(), temporary_sibling(path) as part:
            part.write_bytes(line + jpegs)
            commit(part, path)
        self.clips[clip.name] = self._added[clip.name] = replace(clip, first_byte=len(line))

    def finish(self) -> None:
        """Give the complete store its name; nothing can be added any more.

        DataError: there is not one clip, or no room, or what was packed is damaged by now.
        """
        if not self.clips:
            raise DataError(f"{self.path}: not one clip to pack")
        needed = sum(int(clip.lengths.sum()) for clip in self.clips.values()) / 2**30
        if self._added and shutil.disk_usage(self.path.parent).free / 2**30 < needed:
            raise DataError(
                f"{self.path}: needs {needed:.1f} GiB to be finished: make room, and run again;"
                " what is packed is kept"
            )
        if self._added:
            with self._writing(), temporary_sibling(self._packing / "store") as part:
                self._write_hdf5(part)
                commit(part, self.path)
        # The lock last: until then no other process takes what is going for clips to keep.
        for path in self._packing.iterdir():
            if path.name != LOCK_NAME:
                path.unlink()
        (self._packing / LOCK_NAME).unlink()
        with contextlib.suppress(OSError):  # another process begins to pack
            self._packing.rmdir()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # HDF5 has both
            reason = " ".join(str(error).split())[-200:]
            raise DataError(
                f"{self.path}: cannot be written ({reason}): make room in {self.path.parent}, and"
                f" run again; what is packed is kept, in {self._packing.name}"
            ) from error

    def _file_of(self, name: str) -> Path:
        return self._packing / f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.frames"

    def _write_hdf5(self, path: Path) -> None:
        import h5py

        clips = [self.clips[name] for name in sorted(self.clips)]
        sizes = np.array([clip.lengths.sum() for clip in clips], np.int64)
        counts = np.array([len(clip.lengths) for clip in clips], np.int64)
        first_byte = sizes.cumsum() - sizes
        types = dict.fromkeys(("name", "source"), h5py.string_dtype())
        with open_hdf5(path, "w", libver=("v110", "v110")) as file:
            file.attrs.update(self._settings)
            jpeg = file.create_dataset("jpeg", (sizes.sum(),), "u1")
            for clip, start, size in zip(clips, first_byte, sizes, strict=True):
                if clip.name in self._added:
                    jpegs = self._read_added(clip)
                else:
                    jpegs = self._store.jpegs(clip.name)
                jpeg[start : start + size] = np.frombuffer(b"".join(jpegs), np.uint8)
            file["num_frames"], file["first_frame"] = counts, counts.cumsum() - counts
            file["first_byte"] = first_byte
            file["frame_bytes"] = np.concatenate([clip.lengths for clip in clips])
            file["frame_crc32"] = np.concatenate([clip.checksums for clip in clips])
            for name in ("name", "source", "source_bytes", "source_mtime_ns"):
                values = [getattr(clip, name) for clip in clips]
                file.create_dataset(name, data=values, dtype=types.get(name, "i8"))

    def _read_packing(self) -> Iterator[PackedClip]:
        """What was added before; a file that does not hold what it should is packed again."""
        for path in self._packing.glob("*.frames"):
            with path.open("rb") as file, contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line := file.readline())
                check_settings(self._packing, record, self._settings)
                record |= {f: np.array(record[f], np.uint32) for f in ("lengths", "checksums")}
                fields = {name: record[name] for name in PackedClip.__dataclass_fields__}
                clip = PackedClip(**fields | {"first_byte": len(line)})
                if path.stat().st_size == len(line) + int(clip.lengths.sum()):
                    yield clip

    def _read_added(self, clip: PackedClip) -> list[bytes]:
        path = self._file_of(clip.name)
        try:
            with path.open("rb") as file:
                return read_frames(file, clip)
        except DataError as error:
            raise DataError(f"{path}: {error}: remove it and run again") from error

    def _take_lock(self, shared: bool) -> BinaryIO:
        folder, path = self._packing, self._packing / LOCK_NAME
        ours = {".lock", ".frames", ".part"}
        if folder.exists() and not (
            folder.is_dir() and {p.suffix for p in folder.iterdir()} <= ours
        ):
            raise DataError(
                f"{folder}: is no unfinished frame store, which has that name: move it away,"
                " or give another --frame_store"
            )
        folder.mkdir(exist_ok=True)
        file = path.open("ab+")  # nothing cut off, and readable: so either kind can be had
        locked = lock(file.fileno(), shared=shared)
        if locked is None:
            logger.warning("%s: its file system has no locks; pack it once at a time", self.path)
        # Did the one who had it finish, and remove this file?
        same = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        if locked is False or not same:
            file.close()
            raise DataError(f"{self.path}: another process is packing it, in {folder.name}")
        return file


def check_settings(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Raises a DataError if a store's size and quality are not those asked for."""
    found, wanted = ((settings["size"], settings["quality"]) for settings in (found, wanted))
    if found != wanted:
        raise DataError(
            f"{path}: begun with --size {found[0]} --quality {found[1]}, not {wanted[0]} and"
            f" {wanted[1]}: give those, or another --frame_store, or remove it"
        )


def packing_path(path: Path) -> Path:
    """The folder where a store's clips are until it is finished."""
    return path.with_name(f"{path.name}.packing")
