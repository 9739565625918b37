"""Faults that `tests.forked_main` puts into a run of main.py, by name.

Each replaces functions of the program by their real names: one that was moved or renamed is an
AttributeError or ModuleNotFoundError, and one that a run never calls fails the test.
"""

from __future__ import annotations

import functools
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dataloaders.video
import utils.evaluation.embed
import utils.files
import utils.training.checkpoint
import utils.training.engine
import utils.training.trainer
from modules import losses

ROOMS = {"main", "models", "modules", "dataloaders", "utils"}
_replaced: list[str] = []
_reached = mmap.mmap(-1, 64)  # a byte for each of them, shared with loader workers


def replace(owner, name: str, around: Callable[[Callable], Callable]) -> None:
    """Put `around` the function in its place, also where it was imported by its name."""
    real, number = getattr(owner, name), len(_replaced)
    new = around(real)
    _replaced.append(f"{owner.__name__}.{name}")

    @functools.wraps(real)
    def counted(*arguments, **settings):
        _reached[number] = 1
        return new(*arguments, **settings)

    setattr(owner, name, counted)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] in ROOMS and vars(module).get(name) is real:
            setattr(module, name, counted)


def unreached() -> list[str]:
    """What was replaced and not called since, in no process of the run."""
    return [name for number, name in enumerate(_replaced) if not _reached[number]]


def before(owner, name: str, act: Callable[..., None]) -> None:
    """Call `act` with the arguments of each call."""

    def around(real):
        def function(*arguments, **settings):
            act(*arguments, **settings)
            return real(*arguments, **settings)

        return function

    replace(owner, name, around)


def log_every_step() -> None:
    """No fault: corpora of tests have fewer steps than are left out between two lines."""
    for module in (utils.training.engine, utils.training.trainer):
        assert module.LOG_EVERY > 1
        module.LOG_EVERY = 1


# ------------------------------------------------------------------------------------- the faults


def touch_when_training_starts(path: str) -> None:
    before(utils.training.trainer.Trainer, "run", lambda _: Path(path).touch())


def kill_at_file_operation(number: int, folder: str) -> None:
    """SIGKILL at the given one of all that is done to files of a folder."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(fsync):
        def function(descriptor: int) -> None:
            tick()
            fsync(descriptor)
            tick()

        return function

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove") and folder in str(arguments[0]):
            tick()

    replace(os, "fsync", around)
    sys.addaudithook(hook)


def kill_before_the_best_is_copied(epoch: int) -> None:
    checkpoint = utils.training.checkpoint

    def act(source: Path, _: Path) -> None:
        if checkpoint.epochs_of(source) == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    before(checkpoint, "copy_checkpoint", act)


def at(when: int | str, act: str, **settings) -> None:
    """Another function of this file, at a step counted from 1 or at the first "evaluation"."""
    count, chosen = 0, 1 if when == "evaluation" else when

    def tick(*_, **__) -> None:
        nonlocal count
        count += 1
        if count == chosen:
            globals()[act](**settings)

    if when == "evaluation":
        before(utils.evaluation.embed, "embed_videos", tick)
    else:
        before(utils.training.engine, "train_step", tick)


def terminate(number: int = signal.SIGTERM, times: int = 1, group: bool = False) -> None:
    """As by `kill`, or to all processes of the run, as by Ctrl-C."""
    for _ in range(times):
        os.kill(0 if group else os.getpid(), number)
        time.sleep(1.1 * (times > 1))  # longer than two signals count as one


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))


def run_out_of_memory() -> None:
    torch.empty(2**55, dtype=torch.uint8)


def lose_the_loss() -> None:
    replace(losses, "video_text_loss", lambda real: lambda *scores: real(*scores) * float("nan"))


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
    time.sleep(5)


def overflow(step: int | None = None) -> None:
    """The loss of one step is infinite, or of all, under a loss scaler that scales by 1."""
    count = 0

    def around(real):
        def function(*scores):
            nonlocal count
            count += 1
            return real(*scores) * (float("inf") if step in (None, count) else 1)

        return function

    replace(losses, "video_text_loss", around)
    replace(torch.amp, "GradScaler", lambda real: functools.partial(real, init_scale=1.0))


def tear_the_log(text: str) -> None:
    """SIGKILL within the line of the second epoch, of which the text is written."""

    def act(path: Path, line: str) -> None:
        if '"epoch": 2' in line:
            with path.open("a") as file:
                file.write(text)
            os.kill(os.getpid(), signal.SIGKILL)

    before(utils.files, "append_line", act)


def break_clip(name: str, hang: bool) -> None:
    """Decoding the clip kills the process, or takes longer than its time limit."""
    dataloaders.video.DECODE_TIME_LIMIT = 1

    def act(path: Path, *_) -> None:
        if path.name == name and hang:
            time.sleep(60)
        elif path.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    before(dataloaders.video, "_decode", act)


def hang_while_reading(clip: int, folder: str) -> None:
    """The loader worker stops at the clip that comes so many-th, after the first training step."""
    count, stepped = 0, Path(folder, "stepped")

    def around(real):
        def function(*arguments, **settings):
            result = real(*arguments, **settings)
            stepped.touch()
            return result

        return function

    def act(*_) -> None:
        nonlocal count
        count += 1
        deadline = time.monotonic() + 60
        if count == clip:
            while not stepped.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            Path(folder, "hangs").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    replace(utils.training.engine, "train_step", around)
    before(dataloaders.video, "load_clip", act)
