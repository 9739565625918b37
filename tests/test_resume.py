"""Runs that end anywhere and go on: all losses, lines and checkpoints of a run never stopped."""

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

from dataloaders.ffmpeg import write_video
from tests.forked_main import ForkedMain
from tests.golden_model import make_weights
from utils.files import locked_folder
from utils.logger import MEASURED

NUM_CLIPS, BATCH, EPOCHS = 7, 2, 3
STEPS = NUM_CLIPS // BATCH  # of an epoch


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """main.py in a folder with clips of two random colours, captions and small CLIP weights."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "videos").mkdir()
    colours = np.random.RandomState(0).randint(256, size=(NUM_CLIPS, 2, 3))
    lines = []
    for index in range(NUM_CLIPS):
        frames = np.empty((20, 64, 64, 3), np.uint8)
        frames[:10], frames[10:] = colours[index]
        write_video(folder / f"videos/{index}.mp4", frames)
        for part in range(2):
            lines.append({
                "vid_name": str(index), "desc_id": f"{index}#{part}", "duration": 20 / 3,
                "desc": f"a wall of colour {colours[index, part].sum()}", "ts": [0, 3],
            })  # fmt: skip
    (folder / "annos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(make_weights.torch_state(make_weights.make("tiny", 1, "fp16")), folder / "clip.pt")
    (folder / "pyramid.json").write_text('{"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}')
    with ForkedMain(folder) as program:
        yield program


def flags(output: Path, *more: str, workers: int = 0) -> list[str]:
    return [
        "--do_train", "1", "--prvr_train_annos", "annos.jsonl", "--prvr_val_annos", "annos.jsonl",
        "--video_dir", "videos", "--pretrained_clip_name", "clip.pt",
        "--pyr_config_path", "pyramid.json", "--adapter_channels", "16", "--lr", "5e-3",
        "--batch_size", str(BATCH), "--epochs", str(EPOCHS), "--n_display", "1",
        "--save_every_steps", "2", "--output_dir", str(output), "--resume", "auto",
        "--num_thread_reader", str(workers), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory) -> Path:
    """The run that was never stopped."""
    output = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    assert program.run(*flags(output)) == 0, program.told()
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
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def outcome(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in MEASURED}


def checkpoint(output: Path, name: str = "ckpt.pth.tar") -> dict:
    content = torch.load(output / name, weights_only=True)
    content["last_record"] = outcome(content["last_record"])
    del content["args"]  # the number of workers
    return content


def assert_equal(ours: object, theirs: object, where: str = "") -> None:
    """Bit for bit, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(output: Path, whole: Path) -> None:
    expected = step_losses(whole)
    assert expected.keys() == set(range(1, STEPS * EPOCHS + 1))
    assert all(len(losses) == 1 for losses in expected.values())
    assert step_losses(output) == expected
    assert [outcome(line) for line in lines(output)] == [outcome(line) for line in lines(whole)]
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_equal(checkpoint(output, name), checkpoint(whole, name), name)
    assert not list(output.glob("*.part")) and not list(output.glob(".*.part"))


def stands(output: Path) -> tuple[int, int]:
    """Epoch and step of the checkpoint, which can be read whenever it is there."""
    if not (output / "ckpt.pth.tar").is_file():
        return 0, 0
    content = torch.load(output / "ckpt.pth.tar", weights_only=True)
    return content["epoch"], content["sums"]["steps"]


SAY_WHEN_TRAINING_STARTS = """
from pathlib import Path
from utils.training.trainer import Trainer
run = Trainer.run
Trainer.run = lambda self: (Path("started").touch(), run(self))[1]
"""


def kill_after_random_times(program, output: Path, kills: int, seed: int) -> list:
    """Starts with another number of workers each time; SIGKILL while it trains; then to the end.

    Returns:
        Where the run stood after each of the kills.
    """
    draw, stood = random.Random(seed), []
    started = program.output.with_name("started")
    while len(stood) < kills and (not stood or stood[-1] != (EPOCHS, 0)):
        started.unlink(missing_ok=True)
        workers = draw.choice([0, 0, 1, 2])
        run = program.start(*flags(output, workers=workers), patch=SAY_WHEN_TRAINING_STARTS)
        while not started.exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.5) * program.seconds)
        with contextlib.suppress(ProcessLookupError):  # it has come to its end
            os.kill(run, signal.SIGKILL)
        assert program.wait() in (0, -signal.SIGKILL)
        stood.append(stands(output))
    assert program.run(*flags(output, workers=draw.choice([0, 2]))) == 0
    return stood


