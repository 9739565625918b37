"""The frame store: every frame of a corpus of prepared clips as JPEG, in one HDF5 file.

A clip's frames are fetched by position, without decoding anything else, so that reading costs the
same for a clip of any length. The format is described at `FrameStore`.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from dataloaders import DataError
from dataloaders.clips import ClipSource
from dataloaders.ffmpeg import FfmpegError, read_packets
from dataloaders.sampling import eval_indices, train_indices
from dataloaders.video import load_every_frame

FORMAT, VERSION = "propy frames", 1
PACK = "make it with `.venv/bin/python -m scripts.data.pack_frames`"
# Chroma at full resolution: with half of it quality 90 loses 2.5 dB more, and the same loss takes
# more bytes (measured on real clips; README, "Frame store").
SUBSAMPLING = 0
DEFAULT_QUALITY = 90
HEAD = 2**16  # bytes before the JPEGs, for HDF5's bookkeeping
# Two frames closer than this are fetched by one read, to spare a disk the second seek. The value
# is a guess: it was not measured on a disk.
MERGED_GAP = 2**16

MAX_DECODER_DEVIATION = 8  # of 255 levels, in one smooth picture
# Seconds to wait for a lock: workers of a killed process hold it for the moment until they end.
LOCK_PATIENCE = 2.0


@dataclass(frozen=True)
class PackedClip:
    """One clip as it lies in a store, and what it was made from.

    Attributes:
        lengths: bytes of every frame's JPEG.
        checksums: CRC-32 of every frame's JPEG.
        psnr: of the JPEGs against the frames they were made from, in dB, over all pixels.
        source, source_bytes, source_mtime_ns: the clip's file; its change time in nanoseconds.
        source_fps: frames per second according to its container.
    """

    name: str
    lengths: list[int]
    checksums: list[int]
    psnr: float
    source: str
    source_bytes: int
    source_mtime_ns: int
    source_fps: float

    def same_source(self, path: Path) -> bool:
        """Whether the file it was made from has not changed since."""
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.source_bytes, self.source_mtime_ns)


def pack_clip(name: str, path: Path, size: int, quality: int) -> tuple[PackedClip, bytes]:
    """Decode a prepared clip, crop every frame to the model's square, and encode it as JPEG.

    Raises:
        DataError: the clip cannot be used.
    """
    stat = path.stat()
    frames = load_every_frame(path, size)
    jpegs = [encode_frame(frame, quality) for frame in frames]
    decoded = decode_frames([_as_tensor(jpeg) for jpeg in jpegs])
    clip = PackedClip(
        name=name,
        lengths=[len(jpeg) for jpeg in jpegs],
        checksums=[zlib.crc32(jpeg) for jpeg in jpegs],
        psnr=psnr(frames, decoded),
        source=path.name,
        source_bytes=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        source_fps=frame_rate(path),
    )
    return clip, b"".join(jpegs)


def frame_rate(path: Path) -> float:
    """Frames per second by the length of a clip's first frame; NaN if it does not say."""
    try:
        start, end = read_packets(path, limit=2).times[0]
    except (FfmpegError, IndexError) as error:
        raise DataError(f"{path}: its frame rate cannot be read ({error})") from error
    return float(1 / (end - start)) if end > start else float("nan")


def encode_frame(frame: torch.Tensor, quality: int) -> bytes:
    """uint8 [3, S, S] RGB as JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return buffer.getvalue()


def decode_frames(
    jpegs: Sequence[torch.Tensor], device: str | torch.device = "cpu"
) -> torch.Tensor:
    """JPEGs, each uint8 [bytes] on the CPU, as uint8 [n, 3, S, S] RGB on the device."""
    return torch.stack(decode_jpeg(list(jpegs), mode=ImageReadMode.RGB, device=device))


def psnr(frames: torch.Tensor, decoded: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels, at most 100 (for equal ones)."""
    error = sum(
        (a.float() - b.float()).square().mean().item() for a, b in zip(frames, decoded, strict=True)
    ) / len(frames)
    return float(10 * np.log10(255**2 / max(error, 255**2 / 1e10)))


def _as_tensor(jpeg: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(jpeg, np.uint8).copy())


