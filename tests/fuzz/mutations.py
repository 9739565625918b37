"""Spoils valid annotations, pyramids, checkpoints and clips, bytewise and by their structure.

Used by tests/fuzz/fuzz.py. All is drawn from the generator given, so that a seed names a case.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Random = np.random.Generator

# What a field holds when a converter, a spreadsheet or an attacker wrote it.
ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 512, 4096, 4097, 2**31, 2**63, -(2**63), 10**400,
    0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "1.5", "nan", "a\0b", "../v1", "/etc/passwd", "a/b", "..", ".", "\ud800",
    "\u202e", "x" * 300, "x" * 100_000, "é" * 126, "\n", "\r\n", "\ufeff",
    [], {}, [[]], [None], [[1, 2], [3]], [0, 0], [2, 1], [1, 2, 3], [[1, 1]], [-1, 2], ["1", "2"],
    {"a": 1}, [[[[[[1]]]]]], [float("nan"), 1], [[1, 2]] * 1000,
]  # fmt: skip
INTERESTING_BYTES = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x7B], np.uint8)
INTERESTING_WORDS = [0, 1, 2, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x10000, 0x1000000]
# MP4 boxes that hold boxes.
CONTAINERS = {
    *(b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"moof", b"traf"),
    b"mvex",
}


def spoil_bytes(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """One to four changes that know nothing of the format: flips, cuts, repeats, splices."""
    for _ in range(int(rng.integers(1, 5))):
        data = _BYTE_CHANGES[rng.integers(len(_BYTE_CHANGES))](data, rng, other)
    return data


def _flip_bits(data: bytes, rng: Random, _: bytes) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    if changed.size:
        count = int(2 ** rng.uniform(0, 8))
        places = rng.integers(changed.size, size=count)
        changed[places] ^= (1 << rng.integers(8, size=count)).astype(np.uint8)
    return changed.tobytes()


def _set_bytes(data: bytes, rng: Random, _: bytes) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    start, stop = _span(len(data), rng)
    changed[start:stop] = rng.choice(INTERESTING_BYTES)
    return changed.tobytes()


def _set_word(data: bytes, rng: Random, _: bytes) -> bytes:
    place = int(rng.integers(max(len(data) - 3, 1)))
    return data[:place] + struct.pack(">I", _odd_word(rng)) + data[place + 4 :]


def _cut_end(data: bytes, rng: Random, _: bytes) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def _cut_out(data: bytes, rng: Random, _: bytes) -> bytes:
    start, stop = _span(len(data), rng)
    return data[:start] + data[stop:]


def _repeat(data: bytes, rng: Random, _: bytes) -> bytes:
    start, stop = _span(len(data), rng)
    times = 1 + int(rng.integers(1, 50) if stop - start < 2000 else 1)
    return data[:start] + data[start:stop] * times + data[stop:]


def _splice(data: bytes, rng: Random, other: bytes) -> bytes:
    start, stop = _span(len(data), rng)
    begin, end = _span(len(other), rng)
    return data[:start] + other[begin:end] + data[stop:]


_BYTE_CHANGES = [
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _set_word,
    _cut_end,
    _cut_out,
    _repeat,
    _splice,
]


def _span(length: int, rng: Random) -> tuple[int, int]:
    """A stretch of the file, short ones the more often."""
    start = int(rng.integers(length + 1))
    return start, min(length, start + int(2 ** rng.uniform(0, np.log2(length + 2))))


def _odd_word(rng: Random) -> int:
    if rng.random() < 0.3:
        return int(rng.integers(2**32))
    return int(rng.choice(INTERESTING_WORDS))


# ---------------------------------------------------------------------------------------- JSON


def spoil_json(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """Changes in the values of a JSON text or of some lines of JSONL; also lines torn and moved."""
    lines = data.split(b"\n")
    for _ in range(int(rng.integers(1, 4))):
        row = int(rng.integers(len(lines)))
        try:
            value = json.loads(lines[row])
        except (ValueError, RecursionError):
            lines[row] = spoil_bytes(lines[row], rng, other)
            continue
        way = rng.random()
        if way < 0.8:
            lines[row] = _dump(spoil_value(value, rng), rng)
        elif way < 0.9:
            lines[row] = lines[int(rng.integers(len(lines)))] + b"\r" * int(rng.integers(2))
        else:
            lines[row] = rng.choice([b"[", b'{"a":', b"9", b"-", b'"']) * int(rng.integers(100_000))
    if rng.random() < 0.05:
        lines[0] = b"\xef\xbb\xbf" + lines[0]
    return b"\n".join(lines)


def spoil_value(value: Any, rng: Random, odd: list = ODD_VALUES) -> Any:
    """A copy with one place below it replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return _pick(odd, rng)
    parent, key = places[rng.integers(len(places))]
    way = rng.random()
    if way < 0.7:
        parent[key] = _pick(odd, rng)
    elif way < 0.85:
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[str(_pick(["x", "", key, "Nf", "é" * 50], rng))] = parent.pop(key)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything below a value."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _pick(values: list, rng: Random) -> Any:
    return copy.deepcopy(values[rng.integers(len(values))])


