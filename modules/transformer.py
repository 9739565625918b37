"""The pre-norm transformer block of CLIP, one definition for the image and the text tower.

Parameter names and arithmetic follow OpenAI's release (Radford et al., 2021), so its weights load
unchanged: LayerNorm in at least float32, and by default 64 channels per attention head and
QuickGELU; of open_clip's models most have GELU, and those above ViT-L wider heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.linear import Linear, linear
from modules.lora import LoRA

HEAD_WIDTH = 64  # channels per head of every CLIP model of OpenAI's
QUICK_GELU, GELU = "quick_gelu", "gelu"  # transformers' names of the activations
QUICK_GELU_SLOPE = 1.702


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32; the result has the input's dtype."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """The norm of x, times a factor that costs nothing here."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if factor != 1:
            weight, bias = weight * factor, bias * factor
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention whose projections can be used one by one.

    ``nn.MultiheadAttention`` has the same parameters, but hides queries, keys and values: ProPy's
    event side needs the keys and values which the frame side has computed.

    ValueError: the width D is not a multiple of c, the channels of a head.
    """

    def __init__(self, width: int, head_width: int = HEAD_WIDTH) -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(f"width {width} is not a multiple of {head_width} channels per head")
        self.width = width
        self.num_heads = width // head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def project(
        self, x: Tensor, first: str = "q", last: str = "v", lora: LoRA | None = None
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values of tokens, from the first to the last letter asked for.

        Args:
            x: normalised tokens, [B, N, D].
            first, last: a range of the letters q, k, v; the default is all three, in one product.
            lora: what is added to the frozen projection.

        Returns:
            One [B, N, heads, c] view per letter.
        """
        start, stop = "qkv".index(first), "qkv".index(last) + 1
        rows = slice(start * self.width, stop * self.width)
        weight, bias = self.in_proj_weight[rows], self.in_proj_bias[rows]
        x = lora.project(x, weight, bias, rows) if lora else linear(x, weight, bias)  # [B, N, m·D]
        return x.unflatten(-1, (stop - start, self.num_heads, -1)).unbind(-3)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """softmax(q kᵀ / √c + mask) v of every head, through the output projection.

        Args:
            q: [B, N, heads, c]; k, v: [B, M, heads, c].
            mask: what to add to the logits, or True where a query sees a key; broadcast to
                [B, heads, N, M].
            causal: a query sees the keys up to its own position.

        Returns:
            [B, N, D].
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(heads.transpose(1, 2).flatten(-2))


class ResidualAttentionBlock(nn.Module):
    """x += attention(ln_1(x)); x += mlp(ln_2(x)), with OpenAI's parameter names.

    Args:
        width: channels D, a multiple of `head_width`.
        activation: of the MLP, QUICK_GELU or GELU; no tensor tells which one weights are for, nor
        head_width: channels of a head.
        hidden: channels within the MLP; None: 4 D.
    """

    def __init__(
        self, width: int, activation: str = QUICK_GELU, head_width: int = HEAD_WIDTH,
        hidden: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation = activation
        self.attn = SelfAttention(width, head_width)
        self.ln_1 = LayerNorm(width)
        hidden = hidden or 4 * width
        self.mlp = nn.ModuleDict({"c_fc": Linear(width, hidden), "c_proj": Linear(hidden, width)})
        self.ln_2 = LayerNorm(width)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x + mlp(ln_2(x)), [..., N, D]; between the two linear maps stands the activation.

        QuickGELU is h · σ(1.702 h) = silu(1.702 h) / 1.702, and silu has a fused backward. The two
        factors go where they cost no pass over the hidden channels, and no memory for one.
        """
        c_fc, c_proj = self.mlp["c_fc"], self.mlp["c_proj"]
        if self.activation == GELU:
            return x + c_proj(F.gelu(c_fc(self.ln_2(x))))
        normed = self.ln_2(x, factor=QUICK_GELU_SLOPE)
        hidden = linear(normed, c_fc.weight, c_fc.bias * QUICK_GELU_SLOPE)
        hidden = F.silu(hidden, inplace=not hidden.requires_grad)
        out = linear(hidden, c_proj.weight, c_proj.bias * QUICK_GELU_SLOPE)
        return torch.add(x, out, alpha=1 / QUICK_GELU_SLOPE)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Plain CLIP: every token of [B, N, D] attends to all tokens, or, causal as in the text
        tower, to itself and those before it."""
        return self.feed_forward(
            x + self.attn.attend(*self.attn.project(self.ln_1(x)), causal=causal)
        )


class Transformer(nn.Module):
    """A stack of blocks; ProPy walks over ``resblocks`` itself."""

    def __init__(
        self, width: int, layers: int, activation: str = QUICK_GELU, head_width: int = HEAD_WIDTH,
        hidden: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, activation, head_width, hidden) for _ in range(layers)
        )

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x
