"""Training: one step for everything, and one epoch of steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modules.losses import (
    hardest_negative_loss,
    reversed_negative_loss,
    text_relation_loss,
    video_text_loss,
)
from utils import RunError
from utils.distributed import gather, gather_rows, is_main, rank, shares, sum_gradients
from utils.misc import autocast, peak_memory_gib, to_device
from utils.training.optim import set_learning_rate
from utils.training.progress import EpochSums, StepResult

logger = logging.getLogger("propy.engine")

LOG_EVERY = 50  # steps
SKIPPED_TO_WARN = 5  # steps of an epoch, all of them; finding a scale takes the first few
# From 65536 the scaler halves its scale with every step that it skips; no sound training gets here.
SMALLEST_LOSS_SCALE = 2.0**-20


@dataclass(frozen=True)
class LossWeights:
    """The terms besides `video_text_loss`, see modules.losses; 0 is without."""

    hard_negatives: float = 0.0
    text_relations: float = 0.0
    reversed_negatives: float = 0.0
    reversed_share: float = 0.5  # of the videos of a step, which are embedded backwards too


PUBLISHED_LOSS = LossWeights()


@dataclass(frozen=True)
class TrainConfig(LossWeights):
    """How a run trains; the fields are main.py's flags of the same names, which explain them."""

    epochs: int = 10
    lr: float = 8e-4
    coef_lr: float = 1e-3
    wd: float = 0.2
    clip_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    precision: str = "fp32"
    save_every_steps: int = 0


def train_step(
    model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    *, precision: str = "fp32", micro_batches: int = 1, clip_grad_norm: float = 1.0,
    weights: LossWeights = PUBLISHED_LOSS,
) -> StepResult:  # fmt: skip
    """One optimizer step on one batch of videos with all their captions.

    Args:
        batch: {frames [B,N_f,3,H,W], token_ids [T,W], text_to_video [T]} on the model's device.
        precision: of the forward; similarity and loss are float32 in any case.
        micro_batches: see `batch_gradient`.
        clip_grad_norm: largest norm of the gradient after unscaling.
        weights: of the loss's terms.

    Raises:
        RunError: loss or gradient is not finite and no loss scaler is there to skip the step, or
            it has skipped so many that it never will find a scale. The weights are as before.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, by_level = batch_gradient(model, batch, scaler, precision, micro_batches, weights)
    if not scaler.is_enabled() and not loss.isfinite():
        raise _not_finite("loss", loss, batch)
    scaler.unscale_(optimizer)
    reached = [p for p in model.parameters() if p.grad is not None]
    grad_norm = nn.utils.clip_grad_norm_(reached, clip_grad_norm)
    if not scaler.is_enabled() and not grad_norm.isfinite():
        raise _not_finite("gradient's norm", grad_norm, batch)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    model.clamp_logit_scale()
    skipped = scaler.get_scale() < scale
    if skipped and scaler.get_scale() < SMALLEST_LOSS_SCALE:
        raise _not_finite("loss or gradient", loss, batch)
    return StepResult(loss.item(), grad_norm.item(), skipped, by_level.tolist())


def batch_gradient(
    model: nn.Module, batch: dict, scaler: torch.amp.GradScaler, precision: str,
    micro_batches: int, weights: LossWeights = PUBLISHED_LOSS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of the whole batch's loss, scaled, into the parameters; returns the loss and
    the levels' shares of its gradient in the events of this process's videos.

    Own rows are embedded, those of all processes gathered, the loss is that of all; its gradient of
    the own rows continues into the network. With several micro-batches only one of them holds its
    activations at a time (Gao et al., 2021, "GradCache"): all are embedded without a graph first,
    and each once more for its gradient. A third more work, the same numbers, where adding up the
    losses of small batches would be another loss: a text would meet those of its own batch only.
    """
    frames, token_ids = batch["frames"], batch["token_ids"]

    def embed(encode: Callable, inputs: Tensor) -> Tensor:
        with autocast(frames.device, precision):
            return encode(inputs)

    videos, text_rows = shares(len(batch.get("vid_names", frames))), shares(len(token_ids))
    turned, own_videos = _reversed_videos(videos[-1].stop, weights), videos[rank()]
    if own_turned := [v - own_videos.start for v in turned if v in own_videos]:
        frames = torch.cat([frames, frames[own_turned].flip(1)])
    own_texts = token_ids[text_rows[rank()].start : text_rows[rank()].stop]
    sides = [
        (model.encode_video, frames.chunk(micro_batches)),
        (model.encode_text, own_texts.chunk(micro_batches)),
    ]
    with torch.set_grad_enabled(micro_batches == 1):
        embedded = [[embed(encode, rows) for rows in inputs] for encode, inputs in sides]
    own = [torch.cat(rows).detach().requires_grad_() for rows in embedded]
    forwards, backwards = own[0].split([len(own_videos), len(own_turned)])
    events = gather_rows(forwards, [len(v) for v in videos])
    if turned:
        backwards = gather_rows(backwards, [len(set(v) & set(turned)) for v in videos])
    texts = gather_rows(own[1], [len(t) for t in text_rows])
    frozen = None
    if weights.text_relations:
        with torch.no_grad():
            frozen = torch.cat([embed(model.clip.encode_text, rows) for rows in sides[1][1]])
        frozen = gather(frozen, len(token_ids))
    loss = _loss(model, batch["text_to_video"], events, texts, weights, turned, backwards, frozen)
    scaler.scale(loss).backward()
    by_level = level_shares(own[0].grad, model.pyramid.events_per_level)
    if not is_main():  # the whole loss's own gradients, of a trained logit scale, count once
        model.zero_grad(set_to_none=True)
    for (encode, inputs), embeddings, whole in zip(sides, embedded, own, strict=True):
        gradients = whole.grad.chunk(micro_batches)
        for rows, embedding, gradient in zip(inputs, embeddings, gradients, strict=True):
            if micro_batches > 1:
                embedding = embed(encode, rows)
            if embedding.requires_grad:  # texts without prompts on a frozen CLIP do not
                embedding.backward(gradient)
    sum_gradients(model)
    return loss.detach(), by_level


