"""CLIP's image and text tower (Radford et al., 2021) under OpenAI's parameter names.

Sizes are read off the weights, so ViT-B/32, B/16, L/14 and small models of the same format load
alike, from OpenAI's TorchScript archives or from plain state dicts.
"""

from __future__ import annotations

import hashlib
import math
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.linear import linear
from modules.torch_files import TorchFileError, check_sums, is_plain, load_tensors
from modules.transformer import LayerNorm, Transformer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Besides its parameters OpenAI's archive states three sizes.
ARCHIVE_EXTRAS = {"input_resolution", "context_length", "vocab_size"}

# OpenAI's names of the models this program is meant for, and the files they are published as.
WEIGHTS_FILES = {
    "ViT-B/32": "ViT-B-32.pt",
    "ViT-B/16": "ViT-B-16.pt",
    "ViT-L/14": "ViT-L-14.pt",
}
# sha256 of these files, as OpenAI publishes them.
PUBLISHED_ARCHIVES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}


class WeightsError(ValueError):
    """CLIP weights that are missing, unreadable or of another shape; names file and key."""


@dataclass(frozen=True)
class CLIPSizes:
    """Everything that distinguishes one CLIP ViT from another."""

    embed_dim: int  # D
    vision_width: int  # D_v
    vision_layers: int
    patch_size: int
    grid: int  # G: patches per side
    text_width: int  # D_t
    text_layers: int
    context_length: int
    vocab_size: int

    @property
    def input_resolution(self) -> int:
        """Side of the square input images, in pixels."""
        return self.grid * self.patch_size

    @classmethod
    def of_state_dict(cls, state: Mapping[str, Tensor]) -> CLIPSizes:
        """Read the sizes off OpenAI's tensors.

        Raises:
            WeightsError: a tensor is missing, or the model is not a ViT (the ResNets).
        """

        def shape(key: str, dimensions: int) -> torch.Size:
            if key not in state:
                raise WeightsError(f"no tensor {key!r}: not the weights of a CLIP ViT")
            if state[key].dim() != dimensions:
                raise WeightsError(f"{key!r} has shape {list(state[key].shape)}")
            return state[key].shape

        def depth(prefix: str) -> int:
            names = [key for key in state if key.startswith(prefix)]
            if not names:
                raise WeightsError(f"no tensor of {prefix}*: not the weights of a CLIP ViT")
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
        )


class VisionTransformer(nn.Module):
    """CLIP's image tower."""

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(sizes.grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, sizes.embed_dim))

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to the first layer's input, [N, 1+G², D_v]."""
        # The convolution's stride is its size, so it is a linear map of the patches, which a CPU
        # computes almost three times as fast.
        side = self.conv1.stride[0]
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [N, G², 3·patch²]
        patches = linear(patches, self.conv1.weight.flatten(1))  # [N, G², D_v]
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return self.ln_pre(tokens + self.positional_embedding)

    def head(self, tokens: Tensor) -> Tensor:
        """ln_post and the projection into the joint space, [..., D_v] to [..., D]."""
        return self.ln_post(tokens) @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(images))[:, 0])


