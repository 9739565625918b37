"""Checkpoints: written whole or not at all, read strictly, ours and those of the authors' program.

Ours keep what is trained, under this program's names, plus what resuming needs. The authors' hold
all of CLIP too, under their names. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from modules import ModelError
from modules.torch_files import is_plain, load_tensors
from utils import RunError
from utils.files import atomic_write
from utils.misc import is_number, rng_state, set_rng_state
from utils.training.authors import NUMPY_SCALAR, convert_authors_state
from utils.training.progress import Checkpoint, EpochSums

LATEST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"  # their names in the folder of a run
FORMAT = "propy-2"
EARLIER_FORMAT = "propy-1"  # written after whole epochs, without random states


NOT_FINITE = "has values that are not finite"
# Begins the fingerprint of all tensors of a backbone, and what was computed last for each model.
_ALL_TENSORS = "all:"
_fingerprints: WeakKeyDictionary[nn.Module, tuple[list[int], str]] = WeakKeyDictionary()


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Checkpoint,
) -> None:
    """Write a checkpoint that appears under its name only when it is complete.

    Args:
        path: overwritten if it exists.
        model: its trained tensors are saved, and a fingerprint of CLIP where that is frozen.
        progress: where the run stands. The states of the random number generators go with it.

    Raises:
        OutputError: it could not be written.
        RunError: a weight is not finite.
    """
    path = Path(path)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path}: not written: {name} {NOT_FINITE}")
    trains_clip = any(name.startswith("clip.") for name in state)
    content = {
        "format": FORMAT,
        "state_dict": state,
        "backbone": "" if trains_clip else backbone_fingerprint(model.clip),
        "proposals": model.pyramid.proposals,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": progress.epoch,
        "sums": asdict(progress.sums),
        "global_step": progress.global_step,
        "best_score": progress.best_score,
        "best_epoch": progress.best_epoch,
        "last_record": progress.last_record,
        "args": progress.args,
        "facts": progress.facts,
        "rng": rng_state(),
    }
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
        content = _read(path)
    except RunError:
        return None
    return None if content.get("sums", {}).get("steps") else content.get("epoch")


def load_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Checkpoint:
    """Load a checkpoint of this or of the authors' program into a model.

    Args:
        path: the file.
        model: gets the weights; if the file holds CLIP's tensors, those too.
        optimizer, scaler: get their states, if given and present. An optimizer state of the
            authors' has other groups and shapes and is never taken over.

    Returns:
        Where the run stood.

    Raises:
        RunError: no such file, not a checkpoint, a missing, unexpected, misshapen or
            non-finite tensor, or another CLIP or pyramid than it was trained with.
    """
    path = Path(path)
    content = _read(path)
    state = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    from_authors = _is_from_authors(content)
    if from_authors:
        state = convert_authors_state(state)
    try:
        if from_authors:
            progress = Checkpoint(epoch=content.get("epoch", 0), from_authors=True)
        else:
            progress = _progress(content)
        weights = _check_weights(model, state)
        if not from_authors and not any(name.startswith("clip.") for name in state):
            _check_backbone(model, content["backbone"])
        if not from_authors:
            _check_proposals(model, content)
        if progress.has_optimizer and optimizer is not None:
            _resume(content, model, optimizer, scaler)
    except RunError as error:
        raise RunError(f"{path}: {error}") from error
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(state[name])
    if progress.global_step and not from_authors:
        model.clamp_logit_scale()  # as after every step; a frozen one is in no checkpoint of ours
    return progress


def backbone_fingerprint(clip: nn.Module) -> str:
    """sha256 over CLIP's tensors, by which one backbone is told from another.

    The logit scale is left out: training clamps a frozen one too, and it changes no ranking. The
    last result of a model is kept for as long as its tensors are not written to.
    """
    tensors = sorted(clip.state_dict().items())
    tensors = [(name, tensor) for name, tensor in tensors if name != "logit_scale"]
    if any(tensor.is_inference() for _, tensor in tensors):  # made in inference mode: no versions
        return _ALL_TENSORS + _digest(tensors)
    versions = [tensor._version for _, tensor in tensors]
    known, fingerprint = _fingerprints.get(clip, (None, ""))
    if known != versions:
        fingerprint = _ALL_TENSORS + _digest(tensors)
        _fingerprints[clip] = versions, fingerprint
    return fingerprint


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.cpu().float().contiguous().numpy())
    return digest.hexdigest()


def _read(path: Path) -> dict:
    if path.is_dir():
        names = [name for name in (BEST, LATEST) if (path / name).is_file()]
        found = f"name {' or '.join(names)} in it" if names else "there is no checkpoint in it"
        raise RunError(f"{path}: a folder, no checkpoint: {found}")
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALAR):
            content = load_tensors(path)
    except ModelError as error:
        raise RunError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise RunError(f"{path}: not a checkpoint: it has no 'state_dict'")
    _check_content(path, content)
    return content


def _check_content(path: Path, content: dict) -> None:
    """That names are names, weights plain tensors, and the run's fields such as are saved."""
    for name, tensor in content["state_dict"].items():
        if not isinstance(name, str):
            raise RunError(f"{path}: {str(name)[:60]!r} is no name of a tensor")
        if not torch.is_tensor(tensor):
            raise RunError(f"{path}: {name} is no tensor, but a {type(tensor).__name__}")
        if not is_plain(tensor):
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise RunError(f"{path}: {name} is {kind}, not a plain tensor of floats")
    theirs = {"epoch": _is_count} if "epoch" in content else {}
    for key, is_right in _FIELDS.get(str(content.get("format")), theirs).items():
        if key not in content or not is_right(content[key]):
            raise RunError(f"{path}: its field '{key}' is missing or damaged")
    best = content.get("best_epoch")
    if not _is_from_authors(content) and (
        (best is None) != (content["best_score"] is None) or (best or 0) > content["epoch"]
    ):
        raise RunError(f"{path}: its fields 'best_epoch', 'best_score' and 'epoch' disagree")


