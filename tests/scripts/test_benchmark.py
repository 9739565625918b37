"""scripts/benchmark on small sizes: it runs through, counts right, and notices wrong results."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import reference
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import harness, model
from tests.golden_model import ROOT
from utils import RunError

SMALL = {"model": "small", "frames": 8, "threads": 1}


def test_runs_and_writes_what_was_measured(tmp_path) -> None:
    flags = "train_step --model small --frames 8 --repeats 2 --threads 1 --device cpu --json"
    command = [sys.executable, "-m", "scripts.benchmark", *flags.split(), tmp_path / "b.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "b.json").read_text())["results"]
    assert row["stage"] == "train_step" and "| train_step |" in done.stdout
    for side in ("ours", "reference"):
        assert len(row["seconds"][side]) == 2 and min(row["seconds"][side]) > 0
        assert row["memory"][side] > 0
    assert row["flop"]["ours"] < row["flop"]["reference"]


def test_search_measures_all_its_aims(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("lancedb")
    from scripts.benchmark import search
    from utils.search import lance

    monkeypatch.setattr(lance, "READERS", lance.READERS)  # which the benchmark sets
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "growth.png")]
    search.main(["--quick", "--repeats", "1", *files])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "b.json").read_text())
    assert len(rows) == 10 and all(row["measured"] > 0 for row in rows)
    assert capsys.readouterr().out.count("≤ 1.5") == 2
    events = next(row["numbers"]["events"] for row in rows if "memory" in row["title"])
    assert events == search.QUICK.memory * 42
    grown = [row["measured"] for row in rows if "bytes a window" in row["title"]]
    assert grown == pytest.approx([1, 1], rel=0.1)  # linear


@pytest.mark.parametrize(
    "name", ["encode_text", "prvr_tail", "vcmr_tail", "loader_30s", "store_30s"]
)
def test_both_sides_give_the_same(name: str) -> None:
    """`measure` raises if they do not; tails have 20 videos, loading has one."""
    options = harness.Options(**SMALL, texts=30, videos=20 if name.endswith("tail") else 1)
    result = harness.measure(name, benchmark.STAGES[name], options, repeats=1, memory=False)
    assert harness.ratio(result) > 0


@pytest.mark.parametrize("name", ["prvr_tail", "vcmr_tail"])
def test_both_sides_rank_by_the_same_readout(name: str) -> None:
    options = harness.Options(**SMALL, texts=30, videos=20, readout="half")
    harness.measure(name, benchmark.STAGES[name], options, repeats=1, memory=False)


@pytest.mark.parametrize("name", ["encode_video", "train_step"])
def test_a_wrong_result_is_noticed(name: str, monkeypatch) -> None:
    right = reference.mlp
    monkeypatch.setattr(reference, "mlp", lambda block, x: right(block, x) * 1.01)
    options = harness.Options(**SMALL)
    with pytest.raises(RunError, match=f"{name}: .* differ"):
        harness.measure(name, benchmark.STAGES[name], options, repeats=1, memory=False)


def test_unlike_results_are_never_the_same() -> None:
    a = {"x": torch.ones(3), "y": 2.0}
    assert harness.relative_error(a, a) == 0
    assert harness.relative_error({**a, "y": 2.5}, a) == pytest.approx(0.25)
    for other in ({"x": a["x"]}, {**a, "x": torch.ones(4)}, {**a, "x": torch.full((3,), math.nan)}):
        assert math.isnan(harness.relative_error(other, a)), other
        assert math.isnan(harness.relative_error(a, other)), other


def test_flop_of_the_cpu_are_counted() -> None:
    """Forward two products a head, backward five; a linear map by oneDNN one."""
    q, k = torch.randn(2, 3, 5, 64, requires_grad=True), torch.randn(2, 3, 7, 64)
    product = 2 * 2 * 3 * 5 * 7 * 64
    with FlopCounterMode(display=False, custom_mapping=harness.CPU_FLOP) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k).sum().backward()
    assert counter.get_total_flops() == 7 * product


def test_the_program_computes_hardly_more_than_the_definition_needs() -> None:
    """FLOP of a video's embeddings if nothing is computed twice, or for no one.

    Frames are projected once, in the last layer to keys and values only; a prompt's copies are one
    key; an event meets the keys it sees and no others. Norms, activations and softmax not counted.
    """
    options = harness.Options(model="small", videos=1, frames=16)
    run = model.encode_video(options, True)
    with FlopCounterMode(display=False, custom_mapping=harness.CPU_FLOP) as counter:
        run()
    sizes, propy = model.SIZES["small"], model.build(options)
    pyramid, prompts, conv = propy.pyramid, propy.num_prompts, propy.adapters[0].conv
    channels, kernel = conv.weight.shape[0], conv.kernel_size[0]
    width, layers, events = sizes.vision_width, sizes.vision_layers, pyramid.num_events
    patches, grid_tokens = options.frames * sizes.grid**2, sizes.grid**2 + 1
    tokens = options.frames * grid_tokens
    keys = pyramid.related.sum() + events * prompts + pyramid.frames_of_event.sum() * grid_tokens
    event_side = events * 12 * width**2 + 2 * width * int(keys) + prompts * 2 * width**2
    frame_side = tokens * 12 * width**2 + 2 * width * options.frames * grid_tokens**2
    needed = patches * 3 * sizes.patch_size**2 * width + events * width * sizes.embed_dim
    needed += layers * event_side + tokens * 2 * width**2  # the last layer's keys and values
    needed += (layers - 1) * (frame_side + patches * channels * (2 * width + kernel))
    assert 0.95 < 2 * needed / counter.get_total_flops() <= 1


@pytest.mark.parametrize(
    "flags", [("--frames", "8", "7"), ("--repeats", "0"), ("--json", "nowhere/b.json")]
)
def test_values_that_make_no_sense_are_refused(flags, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_args(["encode_video", *flags])
    assert f"error: argument {flags[0]}" in capsys.readouterr().err
