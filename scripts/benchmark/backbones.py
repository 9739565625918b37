#!/usr/bin/env python3
"""The table of backbones in CLIP_weights/README.md: what each costs with ProPy's published setting.

    .venv/bin/python -m scripts.benchmark.backbones

Nothing is computed: torch's FlopCounterMode counts on tensors without values.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import ProPy, ProPyConfig
from models.backbones import Backbone, list_backbones
from models.clip import CLIP
from utils.command import Parser, run_command


def main() -> None:
    Parser(description=__doc__.split("\n")[0]).parse_args()
    print("| architecture | pixels | parameters | float32 weights | GFLOP a video |")
    print("|---|---|---|---|---|")
    costs = {}
    for backbone in list_backbones():
        costs.setdefault((backbone.sizes, backbone.settings.head_widths), backbone)
    for backbone in sorted(costs.values(), key=lambda backbone: backbone.name):
        print(row(backbone))


def row(backbone: Backbone) -> str:
    """Of the Markdown table: CLIP's own parameters, and the FLOP of `encode_video` for one video
    of 32 frames, prompts and adapters included; a product and its sum are two."""
    with torch.device("meta"):
        clip = CLIP(backbone.sizes, backbone.settings)
    parameters = sum(p.numel() for p in clip.parameters())
    model = ProPy(clip, ProPyConfig(**backbone.settings.as_fields())).to("meta")
    model.requires_grad_(False)
    side = backbone.sizes.input_resolution
    frames = torch.empty(1, model.pyramid.num_frames, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.encode_video(frames)
    architecture = backbone.name.split("/")[0].removesuffix("-quickgelu")
    return (
        f"| {architecture} | {side} | {parameters / 1e6:,.0f} M | {4 * parameters / 2**30:.1f} GiB "
        f"| {counter.get_total_flops() / 1e9:,.0f} |"
    )


if __name__ == "__main__":
    run_command(main)
