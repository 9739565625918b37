"""Several processes compute the run of one: gradients, steps, stopping, resuming, evaluating."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.corpus import FLAGS, TRAIN, TinyRun
from tests.golden_model import ROOT, GoldenModel
from utils.evaluation.predictions import load_predictions

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
    "PROPY_TIMEOUT_MINUTES": "2",
}  # fmt: skip


def command(processes: int, program: str, *flags: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *torchrun * (processes > 1), str(ROOT / program), *flags]


def run_program(folder: Path, processes: int, program: str, *flags: str, status: int = 0) -> str:
    """What it prints, started in a folder; AssertionError: another exit status."""
    done = subprocess.run(
        command(processes, program, *flags), cwd=folder, env=ENVIRONMENT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """What tests/distributed_program.py computes, once for all tests that read it."""
    folder = tmp_path_factory.mktemp("computed")
    runs = ((1, ()), (2, ()), (3, GRADIENTS))
    with ThreadPoolExecutor() as pool:  # side by side: starting takes the longest
        program = "tests/distributed_program.py"
        jobs = [pool.submit(run_program, ROOT, n, program, str(folder), *own) for n, own in runs]
    for job in jobs:
        job.result()
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
    inside, ends = machines
    work = "gradients-1-1"
    (alone,) = saved(computed, work, 1)
    started = [
        subprocess.Popen(
            [*machine, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
             "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", "10.77.0.1",
             "--master_port", "29517", str(ROOT / "tests/distributed_program.py"),
             str(tmp_path), work],
            env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": end}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for n, (machine, end) in enumerate(zip(inside, ends, strict=True))
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    (together, *_) = saved(tmp_path, work, 2)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------- the whole program
# Every process imports torch anew, which takes minutes in all: -m slow.


def words(output: Path, *flags: str) -> list[str]:
    return [
        *FLAGS, "--video_dir", "videos", "--output_dir", str(output), "--batch_size", "3",
        "--batch_size_val", "1", *flags,
    ]  # fmt: skip


def run(trained: TinyRun, processes: int, output: Path, *flags: str, status: int = 0) -> str:
    return run_program(trained.corpus, processes, "main.py", *words(output, *flags), status=status)


def records(output: Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


@pytest.mark.slow
def test_evaluating_gives_identical_results(trained, tmp_path) -> None:
    best = str(trained.logs / "ckpt.best.pth.tar")
    flags = (
        "--do_eval", "1", "--subtask_type", "VCMR", "--resume", best, "--save_predictions", "1",
    )  # fmt: skip
    found = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        printed = run(trained, processes, output, *flags)
        assert printed.count("ProPy ") == 1, "one process prints"
        (record,) = records(output, "eval.jsonl")
        found.append((record["metrics"], load_predictions(output / "predictions.h5")))
    for metrics, predictions in found[1:]:
        assert metrics == found[0][0]
        for name, value in vars(found[0][1]).items():
            same = getattr(predictions, name)
            assert torch.equal(value, same) if torch.is_tensor(value) else value == same, name


@pytest.mark.slow
def test_clip_alone_is_evaluated_and_logged_alike(trained, tmp_path) -> None:
    """With more processes than batches too, whose own part of the videos is empty."""
    evaluate = ("--do_eval", "1", "--zero_shot", "events", "--subtask_type", "VCMR")
    log = ("--epochs", "1", "--log_zero_shot", "1", "--batch_size_val", "4")
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        run(trained, processes, output / "alone", *evaluate)
        run(trained, processes, output / "trained", *TRAIN, *log)
        (record,) = records(output, "alone/eval.jsonl")
        first, _ = records(output, "trained/log.jsonl")
        found.append((record["metrics"], first["zero_shot"]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2])
def test_a_run_continues_on_another_number_of_processes(trained, tmp_path, before: int) -> None:
    run(trained, before, tmp_path / "before", *TRAIN, "--epochs", "1")
    found = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        shutil.copytree(tmp_path / "before", output)
        run(trained, processes, output, *TRAIN, "--resume", "auto", "--epochs", "2")
        found.append([epoch["loss"] for epoch in records(output)])
    assert [len(epochs) for epochs in found] == [2, 2, 2]
    for epochs in found[1:]:
        assert epochs == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_saved_embeddings_and_missing_videos(trained, tmp_path) -> None:
    """Every process goes without the videos that the main one lists."""
    queries = (trained.corpus / "annos.jsonl").read_text().splitlines()
    absent = json.loads(queries[0]) | {"vid_name": "absent", "desc_id": "absent"}
    (tmp_path / "more.jsonl").write_text("\n".join([*queries, json.dumps(absent)]))
    more = ("--prvr_val_annos", str(tmp_path / "more.jsonl"), "--allow_missing", "1")
    evaluate = ("--do_eval", "1", "--resume", str(trained.logs / "ckpt.best.pth.tar"))
    file, rows = str(tmp_path / "e.h5"), []
    run(trained, 2, tmp_path / "made", *evaluate, *more, "--save_embeddings", file)
    for processes in (1, 2):
        output = tmp_path / str(processes)
        run(trained, processes, output, *evaluate, *more, "--load_embeddings", file)
        (record,) = records(output, "eval.jsonl")
        assert record["val_videos_left_out"] == 1
        (line,) = records(output, "missing_videos.jsonl")
        rows.append((record["metrics"], line))
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends_ends_the_run_which_resumes(trained, tmp_path, number) -> None:
    flags = (*TRAIN, "--epochs", "60", "--save_every_steps", "1", "--resume", "auto")
    started = subprocess.Popen(
        command(2, "main.py", *words(tmp_path, *flags)), cwd=trained.corpus, env=ENVIRONMENT,
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
    done = len(records(tmp_path))
    assert 0 < done < 60, output
    run(trained, 2, tmp_path, *TRAIN, "--resume", "auto", "--epochs", str(done + 1))
    assert len(records(tmp_path)) >= done + 1


@pytest.mark.slow
def test_more_processes_than_videos_in_a_batch_are_refused(trained, tmp_path) -> None:
    told = run(trained, 3, tmp_path, *TRAIN, "--batch_size", "2", status=1)
    assert "3 processes for --batch_size 2: use fewer" in told
