"""The golden models: random CLIP weights and ProPy parameters, regenerated from their seeds."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import ProPy, build_model
from utils.training.checkpoint import save_checkpoint
from utils.training.optim import build_optimizer
from utils.training.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
sys.path.insert(0, str(GOLDEN))
import inputs  # noqa: E402
import make_weights  # noqa: E402

SMALL = ("m1", "m2", "m3", "m4", "m5", "m6")


@dataclass
class GoldenModel:
    """One model_*.npz with everything that its README says how to regenerate."""

    name: str
    arrays: dict[str, np.ndarray]
    config: dict

    @classmethod
    def read(cls, name: str) -> GoldenModel:
        with np.load(GOLDEN / f"model_{name}.npz") as file:
            arrays = dict(file)
        return cls(name, arrays, json.loads(str(arrays["config"])))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def clip_state(self) -> OrderedDict[str, Tensor]:
        weights = make_weights.make(self.config["weights"], self.config["weights_seed"])
        return make_weights.torch_state(weights)

    def authors_state(self) -> OrderedDict[str, Tensor]:
        """All parameters under the authors' names and in their shapes and order."""
        clip, state = self.clip_state(), OrderedDict()
        for name, shape in zip(self["param_names"], self["param_shapes"], strict=True):
            plain = str(name).removeprefix("clip.")
            if plain in clip:
                state[str(name)] = clip[plain]
            else:
                value = make_weights.new_value(self.config["new_seed"], plain, json.loads(shape))
                state[str(name)] = torch.from_numpy(value)
        return state

    def write_authors_checkpoint(self, path: Path, **extra: object) -> Path:
        torch.save({"state_dict": self.authors_state(), "epoch": 10, **extra}, path)
        return path

    def build(self, **changes: object) -> ProPy:
        """Our model on the same CLIP weights, its own parameters still random."""
        config = self.config
        settings = {
            "num_prompts": config["Nvp"],
            "adapter_channels": config["adapter_channels"],
            "adapter_kernel": config["temp_kernel_sz"],
            "num_adapter_layers": config["num_adapter_layers"],
            "freeze_clip": config.get("freeze_clip", 1) == 1,
        }
        return build_model(self.clip_state(), config["pyramid"], **settings | changes)

    def video(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(inputs.video(*self.config["video"])).to(dtype)

    def token_ids(self) -> Tensor:
        return torch.from_numpy(self["text_ids"]).long()


def save_model(path: Path, model: ProPy) -> Path:
    """As the checkpoint of a run before its first step."""
    optimizer, scaler = build_optimizer(model, 1e-3, 1e-3, 0.2), torch.amp.GradScaler("cpu")
    save_checkpoint(path, model, optimizer, scaler, Progress())
    return path


def authors_view(tensors: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Our tensors under the authors' names and in their shapes: the way back of the reader."""
    view = {}
    for name, tensor in tensors:
        if name == "prompts.event_prompts":
            name, tensor = "clip.visual.global_prompts", tensor.unsqueeze(0)
        elif name == "prompts.visual_prompts":
            name, tensor = "clip.visual_prompt_embedding", tensor.transpose(0, 1).flatten(1)[None]
        elif name.startswith("prompts."):
            name = name.replace("prompts.", "clip.")
        elif name.startswith("adapters."):
            _, layer, rest = name.split(".", 2)
            name = f"clip.visual.transformer.resblocks.{layer}.temp_adapter.{rest}"
            if rest == "conv.weight" and tensor is not None:
                tensor = tensor.unsqueeze(-1)
        view[name] = tensor
    return view


def checksums(name: str, value: np.ndarray) -> np.ndarray:
    """Sum, sum of magnitudes, of squares, and a dot product with a fixed random vector."""
    x = value.astype(np.float64).ravel()
    return np.array([x.sum(), np.abs(x).sum(), (x * x).sum(), x @ _probe(name, x.size)])


@cache
def _probe(name: str, size: int) -> np.ndarray:
    return make_weights.uniform(99, name, (size,)).astype(np.float64)