def level_shares(gradient: Tensor, events_per_level: Sequence[int]) -> Tensor:
    """How much of a loss's gradient each level of the pyramid gets: the norms of its events'
    gradients, as shares of those of all events. A level whose events never win a maximum gets 0.

    Args:
        gradient: [B, N_e, D], top level first.
        events_per_level: bottom level first.

    Returns:
        [number of levels], bottom level first.
    """
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    levels = gradient.norm(dim=2).sum(0).split(list(events_per_level[::-1]))
    norms = torch.stack([level.sum() for level in reversed(levels)])
    return norms / norms.sum().clamp(min=torch.finfo(norms.dtype).tiny)


def _reversed_videos(num_videos: int, weights: LossWeights) -> list[int]:
    """Those of a batch that are embedded backwards too, spread evenly; batches are shuffled."""
    if not weights.reversed_negatives:
        return []
    count = max(1, round(weights.reversed_share * num_videos))
    return [i * num_videos // count for i in range(count)]


def _loss(
    model: nn.Module, text_to_video: Tensor, events: Tensor, texts: Tensor, weights: LossWeights,
    turned: list[int], backwards: Tensor, frozen: Tensor | None,
) -> Tensor:  # fmt: skip
    """The whole batch's; `backwards` are the events of the videos `turned`, `frozen` CLIP's own
    text features."""
    scores = model.scores(texts, events)
    loss = video_text_loss(scores, text_to_video)
    if weights.hard_negatives:
        cosines = scores / model.clip.logit_scale.exp()
        loss = loss + weights.hard_negatives * hardest_negative_loss(cosines, text_to_video)
    if turned:
        position = {video: i for i, video in enumerate(turned)}
        own = [(t, v, position[v]) for t, v in enumerate(text_to_video.tolist()) if v in position]
        text, video, column = torch.tensor(own, device=scores.device).T
        pairs = scores[text, video], model.scores(texts, backwards)[text, column]
        loss = loss + weights.reversed_negatives * reversed_negative_loss(*pairs)
    if frozen is not None:
        loss = loss + weights.text_relations * text_relation_loss(texts, frozen)
    return loss


def _not_finite(what: str, value: Tensor, batch: dict) -> RunError:
    names = ", ".join(batch.get("vid_names", ["unknown"]))
    return RunError(
        f"the {what} is not finite ({value.item()}) on the batch of videos {names}. Try a lower "
        "--lr or another --precision"
    )


def train_one_epoch(
    model: nn.Module, batches: Iterable[dict], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, sums: EpochSums, config: TrainConfig,
    *, num_steps: int, learning_rate: Callable[[int], float], first_step: int,
    device: torch.device, after_step: Callable[[StepResult], None] = lambda _: None,
) -> None:  # fmt: skip
    """The batches of one epoch that are left, from where `sums` says that it stands.

    Args:
        sums: of the epoch so far; every step is added.
        num_steps: of the whole epoch.
        learning_rate: the rate before a step, by its number counted from 0 over the whole run.
        first_step: number of the epoch's first step.
        after_step: called when a step is complete and added; may end the epoch by an exception.

    Raises:
        RunError: a loss that is not finite, with the step's number; or the loss scaler skipped
            every step.
    """
    model.train()
    started = time.perf_counter()
    with tqdm(
        batches, "train", num_steps, initial=sums.steps, unit="step", dynamic_ncols=True,
        leave=False, disable=not is_main(),
    ) as progress:  # fmt: skip
        for batch in progress:
            batch = to_device(batch, device)
            loaded = time.perf_counter()
            step = first_step + sums.steps
            rate = learning_rate(step)
            set_learning_rate(optimizer, rate)
            model.set_progress(step / (num_steps * config.epochs))
            try:
                result = train_step(
                    model, batch, optimizer, scaler,
                    precision=config.precision, clip_grad_norm=config.clip_grad_norm,
                    micro_batches=config.gradient_accumulation_steps, weights=config,
                )  # fmt: skip
            except RunError as error:
                raise RunError(f"step {step + 1}: {error}") from None
            done = time.perf_counter()
            sums.add(result, loaded - started, done - loaded)
            if sums.skipped_steps == sums.steps == SKIPPED_TO_WARN:
                logger.warning(
                    "the loss scaler has skipped all %d steps of this epoch so far: loss or "
                    "gradient are not finite in float16, and nothing is trained. If it stays so: "
                    "--precision bf16 or fp32, or a lower --lr",
                    sums.steps,
                )
            shown = {
                "loss": f"{result.loss:.3f}",
                "lr": f"{rate:.1e}",
                "data": f"{sums.data_time / sums.steps:.2f}s",
                "step": f"{sums.step_time / sums.steps:.2f}s",
                "mem": f"{peak_memory_gib(device):.1f}GiB",
            }
            progress.set_postfix(shown)
            if sums.steps % LOG_EVERY == 0:
                logger.info("step %d  %s", step + 1, "  ".join(map(" ".join, shown.items())))
            after_step(result)
            started = time.perf_counter()
    if sums.skipped_steps == sums.steps:
        raise RunError(
            f"the loss scaler skipped all {sums.steps} steps of the epoch, since loss or gradient "
            "were not finite in float16: nothing was trained. Use --precision bf16 or fp32, or a "
            "lower --lr"
        )
