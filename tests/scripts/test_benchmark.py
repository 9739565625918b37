"""scripts/benchmark on small sizes: it runs through, counts right, and notices wrong results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import harness, model

ROOT = Path(__file__).resolve().parents[2]
SMALL = harness.Options(model="small", frames=8, threads=1)
STAGES = {"encode_video": model.encode_video, "train_step": model.train_batch}


def test_runs_and_writes_what_was_measured(tmp_path) -> None:
    command = [
        sys.executable, "-m", "scripts.benchmark", "train_step", "--model", "small",
        "--frames", "8", "--repeats", "2", "--threads", "1", "--device", "cpu",
        "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.png").stat().st_size > 5000
    (row,) = json.loads((tmp_path / "b.json").read_text())["results"]
    assert row["name"] == "train_step"
    for side in ("ours", "reference"):
        assert len(row[side]["times"]) == 2 and min(row[side]["times"]) > 0
        assert row[side]["peak"] > row[side]["increment"] > 0
    assert row["ours"]["flop"] < row["reference"]["flop"]
    assert row["deviation"] < row["tolerance"]
    assert "| train_step |" in done.stdout and "× faster" in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_a_wrong_result_is_noticed(name: str, monkeypatch) -> None:
    right = model.plain_propy.mlp
    monkeypatch.setattr(model.plain_propy, "mlp", lambda block, x: right(block, x) * 1.01)
    with pytest.raises(harness.MismatchError, match=f"{name}: .* differ"):
        harness.measure(name, STAGES[name], SMALL, repeats=1, memory=False)


def test_deviation_of_unlike_results_is_never_allowed() -> None:
    a = {"x": torch.ones(3), "y": [torch.zeros(2), torch.tensor([2.0, 4.0])]}
    b = {"x": torch.ones(3), "y": [torch.zeros(2), torch.tensor([2.0, 5.0])]}
    assert harness.largest_deviation(a, a) == 0
    assert harness.largest_deviation(a, b) == pytest.approx(0.2)
    for other in ({"x": a["x"]}, {**a, "x": torch.ones(4)}, {**a, "x": torch.full((3,), math.nan)}):
        assert math.isnan(harness.largest_deviation(other, a)), other


def test_counted_flop_are_the_formulas() -> None:
    """The shortcuts compute what is needed, and masked pairs of events and keys beside it."""
    options = replace(SMALL, frames=16)
    encode = model.encode_video(options).ours()
    with harness.FlopCounter() as counter:
        encode()
    share = model.needed_flop(options) / counter.total
    assert 0.95 < share <= 1
    longer = replace(options, frames=32)
    assert 1.9 < model.needed_flop(longer) / model.needed_flop(options) < 2.2
    q, k = torch.randn(2, 3, 5, 64, requires_grad=True), torch.randn(2, 3, 7, 64)
    with harness.FlopCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.total == 4 * 2 * 3 * 5 * 7 * 64
    with harness.FlopCounter() as counter:
        out.sum().backward()
    assert counter.total == 10 * 2 * 3 * 5 * 7 * 64


@pytest.mark.parametrize(
    "flags",
    [("--frames", "8", "7"), ("--frames", "1"), ("--repeats", "0"), ("--videos", "-1"),
     ("--json", "nowhere/b.json")],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(flags, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_args(["encode_video", *flags])
    assert f"error: {flags[0]}" in capsys.readouterr().err
