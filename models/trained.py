"""A trained ProPy in a file: reading it, checking it against a model, opening it without a run.

Ours hold what is trained, under this program's names, the configuration and CLIP's fingerprint. The
authors' hold all of CLIP too, under their names, and no ``format``. Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.authors import convert_authors_state
from models.clip_weights import build_clip
from models.propy import NOT_COMPARED, ProPy, ProPyConfig
from modules import ModelError
from modules.pyramid import PUBLISHED_PYRAMID, PromptPyramid
from modules.torch_files import is_plain, load_tensors

logger = logging.getLogger("propy.trained")

FORMAT = "propy-3"
# Settings that the shapes of a checkpoint's tensors show.
SEEN_IN_TENSORS = {"num_prompts", "adapter_channels", "adapter_kernel", "num_adapter_layers"}
NOT_FINITE = "has values that are not finite"

# The one type outside of torch's safe list that the authors' VCMR checkpoints need: the best score
# is a numpy float, pickled under the module name of numpy 1 or of numpy 2.
NUMPY_SCALAR = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


def load_propy(
    checkpoint: Path | str,
    clip_weights: Path | str | Mapping[str, Tensor] | None = None,
    trust_archive: bool = False,
) -> ProPy:
    """The model of a checkpoint, in evaluation mode; needs none of its run's flags.

    Args:
        checkpoint: of this program or of the authors'. Theirs hold no configuration, and get what
            can be read off the tensors, the published setting else, and a warning.
        clip_weights: name, file or content; by default what the checkpoint names.
        trust_archive: see ``models.clip_weights.read_weights``.

    Raises:
        ModelError: a file is missing, unreadable or damaged, or they do not fit each other.
    """
    content = read_checkpoint(checkpoint)
    with naming(checkpoint):
        config = _config_of(content)
    clip_weights = config.clip_name if clip_weights is None else clip_weights
    clip = build_clip(clip_weights, trust_archive, config.clip_activation)
    with naming(checkpoint):
        model = ProPy(clip, config)
    load_weights(content, model, checkpoint)
    return model.eval()


def read_checkpoint(path: Path | str) -> dict:
    """The content of a checkpoint; ``state_dict`` under this program's names and of plain tensors.

    ModelError: no such file, not a checkpoint, a damaged one, or one of another version.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path}: a folder, no checkpoint: name the file in it")
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALAR):
            content = load_tensors(path)
    except ModelError as error:
        raise ModelError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ModelError(f"{path}: not a checkpoint: it has no 'state_dict'")
    if not is_from_authors(content) and content["format"] != FORMAT:
        raise ModelError(
            f"{path}: its format is {str(content['format'])[:40]!r}, this program's {FORMAT}: use "
            "the revision of this program that wrote it (its run's args.json says which)"
        )
    state = {}
    for name, tensor in content["state_dict"].items():
        if not isinstance(name, str) or not torch.is_tensor(tensor) or not is_plain(tensor):
            raise ModelError(f"{path}: {str(name)[:60]!r} is not a plain tensor of floats")
        state[name.removeprefix("module.")] = tensor
    if is_from_authors(content):
        state, content["config"] = convert_authors_state(state), {}
    return content | {"state_dict": state}


def is_from_authors(content: Mapping) -> bool:
    """Only the authors' checkpoints have no ``format``."""
    return "format" not in content


def load_weights(content: Mapping, model: ProPy, path: Path | str) -> None:
    """The tensors of `read_checkpoint` into a model that they fit.

    ModelError: a missing, unexpected, misshapen or non-finite tensor, another CLIP, another pyramid
    or another configuration than it was trained with. The model is as before.
    """
    state, ours = content["state_dict"], not is_from_authors(content)
    has_clip = bool(model.backbone_names() & set(state))
    with naming(path):
        check_config(content, model)
        weights = _check_tensors(state, model)
        if ours and not has_clip and content["backbone"] != backbone_fingerprint(model.clip):
            raise ModelError(
                "trained on other CLIP weights than the model's: give the same "
                "--pretrained_clip_name as in the run's args.json"
            )
        warnings = _differences(content, model)
        was_stepped = ours and bool(content["global_step"] > 0)
        seconds = model.config.clip_seconds or content["config"].get("clip_seconds")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(state[name])
    if has_clip:
        model.clip.fingerprint = None  # of weights that are no longer there
    if was_stepped:
        model.clamp_logit_scale()  # as after every step; a frozen one is in no checkpoint of ours
    model.config = replace(model.config, clip_seconds=seconds)
    for warning in warnings:
        logger.warning("%s was trained with %s: scores differ from its training's", path, warning)


