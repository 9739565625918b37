"""Runs that end anywhere and are continued: all of a run that was never stopped, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils._pytree import tree_flatten_with_path

from tests.corpus import FLAGS, TRAIN, make_corpus
from tests.forked_main import ForkedMain
from utils.files import locked_folder
from utils.logger import MEASURED

NUM_CLIPS, BATCH, EPOCHS = 7, 2, 3
STEPS = NUM_CLIPS // BATCH  # of an epoch
STOPPED = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> ForkedMain:
    """main.py in a folder with clips of two random colours."""
    folder = tmp_path_factory.mktemp("resume")
    colours = np.random.RandomState(0).randint(256, size=(NUM_CLIPS, 2, 3))

    def query(index: int, half: int) -> tuple[str, str]:
        return f"{index}#{half}", f"a wall of colour {colours[index, half].sum()}"

    make_corpus(folder, colours, query)
    return ForkedMain(folder)


def flags(output: Path, *more: str, workers: int = 0) -> list[str]:
    return [
        *FLAGS, *TRAIN, "--video_dir", "videos", "--lr", "5e-3", "--batch_size", str(BATCH),
        "--epochs", str(EPOCHS), "--save_every_steps", "2",
        "--output_dir", str(output), "--resume", "auto", "--num_thread_reader", str(workers), *more,
    ]  # fmt: skip


def run(program: ForkedMain, *words: str, status: int = 0, **fault) -> str:
    """A run that ends with this exit status; returns what it printed."""
    done = program.run(*words, **fault)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory) -> Path:
    """The run that was never stopped."""
    output = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    run(program, *flags(output))
    program.seconds = time.monotonic() - started
    return output


def step_losses(output: Path) -> dict[int, set[float]]:
    """All losses that TensorBoard has of every step, by whatever attempt."""
    losses: dict[int, set[float]] = {}
    for path in output.glob("events.out.tfevents.*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "step/loss":
                    losses.setdefault(event.step, set()).add(value.simple_value)
    return losses


def lines(output: Path) -> list[dict]:
    """Of the log, without what was measured."""
    records = map(json.loads, (output / "log.jsonl").open())
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def checkpoint(output: Path, name: str = "ckpt.pth.tar") -> dict:
    content = torch.load(output / name, weights_only=True)
    for measured in MEASURED & content["last_record"].keys():
        del content["last_record"][measured]
    del content["args"]  # the number of workers
    return content


def assert_equal(ours: object, theirs: object, where: str) -> None:
    """Bit for bit, all the way down."""
    pairs = zip(*(tree_flatten_with_path(content)[0] for content in (ours, theirs)), strict=True)
    for (path, a), (other_path, b) in pairs:
        assert path == other_path and type(a) is type(b), (where, path, other_path)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, (where, path)


def assert_same_run(output: Path, whole: Path) -> None:
    expected = step_losses(whole)
    assert expected.keys() == set(range(1, STEPS * EPOCHS + 1))
    assert all(len(losses) == 1 for losses in expected.values())
    assert step_losses(output) == expected
    assert lines(output) == lines(whole)
    for name in (file.name for file in whole.glob("ckpt*.pth.tar")):
        assert_equal(checkpoint(output, name), checkpoint(whole, name), name)
    assert not list(output.glob("*.part")) and not list(output.glob(".*.part"))


def stands(output: Path) -> tuple[int, int]:
    """Epoch and step of the checkpoint, which can be read whenever it is there."""
    if not (output / "ckpt.pth.tar").is_file():
        return 0, 0
    content = torch.load(output / "ckpt.pth.tar", weights_only=True)
    return content["epoch"], content["sums"]["steps"]


def kill_after_random_times(program, output: Path, kills: int, seed: int) -> list:
    """Starts with another number of workers each time; SIGKILL while it trains; then to the end.

    Returns:
        Where the run stood after each of the kills.
    """
    draw, stood = random.Random(seed), []
    started = program.folder / "started"
    while len(stood) < kills and (not stood or stood[-1] != (EPOCHS, 0)):
        started.unlink(missing_ok=True)
        workers = draw.choice([0, 0, 1, 2])
        process = program.start(
            *flags(output, workers=workers), fault="touch_when_training_starts", path=started
        )
        program.wait_until(started.exists)
        time.sleep(draw.uniform(0, 0.5) * program.seconds)
        with contextlib.suppress(ProcessLookupError):  # it has come to its end
            os.kill(process, signal.SIGKILL)
        assert program.wait().returncode in (0, -signal.SIGKILL)
        stood.append(stands(output))
    run(program, *flags(output, workers=draw.choice([0, 2])))
    return stood


def killed_at(program, number: int, output: Path) -> bool:
    """Whether a run does so many file operations; SIGKILL at that one."""
    done = program.run(*flags(output), fault="kill_at_file_operation", number=number, folder=output)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode != 0


def test_killed_at_random_times(program, whole, tmp_path) -> None:
    kill_after_random_times(program, tmp_path, kills=3, seed=1)
    assert_same_run(tmp_path, whole)


def test_killed_while_writing_files(program, whole, tmp_path) -> None:
    for number in random.Random(2).sample(range(20, 60), 3):
        killed_at(program, number, tmp_path)
    run(program, *flags(tmp_path, workers=1))
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_killed_at_many_random_times(program, whole, tmp_path, seed: int) -> None:
    stood = kill_after_random_times(program, tmp_path, kills=8, seed=seed)
    print(f"killed {len(stood)} times; then the run stood at {stood}")
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 9))
def test_killed_at_every_file_operation(program, whole, tmp_path, first: int) -> None:
    """All of them in eight parts, so that each keeps within a test's time."""
    number, killed = first, True
    while killed:
        output = tmp_path / str(number)
        killed = killed_at(program, number, output)
        run(program, *flags(output))
        assert_same_run(output, whole)
        shutil.rmtree(output)
        number += 8
    assert number > 100


