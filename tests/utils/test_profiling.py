"""--profile: a trace that says what the traced steps did, and nothing of the others."""

from __future__ import annotations

import json
import logging

import torch

from utils.training.profiling import SKIPPED, WARM_UP, traced_steps

CPU = torch.device("cpu")
log = logging.getLogger("test")


def train(folder, steps: int, traced: int) -> None:
    with traced_steps(folder, traced, CPU, log) as after_step:
        for step in range(steps):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(3).sum()
            after_step()


def test_trace_holds_the_steps_after_the_warm_up(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    first = SKIPPED + WARM_UP
    train(tmp_path / "profile", first + 5, traced=2)
    trace = json.loads((tmp_path / "profile" / "steps.json").read_text())
    names = {event["name"] for event in trace["traceEvents"] if "name" in event}
    assert {name for name in names if name.startswith("step ")} == {
        f"step {first}", f"step {first + 1}",
    }  # fmt: skip
    assert "aten::sum" in names
    assert str(tmp_path / "profile" / "steps.json") in caplog.text


def test_a_run_that_is_too_short_says_so(tmp_path, caplog) -> None:
    train(tmp_path / "profile", SKIPPED, traced=2)
    assert not (tmp_path / "profile").exists()
    assert "before any was traced" in caplog.text


def test_no_trace_unless_asked_for(tmp_path) -> None:
    train(tmp_path / "profile", 9, traced=0)
    assert not (tmp_path / "profile").exists()