def _dump(value: Any, rng: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=bool(rng.integers(2)))
    return text.encode("utf-8", errors="surrogatepass")


# --------------------------------------------------------------------------------- checkpoints

ODD_TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t * float("nan"),
    lambda t: t + float("inf"),
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t[..., :-1] if t.dim() else t.expand(3),
    lambda t: t.new_zeros(()),
    lambda t: t.new_zeros(0),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.half(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.new_zeros(()).expand(t.shape),
    lambda t: t.new_zeros(()).expand(2**20, 2**20),  # a few bytes in the file, 4 TiB if copied
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.numpy().tolist() if t.numel() < 100 else "tensor",
    lambda t: None,
    lambda t: [t],
    lambda t: torch.nn.Parameter(t.float()),
]


def spoil_checkpoint(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """Either the values that were saved, or the archive that holds them."""
    if rng.random() < 0.5:
        return _spoil_archive(data, rng, other)
    content = torch.load(io.BytesIO(data), weights_only=False)  # made by ourselves
    for _ in range(int(rng.integers(1, 3))):
        content = _spoil_content(content, rng)
    target = io.BytesIO()
    torch.save(content, target, _use_new_zipfile_serialization=bool(rng.random() < 0.9))
    return target.getvalue()


def _spoil_content(content: Any, rng: Random) -> Any:
    if not isinstance(content, dict):
        return content
    tensors = [place for place in _places(content) if torch.is_tensor(place[0][place[1]])]
    if not tensors or rng.random() < 0.5:
        return spoil_value(content, rng, [*ODD_VALUES, {1: 2}, b"bytes", torch.zeros(3)])
    content = copy.deepcopy(content)
    tensors = [place for place in _places(content) if torch.is_tensor(place[0][place[1]])]
    parent, key = tensors[rng.integers(len(tensors))]
    # What is odd already cannot always be made odder.
    with contextlib.suppress(RuntimeError, TypeError):
        parent[key] = ODD_TENSORS[rng.integers(len(ODD_TENSORS))](parent[key])
    return content


def _spoil_archive(data: bytes, rng: Random, other: bytes) -> bytes:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:
        return spoil_bytes(data, rng, other)
    entries = [[item.filename, archive.read(item)] for item in archive.infolist()]
    pickles = [entry for entry in entries if entry[0].endswith("data.pkl")]
    # Half of the changes to the pickle: it says what to build of all the rest.
    chosen = pickles[0] if rng.random() < 0.5 else entries[rng.integers(len(entries))]
    way = rng.random()
    if way < 0.7:
        chosen[1] = spoil_bytes(chosen[1], rng, other)
    elif way < 0.8:
        entries.remove(chosen)
    elif way < 0.9:
        chosen[0] = str(_pick(["x/../../y", "archive/data/0", "", chosen[0] + "0", "é"], rng))
    else:
        entries.append([chosen[0], spoil_bytes(chosen[1], rng, other)])
    target = io.BytesIO()
    method = zipfile.ZIP_STORED if rng.random() < 0.9 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(target, "w", method) as out:
        for name, inner in entries:
            out.writestr(zipfile.ZipInfo(name), inner)
    return target.getvalue()


# ---------------------------------------------------------------------------------------- clips


def spoil_mp4(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """Changes in the boxes before the pictures: sizes, counts, offsets; boxes gone or doubled."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        boxes = list(_boxes(bytes(changed), 0, len(changed)))
        small = [box for box in boxes if box[2] != b"mdat"]
        if not small:
            return spoil_bytes(bytes(changed), rng, other)
        start, end, _ = small[rng.integers(len(small))]
        way = rng.random()
        if way < 0.6 and end - start >= 12:
            place = start + 8 + 2 * int(rng.integers((end - start - 8) // 2 - 1))
            changed[place : place + 4] = struct.pack(">I", _odd_word(rng))
        elif way < 0.75:
            changed[start : start + 4] = struct.pack(">I", _odd_word(rng))
        elif way < 0.9:
            changed[start + 4 : start + 8] = b"free" if rng.random() < 0.7 else b"zzzz"
        else:
            changed[end:end] = changed[start:end]
    return bytes(changed)


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, last + 1, type) of every box, those inside of others too."""
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if size < 8 or start + size > end:
            return
        yield start, start + size, kind
        if kind in CONTAINERS:
            yield from _boxes(data, start + 8, start + size)
        start += size