# Counts what is done to files of the output folder, and SIGKILLs itself at the given number.
DIE_AT_A_FILE_OPERATION = """
import os, signal, sys
number, output = {number}, {output!r}
count = 0
def tick():
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
real = os.fsync
def fsync(descriptor):
    tick()
    real(descriptor)
    tick()
os.fsync = fsync
def hook(event, arguments):
    if event in ("open", "os.rename", "os.remove") and output in str(arguments[0]):
        tick()
sys.addaudithook(hook)
"""


def kill_at_file_operations(program, output: Path, numbers: list[int]) -> None:
    for number in numbers:
        patch = DIE_AT_A_FILE_OPERATION.format(number=number, output=str(output))
        assert program.run(*flags(output), patch=patch) in (0, -signal.SIGKILL)
    assert program.run(*flags(output, workers=1)) == 0


def test_killed_at_random_times(program, whole, tmp_path) -> None:
    kill_after_random_times(program, tmp_path, kills=3, seed=1)
    assert_same_run(tmp_path, whole)


def test_killed_while_writing_files(program, whole, tmp_path) -> None:
    numbers = random.Random(2).sample(range(20, 60), 3)
    kill_at_file_operations(program, tmp_path, numbers)
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
    number, status = first, -signal.SIGKILL
    while status != 0:  # 0: a run has no so many
        output = tmp_path / str(number)
        patch = DIE_AT_A_FILE_OPERATION.format(number=number, output=str(output))
        status = program.run(*flags(output), patch=patch)
        assert status in (0, -signal.SIGKILL)
        assert program.run(*flags(output)) == 0
        assert_same_run(output, whole)
        shutil.rmtree(output)
        number += 8
    assert number > 100


def test_killed_before_the_best_checkpoint_is_copied(program, whole, tmp_path) -> None:
    """That of the last epoch, so that nothing but resuming can make up for it and for its line."""
    patch = """
import os, signal
import utils.trainer as trainer
real = trainer.copy_checkpoint
def copy_checkpoint(source, target):
    if trainer.epochs_of(source) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
trainer.copy_checkpoint = copy_checkpoint
"""
    assert program.run(*flags(tmp_path), patch=patch) == -signal.SIGKILL
    assert checkpoint(tmp_path, "ckpt.best.pth.tar")["epoch"] == 1 and len(lines(tmp_path)) == 2
    assert program.run(*flags(tmp_path)) == 0
    assert_same_run(tmp_path, whole)


# Calls `act` in the process that trains, at a step counted from 1 or while evaluating.
AT = """
import os, signal, time
import utils.engine as engine, utils.evaluation as evaluation
step, when = 0, {when!r}
def act():
    {act}
real_step, real_embed = engine.train_step, evaluation.embed_corpus
def train_step(*arguments, **settings):
    global step
    step += 1
    if step == when: act()
    return real_step(*arguments, **settings)
def embed_corpus(*arguments, **settings):
    if when == "evaluation": act()
    return real_embed(*arguments, **settings)
engine.train_step, evaluation.embed_corpus = train_step, embed_corpus
"""