def test_killed_before_the_best_checkpoint_is_copied(program, whole, tmp_path) -> None:
    """That of the last epoch, so that nothing but resuming can make up for it and for its line."""
    fault = {"fault": "kill_before_the_best_is_copied", "epoch": 3}
    run(program, *flags(tmp_path), status=-signal.SIGKILL, **fault)
    assert checkpoint(tmp_path, "ckpt.best.pth.tar")["epoch"] == 1 and len(lines(tmp_path)) == 2
    run(program, *flags(tmp_path))
    assert_same_run(tmp_path, whole)


BOTH = ("--event_scores", "both")


@pytest.fixture(scope="module")
def whole_both(program, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("both")
    run(program, *flags(output, *BOTH))
    return output


def test_events_that_are_not_normalised_have_a_best_epoch_of_their_own(
    program, whole, whole_both, tmp_path
) -> None:
    """It is the one that --event_scores dot chooses, and the cosine's is what it was."""
    run(program, *flags(tmp_path, "--event_scores", "dot"))
    dot, log = checkpoint(tmp_path, "ckpt.best.pth.tar"), lines(whole_both)
    ours = {name: checkpoint(whole_both, f"ckpt.{name}.pth.tar") for name in ("best", "best_dot")}
    cosine = checkpoint(whole, "ckpt.best.pth.tar")
    for theirs, content in ((cosine, ours["best"]), (dot, ours["best_dot"])):
        assert_equal(content["state_dict"], theirs["state_dict"], "weights")
        assert content["epoch"] == theirs["epoch"]
    assert dot["epoch"] != cosine["epoch"]  # so that nothing can be mistaken for the other
    scores = [line["dot/SumR"] for line in log if line["epoch"]]
    assert (
        max(scores) == scores[dot["epoch"] - 1] == pytest.approx(ours["best_dot"]["best_dot_score"])
    )
    assert (log[-1]["best_epoch"], log[-1]["best_dot_epoch"]) == (cosine["epoch"], dot["epoch"])
    assert not (whole / "ckpt.best_dot.pth.tar").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_both_best_epochs_survive_kills(program, whole_both, tmp_path, number: int) -> None:
    log = lines(whole_both)[-1]
    epoch = (log["best_epoch"], log["best_dot_epoch"])[number]
    fault = {"fault": "kill_before_the_best_is_copied", "epoch": epoch}
    run(program, *flags(tmp_path, *BOTH), status=-signal.SIGKILL, **fault)
    run(program, *flags(tmp_path, *BOTH))
    assert_same_run(tmp_path, whole_both)


def test_a_second_best_epoch_that_comes_late_is_said_to(program, tmp_path) -> None:
    run(program, *flags(tmp_path), status=STOPPED, fault="at", when=5, act="terminate")
    told = run(program, *flags(tmp_path, *BOTH))
    assert 'the best epoch of the row "dot" is one from here on' in told
    assert checkpoint(tmp_path, "ckpt.best_dot.pth.tar")["epoch"] > 1


@pytest.mark.parametrize(
    ("when", "name", "stood"),
    [(1, "SIGTERM", (0, 1)), (6, "SIGINT", (1, 3)), ("evaluation", "SIGTERM", (0, 3))],
)
def test_a_signal_saves_and_says_how_to_continue(
    program, whole, tmp_path, when, name: str, stood
) -> None:
    """Sent to all processes of the run, as by Ctrl-C; the workers have read ahead by then."""
    number = signal.Signals[name]
    fault = {"fault": "at", "when": when, "act": "terminate", "number": number, "group": True}
    told = run(program, *flags(tmp_path, workers=2), status=128 + number, **fault)
    assert f"stopped by {name}, everything is saved" in told and "--resume auto" in told
    assert stands(tmp_path) == stood
    run(program, *flags(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_signal_ends_waiting_for_a_worker_that_hangs(program, whole, tmp_path) -> None:
    """Stopped at the video that comes fourth, once a step was done with those before."""
    fault = {"fault": "hang_while_reading", "clip": 2 * BATCH}
    process = program.start(*flags(tmp_path, workers=1), **fault)
    log = tmp_path / "log.txt"
    program.wait_until(lambda: log.is_file() and "step 1 " in log.read_text())
    time.sleep(1)  # what follows the step is done, and the next batch is waited for
    os.kill(process, signal.SIGTERM)
    assert program.wait().returncode == STOPPED
    assert stands(tmp_path) == (0, 1)
    run(program, *flags(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_second_signal_ends_at_once(program, tmp_path) -> None:
    fault = {"fault": "at", "when": 3, "act": "terminate", "times": 2}
    run(program, *flags(tmp_path), status=-signal.SIGTERM, **fault)
    assert stands(tmp_path) == (0, 2)


def test_a_full_disk_leaves_the_last_checkpoint(program, whole, tmp_path) -> None:
    fault = {"fault": "at", "when": 5, "act": "fill_the_disk"}
    told = run(program, *flags(tmp_path), status=1, **fault)
    latest = tmp_path / "ckpt.pth.tar"
    assert f"error: {latest}: cannot be written: File too large" in told
    assert f"The last good checkpoint, for --resume, is {latest}" in told
    assert stands(tmp_path) == (1, 0)
    run(program, *flags(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_second_run_in_the_folder_is_refused(program, tmp_path) -> None:
    with locked_folder(tmp_path):
        told = run(program, *flags(tmp_path), status=1)
    assert f"another run is writing there: process {os.getpid()}" in told
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("torn", ['{"epoch": 2, "lo', 400 * "\0"])
def test_a_torn_line_of_the_log(program, whole, tmp_path, torn: str) -> None:
    """Killed in the middle of the second epoch's line; by a power cut, which may leave zeros."""
    run(program, *flags(tmp_path), status=-signal.SIGKILL, fault="tear_the_log", text=torn)
    told = run(program, *flags(tmp_path))
    assert "log.jsonl: unreadable lines skipped: 1 (line 2)" in told
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(log) == EPOCHS + 1
    (tmp_path / "log.jsonl").write_text("".join(line + "\n" for line in log if line[-1] == "}"))
    assert_same_run(tmp_path, whole)


def test_resuming_with_other_settings_is_said(program, tmp_path) -> None:
    run(program, *flags(tmp_path), status=STOPPED, fault="at", when=5, act="terminate")
    told = run(program, *flags(tmp_path, "--seed", "1", "--epochs", "2", "--lr", "1e-3"))
    for change in ("seed 1 (was 42)", "epochs 2 (was 3)", "lr 0.001 (was 0.005)"):
        assert change in told
    assert "epoch 2 starts again" in told
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


def test_continuing_in_another_folder(program, whole, tmp_path) -> None:
    """The best checkpoint comes along, or is chosen again with a warning."""
    run(program, *flags(tmp_path / "a"), status=STOPPED, fault="at", when=8, act="terminate")
    resume = ["--resume", str(tmp_path / "a/ckpt.pth.tar")]
    run(program, *flags(tmp_path / "b"), *resume)
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_equal(checkpoint(tmp_path / "b", name), checkpoint(whole, name), name)
    (tmp_path / "a/ckpt.best.pth.tar").unlink()
    told = run(program, *flags(tmp_path / "c"), *resume)
    assert "the best is chosen among the epochs from here on" in told
    assert checkpoint(tmp_path / "c", "ckpt.best.pth.tar")["epoch"] == 3


def test_a_finished_run_without_its_best_checkpoint(program, whole, tmp_path) -> None:
    """No epoch is left of which to choose another."""
    content = torch.load(whole / "ckpt.pth.tar", weights_only=True)
    torch.save(content | {"best_epoch": 1}, tmp_path / "ckpt.pth.tar")
    told = run(program, *flags(tmp_path, "--do_eval", "1"), status=1)
    assert "the best checkpoint, of epoch 1, is neither" in told and "Traceback" not in told
    evaluation = [*flags(tmp_path, "--do_train", "0", "--do_eval", "1"), "--resume"]
    run(program, *evaluation, str(tmp_path / "ckpt.pth.tar"))


def test_a_finished_run_whose_scores_do_not_compare_any_more(program, whole, tmp_path) -> None:
    """In another folder, where no checkpoint is written: the last one is evaluated."""
    resume = ["--resume", str(whole / "ckpt.pth.tar"), "--event_scores", "dot", "--do_eval", "1"]
    told = run(program, *flags(tmp_path), *resume)
    assert "earlier scores do not compare" in told and (tmp_path / "eval.jsonl").is_file()


@pytest.mark.parametrize(
    ("when", "act", "message"),
    [
        (5, "lose_the_loss", "step 5: the loss is not finite (nan) on the batch of videos "),
        (5, "run_out_of_memory", "out of memory: use --checkpoint_activations 1"),
        ("evaluation", "run_out_of_memory", "out of memory: lower --batch_size_val"),
    ],
)
def test_training_faults_say_what_to_do(program, tmp_path, when, act: str, message) -> None:
    told = run(program, *flags(tmp_path), status=1, fault="at", when=when, act=act)
    assert message in told
    last_good = f"The last good checkpoint, for --resume, is {tmp_path / 'ckpt.pth.tar'}"
    assert last_good in told and "Traceback" not in told
    assert message in (tmp_path / "log.txt").read_text()


AMP, NONE_WITHIN = ("--precision", "amp", "--epochs", "1"), ("--save_every_steps", "0")


def test_steps_that_the_loss_scaler_skips_are_counted(program, tmp_path) -> None:
    """And have no part in the means: NaN is not JSON."""
    run(program, *flags(tmp_path, *AMP), fault="overflow", step=2)
    text = (tmp_path / "log.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (line["steps"], line["skipped_steps"]) == (STEPS, 1)
    assert line["loss"] > 0 and line["grad_norm"] > 0


def test_an_epoch_without_a_step_is_an_error(program, tmp_path) -> None:
    """There is no best checkpoint then: it would be an untrained model's."""
    told = run(program, *flags(tmp_path, *AMP, *NONE_WITHIN), status=1, fault="overflow")
    assert f"the loss scaler skipped all {STEPS} steps of the epoch" in told
    assert "No checkpoint was written yet" in told and "Traceback" not in told
    assert not list(tmp_path.glob("*.pth.tar")) and not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("when", [2, "evaluation"])
def test_a_worker_that_dies_while_no_one_waits_for_it(program, tmp_path, when) -> None:
    """torch raises its error in whatever the program does then."""
    fault = {"fault": "at", "when": when, "act": "kill_workers"}
    told = run(program, *flags(tmp_path, workers=1), status=1, **fault)
    assert "a loader worker died" in told and "Traceback" not in told, told
    assert "The last good checkpoint" in told or "No checkpoint was written yet" in told
