"""The frame store: every frame of a corpus of prepared clips as JPEG, in one HDF5 file.

A clip's frames are fetched by position, without decoding anything else, so that reading costs the
same for a clip of any length. The format is described at `FrameStore`.
"""

from __future__ import annotations

import contextlib
import glob
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
from dataloaders.clips import ClipSource, lookalikes
from dataloaders.ffmpeg import decode_frames
from dataloaders.sampling import sampled_indices
from dataloaders.storage import if_supported, lock, open_hdf5, sync
from dataloaders.video import DECODE_TIME_LIMIT, PREPARE, load_every_frame

logger = logging.getLogger("propy.frame_store")

FORMAT, VERSION = "propy frames", 1
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
        psnr: of the JPEGs against the frames they were made from, in dB, over all pixels.
        source, source_bytes, source_mtime_ns: the clip's file; its change time in nanoseconds.
        first_byte: where in the store's file the first JPEG starts.
    """

    name: str
    lengths: np.ndarray
    checksums: np.ndarray
    psnr: float
    source: str
    source_bytes: int
    source_mtime_ns: int
    first_byte: int = 0

    def same_source(self, path: Path) -> bool:
        """Whether the file it was made from has not changed since."""
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.source_bytes, self.source_mtime_ns)

    def same_frames(self, other: PackedClip | None) -> bool:
        return (
            other is not None
            and np.array_equal(self.lengths, other.lengths)
            and np.array_equal(self.checksums, other.checksums)
        )


def pack_clip(name: str, path: Path, size: int, quality: int) -> tuple[PackedClip, bytes]:
    """Decode a prepared clip, crop every frame to the model's square, and encode it as JPEG.

    Raises:
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
        psnr=psnr(frames, decode_jpegs(jpegs)),
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


