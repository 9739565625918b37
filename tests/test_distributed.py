"""Several processes compute the run of one: gradients, steps, stopping, resuming, evaluating."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.corpus import make_run
from tests.golden_model import ROOT, GoldenModel
from utils.evaluation.predictions import load_predictions

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
    "PROPY_TIMEOUT_MINUTES": "0.5",
}  # fmt: skip


def torchrun(processes: int, *command: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(processes), *command,
    ]  # fmt: skip


def compute(processes: int, folder: Path, *chosen: str) -> None:
    """What tests/distributed_program.py computes, once for all tests that read it."""
    words = [str(ROOT / "tests/distributed_program.py"), str(folder), *chosen]
    command = [sys.executable, *words] if processes == 1 else torchrun(processes, *words)
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("computed")
    compute(1, folder)
    compute(2, folder)
    compute(3, folder, *GRADIENTS)
    return folder


GRADIENTS = [f"gradients-{micro}-{freeze}" for micro in (1, 2) for freeze in (1, 0)]
# One video of six is embedded backwards with a share of 0.2: by one process alone.
GRADIENTS += ["more-1-0.5", "more-2-0.5", "more-1-0.2"]


def saved(folder: Path, work: str, processes: int) -> list[dict]:
    """What each process saved of a work, the main one first."""
    files = sorted((folder / work).glob(f"{processes}-*.pt"))
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("work", GRADIENTS)
def test_loss_and_gradients_are_those_of_one_process(computed, work) -> None:
    """With captions in no way even among the processes; in micro-batches; with CLIP trained."""
    (alone,) = saved(computed, work, 1)
    for processes in (2, 3):
        (together,) = saved(computed, work, processes)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_all_processes_take_the_same_steps(computed, precision) -> None:
    (alone,) = saved(computed, f"steps-{precision}", 1)
    first, second = saved(computed, f"steps-{precision}", 2)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        near = {"fp32": 1e-4}.get(precision, 5e-3)
        torch.testing.assert_close(value, alone[name], rtol=0, atol=near, msg=name)


def test_an_inf_in_one_process_is_skipped_by_all(computed) -> None:
    results = saved(computed, "inf", 2)
    for found in results:
        assert found["skipped"].tolist() == [False, False, True, False]
        assert found["scale"] == 8.0
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_the_golden_trajectory(computed) -> None:
    golden = GoldenModel.read("m3")
    for found in saved(computed, "golden", 2):
        losses, norms = found["steps"].unbind(1)
        assert losses.numpy() == pytest.approx(golden["traj_loss_f64"], abs=1e-9)
        assert norms.numpy() == pytest.approx(golden["traj_grad_norm_f64"], rel=1e-9)


@pytest.fixture
def machines():
    """Two network namespaces on one wire, as commands that run a program in each."""
    names = [f"propy-{os.getpid()}-{n}" for n in (1, 2)]
    ends = [f"p{os.getpid() % 10**6}-{n}" for n in (1, 2)]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for n, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{n}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names], ends
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_machines(tmp_path, computed, machines) -> None:
    """As far as the network is concerned: torchrun's own flags, one process on each."""
    commands, ends = machines
    work = "gradients-1-1"
    (alone,) = saved(computed, work, 1)
    started = [
        subprocess.Popen(
            [*command, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
             "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", "10.77.0.1",
             "--master_port", "29517", str(ROOT / "tests/distributed_program.py"),
             str(tmp_path), work],
            env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": end}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for n, (command, end) in enumerate(zip(commands, ends, strict=True))
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    (together, *_) = saved(tmp_path, work, 2)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------- the whole program
# Every process imports torch anew, which takes minutes in all: -m slow.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_run(tmp_path_factory.getbasetemp())


def words(corpus, output: Path, *flags: str) -> list[str]:
    return [
        str(ROOT / "main.py"), "--prvr_val_annos", "annos.jsonl", "--video_dir", "videos",
        "--output_dir", str(output), "--pretrained_clip_name", "clip.pt",
        "--pyr_config_path", "pyramid.json", "--adapter_channels", "16", "--batch_size", "3",
        "--batch_size_val", "1", "--num_thread_reader", "0", "--lr", "2e-3",
        "--log_zero_shot", "0", *flags,
    ]  # fmt: skip


TRAIN = ("--do_train", "1", "--prvr_train_annos", "annos.jsonl")


def run(corpus, processes: int, output: Path, *flags: str) -> str:
    command = words(corpus, output, *flags)
    command = [sys.executable, *command] if processes == 1 else torchrun(processes, *command)
    done = subprocess.run(
        command, cwd=corpus.corpus, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_evaluating_gives_identical_results(corpus, tmp_path) -> None:
    best = str(corpus.logs / "ckpt.best.pth.tar")
    flags = (
        "--do_eval",
        "1",
        "--subtask_type",
        "VCMR",
        "--resume",
        best,
        "--save_predictions",
        "1",
    )
    found = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        printed = run(corpus, processes, output, *flags)
        assert printed.count("ProPy ") == 1, "one process prints"
        (record,) = map(json.loads, (output / "eval.jsonl").read_text().splitlines())
        found.append((record["metrics"], load_predictions(output / "predictions.h5")))
    for metrics, predictions in found[1:]:
        assert metrics == found[0][0]
        for name, value in vars(found[0][1]).items():
            same = getattr(predictions, name)
            assert torch.equal(value, same) if torch.is_tensor(value) else value == same, name


@pytest.mark.slow
def test_clip_alone_is_evaluated_and_logged_alike(corpus, tmp_path) -> None:
    """With more processes than batches too, whose own part of the videos is empty."""
    evaluate = ("--do_eval", "1", "--zero_shot", "events", "--subtask_type", "VCMR")
    log = ("--epochs", "1", "--log_zero_shot", "1", "--batch_size_val", "4")
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        run(corpus, processes, output / "alone", *evaluate)
        run(corpus, processes, output / "trained", *TRAIN, *log)
        (record,) = map(json.loads, (output / "alone/eval.jsonl").read_text().splitlines())
        first, _ = map(json.loads, (output / "trained/log.jsonl").read_text().splitlines())
        found.append((record["metrics"], first["zero_shot"]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2])
def test_a_run_continues_on_another_number_of_processes(corpus, tmp_path, before: int) -> None:
    run(corpus, before, tmp_path / "before", *TRAIN, "--epochs", "1")
    found = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        shutil.copytree(tmp_path / "before", output)
        run(corpus, processes, output, *TRAIN, "--resume", "auto", "--epochs", "2")
        found.append(losses(output))
    assert [len(epochs) for epochs in found] == [2, 2, 2]
    for epochs in found[1:]:
        assert epochs == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_saved_embeddings_and_missing_videos(corpus, tmp_path) -> None:
    """Every process goes without the videos that the main one lists."""
    queries = (corpus.corpus / "annos.jsonl").read_text().splitlines()
    absent = json.loads(queries[0]) | {"vid_name": "absent", "desc_id": "absent"}
    (tmp_path / "more.jsonl").write_text("\n".join([*queries, json.dumps(absent)]))
    more = ("--prvr_val_annos", str(tmp_path / "more.jsonl"), "--allow_missing", "1")
    evaluate = ("--do_eval", "1", "--resume", str(corpus.logs / "ckpt.best.pth.tar"))
    file, rows = str(tmp_path / "e.h5"), []
    run(corpus, 2, tmp_path / "made", *evaluate, *more, "--save_embeddings", file)
    for processes in (1, 2):
        output = tmp_path / str(processes)
        run(corpus, processes, output, *evaluate, *more, "--load_embeddings", file)
        (record,) = map(json.loads, (output / "eval.jsonl").read_text().splitlines())
        assert record["val_videos_left_out"] == 1
        (line,) = (output / "missing_videos.jsonl").read_text().splitlines()
        rows.append((record["metrics"], line))
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends_ends_the_run_which_resumes(corpus, tmp_path, number) -> None:
    flags = (*TRAIN, "--epochs", "60", "--save_every_steps", "1", "--resume", "auto")
    started = subprocess.Popen(
        torchrun(2, *words(corpus, tmp_path, *flags)), cwd=corpus.corpus, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if number == signal.SIGTERM:  # as a scheduler sends it, to torchrun, which passes it on
        started.send_signal(number)
    else:
        children = f"/proc/{started.pid}/task/{started.pid}/children"
        os.kill(int(Path(children).read_text().split()[1]), number)
    output, _ = started.communicate(timeout=120)
    assert started.returncode != 0, output
    done = len(losses(tmp_path))
    assert 0 < done < 60, output
    run(corpus, 2, tmp_path, *TRAIN, "--resume", "auto", "--epochs", str(done + 1))
    assert len(losses(tmp_path)) >= done + 1


@pytest.mark.slow
def test_more_processes_than_videos_in_a_batch_are_refused(corpus, tmp_path) -> None:
    command = torchrun(3, *words(corpus, tmp_path, *TRAIN, "--batch_size", "2"))
    done = subprocess.run(
        command, cwd=corpus.corpus, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "3 processes for --batch_size 2: use fewer" in done.stdout + done.stderr
