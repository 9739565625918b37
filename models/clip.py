"""CLIP's image and text tower (Radford et al., 2021) under OpenAI's parameter names.

Sizes are read off the weights, so ViT-B/32, B/16, L/14 and small models of the same format load
alike; models.clip_weights reads them from every format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules import ModelError
from modules.linear import linear
from modules.transformer import HEAD_WIDTH, QUICK_GELU, LayerNorm, Transformer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPSizes:
    """What the tensors show of a CLIP ViT."""

    embed_dim: int  # D
    vision_width: int  # D_v
    vision_layers: int
    patch_size: int
    grid: int  # G: patches per side
    text_width: int  # D_t
    text_layers: int
    context_length: int
    vocab_size: int
    vision_hidden: int | None = None  # within the MLPs; None: four times the width
    text_hidden: int | None = None

    @property
    def input_resolution(self) -> int:
        """Side of the square input images, in pixels."""
        return self.grid * self.patch_size

    @classmethod
    def of_state_dict(cls, state: Mapping[str, Tensor]) -> CLIPSizes:
        """Read the sizes off OpenAI's tensors. ModelError: they are not those of a ViT."""

        def shape(key: str, dimensions: int) -> torch.Size:
            if key not in state:
                raise ModelError(f"no tensor {key!r}: not the weights of a CLIP ViT")
            if state[key].dim() != dimensions:
                raise ModelError(f"{key!r} has shape {list(state[key].shape)}")
            return state[key].shape

        def depth(prefix: str) -> int:
            names = [key for key in state if key.startswith(prefix)]
            if not names:
                raise ModelError(f"no tensor of {prefix}*: not the weights of a CLIP ViT")
            return len({key[len(prefix) :].split(".")[0] for key in names})

        vision_width, _, patch_size, _ = shape("visual.conv1.weight", 4)
        vocab_size, text_width = shape("token_embedding.weight", 2)
        return cls(
            embed_dim=shape("text_projection", 2)[1],
            vision_width=vision_width,
            vision_layers=depth("visual.transformer.resblocks."),
            patch_size=patch_size,
            grid=math.isqrt(shape("visual.positional_embedding", 2)[0] - 1),
            text_width=text_width,
            text_layers=depth("transformer.resblocks."),
            context_length=shape("positional_embedding", 2)[0],
            vocab_size=vocab_size,
            vision_hidden=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            text_hidden=shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        )


@dataclass(frozen=True)
class CLIPSettings:
    """What no tensor shows of a CLIP ViT; the defaults are those of OpenAI's."""

    activation: str = QUICK_GELU  # of the MLPs, or GELU
    head_widths: tuple[int, int] = (HEAD_WIDTH, HEAD_WIDTH)  # channels of a head: vision, text
    image_mean: tuple[float, float, float] = IMAGE_MEAN  # of RGB in [0, 1]
    image_std: tuple[float, float, float] = IMAGE_STD

    def as_fields(self) -> dict[str, Any]:
        """As the fields of `models.propy.ProPyConfig`."""
        return {f"clip_{name}": value for name, value in asdict(self).items()}


class VisionTransformer(nn.Module):
    """CLIP's image tower."""

    def __init__(self, sizes: CLIPSizes, settings: CLIPSettings) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(sizes.grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width, sizes.vision_layers, settings.activation, settings.head_widths[0],
            sizes.vision_hidden,
        )  # fmt: skip
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, sizes.embed_dim))

    def embed(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        """Normalised images [N, 3, H, W] to the first layer's input, [N, 1+G², D_v]; before its
        norm, `added` [N, D_v] is added to all tokens of an image."""
        # The convolution's stride is its size, so it is a linear map of the patches, which a CPU
        # computes almost three times as fast.
        side = self.conv1.stride[0]
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [N, G², 3·patch²]
        patches = linear(patches, self.conv1.weight.flatten(1))  # [N, G², D_v]
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        tokens = tokens + self.positional_embedding
        return self.ln_pre(tokens if added is None else tokens + added.unsqueeze(1))

    def head(self, tokens: Tensor) -> Tensor:
        """ln_post and the projection into the joint space, [..., D_v] to [..., D]."""
        return self.ln_post(tokens) @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(images))[:, 0])


class CLIP(nn.Module):
    """Plain CLIP: both towers and the scale."""

    def __init__(self, sizes: CLIPSizes, settings: CLIPSettings = CLIPSettings()) -> None:
        super().__init__()
        self.sizes, self.settings = sizes, settings
        self.fingerprint: str | None = None  # of its weights, once it was asked for
        self.visual = VisionTransformer(sizes, settings)
        self.transformer = Transformer(
            sizes.text_width, sizes.text_layers, settings.activation, settings.head_widths[1],
            sizes.text_hidden,
        )  # fmt: skip
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.text_width)
        self.positional_embedding = nn.Parameter(
            torch.empty(sizes.context_length, sizes.text_width)
        )
        self.ln_final = LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(torch.empty(sizes.text_width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        for name in ("image_mean", "image_std"):
            value = torch.tensor(getattr(settings, name)).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Random values for training from nothing, scaled as in OpenAI's release."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.sizes.text_width**-0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        visual, scale = self.visual, self.sizes.vision_width**-0.5
        for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
            nn.init.normal_(parameter, std=scale)
        for tower in (self.visual.transformer, self.transformer):
            width, depth = tower.resblocks[0].attn.width, len(tower.resblocks)
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.zeros_(block.attn.in_proj_bias)
                nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)

    def normalize(self, images: Tensor) -> Tensor:
        """Images [..., 3, H, W], uint8, to what the image tower reads; float ones are that."""
        if images.is_floating_point():
            return images
        return (images.to(self.image_mean.dtype) / 255 - self.image_mean) / self.image_std

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids [T, W] to the text tower's input, [T, W, D_t]."""
        return self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]

    def text_head(self, tokens: Tensor) -> Tensor:
        """ln_final and the projection into the joint space, [..., D_t] to [..., D]."""
        return self.ln_final(tokens) @ self.text_projection

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [N, D], not normalised, of images that `normalize` gives, [N, 3, H, W]."""
        return self.visual(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Features [T, D], not normalised, of texts, int64 [T, W] and 0-padded, read at each row's
        end-of-text token."""
        x = self.transformer(self.embed_tokens(token_ids), causal=True)
        return self.text_head(x[torch.arange(len(x), device=x.device), end_of_text(token_ids)])


def end_of_text(token_ids: Tensor) -> Tensor:
    """Where each row's largest id stands first: the end-of-text token. [T, W] to int64 [T]."""
    return token_ids.argmax(dim=-1)