def check_config(content: Mapping, model: ProPy) -> None:
    """ModelError: a checkpoint is of a model with other settings or another pyramid."""
    ours = asdict(model.config)
    # What a file does not name was written when there was no other setting than the published one.
    published = {f.name: f.default for f in fields(model.config) if f.name not in SEEN_IN_TENSORS}
    theirs = published | content["config"]
    different = [
        f"{name} {theirs[name]!r}, not {ours.get(name)!r}"
        for name in theirs
        if name not in NOT_COMPARED and theirs[name] != ours.get(name)
    ]
    if different:
        raise ModelError(f"trained with {'; '.join(different)}: give the same settings")
    pyramid = None if is_from_authors(content) else PromptPyramid.from_config(theirs["pyramid"])
    if pyramid and not pyramid.proposals.equal(model.pyramid.proposals):
        raise ModelError(
            "trained with another pyramid, whose events cover other parts of a video: give the "
            "same --pyr_config_path as in the run's args.json"
        )


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """What is wrong with a file's content within, as a ModelError that names the file."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {str(error)[:1000]}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0][:300]
        raise ModelError(f"{path}: not a checkpoint of this program: {reason}") from e


def saved_weights(model: ProPy) -> dict:
    """What a checkpoint of this program holds of a model. ModelError: a weight is not finite."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{name} {NOT_FINITE}")
    trains_clip = bool(model.backbone_names() & set(state))
    return {
        "format": FORMAT,
        "config": asdict(model.config),
        "state_dict": state,
        "backbone": "" if trains_clip else backbone_fingerprint(model.clip),
    }


def backbone_fingerprint(clip: nn.Module) -> str:
    """sha256 over CLIP's tensors, by which one backbone is told from another.

    The logit scale is left out: training clamps a frozen one too, and it changes no ranking.
    Computed once for the weights that were read; a CLIP that is trained has none.
    """
    if clip.fingerprint is None:
        digest = hashlib.sha256()
        for name, tensor in sorted(clip.state_dict().items()):
            if name != "logit_scale":
                digest.update(name.encode())
                digest.update(tensor.cpu().float().contiguous().numpy())
        clip.fingerprint = f"all:{digest.hexdigest()}"
    return clip.fingerprint


def _config_of(content: Mapping) -> ProPyConfig:
    """The configuration in a file, or what the tensors of the authors' say of it."""
    if not is_from_authors(content):
        known = {field.name for field in fields(ProPyConfig)}
        unknown = set(content["config"]) - known
        if unknown:
            raise ModelError(f"unknown settings {', '.join(sorted(unknown))}: a newer version's")
        return ProPyConfig(**content["config"])
    state = content["state_dict"]
    layers = len({name.split(".")[1] for name in state if name.startswith("adapters.")})
    sizes = {"num_adapter_layers": layers}
    try:
        sizes["num_prompts"] = state["prompts.visual_prompts"].shape[1]
        if layers:
            channels, _, kernel, _ = state["adapters.0.conv.weight"].shape
            sizes |= {"adapter_channels": channels, "adapter_kernel": kernel}
        events = len(state["prompts.event_prompts"])
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"not the weights of a ProPy: {error}") from None
    if events != PromptPyramid.from_config(PUBLISHED_PYRAMID).num_events:
        raise ModelError(
            f"its {events} events are not those of the published pyramid: load it with "
            "build_model(…, pyramid) and load_checkpoint"
        )
    config = ProPyConfig(**sizes)
    logger.warning(
        "the checkpoint holds no configuration: sizes are those of its tensors, everything else is "
        "the published setting, max_words %d among it",
        config.max_words,
    )
    return config


def _differences(content: Mapping, model: ProPy) -> list[str]:
    """Where the model reads more or less of a video or a sentence than in its training."""
    config = content["config"]
    before = {"rank_readout": config.get("rank_readout", ProPyConfig.readout)}
    if config:
        before |= {"frames of a video": config["pyramid"]["Nf"], "max_words": config["max_words"]}
    now = {"frames of a video": model.pyramid.num_frames, "max_words": model.config.max_words}
    now["rank_readout"] = model.config.rank_readout
    return [
        f"{name} {before[name]}, but is used with {value}"
        for name, value in now.items()
        if str(before.get(name, value)) != str(value)
    ]


def _check_tensors(state: Mapping[str, Tensor], model: ProPy) -> dict[str, Tensor]:
    """The model's tensors to be replaced; CLIP's may be absent as a whole, nothing else may be."""
    expected, backbone = model.state_dict(), model.backbone_names()
    if not backbone & set(state):
        expected = {name: tensor for name, tensor in expected.items() if name not in backbone}
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        problems += tensor_problems(name, state[name], expected[name])
    if not problems:
        return expected
    rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    message = f"{'; '.join(sorted(problems)[:5])}{rest}"
    if all(problem.endswith(NOT_FINITE) for problem in problems):
        raise ModelError(f"its weights are damaged: {message}")
    raise ModelError(
        f"not a checkpoint of this model: {message}. Are the pyramid, CLIP, Nvp, temp_kernel_sz, "
        "adapter_channels and num_adapter_layers the same?"
    )


def tensor_problems(name: str, theirs: Tensor, ours: Tensor) -> list[str]:
    """What keeps a saved tensor from taking the place of one of the model's."""
    if theirs.shape != ours.shape:
        return [f"{name} has shape {list(theirs.shape)}, the model {list(ours.shape)}"]
    if not theirs.float().isfinite().all():
        return [f"{name} {NOT_FINITE}"]
    return []