@dataclass(frozen=True)
class EncodedClips:
    """Sampled frames of clips, not yet decoded.

    Attributes:
        label: what messages call them.
        jpegs: uint8 [bytes], one after the other, every frame once. They are one tensor because
            each tensor that comes from a worker process costs an open file.
        lengths: bytes of each.
        positions: int64 [B, N_f], which of them each sampled frame is.
        size: side of the frames, pixels.
    """

    label: str
    jpegs: torch.Tensor
    lengths: list[int]
    positions: torch.Tensor
    size: int

    @classmethod
    def stack(cls, clips: Sequence[EncodedClips]) -> EncodedClips:
        """The clips as one batch."""
        counts = np.array([len(clip.lengths) for clip in clips])
        firsts = (counts.cumsum() - counts).tolist()
        return cls(
            label=", ".join(clip.label for clip in clips),
            jpegs=torch.cat([clip.jpegs for clip in clips]),
            lengths=[length for clip in clips for length in clip.lengths],
            positions=torch.cat([c.positions + f for c, f in zip(clips, firsts, strict=True)]),
            size=clips[0].size,
        )

    def decode(self, device: torch.device) -> torch.Tensor:
        """uint8 [B, N_f, 3, size, size], RGB, on the device.

        Raises:
            DataError: there is a JPEG which is none, or has another size.
        """
        try:
            frames = decode_frames(self.jpegs.split(self.lengths), device)
        except RuntimeError as error:
            raise DataError(f"{self.label}: cannot be decoded ({error}): {PACK}") from error
        if frames.shape[1:] != (3, self.size, self.size):
            raise DataError(f"{self.label}: frames of shape {list(frames.shape[1:])}: {PACK}")
        if len(frames) == self.positions.numel():  # none is sampled twice: no copy is needed
            return frames.unflatten(0, self.positions.shape)
        return frames[self.positions.to(device)]


