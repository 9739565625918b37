"""Ablations as a person runs them: grids, resuming, GPUs, interruptions, and a tiny real one."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import ProPy, ProPyConfig
from models.clip import CLIP
from modules.pyramid import PromptPyramid
from scripts import ablate
from scripts.ablate import Corpus, Run, Runner, open_corpus, read_grid, report, run_places
from scripts.demo import run as demo
from scripts.demo.run import against_twin
from tests.corpus import FLAGS, TinyRun, tiny_corpus
from utils import RunError
from utils.arguments import config_from, parse_args
from utils.report.ablation import Variant
from utils.training.engine import TrainConfig

GRIDS = sorted((ablate.ROOT / "scripts/ablations").glob("*.json"))
VARIANTS = [Variant("base", "a", []), Variant("more", "b", ["--Nvp=2"])]

# In place of main.py: says what it was asked to do and where, and fails or waits if asked for.
STUB = """
import json, os, sys, time
from pathlib import Path
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
folder = Path(flags["output_dir"])
where, started = os.environ.get("CUDA_VISIBLE_DEVICES"), time.monotonic()
time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
if flags["task"] == "train" and flags["seed"] == os.environ.get("STUB_FAILS"):
    sys.exit("the reason")
if flags["task"] == "evaluate":
    with (folder / "eval.jsonl").open("a") as file:
        print(json.dumps({"metrics": {"cosine": {"SumR": float(flags["seed"])}}}), file=file)
