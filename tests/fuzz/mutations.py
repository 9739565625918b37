"""Corrupted files: of values, by an odd one in place of another; of bytes, with what is known of
the format (zip archives, MP4) and without."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Random = np.random.Generator
Cases = st.SearchStrategy[bytes]

MISSING = ...
# What a field holds when a converter, a spreadsheet or an attacker wrote it.
ODD_VALUES = st.sampled_from([
    MISSING, True, -1, 512, 4097, 2**31, 2**63, -(2**63), 10**400, -0.0, 1e308, float("nan"), " ",
    float("inf"), "", "1.5", "nan", "a\0b", "../v1", "a/b", "..", "\ud800", "\u202e", "x" * 100_000,
    "é" * 126, "\r\n", [[]], [None], [2, 1], [1, 2, 3], [-1, 2], ["1", "2"], [[1, 2]] * 1000,
]) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip
ODD_TENSORS = st.sampled_from([
    lambda t: t * float("nan"),
    lambda t: t[None],
    lambda t: t[..., :-1] if t.dim() else t.expand(3),
    lambda t: t.long(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.new_zeros(()).expand(2**20, 2**20),  # a few bytes in the file, 4 TiB if copied
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
])  # fmt: skip
ODD_WORDS = [0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x1000000]
BOXES = re.compile(
    rb"moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|minf|stbl|stsd|stts|ctts|stss|stsc|stsz|stco|trun"
)


def json_cases(lines: list) -> Cases:
    """Files of these values, one a line."""

    def write(value: Any, separator: str) -> bytes:
        values = value if isinstance(value, list) else [str(value)]
        return separator.join(map(json.dumps, values)).encode()

    files = st.builds(write, almost(lines), st.sampled_from(["\n", "\r\n\r\n"]))
    return files | changed(files, corrupt_bytes)


def torch_cases(*contents: dict) -> Cases:
    """Files of torch.save."""

    def save(content: Any) -> bytes:
        torch.save(content, target := io.BytesIO())
        return target.getvalue()

    saved = st.one_of(*map(almost, contents)).map(save)
    return saved | changed(saved, corrupt_archive) | changed(saved, corrupt_bytes)


def mp4_cases(*clips: bytes) -> Cases:
    """Clips."""
    clip = st.sampled_from(clips)
    return clip | changed(clip, corrupt_mp4) | changed(clip, corrupt_bytes)


def changed(valid: Cases, change: Callable[[bytes, Random, bytes], bytes]) -> Cases:
    """By a function of the bytes, a generator and another file's bytes."""
    rng = st.integers(0, 2**64).map(np.random.default_rng)
    return st.builds(change, valid, rng, valid)


def almost(value: Any, odds: int | None = None) -> st.SearchStrategy:
    """Like a value, but with an odd one in about one place; the simplest is the value itself."""
    odds = odds or _count(value)
    odd = ODD_VALUES.map(copy.deepcopy)
    if isinstance(value, dict):
        inner = st.fixed_dictionaries({key: almost(part, odds) for key, part in value.items()})
        like = inner.map(lambda parts: {k: v for k, v in parts.items() if v is not MISSING})
    elif isinstance(value, list):
        inner = st.tuples(*(almost(part, odds) for part in value))
        like = inner.map(lambda parts: [part for part in parts if part is not MISSING])
    else:
        like = st.just(value)
        if torch.is_tensor(value):
            odd = ODD_TENSORS.map(lambda change: change(value)) | odd
    return st.integers(0, odds).flatmap(lambda draw: odd if draw == odds else like)


def _count(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value
    return 1 + sum(map(_count, parts)) if isinstance(value, dict | list) else 1


def corrupt_bytes(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """One to four changes that know nothing of the format: flips, cuts, repeats, splices."""
    for _ in range(rng.integers(1, 5)):
        start = int(rng.integers(len(data) + 1))
        stop = start + int(2 ** rng.uniform(0, np.log2(len(data) + 2)))  # short ones more often
        part, rest = data[start:stop], data[stop:]
        begin = int(rng.integers(len(other) + 1))
        part = [
            bytes(byte ^ 1 << rng.integers(8) for byte in part[:64]) + part[64:],
            bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x7B])]) * len(part),
            struct.pack(">I", _odd_word(rng)) + part[4:],
            part * (20 if len(part) < 2000 else 2),
            other[begin : begin + len(part)],
            b"",
        ][rng.integers(6)]
        data = data[:start] + part + (rest if rng.random() < 0.9 else b"")
    return data


def corrupt_archive(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """A zip file of torch's whose checksums are right, with a member changed, removed, renamed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # Half of the changes to the pickle: it says what to build of all the rest.
    name = str(rng.choice(list(members))) if rng.random() < 0.5 else "archive/data.pkl"
    content, way = members.pop(name), rng.random()
    if way < 0.9:
        name = name if way < 0.8 else str(rng.choice(["x/../../y", "archive/data/0", ""]))
        members[name] = corrupt_bytes(content, rng, other) if way < 0.8 else content
    with zipfile.ZipFile(target := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return target.getvalue()


def corrupt_mp4(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """Changes in the boxes beside the pictures: sizes, counts, offsets; boxes gone or doubled."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        places = [found.start() - 4 for found in BOXES.finditer(changed)]
        if not places:
            return corrupt_bytes(bytes(changed), rng, other)
        start = int(rng.choice(places))
        size, way = int.from_bytes(changed[start : start + 4], "big"), rng.random()
        if way < 0.75:  # a word within, or the box's size
            within = 8 + 2 * int(rng.integers(max(min(size, 2000) // 2 - 5, 1)))
            place = start + (within if way < 0.6 else 0)
            changed[place : place + 4] = struct.pack(">I", _odd_word(rng))
        elif way < 0.9:
            changed[start + 4 : start + 8] = b"free"
        else:
            changed[start:start] = changed[start : start + min(size, 2000)]
    return bytes(changed)


def _odd_word(rng: Random) -> int:
    return int(rng.integers(2**32) if rng.random() < 0.3 else rng.choice(ODD_WORDS))
