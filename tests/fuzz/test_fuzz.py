"""Corrupted files of every kind: a reader gives a proper result, or refuses the file by its name.

    FUZZ_EXAMPLES=100000 .venv/bin/python -m pytest -m slow tests/fuzz/test_fuzz.py

The file that a reader stumbles over, or a decoder ends the process over, is in the test's folder.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.readers import KINDS

MANY = int(os.environ.get("FUZZ_EXAMPLES", 500))
TIME_LIMIT = 30_000  # milliseconds for one file
MEMORY_LIMIT = 2**30  # bytes that a file may add at its peak
MAX_MESSAGE = 20_000  # characters of an error that someone is meant to read


def memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.parametrize("examples", [30, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_a_corrupted_file_is_read_or_refused(tmp_path, name: str, examples: int) -> None:
    kind, counts = KINDS[name], Counter()
    (tmp_path / "samples").mkdir()
    path = tmp_path / kind.file

    @settings(
        max_examples=examples, deadline=TIME_LIMIT, derandomize=examples == 30, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(kind.cases(tmp_path / "samples"))
    def read(case: bytes) -> None:
        path.write_bytes(case)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = memory("VmRSS")
        try:
            assert kind.read(path), "a wrong result"
            counts["accepted"] += 1
        except kind.error as error:
            text = str(error)
            assert str(path) in text and len(text) <= MAX_MESSAGE
            assert text.encode(errors="replace").decode() == text, "it cannot be printed"
            counts["refused"] += 1
        assert memory("VmHWM") - before < MEMORY_LIMIT

    read()
    assert counts["accepted"] and counts["refused"]