class CLIP(nn.Module):
    """Plain CLIP: both towers and the similarity's scale.

    Args:
        sizes: as read off a checkpoint, or chosen for a new model (see ``initialize``).
    """

    def __init__(self, sizes: CLIPSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.visual = VisionTransformer(sizes)
        self.transformer = Transformer(sizes.text_width, sizes.text_layers)
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.text_width)
        self.positional_embedding = nn.Parameter(
            torch.empty(sizes.context_length, sizes.text_width)
        )
        self.ln_final = LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(torch.empty(sizes.text_width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    @torch.no_grad()
    def initialize(self) -> None:
        """Random values for training from nothing, scaled as in OpenAI's release."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.sizes.text_width**-0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        scale = self.sizes.vision_width**-0.5
        for parameter in (
            self.visual.class_embedding,
            self.visual.positional_embedding,
            self.visual.proj,
        ):
            nn.init.normal_(parameter, std=scale)
        for tower in (self.visual.transformer, self.transformer):
            width, depth = tower.resblocks[0].attn.width, len(tower.resblocks)
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.zeros_(block.attn.in_proj_bias)
                nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids [T, W] to the text tower's input, [T, W, D_t]."""
        return self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]

    def text_head(self, tokens: Tensor) -> Tensor:
        """ln_final and the projection into the joint space, [..., D_t] to [..., D]."""
        return self.ln_final(tokens) @ self.text_projection

    def encode_image(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: float [N, 3, H, W], normalised with IMAGE_MEAN and IMAGE_STD.

        Returns:
            [N, D], not normalised.
        """
        return self.visual(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Features of texts, read at each row's end-of-text token.

        Args:
            token_ids: int64 [T, W], 0-padded.

        Returns:
            [T, D], not normalised.
        """
        x = self.transformer(self.embed_tokens(token_ids), causal=True)
        return self.text_head(x[torch.arange(len(x), device=x.device), end_of_text(token_ids)])


def end_of_text(token_ids: Tensor) -> Tensor:
    """Where each row's largest id stands first: the end-of-text token. [T, W] to int64 [T]."""
    return token_ids.argmax(dim=-1)


def weights_path(name: str, folder: Path | str) -> Path:
    """The file of a model by OpenAI's name, in a folder; anything else is a path itself."""
    return Path(folder) / WEIGHTS_FILES[name] if name in WEIGHTS_FILES else Path(name)


def read_weights(path: Path | str, trust_archive: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file, in float32.

    Args:
        path: OpenAI's TorchScript archive or a state dict saved with ``torch.save``.
        trust_archive: load a TorchScript archive that is none of OpenAI's too, which runs code
            that is in it. Reading a state dict runs none.

    Raises:
        WeightsError: no such file, not a file of either kind, a damaged one, an archive that is not
            trusted, or values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no CLIP weights there. `bash scripts/download_clip.sh` fetches them"
        )
    try:
        state = _read_archive(path, trust_archive) if _is_torchscript(path) else load_tensors(path)
    except TorchFileError as error:
        raise WeightsError(f"{path}: {error}. If the download broke off, fetch it again") from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise WeightsError(f"{path}: not a state dict, but a {type(state).__name__}")
    state = {str(key): value for key, value in state.items() if key not in ARCHIVE_EXTRAS}
    for key, value in state.items():
        if not is_plain(value):
            raise WeightsError(f"{path}: {key!r} is not a plain tensor of floats")
        state[key] = value.float()
        if not state[key].isfinite().all():
            raise WeightsError(f"{path}: {key!r} has values that are not finite")
    return state


def build_clip(weights: Path | str | Mapping[str, Tensor], trust_archive: bool = False) -> CLIP:
    """A CLIP with all of the given weights, in evaluation mode.

    Args:
        weights: a file or its content.
        trust_archive: see ``read_weights``.

    Raises:
        WeightsError: the file cannot be read, or keys or shapes are not those of one CLIP ViT.
    """
    state, name = weights, "the state dict"
    if not isinstance(weights, Mapping):
        state, name = read_weights(weights, trust_archive), weights
    try:
        clip = CLIP(CLIPSizes.of_state_dict(state))
        clip.load_state_dict(state, strict=True)
    except (WeightsError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{name}: {error}") from error
    return clip.eval()


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives hold code beside the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # whatever zipfile stumbles over; load_tensors says what it is
        return False


def _read_archive(path: Path, trusted: bool) -> Mapping[str, Tensor]:
    if trusted:
        check_sums(path)
    else:
        _check_published(path)
    try:
        with warnings.catch_warnings():  # deprecated, but the format OpenAI publishes
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception as error:  # torch raises whatever it stumbles over
        raise TorchFileError("it is no TorchScript archive that torch can load") from error


def _check_published(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    sha256 = digest.hexdigest()
    if sha256 not in PUBLISHED_ARCHIVES:
        raise WeightsError(
            f"{path}: a TorchScript archive, but none of OpenAI's (its sha256 is {sha256}). "
            "Loading one runs code that is in it: fetch OpenAI's with `bash "
            "scripts/download_clip.sh`, or, if you trust this one, add --trust_clip_archive 1"
        )
