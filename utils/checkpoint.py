"""Checkpoints: written whole or not at all, read strictly, ours and those of the authors' program.

Ours keep what is trained, under this program's names, plus what resuming needs. The authors' hold
all of CLIP too, under their names. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = "propy-1"

# The one type outside of torch's safe list that the authors' VCMR checkpoints need: the best score
# is a numpy float, pickled under the module name of numpy 1 or of numpy 2.
_NUMPY_SCALAR = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]

# What else a checkpoint of this program holds, and of which type.
_RUN_FIELDS = {
    "backbone": str,
    "epoch": int,
    "global_step": int,
    "best_score": float | int | None,
    "best_epoch": int | None,
    "args": dict,
}

_AUTHORS_ADAPTER = re.compile(r"clip\.visual\.transformer\.resblocks\.(\d+)\.temp_adapter\.(.+)")


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable or of another model; names file, key and shapes."""


@dataclass
class Checkpoint:
    """What a checkpoint says of the run besides the weights, which are in the model by then."""

    epoch: int = 0  # epochs done
    global_step: int = 0  # optimizer steps done, those skipped by the loss scaler included
    best_score: float | None = None
    best_epoch: int | None = None
    args: dict = field(default_factory=dict)
    has_optimizer: bool = False  # whether training can be resumed from it
    from_authors: bool = False


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
        model: its trained tensors are saved, and a fingerprint of the frozen rest.
        progress: epoch, step and best score so far.
    """
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    content = {
        "format": FORMAT,
        "state_dict": state,
        "backbone": backbone_fingerprint(model.clip),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "best_score": progress.best_score,
        "best_epoch": progress.best_epoch,
        "args": progress.args,
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a file so that the target appears, or is replaced, only when it is complete."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
        CheckpointError: no such file, not a checkpoint, a missing, unexpected, misshapen or
            non-finite tensor, or another CLIP than the one it was trained on.
    """
    path = Path(path)
    content = _read(path)
    state = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    from_authors = content.get("format") != FORMAT
    if from_authors:
        state = convert_authors_state(state)
    try:
        _load_weights(model, state)
        if not from_authors and not any(name.startswith("clip.") for name in state):
            _check_backbone(model, content["backbone"])
        has_optimizer = not from_authors and "optimizer" in content
        if has_optimizer and optimizer is not None:
            _load_state(optimizer, content, "optimizer")
        if has_optimizer and scaler is not None:
            _load_state(scaler, content, "scaler")
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if from_authors:
        return Checkpoint(epoch=content.get("epoch", 0), from_authors=True)
    return Checkpoint(
        content["epoch"],
        content["global_step"],
        content["best_score"],
        content["best_epoch"],
        content["args"],
        has_optimizer,
    )


def convert_authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the authors' names and shapes to this program's.

    Theirs: ``clip.visual.global_prompts`` [1, N_e, D_v]; ``clip.visual_prompt_embedding``
    [1, N_p, L·D_v], layer by layer along the last axis; convolution weights [C, 1, k, 1, 1]; all
    below ``clip.``. A tensor of another rank is left as it is, for the shape check to name it.
    """
    converted = {}
    events = state.get("clip.visual.global_prompts")
    for name, tensor in state.items():
        adapter = _AUTHORS_ADAPTER.fullmatch(name)
        if name == "clip.visual.global_prompts":
            name, tensor = "prompts.event_prompts", tensor.squeeze(0)
        elif name == "clip.visual_prompt_embedding":
            name = "prompts.visual_prompts"
            width = events.shape[-1] if events is not None else 0
            if tensor.dim() == 3 and width and tensor.shape[-1] % width == 0:
                tensor = tensor.squeeze(0).unflatten(-1, (-1, width)).transpose(0, 1)
        elif name.startswith(("clip.prefix_proj.", "clip.postfix_proj.")):
            name = name.replace("clip.", "prompts.", 1)
        elif adapter:
            name = f"adapters.{adapter[1]}.{adapter[2]}"
            if tensor.dim() == 5:
                tensor = tensor.squeeze(-1)
        converted[name] = tensor
    return converted


def backbone_fingerprint(clip: nn.Module) -> str:
    """sha256 over CLIP's vectors (norms, biases): cheaply tells one backbone from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        if tensor.dim() == 1:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers stumble over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(f"{path}: not a checkpoint: it has no 'state_dict'")
    _check_content(path, content)
    return content


def _check_content(path: Path, content: dict) -> None:
    """Types only: that names are names, weights plain tensors, and the run's fields as saved."""
    for name, tensor in content["state_dict"].items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: {str(name)[:60]!r} is no name of a tensor")
        if not torch.is_tensor(tensor):
            raise CheckpointError(f"{path}: {name} is no tensor, but a {type(tensor).__name__}")
        if not _is_plain(tensor):
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise CheckpointError(f"{path}: {name} is {kind}, not a plain tensor of floats")
    ours = content.get("format") == FORMAT
    fields = content if ours else {"epoch": 0} | content
    for key, kind in (_RUN_FIELDS if ours else {"epoch": int}).items():
        if key not in fields or not isinstance(fields[key], kind):
            raise CheckpointError(f"{path}: its field '{key}' is missing or damaged")


def _is_plain(tensor: Tensor) -> bool:
    """Numbers that can be looked at and copied: not sparse, quantized, or without values (meta)."""
    return tensor.layout == torch.strided and tensor.is_floating_point() and not tensor.is_meta


def _load_state(target: torch.optim.Optimizer | torch.amp.GradScaler, content: dict, key: str):
    try:
        target.load_state_dict(content[key])
    except Exception as error:  # torch raises whatever it stumbles over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the state of the {key} does not fit: {reason}") from error


@torch.no_grad()
def _load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors by name; CLIP's may be absent as a whole, nothing else may be."""
    expected = model.state_dict()
    if not any(name.startswith("clip.") for name in state):
        expected = {k: v for k, v in expected.items() if not k.startswith("clip.")}
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        theirs, ours = state[name], expected[name]
        if theirs.shape != ours.shape:
            problems.append(f"{name} has shape {list(theirs.shape)}, the model {list(ours.shape)}")
        elif not theirs.float().isfinite().all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"not a checkpoint of this model: {'; '.join(sorted(problems)[:5])}{rest}. Are the "
            "pyramid, CLIP, Nvp, temp_kernel_sz, adapter_channels and num_adapter_layers the same?"
        )
    for name, tensor in expected.items():
        tensor.copy_(state[name])


def _check_backbone(model: nn.Module, fingerprint: str) -> None:
    if fingerprint != backbone_fingerprint(model.clip):
        raise CheckpointError(
            "trained on other CLIP weights than the model's: give the same --pretrained_clip_name "
            "and --pretrained_dir as in the run's args.json"
        )