def _is_from_authors(content: dict) -> bool:
    return str(content.get("format")) not in _FIELDS


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_record(value: object) -> bool:
    """An object that log.jsonl and args.json can hold."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def _is_last_record(value: object) -> bool:
    return (
        _is_record(value) and _is_count(value.get("epoch")) and _is_count(value.get("global_step"))
    )


def _is_sums(value: object) -> bool:
    try:
        sums = EpochSums(**value)
    except TypeError:
        return False
    return (
        all(isinstance(number, float | int) for number in vars(sums).values())
        and _is_count(sums.steps)
        and _is_count(sums.skipped_steps)
        and sums.skipped_steps <= sums.steps
    )


# What else a checkpoint of this program holds, and whether a value of it can be right.
_EARLIER_FIELDS: dict[str, Callable[[Any], bool]] = {
    "backbone": lambda value: isinstance(value, str),
    "epoch": _is_count,
    "global_step": _is_count,
    "best_score": lambda value: value is None or is_number(value),
    "best_epoch": lambda value: value is None or (_is_count(value) and value > 0),
    "args": _is_record,
}
_FIELDS = {
    EARLIER_FORMAT: _EARLIER_FIELDS,
    FORMAT: _EARLIER_FIELDS
    | {
        "sums": _is_sums,
        "last_record": lambda value: value is None or _is_last_record(value),
        "facts": _is_record,
    },
}


def _progress(content: dict) -> Checkpoint:
    """Where the run stood, of a checkpoint of this program."""
    return Checkpoint(
        epoch=content["epoch"],
        global_step=content["global_step"],
        best_score=content["best_score"],
        best_epoch=content["best_epoch"],
        args=content["args"],
        sums=EpochSums(**content.get("sums", {})),
        last_record=content.get("last_record"),
        facts=content.get("facts", {}),
        has_optimizer="optimizer" in content,
    )


def _check_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors to be replaced; CLIP's may be absent as a whole, nothing else may be."""
    expected = model.state_dict()
    if not any(name.startswith("clip.") for name in state):
        expected = {k: v for k, v in expected.items() if not k.startswith("clip.")}
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        problems += _tensor_problems(name, state[name], expected[name])
    if not problems:
        return expected
    rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    message = f"{'; '.join(sorted(problems)[:5])}{rest}"
    if all(problem.endswith(NOT_FINITE) for problem in problems):
        raise RunError(f"its weights are damaged: {message}")
    raise RunError(
        f"not a checkpoint of this model: {message}. Are the pyramid, CLIP, Nvp, temp_kernel_sz, "
        "adapter_channels and num_adapter_layers the same?"
    )


def _check_proposals(model: nn.Module, content: dict) -> None:
    """Another pyramid may have as many events, so that all shapes fit."""
    if "proposals" not in content:  # a file of an earlier version
        return
    theirs, ours = content["proposals"], model.pyramid.proposals.cpu()
    plain = torch.is_tensor(theirs) and is_plain(theirs)
    # The shape first: a damaged one may claim more values than there is time for.
    if not plain or theirs.shape != ours.shape or not theirs.to(ours).equal(ours):
        raise RunError(
            "trained with another pyramid, whose events cover other parts of a video: give the "
            "same --pyr_config_path as in the run's args.json"
        )


def _tensor_problems(name: str, theirs: Tensor, ours: Tensor) -> list[str]:
    if theirs.shape != ours.shape:
        return [f"{name} has shape {list(theirs.shape)}, the model {list(ours.shape)}"]
    if not theirs.float().isfinite().all():
        return [f"{name} {NOT_FINITE}"]
    return []


def _resume(
    content: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Optimizer, scaler and random number generators to where they were."""
    try:
        _check_optimizer(content["optimizer"], model, optimizer)
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(content["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)  # the file's were those of the flags it was made with
        if not all(is_number(value) for value in content["scaler"].values()):
            raise RunError("the state of its loss scaler is damaged")
        if scaler is not None and content["scaler"]:  # empty: it was made without float16
            scaler.load_state_dict(content["scaler"])
        if content["format"] != EARLIER_FORMAT:
            set_rng_state(content["rng"])
    except RunError:
        raise
    except Exception as error:  # torch raises whatever it stumbles over
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise RunError(f"its optimizer, scaler or rng does not fit: {reason}") from error


def _check_optimizer(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's own loading compares the number of parameters, but no shape or value."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    theirs = [index for group in state["param_groups"] for index in group["params"]]
    if len(ours) != len(theirs):
        raise RunError(
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
            problems += _tensor_problems(title, moments[moment], parameter)
        if not 0 <= float(moments["step"]) < math.inf:
            problems.append(f"the optimizer's step of {name} is {float(moments['step'])}")
    if problems:
        raise RunError("; ".join(problems[:5]))


def _check_backbone(model: nn.Module, fingerprint: str) -> None:
    if fingerprint.startswith(_ALL_TENSORS):
        ours = backbone_fingerprint(model.clip)
    else:  # a file of an earlier version, which looked at vectors only
        tensors = sorted(model.clip.state_dict().items())
        ours = _digest((name, tensor) for name, tensor in tensors if tensor.dim() == 1)
    if fingerprint != ours:
        raise RunError(
            "trained on other CLIP weights than the model's: give the same --pretrained_clip_name "
            "and --pretrained_dir as in the run's args.json"
        )
