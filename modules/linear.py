"""Linear maps. On a CPU, float32 ones go to oneDNN: torch sends them to MKL, which does not use
AVX-512 on AMD's processors and is half as fast there. Everywhere else this is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# torch's operator for its compiler: x Wᵀ + b by oneDNN, without autograd. Absent where torch was
# built without oneDNN.
_OPERATOR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of x [..., n], W [m, n] and b [m]: [..., m], the numbers of
    ``torch.nn.functional.linear`` up to rounding."""
    if _by_onednn(x, weight):
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler chooses itself; asked first, it sees no more
        return False
    return (
        _OPERATOR is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _OPERATOR(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """Keeps its input only if the weight is trained, as torch's own does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.T) if of_x else None,
            _product(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
