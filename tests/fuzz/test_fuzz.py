"""The fuzzer: it finds nothing in a short run, and it would find what there is to be found."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from tests.fuzz import fuzz, mutations


def test_a_short_run_finds_nothing(tmp_path, capsys):
    findings = tmp_path / "findings"
    status = fuzz.main(["--seconds", "6", "--findings", str(findings), "--refresh", "60"])
    printed = capsys.readouterr().out
    assert status == 0, printed + "".join(p.read_text() for p in findings.glob("*.txt"))
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    for kind in fuzz.KINDS:
        cases, accepted, refused, found = map(int, rows[kind][:4])
        assert cases == accepted + refused > 0 and found == 0


def test_every_sample_is_accepted_and_the_same_seed_gives_the_same_case(tmp_path):
    samples = fuzz.make_samples(tmp_path, None)
    for kind, contents in samples.items():
        for content in contents:
            path = tmp_path / f"sample{fuzz.KINDS[kind].suffix}"
            path.write_bytes(content)
            assert fuzz.read_case(kind, path).outcome == "accepted"
        cases = [fuzz.make_case(samples, kind, 0, i) for i in range(20)]
        if kind != "checkpoint":
            assert cases == [fuzz.make_case(samples, kind, 0, i) for i in range(20)]
        assert len(set(cases)) > 15


def hang(_: Path) -> bool:
    time.sleep(100)
    return True


def crash(_: Path) -> bool:
    os.abort()


def eat(_: Path) -> bool:
    with mmap.mmap(-1, 2**28) as fresh:  # an array might lie where earlier tests had theirs
        return fresh.write(b"\1" * 2**28) == 2**28


def lie(_: Path) -> bool:
    return False


def stumble(_: Path) -> bool:
    raise KeyError("x")


def mumble(_: Path) -> bool:
    raise fuzz.ModelError("something is wrong")


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (hang, "hang"),
        (crash, "SIGABRT"),
        (eat, "memory"),
        (lie, "wrong result"),
        (stumble, "KeyError"),
        (mumble, "bad message"),
    ],
)
def test_what_is_no_answer_is_a_finding(read, outcome, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz.multiprocessing, "get_context", _fork)  # takes the changes along
    kind = fuzz.Kind(read, fuzz.ModelError, mutations.spoil_json, ".json")
    monkeypatch.setitem(fuzz.KINDS, "pyramid", kind)
    if outcome == "hang":
        monkeypatch.setattr(fuzz, "TIME_LIMIT", 0.5)
        monkeypatch.setattr(fuzz, "BUSY_TIME_LIMIT", 1.0)
    monkeypatch.setattr(fuzz, "MEMORY_LIMIT", 2**27)
    arguments = ["--seconds", "0", "--kinds", "pyramid", "--findings", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    (finding,) = tmp_path.glob("*.json")
    assert (tmp_path / f"{finding.name}.txt").read_text().startswith(outcome)
    capsys.readouterr()
    assert fuzz.main(["--replay", str(finding)]) == 1
    assert outcome in capsys.readouterr().out


def _fork(_: str, original=fuzz.multiprocessing.get_context):
    return original("fork")
