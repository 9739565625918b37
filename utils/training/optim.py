"""AdamW's parameter groups, and the learning rate as a function of the step (ProPy, §4.1)."""

from __future__ import annotations

import math

import torch
from torch import nn

ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-6
MIN_LEARNING_RATE = 1e-8


def parameter_groups(model: nn.Module, coef_lr: float, weight_decay: float) -> list[dict]:
    """Trainable parameters in up to four groups: CLIP's or new, decayed or not.

    Decay spares what has ``bias`` in its name and nothing else: prompts decay, and so do the
    LayerNorm weights and the logit scale of a CLIP that is fine-tuned.

    Args:
        coef_lr: factor on the learning rate of CLIP's.

    Returns:
        Groups with ``lr_scale`` and ``weight_decay``, none of them empty.
    """
    # By kind and not by value: a checkpoint's groups fit, whatever the values are now.
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    backbone = model.backbone_names()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (name in backbone, "bias" not in name)
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": coef_lr if from_clip else 1.0,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (from_clip, decayed), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, lr: float, coef_lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; ``set_learning_rate`` gives each step its rate."""
    groups = parameter_groups(model, coef_lr, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS)


def learning_rate(
    step: int, total_steps: float, peak: float, warmup_proportion: float = 0.1
) -> float:
    """Linear warm-up, then a cosine to zero, never below 1e-8.

    Args:
        step: s, counted from 0; the rate is that *before* step s.
        total_steps: S.
        peak: the highest rate.
        warmup_proportion: share of S in the warm-up; W = proportion · S is not rounded.
    """
    warmup = warmup_proportion * total_steps
    if step < warmup:
        rate = step / warmup * (peak - MIN_LEARNING_RATE) + MIN_LEARNING_RATE
        return min(rate, peak)
    progress = (step - warmup) / max(total_steps - warmup, 1e-12)
    return max(0.5 * peak * (1 + math.cos(math.pi * progress)), MIN_LEARNING_RATE)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