def psnr(frames: torch.Tensor, decoded: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels, at most 100 (for equal ones)."""
    error = sum(
        (a.float() - b.float()).square().mean().item() for a, b in zip(frames, decoded, strict=True)
    ) / len(frames)
    return float(10 * np.log10(255**2 / max(error, 255**2 / 1e10)))


class FrameStore(ClipSource):
    """A finished store, for reading.

    The file is HDF5, with attributes ``format``, ``version``, ``size`` (side of the frames, pixels)
    and ``quality`` (JPEG's), and the datasets

    - ``jpeg``, uint8 [bytes], contiguous: the JPEGs of all frames, a clip's in the order of time;
    - ``frame_bytes`` and ``frame_crc32``, uint32 [frames]: length and checksum of each;
    - ``first_frame`` and ``first_byte``, int64 [clips]: where a clip starts in these, in ``jpeg``;
    - ``num_frames``, int64 [clips], and ``name``, the clip's;
    - ``source`` and ``source_…``: what it was made from; ``psnr``: its loss. See `PackedClip`.

    The index is read once; frames are then read from the file by their offset, without HDF5, whose
    handles do not survive a fork. Nothing stays open. A file that was extended meanwhile has its
    index read again.

    Attributes:
        clips: everything but the frames, by name, as the file was when it was opened.

    Raises:
        DataError: no such file, no frame store, a damaged one, or one of another version.
    """

    kind = "frame store"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            unfinished = packing_path(self.path).is_file() or packed_parts(self.path)
            state = "is not finished" if unfinished else "no such frame store"
            raise DataError(f"{self.path}: {state}: {PACK}")
        with self._opened() as file:
            self.clips = self._places = self._read_index(file)
            self._identity = file_identity(file)

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb", buffering=0)
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

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self.clips]

    def lookalikes(self, missing: Sequence[str]) -> dict[str, str]:
        return lookalikes(missing, self.clips)

    def missing_message(self, missing: Sequence[str], total: int) -> str:
        return (
            f"{self.path}: {len(missing)} of {total} clips are missing from the frame store: add"
            " them with `.venv/bin/python -m scripts.data.pack_frames`"
        )

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
        self,
        name: str,
        num_frames: int,
        size: int,
        generator: np.random.RandomState | None = None,
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
            if clip is not self.clips[name] and not self.clips[name].same_frames(clip):
                raise DataError(f"{self.label(name)}: changed while it was in use: start again")
            try:
                return read_frames(file, clip, frames)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
            except DataError as error:
                remedy = f"remove the file and {PACK}"
                raise DataError(f"{self.label(name)}: {error}: {remedy}") from error


def _read_clips(file) -> dict[str, PackedClip]:
    """The index of an open HDF5 file."""
    lengths, checksums = file["frame_bytes"][:], file["frame_crc32"][:]
    ends = file["first_frame"][:] + file["num_frames"][:]
    columns = {
        "name": file["name"].asstr()[:],
        "lengths": [lengths[a:b] for a, b in zip(file["first_frame"][:], ends, strict=True)],
        "checksums": [checksums[a:b] for a, b in zip(file["first_frame"][:], ends, strict=True)],
        "source": file["source"].asstr()[:],
        **{f: file[f][:].tolist() for f in ("psnr", "source_bytes", "source_mtime_ns")},
        "first_byte": (file["jpeg"].id.get_offset() + file["first_byte"][:]).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    clips = (PackedClip(**dict(zip(columns, row, strict=True))) for row in rows)
    return {clip.name: clip for clip in clips}


def read_frames(file: BinaryIO, clip: PackedClip, frames: np.ndarray | None = None) -> list[bytes]:
    """As `FrameStore.jpegs`, from an open file.

    All are announced before the first is read, so that the system fetches them side by side.

    Raises:
        DataError: one is damaged; without the name of file and clip.
    """
    frames = np.arange(len(clip.lengths)) if frames is None else frames
    lengths = clip.lengths.astype(np.int64)
    starts = (clip.first_byte + lengths.cumsum() - lengths)[frames].tolist()
    places = list(zip(lengths[frames].tolist(), starts, strict=True))
    if hasattr(os, "posix_fadvise"):  # not on every system
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

    Clips are collected beside the store, see `Packing`. `finish` writes them and what an earlier
    store has to a new file, which takes the store's place in one step: until then readers have the
    earlier one. So there has to be room for both.

    Args:
        path: the store.
        size, quality: of the frames, see `FrameStore`.
        part: of a process that packs a part of the clips, at the same time as others pack theirs:
            what its own file is called by. It does not `finish`; a writer without a part takes in
            what all of them have packed.

    Attributes:
        clips: what is packed already, by name.

    Raises:
        DataError: what is there has another size or quality, or cannot be read; or another
            process is packing it.
    """

    def __init__(self, path: Path, size: int, quality: int, part: str = ""):
        self.path = path
        self._settings = {"format": FORMAT, "version": VERSION, "size": size, "quality": quality}
        if path.is_file():
            check_settings(path, vars(FrameStore(path)), self._settings)
        with contextlib.ExitStack() as stack:
            self._packings = [
                stack.enter_context(contextlib.closing(Packing(file, path, self._settings)))
                for file in [*([] if part else packed_parts(path)), packing_path(path, part)]
            ]
            self._store = FrameStore(path) if path.is_file() else None
            self._opened = stack.pop_all()
        self._added = {name: packing for packing in self._packings for name in packing.clips}
        self.clips = dict(self._store.clips if self._store else {})
        self.clips |= {name: packing.clips[name] for name, packing in self._added.items()}

    def __enter__(self) -> FrameStoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add(self, clip: PackedClip, jpegs: bytes) -> None:
        """Keep a clip; it replaces one of the same name."""
        own = self._packings[-1]
        with self._writing():
            self.clips[clip.name] = own.add(clip, jpegs)
        self._added[clip.name] = own

    def finish(self, order: Sequence[str] = ()) -> None:
        """Give the complete store its name; nothing can be added any more.

        Args:
            order: of the clips in it, by name; others follow in the order in which they came.

        Raises:
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
            place = {name: i for i, name in enumerate(order)}
            clips = sorted(self.clips.values(), key=lambda c: place.get(c.name, len(place)))
            part = self.path.with_name(f".{packing_path(self.path).name}")
            try:
                with self._writing():
                    self._write_hdf5(part, clips)
                    with part.open("rb") as file:
                        sync(file.fileno())
                    part.replace(self.path)
            finally:
                part.unlink(missing_ok=True)
        for packing in self._packings:
            packing.path.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # HDF5 has both
            reason = " ".join(str(error).split())[-200:]
            raise DataError(
                f"{self.path}: cannot be written ({reason}): make room in {self.path.parent}, and"
                f" run again; what is packed is kept, in {self._packings[-1].path.name}"
            ) from error

    def _write_hdf5(self, path: Path, clips: Sequence[PackedClip]) -> None:
        import h5py

        sizes = np.array([clip.lengths.sum() for clip in clips], np.int64)
        counts = np.array([len(clip.lengths) for clip in clips], np.int64)
        first_byte = sizes.cumsum() - sizes
        text = h5py.string_dtype()
        types = {"name": text, "source": text, "psnr": "f8"}
        with open_hdf5(path, "w", libver=("v110", "v110")) as file:
            file.attrs.update(self._settings)
            jpeg = file.create_dataset("jpeg", (sizes.sum(),), "u1")
            for clip, start, size in zip(clips, first_byte, sizes, strict=True):
                if clip.name in self._added:
                    jpegs = self._added[clip.name].frames(clip)
                else:
                    jpegs = self._store.jpegs(clip.name)
                jpeg[start : start + size] = np.frombuffer(b"".join(jpegs), np.uint8)
            file["num_frames"], file["first_frame"] = counts, counts.cumsum() - counts
            file["first_byte"] = first_byte
            file["frame_bytes"] = np.concatenate([clip.lengths for clip in clips])
            file["frame_crc32"] = np.concatenate([clip.checksums for clip in clips])
            for name in ("name", "psnr", "source", "source_bytes", "source_mtime_ns"):
                values = [getattr(clip, name) for clip in clips]
                file.create_dataset(name, data=values, dtype=types.get(name, "i8"))


class Packing:
    """Clips that are packed and not in a store yet: a file of its own beside it.

    A line of settings, then for each clip a line that describes it, followed by its JPEGs.

    Attributes:
        clips: what is in it, by name; ``first_byte`` counts in this file.

    Raises:
        DataError: another process is packing into it, or it cannot be continued.
    """

    def __init__(self, path: Path, store: Path, settings: Mapping):
        self.path, self._store, self._settings = path, store, settings
        self.clips: dict[str, PackedClip] = {}
        # O_CREAT, and nothing cut off: it may be another process's
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it tries again to write what found no room
            self._file.close()

    def add(self, clip: PackedClip, jpegs: bytes) -> PackedClip:
        """Append a clip and see it on the disk; returns it as it lies in this file."""
        arrays = {"lengths": clip.lengths.tolist(), "checksums": clip.checksums.tolist()}
        self._write(json.dumps(vars(clip) | arrays).encode() + b"\n" + jpegs)
        clip = replace(clip, first_byte=self._file.tell() - len(jpegs))
        self.clips[clip.name] = clip
        return clip

    def frames(self, clip: PackedClip) -> list[bytes]:
        """The JPEGs of a clip that is in it. DataError: they are damaged."""
        return read_frames(self._file, clip)

    def _read(self) -> None:
        """What an earlier process added, without the clip over which it was killed."""
        length = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        begin = json.dumps({"format": FORMAT})[:-1].encode()
        if not begin.startswith(self._file.read(len(begin))):  # a whole one, or the file ends
            raise DataError(
                f"{self.path}: is no unfinished frame store, which has that name: move it away,"
                " or give another --frame_store"
            )
        end = self._file.seek(0)
        try:
            while (line := self._file.readline()).endswith(b"\n"):
                record = json.loads(line)
                if end == 0:
                    check_settings(self.path, record, self._settings)
                else:
                    record |= {f: np.array(record[f], np.uint32) for f in ("lengths", "checksums")}
                    clip = PackedClip(**record | {"first_byte": end + len(line)})
                    stop = self._file.seek(clip.first_byte + int(clip.lengths.sum()))
                    if stop > length or (stop == length and not self._is_whole(clip)):
                        break
                    self.clips[clip.name] = clip
                end = self._file.tell()
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{self.path}: cannot be continued ({error}): remove it and start again"
            ) from error
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._write(json.dumps(self._settings).encode() + b"\n")

    def _is_whole(self, clip: PackedClip) -> bool:
        """The end of the file need not have come to the disk with its length."""
        try:
            return bool(self.frames(clip))
        except DataError:
            return False

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        sync(self._file.fileno())

    def _lock(self) -> None:
        locked = lock(self._file.fileno())
        if locked is None:
            logger.warning("%s: its file system has no locks; pack it once at a time", self._store)
        try:  # did the one who had it finish, and remove this file?
            same = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            same = False
        if locked is False or not same:
            raise DataError(f"{self._store}: another process is packing it, in {self.path.name}")


def check_settings(path: Path, found: Mapping, wanted: Mapping) -> None:
    """Raises a DataError if a store's size and quality are not those asked for."""
    found, wanted = ((settings["size"], settings["quality"]) for settings in (found, wanted))
    if found != wanted:
        raise DataError(
            f"{path}: begun with --size {found[0]} --quality {found[1]}, not {wanted[0]} and"
            f" {wanted[1]}: give those, or another --frame_store, or remove it"
        )


def packing_path(path: Path, part: str = "") -> Path:
    """Where a store, or a part of its clips, is until it is finished."""
    return path.with_name(f"{path.name}.{part + '.' if part else ''}packing")


def packed_parts(path: Path) -> list[Path]:
    """What is there of the parts of a store that is not finished."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.*-of-*.packing"))