done = flags | {"where": where, "from": started, "to": time.monotonic()}
with Path(os.environ["STUB_LOG"]).open("a") as file:
    file.write(json.dumps(done) + "\\n")
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A corpus whose programs are STUB; `calls()` are those that came to their end."""
    path, log = tmp_path / "stub.py", tmp_path / "stub.log"
    path.write_text(STUB)
    monkeypatch.setenv("STUB_LOG", str(log))
    monkeypatch.setattr(ablate, "run_places", lambda *_, **__: [{}])
    measured = lambda folder, test: {"SumR": float(folder.name[5:])}  # noqa: E731
    monkeypatch.setattr(ablate, "measure", measured)

    programs = [[sys.executable, str(path), f"--task={task}"] for task in ("train", "evaluate")]
    return SimpleNamespace(
        programs=programs,
        corpus=Corpus("stub", *programs, "videos", "A note."),
        calls=lambda: [json.loads(line) for line in log.read_text().splitlines()],
    )


def runs(folder: Path, variants: list[Variant] = VARIANTS, seeds: tuple = (1, 2)) -> list[Run]:
    return [Run(v, seed, folder / v.name / f"seed_{seed}") for seed in seeds for v in variants]


def test_a_run_that_is_finished_is_never_run_again(stub, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    monkeypatch.setenv("STUB_FAILS", "2")
    failed = Runner(stub.corpus, 1).run_all(runs(folder))
    assert len(failed) == 2 and all("the reason" in reason for reason in failed)
    assert sorted(path.parent.name for path in folder.rglob("result.json")) == ["seed_1"] * 2
    before = stub.calls()
    assert [c["task"] for c in before] == ["train", "evaluate"] * 2
    assert [c.get("Nvp") for c in before] == [None, None, "2", "2"]
    monkeypatch.delenv("STUB_FAILS")
    assert Runner(stub.corpus, 1).run_all(runs(folder)) == []
    new = stub.calls()[len(before) :]
    assert [(c["task"], c["seed"]) for c in new] == [("train", "2"), ("evaluate", "2")] * 2
    assert all(c["resume"] == "auto" for c in new if c["task"] == "train")
    assert Runner(stub.corpus, 1).run_all(runs(folder)) == [] and len(stub.calls()) == 8
    assert "the reason" in (folder / "base/seed_2/output.txt").read_text()


def test_the_test_split_is_scored_once(stub, tmp_path) -> None:
    """Also where a run was killed between its evaluation and its result."""
    (run,) = runs(tmp_path, VARIANTS[:1], (1,))
    Runner(stub.corpus, 1).run_all([run])
    (run.folder / "result.json").unlink()
    Runner(stub.corpus, 1).run_all([run])
    assert [c["task"] for c in stub.calls()] == ["train", "evaluate", "train"]
    assert (run.folder / "result.json").is_file()


@pytest.mark.parametrize("other", ["flags", "settings"])
def test_runs_of_another_setting_are_refused(stub, tmp_path, other) -> None:
    Runner(stub.corpus, 1).run_all(runs(tmp_path))
    corpus, variants = stub.corpus, VARIANTS
    if other == "flags":
        variants = [VARIANTS[0], Variant("more", "b", ["--Nvp=3"])]
    else:
        corpus = Corpus("stub", *stub.programs, "other settings", "A note.")
    with pytest.raises(RunError, match=rf"a run with other {other}: give another --output"):
        Runner(corpus, 1).check(runs(tmp_path, variants, (1, 2, 3)))
    Runner(stub.corpus, 1).check(runs(tmp_path, seeds=(1, 2, 3)))
    assert len(stub.calls()) == 8


def test_an_interruption_stops_the_runs_and_the_next_call_goes_on(
    stub, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ablate, "run_places", lambda *_, **__: [{"CUDA_VISIBLE_DEVICES": "0"}] * 2)
    monkeypatch.setenv("STUB_SECONDS", "60")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    runner, started = Runner(stub.corpus, 1), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(runs(tmp_path))
    assert time.monotonic() - started < 30 and not runner.processes
    assert not list(tmp_path.rglob("result.json")) and not Path(os.environ["STUB_LOG"]).exists()
    assert len(list(tmp_path.rglob("output.txt"))) == 2, "no other run was started"
    monkeypatch.setenv("STUB_SECONDS", "0")
    assert Runner(stub.corpus, 1).run_all(runs(tmp_path)) == []
    assert len(list(tmp_path.rglob("result.json"))) == 4


def test_each_gpu_has_one_run_at_a_time(stub, tmp_path, monkeypatch) -> None:
    places = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setattr(ablate, "run_places", lambda *_, **__: places)
    monkeypatch.setenv("STUB_SECONDS", "0.3")
    assert Runner(stub.corpus, 2).run_all(runs(tmp_path, seeds=(1, 2, 3))) == []
    calls = sorted(stub.calls(), key=lambda call: call["from"])
    assert {call["where"] for call in calls} == {"0,1", "2,3"}
    for where in ("0,1", "2,3"):
        own = [call for call in calls if call["where"] == where]
        assert all(a["to"] <= b["from"] for a, b in itertools.pairwise(own))
    assert any(a["to"] > b["from"] for a, b in itertools.pairwise(calls)), "side by side"


@pytest.mark.parametrize(
    ("visible", "count", "gpus", "groups"),
    [
        (None, 3, 1, ["0", "1", "2"]), ("4,5,6,7,8", 5, 2, ["4,5", "6,7"]),
        ("GPU-a,GPU-b", 2, 1, ["GPU-a", "GPU-b"]),
    ],
)  # fmt: skip
def test_places_on_gpus(monkeypatch, visible, count, gpus, groups) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    expected = [{"CUDA_VISIBLE_DEVICES": names} for names in groups]
    assert run_places(gpus, side_by_side=False) == run_places(gpus, side_by_side=True) == expected
    with pytest.raises(RunError, match=f"this machine has {count}"):
        run_places(count + 1, side_by_side=True)


@pytest.mark.parametrize(
    ("cores", "gpus", "places", "threads"),
    [(1, 1, 1, 1), (2, 1, 2, 1), (2, 4, 1, 1), (6, 2, 3, 1), (32, 1, 8, 4), (32, 4, 8, 1)],
)
def test_places_on_a_cpu_share_its_cores(monkeypatch, cores, gpus, places, threads) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(ablate, "usable_cores", lambda: cores)
    shares = [{"OMP_NUM_THREADS": str(threads)}] * places
    assert run_places(gpus, side_by_side=True) == shares
    assert run_places(gpus, side_by_side=False) == [{}], "a real CLIP needs the memory"


def test_flags_of_the_base_are_those_of_all(tmp_path) -> None:
    path = tmp_path / "g.json"
    variants = {"b c": {"asks": "?", "flags": {"Nvp": 1}}}
    path.write_text(json.dumps(
        {"base": {"asks": "!", "flags": {"Nvp": 2, "lr": 0.1}}, "variants": variants}
    ))  # fmt: skip
    base, other = read_grid(path, ["--epochs", "8"])
    assert base == Variant("base", "!", ["--Nvp=2", "--lr=0.1", "--epochs", "8"])
    assert other == Variant("b c", "?", [*base.flags, "--Nvp=1"])


BASE = {"asks": "!", "flags": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not a grid"),
        ("[1]", "not a grid"),
        ({"base": BASE}, "not a grid.*variants"),
        ({"base": {"asks": "!"}, "variants": {}}, "not a grid.*flags"),
        ({"base": BASE, "variants": {}, "seeds": [1]}, "not a grid.*seeds"),
        ({"base": BASE, "variants": {"a": BASE | {"flag": 1}}}, "not a grid.*flag"),
        ({"base": BASE, "variants": {"base": BASE}}, "not a grid.*called base"),
        ({"base": BASE, "variants": {"../a": BASE}}, r"\.\./a: letters"),
        ({"base": {"asks": "!", "flags": {"seed": 1}}, "variants": {}}, "base: no grid decides"),
        ({"base": BASE, "variants": {"a": {"asks": "?", "flags": {"Nvpp": 1}}}}, "a: main.py"),
    ],
)  # fmt: skip
def test_a_grid_that_is_none_is_refused(tmp_path, content, message) -> None:
    path = tmp_path / "grid.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RunError, match=rf"grid\.json: .*{message}"):
        read_grid(path)
    with pytest.raises(RunError, match=r"none\.json: No such file"):
        read_grid(tmp_path / "none.json")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_are_of_models_that_differ(path, monkeypatch) -> None:
    """With flags that main.py takes, also on the demo's small CLIP."""
    monkeypatch.chdir(ablate.ROOT)
    clip, settings = CLIP(replace(demo.CLIP_SIZES, vocab_size=99)), []
    clip.initialize()
    for variant in read_grid(path):
        args = parse_args([*ablate.NEEDED.split(), *variant.flags])
        pyramid = PromptPyramid.from_config(args.pyr_config_path).config
        given = clip.settings.as_fields() | {"clip_seconds": None, "adapter_channels": 8}
        config = config_from(ProPyConfig, args, pyramid=pyramid, **given)
        model = ProPy(copy.deepcopy(clip), config)
        frames = torch.zeros(1, pyramid["Nf"], 3, demo.SIZE, demo.SIZE, dtype=torch.uint8)
        with torch.inference_mode():
            assert model.encode_video(frames).shape == (1, model.pyramid.num_events, 64)
        channels = args.adapter_channels
        settings.append((model.config, channels, config_from(TrainConfig, args)))
    assert len(settings) > 1
    assert all(a != b for a, b in itertools.combinations(settings, 2)), "two variants are the same"


