"""Checkpoints of the authors' program: their names and shapes to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_AUTHORS_ADAPTER = re.compile(r"clip\.visual\.transformer\.resblocks\.(\d+)\.temp_adapter\.(.+)")


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
            width = 0 if events is None or not events.dim() else events.shape[-1]
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
