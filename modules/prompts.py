"""The learned prompts of ProPy (§3.2, §3.4): events, visual prompts per layer, and text prompts,
which are projected from the visual ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modules.linear import Linear


class PyramidPrompts(nn.Module):
    """Every learned token of both towers.

    Args:
        num_events: N_e; one set, enters before the first layer and is carried through all.
        num_prompts: N_p per layer, fresh at every layer.
        num_layers: L of the image tower.
        vision_width, text_width: D_v and D_t.
        patch_size: side of CLIP's patches in pixels; sets the range of the initial values.
        for_texts: False has no text prompts.
    """

    def __init__(
        self, num_events: int, num_prompts: int, num_layers: int, vision_width: int,
        text_width: int, patch_size: int, for_texts: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.event_prompts = nn.Parameter(torch.empty(num_events, vision_width))
        self.visual_prompts = nn.Parameter(torch.empty(num_layers, num_prompts, vision_width))
        self.prefix_proj = Linear(vision_width, text_width) if for_texts else None
        # Text postfixes stand after the end-of-text token, out of the causal text feature's sight:
        # nothing computes them. The parameters are part of the authors' checkpoints.
        self.postfix_proj = Linear(vision_width, text_width) if for_texts else None
        self.text_width = text_width
        bound = math.sqrt(6 / (3 * patch_size**2 + vision_width))
        nn.init.uniform_(self.event_prompts, -bound, bound)
        nn.init.uniform_(self.visual_prompts, -bound, bound)

    def text_prefixes(self) -> Tensor:
        """The prefix of every layer of the text tower, [L, N_p, D_t]; [L, 0, D_t] without."""
        if self.prefix_proj is None:
            return self.visual_prompts.new_empty(len(self.visual_prompts), 0, self.text_width)
        return self.prefix_proj(self.visual_prompts)
