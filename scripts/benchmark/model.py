"""Stages of the model, against its plain definition in models/reference.py: encode_video,
encode_text, train_step. Weights are random and of the true sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models import ProPy
from models import reference as plain_propy
from models.clip import CLIP, IMAGE_MEAN, IMAGE_STD, CLIPSizes
from scripts.benchmark.harness import Options, Stage, largest_deviation, pyramid_of
from utils.misc import autocast
from utils.training.engine import train_step
from utils.training.optim import MIN_LEARNING_RATE, build_optimizer

#                  D    D_v  L  patch G  D_t  L_t  W   words
SIZES = {
    "b32": CLIPSizes(512, 768, 12, 32, 7, 512, 12, 77, 49408),
    "b16": CLIPSizes(512, 768, 12, 16, 14, 512, 12, 77, 49408),
    "l14": CLIPSizes(768, 1024, 24, 14, 16, 768, 12, 77, 49408),
    "small": CLIPSizes(64, 128, 3, 16, 2, 128, 3, 77, 512),
}
# Largest deviation, relative to the largest value: of embeddings, and of a step's gradients.
TOLERANCE = {"fp32": (1e-4, 2e-3), "bf16": (0.1, 0.5), "amp": (0.02, 0.2)}


def aims(options: Options, cpu: tuple, gpu: tuple) -> dict[str, float | None]:
    """Time and memory aimed at, which are set for the published model."""
    chosen = cpu if options.device == "cpu" else gpu
    return (
        dict(zip(("time_aim", "memory_aim"), chosen, strict=True)) if options.model == "b32" else {}
    )


def build(options: Options) -> ProPy:
    """A model with random weights, whose adapters do something; equal for equal options."""
    sizes = SIZES[options.model]
    torch.manual_seed(options.seed)
    clip = CLIP(sizes)
    clip.initialize()
    model = ProPy(clip, pyramid_of(options), checkpoint_activations=options.checkpoint_activations)
    for adapter in model.adapters:  # they start as nothing
        nn.init.normal_(adapter.conv.weight, std=0.2)
    return model.to(options.device).eval()


def draw_videos(model: ProPy, videos: int, options: Options) -> Tensor:
    """uint8 [B, N_f, 3, H, W]."""
    generator = torch.Generator().manual_seed(options.seed)
    side = model.input_resolution
    shape = (videos, options.frames, 3, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(options.device)


def draw_texts(model: ProPy, texts: int, options: Options) -> Tensor:
    """Token ids of texts of 5 tokens to `words`, padded with zeros to the longest."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    end = model.clip.sizes.vocab_size - 1
    lengths = torch.randint(5, options.words + 1, (texts,), generator=generator)
    ids = torch.randint(1, end - 1, (texts, int(lengths.max())), generator=generator)
    position = torch.arange(ids.shape[1])
    ids[:, 0] = end - 1
    ids[position == lengths[:, None] - 1] = end
    return ids.masked_fill(position >= lengths[:, None], 0).to(options.device)