def test_a_corpus_is_the_demo_or_a_split(monkeypatch) -> None:
    corpus = open_corpus("charades", gpus=2)
    monkeypatch.setenv("lr", "1e-2")
    assert open_corpus("charades", gpus=2).made_with != corpus.made_with, "variables count"
    assert corpus.train[:4] == ["env", "gpus=2", "bash", "scripts/prvr_charades.sh"]
    assert "as in the authors' program" in corpus.note
    with pytest.raises(RunError, match="nothing: neither demo"):
        open_corpus("nothing", gpus=1)


def test_against_the_twin() -> None:
    """Videos 0 and 1, 2 and 3 are pairs; one text wins, one loses, one ties."""
    scores = torch.tensor([[0.9, 0.1, 1.0, 1.0], [0.5, 0.2, 0, 0], [0, 0, 0.3, 0.3]])
    assert against_twin(scores[:1], torch.tensor([0])) == 100
    assert against_twin(scores, torch.tensor([0, 1, 3])) == pytest.approx(50)


@pytest.fixture
def tiny(tmp_path, tmp_path_factory, monkeypatch) -> Corpus:
    """main.py on the tests' corpus, in forks; every query is one of motion."""
    base = tiny_corpus(tmp_path_factory.getbasetemp())
    lines = [json.loads(line) for line in (base / "annos.jsonl").read_text().splitlines()]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(line | {"type": "motion"}) + "\n" for line in lines))
    common = [*FLAGS, "--pretrained_clip_name", str(base / "clip.pt")]
    train = ["--do_train", "1", "--prvr_train_annos", "annos.jsonl", "--epochs", "2"]
    evaluate = ["--do_eval", "1", "--subtask_type", "VCMR", "--prvr_val_annos", str(test)]
    run, interrupted = TinyRun(base, tmp_path), []

    def call(self: Runner, command: list[str], folder: Path, places: dict) -> None:
        if "do_train" in str(command) and not interrupted:
            interrupted.append(folder)
            assert run.main(*command, fault="at", when=3, act="terminate").returncode == 143
            raise RunError(f"{folder}: stopped")
        run.works(*command)

    monkeypatch.setattr(Runner, "_call", call)
    monkeypatch.setattr(ablate, "run_places", lambda *_, **__: [{}])  # forks come one by one
    return Corpus("tiny", [*common, *train], [*common, *evaluate], "", "A note.", test)


