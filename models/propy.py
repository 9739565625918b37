"""ProPy: a prompt pyramid on a frozen CLIP (Pan et al., Findings of EMNLP 2025).

Symbols, here and in every module:
    B    videos                      N_f  sampled frames of a video (32)
    T    texts, all of those videos  N_e  event prompts, over all levels of the pyramid (42)
    W    tokens of a text            N_p  visual prompts per layer (4)
    L    layers (12)                 n_1  events of the bottom level (16)
    G²   patches of a frame (7×7)    D_v, D_t, D  width of vision, text, joint space
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.clip import CLIP, CLIPSettings, end_of_text
from models.clip_weights import build_clip
from modules import ModelError
from modules.adapter import TemporalAdapter
from modules.frame_groups import FrameGroups
from modules.interaction import (
    event_key_counts,
    expand_attention,
    recomputed,
    text_layer,
    video_layer,
)
from modules.lora import LoRA
from modules.prompts import PyramidPrompts
from modules.pyramid import PUBLISHED_PYRAMID, PromptPyramid
from modules.readout import AnnealedMaximum, ranking_name, readout_of
from modules.similarity import event_scores
from modules.transformer import QUICK_GELU

# The logit scale (before exp) stays in this range while it is trained.
MIN_LOGIT_SCALE, MAX_LOGIT_SCALE = 0.1, 4.6052
TEXT_PROMPTS = ("projected", "none")


@dataclass(frozen=True)
class ProPyConfig:
    """Everything that makes the network besides its weights; every checkpoint holds it.

    The defaults are the published setting. A checkpoint is refused by a model that differs in a
    field that is not among `NOT_COMPARED`.
    """

    # As `PromptPyramid.config` gives it: {"Nf": N_f, "H": [[window, stride], …]}.
    pyramid: Mapping = field(default_factory=lambda: dict(PUBLISHED_PYRAMID))
    num_prompts: int = 4  # N_p
    adapter_channels: int = 384  # C of the temporal adapters
    adapter_kernel: int = 5  # k of the temporal adapters, in frames
    num_adapter_layers: int = 12  # the first so many layers have an adapter
    visibility: str = "relatives"  # which events an event sees, of modules.pyramid.VISIBILITIES
    text_prompts: str = "projected"  # from the visual ones; or none
    lora_rank: int = 0  # r of low-rank adaptation of both towers' q, k and v; 0: without
    frame_groups: str = ""  # "2,4": frames attend in groups in the last blocks that use them
    frame_embedding: int = 0  # 1: a learned vector a frame
    readout: str = "max"  # of a video's score in training, see modules.readout
    rank_readout: str | None = None  # of its score in ranking; None: what suits the other
    max_words: int = 32  # tokens of a caption that training reads, start and end included
    clip_name: str = "ViT-B/32"  # OpenAI's or open_clip's name, or the file of the weights
    # What no tensor of CLIP shows, see `models.clip.CLIPSettings`.
    clip_activation: str = QUICK_GELU
    clip_head_widths: tuple[int, int] = CLIPSettings.head_widths
    clip_image_mean: tuple[float, float, float] = CLIPSettings.image_mean
    clip_image_std: tuple[float, float, float] = CLIPSettings.image_std
    clip_seconds: float | None = None  # mean length of the training videos, if it is known


# The pyramid is compared by its events, max_words and rank_readout with a warning; the others
# describe, no more.
NOT_COMPARED = {"pyramid", "max_words", "rank_readout", "clip_name", "clip_seconds"}


class ProPy(nn.Module):
    """Videos and sentences into one space, an embedding per event of the pyramid.

    Args:
        clip: the backbone.
        config: the rest of the network.
        freeze_clip: train the prompts, their projections and the adapters only.
        checkpoint_activations: in training keep each layer's inputs only, and compute the rest
            again for the gradient: the same numbers, less memory, a third more work.

    Raises:
        ModelError: more text than visual layers, a setting out of range, no pyramid, or other
            settings of the backbone than it has.
    """

    def __init__(
        self, clip: CLIP, config: ProPyConfig, freeze_clip: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = clip.sizes
        _check(clip, config)
        adapters = min(config.num_adapter_layers, sizes.vision_layers)
        ranking = ranking_name(config.readout, config.rank_readout)
        self.config = config = replace(config, num_adapter_layers=adapters, rank_readout=ranking)
        self.clip = clip.requires_grad_(not freeze_clip)
        self.pyramid = pyramid = PromptPyramid.from_config(config.pyramid)
        self.num_prompts = config.num_prompts
        self.training_readout = readout_of(config.readout, pyramid)
        self.readout = readout_of(ranking, pyramid)
        self.checkpoint_activations = checkpoint_activations
        self.prompts = PyramidPrompts(
            pyramid.num_events, config.num_prompts, sizes.vision_layers, sizes.vision_width,
            sizes.text_width, sizes.patch_size, config.text_prompts == "projected",
        )  # fmt: skip
        self.adapters = nn.ModuleList(
            TemporalAdapter(sizes.vision_width, config.adapter_channels, config.adapter_kernel)
            for _ in range(adapters)
        )
        self.vision_lora = _loras(config.lora_rank, sizes.vision_width, sizes.vision_layers)
        self.text_lora = _loras(config.lora_rank, sizes.text_width, sizes.text_layers)
        groups = _group_sizes(config.frame_groups, pyramid.num_frames, sizes.vision_layers - 1)
        self.frame_groups = nn.ModuleList(map(FrameGroups, groups))
        self.frame_embedding = None
        if config.frame_embedding:
            embedding = torch.zeros(pyramid.num_frames, sizes.vision_width)
            self.frame_embedding = nn.Parameter(embedding)
        seen = (self.num_prompts, sizes.grid**2 + 1, config.visibility)
        self.register_buffer("visibility", pyramid.visibility(*seen), persistent=False)
        self.register_buffer("event_key_counts", event_key_counts(pyramid, *seen), persistent=False)

    def backbone_names(self) -> set[str]:
        """Names of the parameters that are CLIP's: what freezing, the optimizer's groups, and
        checkpoints ask, instead of matching names."""
        return {f"clip.{name}" for name, _ in self.clip.named_parameters()}

    @property
    def input_resolution(self) -> int:
        """Side of the square frames, in pixels."""
        return self.clip.sizes.input_resolution

    @property
    def num_heads(self) -> int:
        """Attention heads of a visual layer."""
        return self.clip.visual.transformer.resblocks[0].attn.num_heads

    def encode_video(
        self, frames: Tensor, return_attention: bool = False, head: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Event embeddings of videos (§3.2, §3.3).

        Args:
            frames: [B, N_f, 3, H, W], uint8, or float and normalised with CLIP's mean and std.
            return_attention: also what every event attends to, averaged over heads.
            head: of this head instead, counted from 0.

        Returns:
            [B, N_e, D], not normalised; with attention also [L, B, N_e, keys], with the columns of
            ``visibility``.

        Raises:
            ValueError: another number or size of frames than the model's, or no such head.
        """
        side = self.input_resolution
        expected = (self.pyramid.num_frames, 3, side, side)
        if tuple(frames.shape[1:]) != expected:
            raise ValueError(f"frames are [B, {expected}], not {list(frames.shape)}")
        if head is not None and not 0 <= head < self.num_heads:
            raise ValueError(f"head {head} of {self.num_heads}")
        visual, prompts = self.clip.visual, self.prompts
        added = self.frame_embedding
        added = None if added is None else added.repeat(len(frames), 1)
        x = visual.embed(self.clip.normalize(frames).flatten(0, 1), added)  # [B·N_f, 1+G², D_v]
        events = prompts.event_prompts.expand(len(frames), -1, -1)  # [B, N_e, D_v]
        blocks = visual.transformer.resblocks
        bias = self.event_key_counts.double().log()
        attention, last = [], len(blocks) - 1  # the last layer's frames reach no one
        for layer, block in enumerate(blocks):
            adapter = _at(self.adapters, layer)
            x, events, weights = self._layer(
                video_layer, block, adapter, x, events, prompts.visual_prompts[layer], bias,
                last=layer == last, lora=_at(self.vision_lora, layer),
                groups=_at(self.frame_groups, layer - (last - len(self.frame_groups))),
                return_attention=return_attention, head=head,
            )  # fmt: skip
            if return_attention:
                attention.append(expand_attention(weights, self.pyramid, self.num_prompts))
        embeddings = visual.head(events)
        return (embeddings, torch.stack(attention)) if return_attention else embeddings

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Text embeddings (§3.4), read at each row's end-of-text token: [T, D], not normalised.

        Args:
            token_ids: int64 [T, W], 0-padded; W is at most CLIP's context length.
        """
        x = self.clip.embed_tokens(token_ids)  # [T, W, D_t]
        end = end_of_text(token_ids)
        prefixes = self.prompts.text_prefixes()  # [L, N_p, D_t]
        blocks = self.clip.transformer.resblocks
        for layer, block in enumerate(blocks):
            # nothing but the end-of-text token is read after the last layer
            read = end if layer == len(blocks) - 1 else None
            lora = _at(self.text_lora, layer)
            x = self._layer(text_layer, block, x, prefixes[layer], read, lora)
        return self.clip.text_head(x.squeeze(1))

    def scores(self, texts: Tensor, events: Tensor) -> Tensor:
        """What training compares of texts [T, D] and videos [B, N_e, D]: its read-out of the
        cosines × exp(logit_scale), [T, B], at least float32. ``readout`` ranks."""
        cosines = event_scores(texts, events)
        return self.training_readout(cosines) * self.clip.logit_scale.exp()

    def forward(self, frames: Tensor, token_ids: Tensor) -> Tensor:
        """Scores of every text against every video of a batch, [T, B]."""
        return self.scores(self.encode_text(token_ids), self.encode_video(frames))

    def compile_encoders(self) -> None:
        """Run both encoders through torch.compile from now on; each compiles when first called.

        Texts come in batches of many sizes, so theirs is compiled for any size.
        """
        # Layers take floats, which must stay numbers: with `checkpoint_activations` a symbol for
        # one of them, as dynamic=True makes it, ends in an error of torch's (2.11).
        torch._dynamo.config.specialize_float = True
        self.encode_video = torch.compile(self.encode_video)
        self.encode_text = torch.compile(self.encode_text, dynamic=True)

    def unreachable_parameters(self) -> set[str]:
        """Names of parameters that never get a gradient, kept for the authors' checkpoint format.

        Text postfixes stand after the token that is read, and nothing reads the last layer's frames
        beyond their keys and values, so its adapter has no effect. No visual prompts project to no
        text prompts.
        """
        dead = ("prompts.postfix_proj.", f"adapters.{self.clip.sizes.vision_layers - 1}.")
        if not self.num_prompts:
            dead += ("prompts.prefix_proj.", "prompts.visual_prompts")
        return {name for name, _ in self.named_parameters() if name.startswith(dead)}

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters: all, trained, and trained ones that a gradient can reach."""
        trained = {name: p.numel() for name, p in self.named_parameters() if p.requires_grad}
        dead = self.unreachable_parameters()
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "trainable": sum(trained.values()),
            "reached_by_gradient": sum(n for name, n in trained.items() if name not in dead),
        }

    def set_progress(self, share: float) -> None:
        """What changes in the course of training: to be called before every optimizer step, with
        the share of all steps that is done."""
        if isinstance(self.training_readout, AnnealedMaximum):
            self.training_readout.anneal(share)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logit scale in its range; to be called after every optimizer step."""
        self.clip.logit_scale.clamp_(MIN_LOGIT_SCALE, MAX_LOGIT_SCALE)

    def _layer(self, layer: Callable, *arguments: Any, **settings: Any) -> Any:
        if self.checkpoint_activations:
            return recomputed(layer, *arguments, **settings)
        return layer(*arguments, **settings)


def _check(clip: CLIP, config: ProPyConfig) -> None:
    """ModelError: a setting out of range, or not of this CLIP."""
    sizes = clip.sizes
    if sizes.text_layers > sizes.vision_layers:
        raise ModelError(
            f"this CLIP has {sizes.text_layers} text layers, but only {sizes.vision_layers} "
            "visual ones whose prompts they could take"
        )
    for name, value in clip.settings.as_fields().items():
        if value != getattr(config, name):
            raise ModelError(f"this CLIP has {name} {value}, not {getattr(config, name)}")
    if min(config.num_prompts, config.num_adapter_layers, config.lora_rank) < 0:
        raise ModelError("numbers of visual prompts, of adapter layers, a rank are 0 or more")
    if config.text_prompts not in TEXT_PROMPTS:
        raise ModelError(f"text_prompts {config.text_prompts!r} is none of {TEXT_PROMPTS}")


def _at(modules: nn.ModuleList, index: int) -> nn.Module | None:
    return modules[index] if 0 <= index < len(modules) else None


def _loras(rank: int, width: int, layers: int) -> nn.ModuleList:
    return nn.ModuleList(LoRA(width, rank) for _ in range(layers if rank else 0))


def _group_sizes(groups: str, num_frames: int, layers: int) -> list[int]:
    """The sizes in "2,4". ModelError: they are none, or do not fit the frames and layers."""
    try:
        sizes = [int(size) for size in groups.split(",") if groups]
    except ValueError:
        sizes = [0]
    if len(sizes) > layers or any(size < 2 or num_frames % size for size in sizes):
        raise ModelError(
            f"frame_groups {groups!r}: sizes from 2, as 2,4, that divide the {num_frames} frames, "
            f"for at most {layers} layers"
        )
    return sizes


def build_model(
    clip_weights: Path | str | Mapping[str, Tensor], pyramid: Path | str | Mapping,
    *, freeze_clip: bool = True, trust_archive: bool = False, checkpoint_activations: bool = False,
    **settings: Any,
) -> ProPy:  # fmt: skip
    """ProPy with the published setting as defaults, new parameters drawn from torch's generator.

    Args:
        clip_weights: a file or its state dict, see models.clip_weights.
        pyramid: a JSON file or its content (see ``PromptPyramid.from_config``).
        trust_archive: see ``models.clip_weights.read_weights``.
        settings: the other fields of `ProPyConfig`; ``clip_…`` are what the name, the file or
            its neighbours say, and ``clip_activation`` where they do not.

    Raises:
        ModelError: from the two files, or settings that do not fit them.
    """
    clip = build_clip(clip_weights, trust_archive, settings.get("clip_activation"))
    settings |= clip.settings.as_fields()
    config = ProPyConfig(pyramid=PromptPyramid.from_config(pyramid).config, **settings)
    try:
        return ProPy(clip, config, freeze_clip, checkpoint_activations)
    except ModelError as error:
        name = "the state dict" if isinstance(clip_weights, Mapping) else clip_weights
        raise ModelError(f"{name}: {error}") from None