def normalised(frames: Tensor) -> Tensor:
    """Frames as the plain program's loader hands them over."""
    mean, std = (torch.tensor(x, device=frames.device) for x in (IMAGE_MEAN, IMAGE_STD))
    return (frames.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def encode_video(options: Options) -> Stage:
    """Videos to event embeddings, as in an evaluation."""
    count = options.videos or 1

    def ours() -> Callable[[], Tensor]:
        model = build(options)
        if options.compile:
            model.compile_encoders()
        frames = draw_videos(model, count, options)
        return _inference(model.encode_video, frames, options)

    def reference() -> Callable[[], Tensor]:
        model = build(options)
        frames = normalised(draw_videos(model, count, options))
        return _inference(lambda x: plain_propy.encode_video(model, x)[0], frames, options)

    return Stage(
        title=f"{count} videos of {options.frames} frames",
        ours=ours,
        reference=reference,
        compare=largest_deviation,
        tolerance=TOLERANCE[options.precision][0],
        work=count,
        unit="videos",
        needed_flop=count * needed_flop(options),
        **aims(options, (1.4, None), (2.0, 0.5)),
    )


def encode_text(options: Options) -> Stage:
    """Texts to embeddings, as in an evaluation."""
    count = options.texts or 64

    def prepare(encode: Callable[[ProPy, Tensor], Tensor]) -> Callable[[], Tensor]:
        model = build(options)
        token_ids = draw_texts(model, count, options)
        return _inference(lambda x: encode(model, x), token_ids, options)

    return Stage(
        title=f"{count} texts of up to {options.words} tokens",
        ours=lambda: prepare(ProPy.encode_text),
        reference=lambda: prepare(plain_propy.encode_text),
        compare=largest_deviation,
        tolerance=TOLERANCE[options.precision][0],
        work=count,
        unit="texts",
    )


def train_batch(options: Options) -> Stage:
    """One optimizer step on videos with all their texts, CLIP frozen."""
    videos, texts = options.videos or 2, options.texts or 4

    def setting() -> tuple[ProPy, dict, torch.optim.Optimizer, torch.amp.GradScaler]:
        model = build(options)
        batch = {
            "frames": draw_videos(model, videos, options),
            "token_ids": draw_texts(model, videos * texts, options),
            "text_to_video": torch.arange(videos).repeat_interleave(texts).to(options.device),
        }
        # The rate of a run's first step; the two sides' weights cannot drift apart by it.
        optimizer = build_optimizer(model, MIN_LEARNING_RATE, 1.0, 0.2)
        scaler = torch.amp.GradScaler(options.device, enabled=options.precision == "amp")
        return model.train(), batch, optimizer, scaler

    def ours() -> Callable[[], dict]:
        model, batch, optimizer, scaler = setting()
        if options.compile:
            model.compile_encoders()

        def run() -> dict:
            step = train_step(model, batch, optimizer, scaler, precision=options.precision)
            return _step_result(model, step.loss)

        return run

    def reference() -> Callable[[], dict]:
        model, batch, optimizer, scaler = setting()
        batch["frames"] = normalised(batch["frames"])

        def run() -> dict:
            loss = plain_step(model, batch, optimizer, scaler, options.precision)
            return _step_result(model, loss)

        return run

    return Stage(
        title=f"{videos} videos of {options.frames} frames, {texts} texts each",
        ours=ours,
        reference=reference,
        compare=largest_deviation,
        tolerance=TOLERANCE[options.precision][1],
        work=videos,
        unit="videos",
        **aims(options, (1.4, 0.6), (2.0, 0.5)),
    )


def plain_step(
    model: ProPy,
    batch: dict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str,
) -> float:
    """A training step without anything clever about it; returns the loss."""
    optimizer.zero_grad()
    with autocast(batch["frames"].device, precision):
        events, _ = plain_propy.encode_video(model, batch["frames"])
        texts = plain_propy.encode_text(model, batch["token_ids"])
    scores = plain_propy.scores(model, texts.float(), events.float())
    loss = plain_propy.loss(scores, batch["text_to_video"])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    scaler.step(optimizer)
    scaler.update()
    model.clamp_logit_scale()
    return loss.item()


def needed_flop(options: Options) -> float:
    """FLOP of one video's embeddings if nothing is computed twice, or for nobody.

    Frames are projected once, in the last layer to keys and values only; a prompt's copies are one
    key; an event meets the keys it sees and no others. Norms, activations and softmax not counted.
    """
    sizes = SIZES[options.model]
    model = build(replace(options, model="small", device="cpu"))  # its pyramid and adapters
    pyramid, prompts = model.pyramid, model.num_prompts
    channels, kernel = model.adapters[0].conv.weight.shape[0], model.adapters[0].conv.kernel_size[0]
    width, frames, events = sizes.vision_width, pyramid.num_frames, pyramid.num_events
    patches, grid_tokens = frames * sizes.grid**2, sizes.grid**2 + 1
    tokens = frames * grid_tokens
    keys = pyramid.related.sum() + events * prompts + pyramid.frames_of_event.sum() * grid_tokens
    event_side = events * 12 * width**2 + 2 * width * int(keys) + prompts * 2 * width**2
    frame_side = tokens * 12 * width**2 + 2 * width * frames * grid_tokens**2
    adapter = patches * channels * (2 * width + kernel)
    layers = sizes.vision_layers
    total = patches * 3 * sizes.patch_size**2 * width + events * width * sizes.embed_dim
    total += layers * event_side + (layers - 1) * frame_side + tokens * 2 * width**2
    total += min(len(_adapters(layers)), layers - 1) * adapter
    return 2.0 * total


def _adapters(layers: int) -> range:
    return range(min(12, layers))  # adapters in the first 12 layers, as published


def _inference(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, options: Options
) -> Callable[[], Tensor]:
    device = torch.device(options.device)

    def run() -> Tensor:
        with torch.inference_mode(), autocast(device, options.precision):
            return encode(inputs).float()

    return run


def _step_result(model: ProPy, loss: float) -> dict[str, Any]:
    """Loss and (clipped) gradients: one tensor of all, since each counts by its size in the step.

    A gradient that the plain program computes as exact zeros is absent in ours.
    """
    dead = model.unreachable_parameters()
    gradients = [
        p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad and n not in dead
    ]
    return {"loss": torch.tensor(loss), "gradients": gradients}
