"""The model of an index: which one is at hand, and what an index keeps of it."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import nn

from models import ProPyConfig
from models.clip_weights import WEIGHTS_FILES, WEIGHTS_FOLDER, weights_path
from models.trained import backbone_fingerprint, load_propy
from utils import SearchError
from utils.search.windows import WINDOW_SECONDS

logger = logging.getLogger("propy.search")

ROOT = WEIGHTS_FOLDER.parent
DEMO = {"checkpoint": ROOT / "logs/demo/ckpt.best.pth.tar", "clip_weights": ROOT / "demo/clip.pt"}
# Settings that no event embedding shows.
NOT_IN_EVENTS = {"max_words", "clip_name", "readout", "rank_readout"}


def choose_model(checkpoint: str | None, clip_weights: str | None) -> dict[str, str | None]:
    """The files of a model: those that are named, or what is at hand, with a sentence about it.

    Returns:
        ``checkpoint``, None for a CLIP without one, and ``clip_weights``, None for the one that the
        checkpoint names.

    Raises:
        SearchError: nothing is at hand.
    """
    if checkpoint:
        return lasting(checkpoint, clip_weights)
    here = [WEIGHTS_FOLDER / name for name in WEIGHTS_FILES.values()]
    clip = clip_weights or next((path for path in here if path.is_file()), None)
    if clip:
        logger.warning("no --checkpoint: CLIP as it is (%s), its frames averaged by events", clip)
        return lasting(None, clip)
    if not all(path.is_file() for path in DEMO.values()):
        raise SearchError(
            "no model: name a trained one (--checkpoint logs/…/ckpt.best.pth.tar), get CLIP "
            "(`bash scripts/download_clip.sh`), or make the demo's (`bash scripts/demo.sh`)"
        )
    logger.warning(
        "no --checkpoint and no CLIP in %s: the demo's model, which knows nothing but its own "
        "rendered scenes. `bash scripts/download_clip.sh` gets CLIP",
        WEIGHTS_FOLDER,
    )
    return lasting(**DEMO)


def load_model(checkpoint: str | None, clip_weights: str | None) -> nn.Module:
    """The model of `choose_model`'s files, in evaluation mode. ModelError: as ``load_propy``."""
    if checkpoint:
        return load_propy(checkpoint, clip_weights)
    from models.zero_shot import load_zero_shot

    return load_zero_shot(clip_weights)


def describe(model: nn.Module, files: dict[str, str | None]) -> dict:
    """What an index keeps of its model."""
    return {
        **files,
        "fingerprint": fingerprint(model),
        "clip": model.config.clip_name,
        "events": model.pyramid.num_events,
        "frames": model.pyramid.num_frames,
        "width": model.clip.sizes.embed_dim,
        "levels": (model.pyramid.level_of_event - 1).tolist(),
        "window_seconds": model.config.clip_seconds or WINDOW_SECONDS,
    }


def fingerprint(model: nn.Module) -> str:
    """sha256 of all that event embeddings depend on: weights, and settings that are not the
    published ones, so that an index outlives the settings that later versions add."""
    published, settings = asdict(ProPyConfig()), asdict(model.config)
    settings = {k: v for k, v in settings.items() if k not in NOT_IN_EVENTS and v != published[k]}
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings], sort_keys=True).encode())
    digest.update(backbone_fingerprint(model.clip).encode())
    backbone = {f"clip.{name}" for name in model.clip.state_dict()}
    for name, tensor in sorted(model.state_dict().items()):
        if name not in backbone:
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()))
    return digest.hexdigest()


def lasting(
    checkpoint: str | Path | None, clip_weights: str | Path | None
) -> dict[str, str | None]:
    """What names them from everywhere: absolute paths, or the name of a CLIP as it is."""
    if checkpoint:
        checkpoint = str(Path(checkpoint).absolute())
    if clip_weights and weights_path(clip_weights) == Path(clip_weights):
        clip_weights = str(Path(clip_weights).absolute())
    return {"checkpoint": checkpoint, "clip_weights": clip_weights}
