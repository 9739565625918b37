"""Stages of the model beside its literal definition, models/reference.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import ProPy, ProPyConfig, reference
from models.clip import CLIP, IMAGE_MEAN, IMAGE_STD, CLIPSizes
from modules.pyramid import PromptPyramid
from scripts.benchmark.harness import Options
from utils.misc import autocast
from utils.training.engine import train_step
from utils.training.optim import MIN_LEARNING_RATE, build_optimizer

Run = Callable[[], dict[str, Tensor]]
#                  D    D_v  L  patch G  D_t  L_t  W   words
SIZES = {
    "b32": CLIPSizes(512, 768, 12, 32, 7, 512, 12, 77, 49408),
    "b16": CLIPSizes(512, 768, 12, 16, 14, 512, 12, 77, 49408),
    "l14": CLIPSizes(768, 1024, 24, 14, 16, 768, 12, 77, 49408),
    "small": CLIPSizes(64, 128, 3, 16, 2, 128, 3, 77, 512),
}


def pyramid_of(frames: int) -> PromptPyramid:
    """Each level halves the one below, all but the lowest with events that overlap by half.

    32 frames give scripts/pyramids/cfg_32.json.
    """
    levels = frames.bit_length() - 1
    return PromptPyramid.from_config({"Nf": frames, "offset": [0] + [1] * (levels - 1)})


def build(options: Options) -> ProPy:
    """A model with random weights, whose adapters do something; equal for equal options."""
    torch.manual_seed(0)
    clip = CLIP(SIZES[options.model])
    clip.initialize()
    checkpoint = bool(options.checkpoint_activations)
    config = ProPyConfig(pyramid=pyramid_of(options.frames).config)
    model = ProPy(clip, config, checkpoint_activations=checkpoint)
    for adapter in model.adapters:  # they start as nothing
        nn.init.normal_(adapter.conv.weight, std=0.2)
    return model.to(options.device).eval()


def draw_videos(model: ProPy, options: Options) -> Tensor:
    """uint8 [B, N_f, 3, H, W]."""
    shape = (options.videos, options.frames, 3, model.input_resolution, model.input_resolution)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(options.device)


def draw_texts(model: ProPy, texts: int, options: Options) -> Tensor:
    """Token ids [T, W] of texts of 5 tokens to `words`, padded with zeros to the longest."""
    generator = torch.Generator().manual_seed(1)
    end = model.clip.sizes.vocab_size - 1
    shortest = min(5, options.words)
    lengths = torch.randint(shortest, options.words + 1, (texts, 1), generator=generator)
    ids = torch.randint(1, end - 1, (texts, int(lengths.max())), generator=generator)
    position = torch.arange(ids.shape[1])
    ids[:, 0] = end - 1
    ids[position == lengths - 1] = end
    return ids.masked_fill(position >= lengths, 0).to(options.device)


def normalized(frames: Tensor) -> Tensor:
    """Frames as a plain program's loader hands them over."""
    mean, std = (torch.tensor(x, device=frames.device) for x in (IMAGE_MEAN, IMAGE_STD))
    return (frames.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def encode_video(options: Options, ours: bool) -> Run:
    """Videos to event embeddings, as in an evaluation."""
    model = build(options).requires_grad_(False)
    frames = draw_videos(model, options)
    if ours:
        return _encoder(model.encode_video, frames, options)
    return _encoder(lambda x: reference.encode_video(model, x)[0], normalized(frames), options)


def encode_text(options: Options, ours: bool) -> Run:
    """Texts to embeddings, as in an evaluation."""
    model = build(options).requires_grad_(False)
    encode = model.encode_text if ours else lambda x: reference.encode_text(model, x)
    return _encoder(encode, draw_texts(model, options.texts, options), options)


def _encoder(encode: Callable[[Tensor], Tensor], inputs: Tensor, options: Options) -> Run:
    def run() -> dict[str, Tensor]:
        with torch.inference_mode(), autocast(inputs.device, options.precision):
            return {"embeddings": encode(inputs)}

    return run


def train(options: Options, ours: bool) -> Run:
    """One optimizer step on videos with all their texts, CLIP frozen: loss, clipped gradients."""
    model = build(options).train()
    frames = draw_videos(model, options)
    own_video = torch.arange(options.videos).repeat_interleave(options.texts)
    batch = {
        "frames": frames if ours else normalized(frames),
        "token_ids": draw_texts(model, len(own_video), options),
        "text_to_video": own_video.to(options.device),
    }
    # The rate of a run's first step; the two sides' weights cannot drift apart by it.
    optimizer = build_optimizer(model, MIN_LEARNING_RATE, 1.0, 0.2)
    scaler = torch.amp.GradScaler(options.device, enabled=options.precision == "amp")
    # A gradient that the plain program computes as exact zeros is absent in ours.
    dead = model.unreachable_parameters()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in dead}
    step = _our_step if ours else _plain_step

    def run() -> dict[str, Tensor]:
        loss = step(model, batch, optimizer, scaler, options.precision)
        return {"loss": torch.tensor(loss)} | {n: p.grad for n, p in trained.items()}

    return run


def _our_step(model, batch, optimizer, scaler, precision: str) -> float:
    return train_step(model, batch, optimizer, scaler, precision=precision).loss


def _plain_step(model, batch, optimizer, scaler, precision: str) -> float:
    """A training step without anything clever about it."""
    optimizer.zero_grad()
    with autocast(batch["frames"].device, precision):
        events, _ = reference.encode_video(model, batch["frames"])
        texts = reference.encode_text(model, batch["token_ids"])
    scores = reference.scores(model, texts.float(), events.float())
    loss = reference.loss(scores, batch["text_to_video"])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    scaler.step(optimizer)
    scaler.update()
    model.clamp_logit_scale()
    return loss.item()
