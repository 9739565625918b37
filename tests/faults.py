"""Faults that `tests.forked_main` puts into a run of main.py, by name.

Each replaces functions of the program by their real names: one that was moved or renamed is an
AttributeError or ModuleNotFoundError, and one that a run never calls fails the test.
"""

from __future__ import annotations

import functools
import itertools
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


def before(owner, name: str, act: Callable[..., object]) -> None:
    """Call `act` with the arguments of each call."""
    replace(owner, name, lambda real: lambda *a, **k: (act(*a, **k), real(*a, **k))[1])


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
    numbers = itertools.count(1)

    def tick(*_) -> None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove") and folder in str(arguments[0]):
            tick()

    replace(os, "fsync", lambda fsync: lambda descriptor: (tick(), fsync(descriptor), tick()))
    sys.addaudithook(hook)


def kill_before_the_best_is_copied(epoch: int) -> None:
    checkpoint = utils.training.checkpoint

    def act(source: Path, _: Path) -> None:
        if checkpoint.epochs_of(source) == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    before(checkpoint, "copy_checkpoint", act)


def at(when: int | str, act: str, **settings) -> None:
    """Another function of this file, at a step counted from 1 or at the first "evaluation"."""
    numbers, chosen = itertools.count(1), 1 if when == "evaluation" else when

    def tick(*_, **__) -> None:
        if next(numbers) == chosen:
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
    numbers = itertools.count(1)

    def around(real):
        return lambda *scores: (
            real(*scores) * (float("inf") if step in (None, next(numbers)) else 1)
        )

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


def hang_while_reading(clip: int) -> None:
    """A loader worker stops at the clip that comes so many-th."""
    numbers = itertools.count(1)

    def act(*_) -> None:
        if next(numbers) == clip:
            time.sleep(1)  # the batch before is sent by a thread of the worker
            os.kill(os.getpid(), signal.SIGSTOP)

    before(dataloaders.video, "load_clip", act)