def gpu_decoder_problem(device: torch.device) -> str | None:
    """Why frames had better not be decoded on this device; None if it does what the CPU does.

    One picture is decoded on both. They may round differently, by a few of 255 levels.
    """
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    picture = torch.stack([x, y, (x + y) // 2]).byte()
    jpeg = _as_tensor(encode_frame(picture, DEFAULT_QUALITY))
    try:
        theirs = decode_frames([jpeg], device).cpu()
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    if theirs.shape != (1, *picture.shape):
        return f"it makes {list(theirs.shape)} of one picture"
    deviation = (theirs.int() - decode_frames([jpeg]).int()).abs().max().item()
    return None if deviation <= MAX_DECODER_DEVIATION else f"its pixels are off by {deviation}"


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
    handles do not survive a fork. Nothing stays open.

    Args:
        path: the file.
        decode_on: where JPEGs are decoded. None: where they are loaded, so in the loader's workers.
            A device: clips travel as JPEG, and `EncodedClips.decode` decodes a batch there, which
            the loader does before it hands the batch out.

    Raises:
        DataError: no such file, no frame store, a damaged one, or one of another version.
    """

    kind = "frame store"

    def __init__(self, path: str | Path, decode_on: torch.device | None = None):
        self.path = Path(path)
        self.decode_on = decode_on
        if not self.path.is_file():
            unfinished = any(part.is_file() for part in _partial_paths(self.path))
            state = "is not finished" if unfinished else "no such frame store"
            raise DataError(f"{self.path}: {state}: {PACK}")
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                self._read_index(file)
        except DataError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[-200:]
            raise DataError(
                f"{self.path}: no readable frame store ({reason}): remove it and {PACK}"
            ) from error
        self._identity = file_identity(self.path.stat())

    def _read_index(self, file: h5py.File) -> None:
        found = file.attrs.get("format"), int(file.attrs.get("version", 0))
        if found != (FORMAT, VERSION):
            raise DataError(
                f"{self.path}: format and version are {found}, but this program reads"
                f" {(FORMAT, VERSION)}: {PACK}"
            )
        self.size, self.quality = int(file.attrs["size"]), int(file.attrs["quality"])
        self.names: list[str] = file["name"].asstr()[:].tolist()
        self._row = {name: row for row, name in enumerate(self.names)}
        self._frame_bytes, self._frame_crc32 = file["frame_bytes"][:], file["frame_crc32"][:]
        self._first_frame, self._num_frames = file["first_frame"][:], file["num_frames"][:]
        self._first_byte = int(file["jpeg"].id.get_offset()) + file["first_byte"][:]
        self._facts = {
            field: (file[field].asstr() if field == "source" else file[field])[:].tolist()
            for field in FACTS
        }

    def __len__(self) -> int:
        return len(self.names)

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._row]

    def missing_message(self, missing: Sequence[str], total: int) -> str:
        return (
            f"{self.path}: {len(missing)} of {total} clips are missing from the frame store: add"
            " them with `.venv/bin/python -m scripts.data.pack_frames`"
        )

    def label(self, name: str) -> str:
        return f"{self.path}: clip {name!r}"

    def probe(self, name: str, size: int) -> int:
        return self.num_frames(name)  # `check` has the size, and reading verifies every frame

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
    ) -> torch.Tensor | EncodedClips:
        self.check([name], size)
        n = self.num_frames(name)
        if generator is None:
            chosen = eval_indices(n, num_frames)
        else:
            chosen = train_indices(n, num_frames, generator)
        distinct, position = np.unique(chosen, return_inverse=True)
        jpegs = self.jpegs(name, distinct)
        clip = EncodedClips(
            label=self.label(name),
            jpegs=_as_tensor(b"".join(jpegs)),
            lengths=[len(jpeg) for jpeg in jpegs],
            positions=torch.from_numpy(position)[None],
            size=size,
        )
        if self.decode_on is not None:
            return clip
        return clip.decode(torch.device("cpu"))[0]

    def num_frames(self, name: str) -> int:
        """n, the frames that the clip has."""
        return int(self._num_frames[self._row[name]])

    def jpegs(self, name: str, frames: np.ndarray) -> list[bytes]:
        """Some frames of a clip as they are stored, with their checksums verified.

        Args:
            frames: int64, ascending positions in the clip.

        Raises:
            DataError: the file is cut short, damaged, or was replaced since it was opened.
        """
        row = self._row[name]
        in_clip = self._frames_of(row)
        lengths = self._frame_bytes[in_clip].astype(np.int64)
        starts = (self._first_byte[row] + lengths.cumsum() - lengths)[frames]
        found = read_ranges(self.path, starts, lengths[frames], self._identity)
        for frame, jpeg, expected in zip(
            frames, found, self._frame_crc32[in_clip][frames], strict=True
        ):
            if zlib.crc32(jpeg) != expected:
                raise DataError(
                    f"{self.label(name)}: frame {frame} is damaged (its checksum differs): remove"
                    f" the file and {PACK}"
                )
        return found

    def clips(self) -> Iterator[PackedClip]:
        """What is known of every clip, in the order of the file."""
        for row, name in enumerate(self.names):
            frames = self._frames_of(row)
            yield PackedClip(
                name=name,
                lengths=self._frame_bytes[frames].tolist(),
                checksums=self._frame_crc32[frames].tolist(),
                **{field: self._facts[field][row] for field in FACTS},
            )

    def verify(self) -> Iterator[str]:
        """Reads everything, clip by clip: the name of each that is as it was packed.

        Raises:
            DataError: the first that is not.
        """
        for name in self.names:
            self.jpegs(name, np.arange(self.num_frames(name)))
            yield name

    def first_bytes(self) -> list[int]:
        """Where each clip's first JPEG starts in the file."""
        return self._first_byte.tolist()

    def _frames_of(self, row: int) -> slice:
        first = int(self._first_frame[row])
        return slice(first, first + int(self._num_frames[row]))


# What a store knows of each clip beside its frames, and HDF5's type of it.
FACTS = {
    "psnr": "f8",
    "source": h5py.string_dtype(),
    "source_bytes": "i8",
    "source_mtime_ns": "i8",
    "source_fps": "f8",
}


def read_ranges(
    path: Path, starts: np.ndarray, lengths: np.ndarray, identity: tuple[int, ...]
) -> list[bytes]:
    """Bytes of a file at ascending places that do not overlap, in few reads.

    All places are announced before the first is read, so that the system fetches them side by side.

    Args:
        starts, lengths: int64 [n], in bytes.
        identity: what `file_identity` said of the file.

    Raises:
        DataError: it cannot be read, or is another file by now.
    """
    ends = starts + lengths
    groups = np.split(
        np.arange(len(starts)), np.flatnonzero(starts[1:] - ends[:-1] > MERGED_GAP) + 1
    )
    found = []
    try:
        with path.open("rb", buffering=0) as file:
            if file_identity(os.fstat(file.fileno())) != identity:
                raise DataError(f"{path}: was replaced while it was in use: start again")
            for group in groups:
                _announce(file, int(starts[group[0]]), int(ends[group[-1]] - starts[group[0]]))
            for group in groups:
                start = int(starts[group[0]])
                data = os.pread(file.fileno(), int(ends[group[-1]]) - start, start)
                found += [data[starts[i] - start : ends[i] - start] for i in group]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return found


def _announce(file: BinaryIO, start: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on every system
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def file_identity(stat: os.stat_result) -> tuple[int, ...]:
    """Differs once a file was replaced or written to."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class FrameStoreWriter:
    """Builds a frame store, or adds to one; whatever ends the process, what was added is kept.

    While it is built the JPEGs lie in ``<file>.packing``, where they will stay, and what is known
    of each clip in ``<file>.packing.jsonl``, a line each, written once the clip's bytes are on the
    disk. `finish` puts HDF5's bookkeeping around the JPEGs and gives the file its name. HDF5 itself
    does not survive being killed while it writes.

    Args:
        path: the store; one that is there is taken apart, and complete again after `finish`.
        size, quality: of the frames, see `FrameStore`.

    Attributes:
        clips: what is packed already, by name.

    Raises:
        DataError: what is there has another size or quality, or cannot be read; or another
            process is packing it.
    """

    def __init__(self, path: Path, size: int, quality: int):
        self.path, self.size, self.quality = path, size, quality
        self.clips: dict[str, PackedClip] = {}
        self._first_byte: dict[str, int] = {}
        self._data_path, self._journal_path = _partial_paths(path)
        self._reopen_finished()
        self._data = self._data_path.open("r+b" if self._data_path.is_file() else "x+b")
        self._lock(self._data)
        self._end = HEAD
        if self._journal_path.is_file():
            self._read_journal()
        else:
            self._write_journal()
        self._journal = self._journal_path.open("a")
        self._data.truncate(self._end)

    def __enter__(self) -> FrameStoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()
        self._data.close()

    def add(self, clip: PackedClip, jpegs: bytes) -> None:
        """Keep a clip; it replaces one of the same name, whose bytes stay behind unused."""
        before = self.clips.get(clip.name)
        first_byte = self._end
        if before and before.checksums == clip.checksums and before.lengths == clip.lengths:
            first_byte = self._first_byte[clip.name]  # another file with the same frames
        else:
            self._data.seek(self._end)
            self._data.write(jpegs)
            self._data.flush()
            os.fsync(self._data.fileno())
            self._end += len(jpegs)
        self.clips[clip.name], self._first_byte[clip.name] = clip, first_byte
        self._journal.write(self._line(clip))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def finish(self) -> None:
        """Give the complete store its name; nothing can be added any more.

        Raises:
            DataError: no clip was added.
        """
        if not self.clips:
            raise DataError(f"{self.path}: not one clip to pack")
        length = max(self._end - HEAD, HEAD)  # HDF5 does not align what is smaller
        head = self._data_path.with_name(self._data_path.name + ".head")
        try:
            self._write_hdf5(head, length)
            with head.open("rb") as file:
                self._data.seek(0)
                self._data.write(file.read(HEAD))
                file.seek(HEAD + length)
                self._data.truncate(HEAD + length)
                self._data.seek(HEAD + length)
                self._data.write(file.read())
        finally:
            head.unlink(missing_ok=True)
        self._data.flush()
        os.fsync(self._data.fileno())
        self._data_path.replace(self.path)
        self._journal_path.unlink()

    def _write_hdf5(self, path: Path, length: int) -> None:
        """The store with a hole, not yet bytes, where the JPEGs belong."""
        clips = list(self.clips.values())
        # Whatever has HEAD bytes or more starts at a multiple of HEAD: the JPEGs, which come first,
        # directly behind the bookkeeping.
        options = {"alignment_threshold": HEAD, "alignment_interval": HEAD}
        with h5py.File(path, "w", libver=("v110", "v110"), **options) as file:
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_layout(h5py.h5d.CONTIGUOUS)
            plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            plan.set_obj_track_times(False)  # the same clips give the same bytes
            space = h5py.h5s.create_simple((length,))
            jpeg = h5py.h5d.create(file.id, b"jpeg", h5py.h5t.NATIVE_UINT8, space, plan)
            if jpeg.get_offset() != HEAD:
                raise RuntimeError(f"HDF5 placed the data at {jpeg.get_offset()}, not at {HEAD}")
            file.attrs.update(
                {"format": FORMAT, "version": VERSION, "size": self.size, "quality": self.quality}
            )
            counts = np.array([len(clip.lengths) for clip in clips], np.int64)
            first_byte = np.array([self._first_byte[clip.name] for clip in clips], np.int64)
            file["num_frames"], file["first_frame"] = counts, counts.cumsum() - counts
            file["first_byte"] = first_byte - HEAD
            for name, column in (("frame_bytes", "lengths"), ("frame_crc32", "checksums")):
                file[name] = np.concatenate([np.array(getattr(c, column), "u4") for c in clips])
            for name, dtype in {"name": h5py.string_dtype(), **FACTS}.items():
                file.create_dataset(name, data=[getattr(c, name) for c in clips], dtype=dtype)

    def _reopen_finished(self) -> None:
        """Turn a finished store back into a beginning: its journal first, then its name.

        `finish` gives the name first and removes the journal then, so that of the three files any
        two that are found together say what to do.
        """
        if self._data_path.is_file() or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            self._lock(file)
            if not self._journal_path.is_file():
                store = FrameStore(self.path)
                check_settings(self.path, (store.size, store.quality), (self.size, self.quality))
                self.clips = {clip.name: clip for clip in store.clips()}
                self._first_byte = dict(zip(store.names, store.first_bytes(), strict=True))
                self._write_journal()
            self.path.rename(self._data_path)

    def _write_journal(self) -> None:
        head = {"format": FORMAT, "version": VERSION, "size": self.size, "quality": self.quality}
        part = self._journal_path.with_name(self._journal_path.name + ".part")
        with part.open("w") as file:
            file.write(json.dumps(head) + "\n")
            file.writelines(self._line(clip) for clip in self.clips.values())
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._journal_path)

    def _line(self, clip: PackedClip) -> str:
        return json.dumps({"first_byte": self._first_byte[clip.name], **asdict(clip)}) + "\n"

    def _read_journal(self) -> None:
        text = self._journal_path.read_text()
        whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
        os.truncate(self._journal_path, len(whole.encode()))
        self.clips, self._first_byte = {}, {}
        try:
            head, *lines = map(json.loads, whole.splitlines())
            check_settings(
                self._data_path, (head["size"], head["quality"]), (self.size, self.quality)
            )
            for line in lines:
                first_byte = line.pop("first_byte")
                clip = PackedClip(**line)
                self.clips[clip.name], self._first_byte[clip.name] = clip, first_byte
                self._end = max(self._end, first_byte + sum(clip.lengths))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._journal_path}: cannot be gone on with ({error}): remove it and"
                f" {self._data_path}"
            ) from error
        if self._data_path.stat().st_size < self._end:
            raise DataError(
                f"{self._data_path}: shorter than {self._journal_path} says: remove both"
            )

    def _lock(self, file: BinaryIO) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(f"{self.path}: another process is packing it") from None
                time.sleep(0.05)


def check_settings(path: Path, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raises a DataError if a store's size and quality are not those asked for."""
    if found != wanted:
        raise DataError(
            f"{path}: begun with --size {found[0]} --quality {found[1]}, not {wanted[0]} and"
            f" {wanted[1]}: give those, or another --frame_store, or remove it"
        )


def _partial_paths(path: Path) -> tuple[Path, Path]:
    """Where data and journal of an unfinished store are."""
    return path.with_name(path.name + ".packing"), path.with_name(path.name + ".packing.jsonl")