@pytest.mark.parametrize(
    ("when", "number", "stood"),
    [
        (1, signal.SIGTERM, (0, 1)),
        (6, signal.SIGINT, (1, 3)),
        ("evaluation", signal.SIGTERM, (0, 3)),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(
    program, whole, tmp_path, when, number: signal.Signals, stood
) -> None:
    """Sent to all processes of the run, as by Ctrl-C; the workers have read ahead by then."""
    patch = AT.format(when=when, act=f"os.killpg(0, {int(number)})")
    program.told()
    assert program.run(*flags(tmp_path, workers=2), patch=patch) == 128 + number
    told = program.told()
    assert f"stopped by {number.name}, everything is saved" in told and "--resume auto" in told
    assert stands(tmp_path) == stood
    assert program.run(*flags(tmp_path)) == 0
    assert_same_run(tmp_path, whole)


def test_a_signal_ends_waiting_for_a_worker_that_hangs(program, whole, tmp_path) -> None:
    """Stopped at the video that comes fourth, once a step was done with those before."""
    patch = f"""
import os, signal, time
from pathlib import Path
import dataloaders.clips as clips, utils.engine as engine
real, real_step, read = clips.load_clip, engine.train_step, 0
stepped, hangs = Path({str(tmp_path)!r}, "stepped"), Path({str(tmp_path)!r}, "hangs")
def train_step(*arguments, **settings):
    result = real_step(*arguments, **settings)
    stepped.touch()
    return result
def load_clip(*arguments):
    global read
    read += 1
    if read == 2 * {BATCH}:
        while not stepped.exists(): time.sleep(0.01)
        hangs.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*arguments)
clips.load_clip, engine.train_step = load_clip, train_step
"""
    run = program.start(*flags(tmp_path, workers=1), patch=patch)
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    time.sleep(1)  # what follows the step is done, and the next batch is waited for
    os.kill(run, signal.SIGTERM)
    assert program.wait() == 128 + signal.SIGTERM
    assert stands(tmp_path) == (0, 1)
    assert program.run(*flags(tmp_path)) == 0
    (tmp_path / "hangs").unlink()
    assert_same_run(tmp_path, whole)


def test_a_second_signal_ends_at_once(program, tmp_path) -> None:
    act = "[(os.kill(os.getpid(), signal.SIGTERM), time.sleep(1.1)) for _ in range(2)]"
    patch = AT.format(when=3, act=act)
    assert program.run(*flags(tmp_path), patch=patch) == -signal.SIGTERM
    assert stands(tmp_path) == (0, 2)


def test_a_full_disk_leaves_the_last_checkpoint(program, whole, tmp_path) -> None:
    act = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))"
    program.told()
    assert program.run(*flags(tmp_path), patch=AT.format(when=5, act=act)) == 1
    told, latest = program.told(), tmp_path / "ckpt.pth.tar"
    assert f"error: {latest}: cannot be written: File too large" in told
    assert f"The last good checkpoint, for --resume, is {latest}" in told
    assert stands(tmp_path) == (1, 0)
    assert program.run(*flags(tmp_path)) == 0
    assert_same_run(tmp_path, whole)


def test_a_second_run_in_the_folder_is_refused(program, tmp_path) -> None:
    with locked_folder(tmp_path):
        program.told()
        assert program.run(*flags(tmp_path)) == 1
    assert f"another run is writing there: process {os.getpid()}" in program.told()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("torn", ['{"epoch": 2, "lo', 400 * "\0"])
def test_a_torn_line_of_the_log(program, whole, tmp_path, torn: str) -> None:
    """Killed in the middle of the second epoch's line; by a power cut, which may leave zeros."""
    patch = f"""
import os, signal
import utils.logger as logger
real = logger.append_line
def append_line(path, line):
    if '"epoch": 2' in line:
        path.open("a").write({torn!r})
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, line)
logger.append_line = append_line
"""
    assert program.run(*flags(tmp_path), patch=patch) == -signal.SIGKILL
    program.told()
    assert program.run(*flags(tmp_path)) == 0
    assert "log.jsonl: unreadable lines left out: 1 (line 2)" in program.told()
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(log) == EPOCHS + 1
    (tmp_path / "log.jsonl").write_text("".join(line + "\n" for line in log if line[-1] == "}"))
    assert_same_run(tmp_path, whole)


def test_resuming_with_other_settings_is_said(program, tmp_path) -> None:
    stop = AT.format(when=5, act="os.kill(os.getpid(), signal.SIGTERM)")
    assert program.run(*flags(tmp_path), patch=stop) == 128 + signal.SIGTERM
    program.told()
    changed = flags(tmp_path, "--seed", "1", "--epochs", "2", "--lr", "1e-3")
    assert program.run(*changed) == 0
    told = program.told()
    for change in ("seed 1 (was 42)", "epochs 2 (was 3)", "lr 0.001 (was 0.005)"):
        assert change in told
    assert "epoch 2 starts again" in told
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


