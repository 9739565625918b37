"""The fuzzer: it finds nothing in a few cases, and it would find what there is to be found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modules import ModelError
from tests.fuzz import fuzz
from tests.fuzz.readers import KINDS


def test_a_few_cases_of_every_kind_find_nothing(tmp_path) -> None:
    """In an interpreter of their own: the same cases whatever ran before, and nothing stays."""
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "--cases", "30", "--findings", tmp_path]
    done = subprocess.run(command, cwd=fuzz.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in KINDS:
        found = re.search(rf"^{kind}: (\d+) accepted, (\d+) refused", done.stdout, re.MULTILINE)
        assert found and min(map(int, found.groups())) > 0, done.stdout


def test_a_seed_gives_the_same_cases(tmp_path) -> None:
    cases = KINDS["annotations"].cases(tmp_path)
    drawn = fuzz.draw_cases(cases, "0", 20)
    assert drawn == fuzz.draw_cases(cases, "0", 20)
    assert drawn != fuzz.draw_cases(cases, "1", 20) and len(set(drawn)) > 10


def stumble(_: Path) -> bool:
    raise KeyError("x")


def mumble(_: Path) -> bool:
    raise ModelError("something is wrong")


def hang(_: Path) -> None:
    time.sleep(100)


def abort(_: Path) -> None:
    os.abort()


def eat(_: Path) -> bool:
    return bool(np.ones(3 * 2**29, np.uint8).all())


@pytest.mark.parametrize(
    ("read", "outcome"),
    [(bool, "accepted"), (Path.exists, "wrong result"), (stumble, "KeyError"),
     (mumble, "bad message")],
)  # fmt: skip
def test_what_is_no_answer_is_a_finding(read, outcome, tmp_path) -> None:
    answer = fuzz.read_case(read, ModelError, tmp_path / "file")
    assert answer.outcome == outcome and answer.is_finding == (outcome != "accepted")


@pytest.mark.slow
def test_a_reader_that_hangs_crashes_or_eats_memory_is_a_finding(tmp_path) -> None:
    child = fuzz.Child(tmp_path, time_limit=10)
    outcomes = [child.read_case(read, ModelError, tmp_path / "file") for read in (hang, abort, eat)]
    assert [answer.outcome for answer in outcomes] == ["hang", "crash", "memory"]
    assert "in hang" in outcomes[0].details and "in abort" in outcomes[1].details


@pytest.mark.slow
def test_a_minute_finds_nothing(tmp_path) -> None:
    assert fuzz.main(["--seconds", "60", "--findings", str(tmp_path)]) == 0


def test_a_finding_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(KINDS, "pyramid", KINDS["pyramid"]._replace(read=stumble))
    arguments = ["--cases", "1", "--kinds", "pyramid", "--findings", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    assert (tmp_path / "pyramid_0_0.json.txt").read_text().startswith("KeyError")
    assert (tmp_path / "pyramid_0_0.json").stat().st_size > 0
