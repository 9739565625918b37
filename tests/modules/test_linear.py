"""Linear maps by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from modules.linear import linear


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 5, 7), (7,)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("trained", ["input", "weight", "all"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torch(shape, layout: str, trained: str, with_bias: bool) -> None:
    if len(shape) == 1 and layout == "transposed":
        pytest.skip("one axis")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(6, 7), torch.randn(6)
    if layout == "transposed":
        x = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    elif layout == "sliced":
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    leaves = {"input": [x], "weight": [weight], "all": [x, weight, bias]}[trained]
    leaves = [leaf.requires_grad_() for leaf in leaves if with_bias or leaf is not bias]
    results = []
    for function in (linear, F.linear):
        out = function(x, weight, bias if with_bias else None)
        gradient = torch.arange(out.numel()).reshape(out.shape) / out.numel()
        results.append([out, *torch.autograd.grad(out, leaves, gradient)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_frozen_map_keeps_nothing_but_its_weight() -> None:
    weight, x = torch.randn(6, 7), torch.randn(5, 7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        linear(x, weight)
    assert kept == [weight.shape]


def test_autocast_still_lowers_the_precision() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(5, 7), torch.randn(6, 7)).dtype == torch.bfloat16
    assert linear(torch.randn(5, 7).double(), torch.randn(6, 7).double()).dtype == torch.float64
