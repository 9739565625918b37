"""Low-rank adaptation (Hu et al., 2022) of the packed projection of queries, keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modules.linear import linear

SCALE = 2.0  # α / r, as in ITA


class LoRA(nn.Module):
    """W + 2 B A in place of a frozen W [3·D, D]; it starts as W, for B is zero.

    Args:
        width: D.
        rank: r, rows of A [r, D] and columns of B [3·D, r].
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(3 * width, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def project(self, x: Tensor, weight: Tensor, bias: Tensor, rows: slice) -> Tensor:
        """x (W + 2 B A)ᵀ + b of some rows of W: [..., D] to [..., rows].

        In training A and B stay apart, so that no gradient as large as W's is computed; without
        gradients they are merged, which costs as much as projecting r tokens.
        """
        up = SCALE * self.up[rows]
        if torch.is_grad_enabled():
            return linear(x, weight, bias) + linear(linear(x, self.down), up)
        return linear(x, weight + up @ self.down, bias)
