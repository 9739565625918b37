"""Checkpoints of a run: written whole or not at all, and everything that resuming needs in them.

What of it is the model's is read and checked in models.trained.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from models import ProPy
from models.trained import (
    check_config,
    is_from_authors,
    load_weights,
    naming,
    read_checkpoint,
    saved_weights,
    tensor_problems,
)
from modules import ModelError
from utils import RunError
from utils.files import atomic_write
from utils.misc import rng_state, set_rng_state
from utils.training.progress import EpochSums, Progress

# Their names in the folder of a run; of the best by its name in `Progress`.
LATEST, BEST, BEST_DOT = "ckpt.pth.tar", "ckpt.best.pth.tar", "ckpt.best_dot.pth.tar"
BESTS = {"best": BEST, "best_dot": BEST_DOT}


def save_checkpoint(
    path: Path | str, model: ProPy, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, progress: Progress,
) -> None:  # fmt: skip
    """Write a checkpoint, which appears under its name, or replaces another, when it is complete.

    It holds `saved_weights`, the progress, and the states of the optimizer, the scaler and the
    random number generators.

    OutputError: it could not be written. RunError: a weight is not finite.
    """
    path = Path(path)
    try:
        content = saved_weights(model)
    except ModelError as error:
        raise RunError(f"{path}: not written: {error}") from None
    content |= asdict(progress)
    del content["has_optimizer"]
    content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    content["rng"] = rng_state()
    with atomic_write(path) as part, part.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # which torch makes of an error of the file's
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a file so that the target appears, or is replaced, only when it is complete."""
    with atomic_write(target) as part:
        shutil.copyfile(source, part)


def epochs_of(path: Path) -> int | None:
    """Epochs that a file is a checkpoint right after; None if it is no such checkpoint."""
    try:
        with naming(path):
            progress = _progress(read_checkpoint(path))
    except ModelError:
        return None
    return None if progress.sums.steps else progress.epoch


def load_checkpoint(
    path: Path | str, model: ProPy, optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Progress:  # fmt: skip
    """Load a checkpoint of this or of the authors' program into a model; returns where it stood.

    Args:
        model: gets the weights; if the file holds CLIP's tensors, those too.
        optimizer, scaler: get their states, if given and present. An optimizer state of the
            authors' has other groups and shapes and is never taken over.

    Raises:
        ModelError: no such file, not a checkpoint, another version's, or one of another model, CLIP
            or pyramid; see `models.trained.load_weights`.
    """
    content = read_checkpoint(path)
    with naming(path):
        progress = _progress(content)
        resumed = optimizer if progress.has_optimizer else None
        if resumed:
            check_config(content, model)  # first, since it says what makes other parameters
            _check_optimizer(content["optimizer"], model, resumed)
    load_weights(content, model, path)
    if resumed:
        with naming(path):
            _resume(content, resumed, scaler)
    return progress


def _progress(content: dict) -> Progress:
    if is_from_authors(content):
        return Progress(epoch=int(content.get("epoch", 0)))
    own = {name: content[name] for name in asdict(Progress()) if name in content}
    sums = EpochSums(**own.pop("sums"))
    progress = Progress(**own, sums=sums, has_optimizer="optimizer" in content)
    scores = [progress.best(name)[0] or 0 for name in BESTS]
    numbers = (progress.epoch, progress.global_step, sums.steps, *scores)
    if not all(type(number) in (int, float) and number >= 0 for number in numbers):
        raise ModelError("its numbers of epochs and steps or its best score are damaged")
    return progress


def _resume(
    content: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    """Optimizer, scaler and random number generators to where they were."""
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(content["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # the file's were those of the flags it was made with
    if scaler is not None and content["scaler"]:  # empty: it was made without float16
        scaler.load_state_dict(content["scaler"])
    set_rng_state(content["rng"])


def _check_optimizer(state: dict, model: ProPy, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's own loading compares the number of parameters, but no shape or value."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    theirs = [index for group in state["param_groups"] for index in group["params"]]
    if len(ours) != len(theirs):
        raise ModelError(
            f"its optimizer has {len(theirs)} parameters, this run's {len(ours)}. Is freeze_clip "
            "the same?"
        )
    problems = []
    for index, parameter in zip(theirs, ours, strict=True):
        moments = state["state"].get(index)
        if not moments:  # no gradient has come there yet
            continue
        name = names[id(parameter)]
        for moment in ("exp_avg", "exp_avg_sq"):
            title = f"the optimizer's {moment} of {name}"
            problems += tensor_problems(title, moments[moment], parameter)
        if not 0 <= float(moments["step"]) < math.inf:
            problems.append(f"the optimizer's step of {name} is {float(moments['step'])}")
    if problems:
        raise ModelError("; ".join(problems[:5]))
