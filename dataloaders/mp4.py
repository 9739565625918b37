"""What an MP4's header claims, read without a decoder: frame size, number and place of frames.

A decoder trusts these numbers: decord aborts the whole process where a damaged header claims a
billion frames. Reading them first costs a fraction of a millisecond.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataloaders import DataError

MAX_HEADER = 2**26  # bytes of one header box; an hour at 3 fps takes about 100 KiB
PARENTS = {b"trak", b"edts", b"mdia", b"minf", b"stbl"}
WHOLE = {b"moov", b"moof", b"mdat"} | PARENTS  # what others are cut short is skipped


@dataclass
class Header:
    """The video tracks of an MP4 file.

    Attributes:
        width, height: pixels as stored, of the first video track.
        num_frames: frames that the header's tables list, of all video tracks.
        fragmented: frames are listed in pieces all over the file, not only in the header.
    """

    width: int = 0
    height: int = 0
    num_frames: int = 0
    fragmented: bool = False


def read_header(path: Path) -> Header:
    """Read the header of an MP4 file and check it against the file's length.

    DataError: it is missing, does not fit the file, or claims what the file cannot hold. The
    message leaves the file's name to the caller. OSError: the file cannot be read.
    """
    tracks: list[Header] = []
    fragmented = found = False
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        for kind, start, end in _boxes(file, 0, length):
            fragmented |= kind == b"moof"
            if kind != b"moov":
                continue
            found = True
            if end - start > MAX_HEADER:
                raise DataError(f"its header claims {end - start} bytes")
            for name, first, last in _boxes(file, start, end):
                if name == b"trak" and (track := _read_track(file, first, last, length)):
                    tracks.append(track)
    if not found:
        raise DataError("its header (the moov box) is missing: the file was cut short")
    if not tracks:
        raise DataError("it has no video track")
    num_frames = sum(track.num_frames for track in tracks)
    if not num_frames and not fragmented:
        raise DataError("it lists no frames")
    return Header(tracks[0].width, tracks[0].height, num_frames, fragmented)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, first byte of the content, last + 1) of the boxes between two places of a file."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, kind, inner = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, inner = int.from_bytes(head[8:], "big"), 16
        elif size == 0:
            size = end - start
        if size < inner or (start + size > end and kind in WHOLE):
            told = f"a {_name(kind)} box of {size} bytes at byte {start}, with {end - start} left"
            raise DataError(f"it was cut short or is damaged: {told}")
        yield kind, start + inner, start + size
        start += size


def _read_track(file: BinaryIO, start: int, end: int, length: int) -> Header | None:
    """None for a track that is no video."""
    tables: dict[bytes, bytes] = {}
    for kind, first, last in _leaves(file, start, end):
        file.seek(first)
        tables.setdefault(kind, file.read(last - first))  # QuickTime has a second hdlr, of the data
    if tables.get(b"hdlr", b"")[8:12] != b"vide":
        return None
    durations = _table(tables, b"stts", 2)
    frames = int(durations[:, 0].sum(dtype=np.int64))
    listed = int.from_bytes(tables[b"stsz"][8:12], "big") if b"stsz" in tables else frames
    if frames > length or listed > length:
        raise DataError(f"it lists {max(frames, listed)} frames, but has {length} bytes")
    if frames != listed:
        raise DataError(f"its header is damaged: times of {frames} frames, sizes of {listed}")
    if frames:  # none are listed here where they come in fragments
        _check_edits(tables.get(b"elst", b""), int(durations.prod(1, dtype=np.int64).sum()))
        _check_end(tables, frames, length)
    description = tables.get(b"stsd", b"")[8:]
    width, height = (int.from_bytes(description[i : i + 2], "big") for i in (32, 34))
    return Header(width, height, frames)


def _check_edits(edits: bytes, duration: int) -> None:
    """Whether an edit list, if there is one, shows anything: decord searches for long otherwise.

    Args:
        duration: of all frames, in the track's unit of time.
    """
    number, rest = (">u8", ">i8") if edits[:1] == b"\1" else (">u4", ">i4")
    entry = np.dtype([("length", number), ("start", rest), ("rate", ">u4")])
    starts = np.frombuffer(edits[8:], entry, len(edits[8:]) // entry.itemsize)["start"]
    shown = starts[starts != -1]  # -1: a pause
    if shown.size and not ((shown >= 0) & (shown < duration)).any():
        raise DataError("its edit list hides every frame")


def _check_end(tables: dict[bytes, bytes], frames: int, length: int) -> None:
    """Whether the file is long enough for the last chunk of frames that its header lists."""
    wide = b"co64" in tables
    offsets = _table(tables, b"co64" if wide else b"stco", 1, ">u8" if wide else ">u4")[:, 0]
    if offsets.size and int(offsets.max()) >= length:
        raise DataError(f"it was cut short: a frame starts at byte {offsets.max()}")
    if not offsets.size:
        raise DataError(f"its header is damaged: it does not say where {frames} frames lie")
    sizes = tables.get(b"stsz", b"")
    if int.from_bytes(sizes[4:8], "big"):
        return  # all frames have one size
    sizes = np.frombuffer(sizes[12 : 12 + 4 * frames], ">u4")
    if sizes.size < frames:
        raise DataError(f"its header is damaged: sizes of {sizes.size} frames of {frames}")
    total = int(sizes.sum(dtype=np.int64))
    if total > length:
        raise DataError(f"it was cut short: {length} of at least {total} bytes")
    in_last_chunk = int(_table(tables, b"stsc", 3)[-1:, 1].sum())
    end = int(offsets[-1]) + int(sizes[-in_last_chunk:].sum(dtype=np.int64))
    if in_last_chunk and end > length:
        raise DataError(f"it was cut short: {length} of {end} bytes")


def _leaves(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    for kind, inner, last in _boxes(file, start, end):
        if kind in PARENTS:
            yield from _leaves(file, inner, last)
        else:
            yield kind, inner, last


def _table(tables: dict, kind: bytes, columns: int, number: str = ">u4") -> np.ndarray:
    """[rows, columns] of a box that is a version, a count of rows, and the rows."""
    box, width = tables.get(kind, bytes(8)), np.dtype(number).itemsize
    rows = int.from_bytes(box[4:8], "big")
    if len(box) < 8 + rows * columns * width:
        raise DataError(f"its header is damaged: {rows} rows in a short {_name(kind)} box")
    return np.frombuffer(box, number, rows * columns, 8).reshape(rows, columns)


def _name(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace")