def test_going_on_in_another_folder(program, whole, tmp_path) -> None:
    """The best checkpoint comes along, or is chosen anew with a warning."""
    stop = AT.format(when=8, act="os.kill(os.getpid(), signal.SIGTERM)")
    assert program.run(*flags(tmp_path / "a"), patch=stop) == 128 + signal.SIGTERM
    resume = ["--resume", str(tmp_path / "a/ckpt.pth.tar")]
    assert program.run(*flags(tmp_path / "b"), *resume) == 0
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_equal(checkpoint(tmp_path / "b", name), checkpoint(whole, name), name)
    (tmp_path / "a/ckpt.best.pth.tar").unlink()
    program.told()
    assert program.run(*flags(tmp_path / "c"), *resume) == 0
    assert "the best is chosen among the epochs from here on" in program.told()
    assert checkpoint(tmp_path / "c", "ckpt.best.pth.tar")["epoch"] == 3


def test_a_finished_run_without_its_best_checkpoint(program, whole, tmp_path) -> None:
    """No epoch is left of which to choose another."""
    content = torch.load(whole / "ckpt.pth.tar", weights_only=True)
    torch.save(content | {"best_epoch": 1}, tmp_path / "ckpt.pth.tar")
    program.told()
    assert program.run(*flags(tmp_path, "--do_eval", "1")) == 1
    told = program.told()
    assert "the best checkpoint, of epoch 1, is neither" in told and "Traceback" not in told
    evaluation = [*flags(tmp_path, "--do_train", "0", "--do_eval", "1"), "--resume"]
    assert program.run(*evaluation, str(tmp_path / "ckpt.pth.tar")) == 0


NOT_FINITE = "engine.video_text_loss = lambda *_: torch.tensor(float('nan'), requires_grad=True)"
TOO_MUCH = "torch.empty(2**55, dtype=torch.uint8)"


@pytest.mark.parametrize(
    ("when", "act", "messages"),
    [
        (5, NOT_FINITE, ("step 5: the loss is not finite (nan) on the batch of videos ",)),
        (5, TOO_MUCH, ("out of memory: use --checkpoint_activations 1 or raise", "--batch_size")),
        ("evaluation", TOO_MUCH, ("out of memory: lower --batch_size_val",)),
    ],
)
def test_training_faults_say_what_to_do(program, tmp_path, when, act: str, messages) -> None:
    program.told()
    patch = AT.format(when=when, act="import torch; " + act)
    assert program.run(*flags(tmp_path), patch=patch) == 1
    told = program.told()
    assert all(message in told for message in messages), told
    last_good = f"The last good checkpoint, for --resume, is {tmp_path / 'ckpt.pth.tar'}"
    assert last_good in told and "Traceback" not in told
    assert messages[0] in (tmp_path / "log.txt").read_text()


def test_a_step_that_the_loss_scaler_skips_is_counted(program, tmp_path) -> None:
    patch = """
import functools
import torch
import utils.engine as engine
losses, real = 0, engine.video_text_loss
def loss(*arguments):
    global losses
    losses += 1
    return real(*arguments) * (float("inf") if losses == 2 else 1)
engine.video_text_loss = loss
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=1.0)
"""
    assert program.run(*flags(tmp_path, "--precision", "amp", "--epochs", "1"), patch=patch) == 0
    (line,) = lines(tmp_path)
    assert (line["steps"], line["skipped_steps"]) == (STEPS, 1)
    assert np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "a loader worker died"),
        ("import time; time.sleep(60)", "not decoded within 1 seconds"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_named(program, tmp_path, fault: str, message) -> None:
    """Reading one of the videos, in whichever batch it comes."""
    patch = f"""
import dataloaders.video as video
video.DECODE_TIME_LIMIT = 1
real = video._decode
def decode(path, *arguments):
    if path.name == "3.mp4":
        {fault}
    return real(path, *arguments)
video._decode = decode
"""
    program.told()
    assert program.run(*flags(tmp_path, workers=1), patch=patch) == 1
    told = program.told()
    assert message in told and "3.mp4" in told and "Traceback" not in told, told


@pytest.mark.parametrize("when", [2, "evaluation"])
def test_a_worker_that_dies_while_nobody_waits_for_it(program, tmp_path, when) -> None:
    """torch raises its error in whatever the program does then."""
    kill = "import multiprocessing; [w.kill() for w in multiprocessing.active_children()]"
    program.told()
    patch = AT.format(when=when, act=f"{kill}; time.sleep(5)")
    assert program.run(*flags(tmp_path, workers=1), patch=patch) == 1
    told = program.told()
    assert "a loader worker died" in told and "Traceback" not in told, told
    assert "The last good checkpoint" in told or "No checkpoint was written yet" in told