def test_a_grid_on_a_tiny_corpus(tiny, tmp_path, capsys) -> None:
    """The numbers are those that the runs themselves logged; what was stopped in its second epoch
    comes to those of a run that was not."""
    variants = [Variant("base", "a", []), Variant("no prompts", "b", ["--Nvp=0"])]
    out = tmp_path / "out"
    grid = runs(out, variants)
    assert len(Runner(tiny, 1).run_all(grid)) == 1
    assert Runner(tiny, 1).run_all(grid) == []
    again = Run(variants[0], 1, tmp_path / "again")
    assert Runner(tiny, 1).run_all([again]) == []
    report("grid", variants, grid, tiny, out)
    shown = capsys.readouterr().out
    assert "| base | 2 |" in shown and "| no prompts | 2 |" in shown and "A note." in shown
    found = {}
    for run in [*grid, again]:
        numbers = found[run.folder] = json.loads((run.folder / "result.json").read_text())
        args = json.loads((run.folder / "args.json").read_text())
        (evaluation,) = (run.folder / "eval.jsonl").read_text().splitlines()
        metrics = json.loads(evaluation)["metrics"]
        assert args["seed"] == run.seed and args["Nvp"] == (0 if run.variant.flags else 4)
        assert numbers["SumR"] == metrics["cosine"]["SumR"]
        assert numbers["VCMR/0.5-r10"] == metrics["VCMR"]["0.5-r10"]
        assert numbers["VR/motion/r1"] == metrics["VR/motion"]["r1"]
        assert numbers["trainable"] == args["trainable"] / 1e6
        assert numbers["gflop"] > 0 and 0 <= numbers["twin/motion"] <= 100
    measured = {"step_time": 0, "memory_gib": 0}
    assert found[grid[0].folder] | measured == found[again.folder] | measured
    assert found[grid[0].folder]["gflop"] > found[grid[1].folder]["gflop"], "prompts are work"
