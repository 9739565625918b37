"""Groups of neighbouring frames that attend together (ITA), in place of each frame by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.transformer import SelfAttention


class FrameGroups(nn.Module):
    """Attention over all tokens of g neighbouring frames; groups do not overlap.

    A learned number per distance in frames, zero at the start, is added to the logits of all heads.

    Args:
        size: g; the number of frames is a multiple of it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.zeros(2 * size - 1))  # of key − query = −(g−1) … g−1

    def attend(self, attn: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attn.attend` of the frames of a batch, [B·N_f, 1+G², heads, 64] to [B·N_f, 1+G², D]."""
        tokens = q.shape[1]
        frame = torch.arange(self.size, device=q.device).repeat_interleave(tokens)
        bias = self.bias[frame - frame.unsqueeze(1) + self.size - 1].to(q.dtype)
        groups = (x.unflatten(0, (-1, self.size)).flatten(1, 2) for x in (q, k, v))
        out = attn.attend(*groups, mask=bias)  # [B·N_f/g, g·(1+G²), D]
        return out.unflatten(1, (self.size, tokens)).flatten(0, 1)
