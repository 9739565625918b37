"""Training and evaluation: one epoch of steps, a corpus to embeddings, embeddings to metrics.

Both evaluations are readings of the same embeddings: videos and texts are embedded once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modules.losses import video_text_loss
from utils import RunError
from utils.misc import autocast, peak_memory_gib, to_device
from utils.training.optim import set_learning_rate
from utils.training.progress import EpochSums

# From 65536 the scaler halves its scale with every step that it skips; no sound training gets here.
SMALLEST_LOSS_SCALE = 2.0**-20


@dataclass
class StepResult:
    """What one optimizer step did."""

    loss: float
    grad_norm: float  # before clipping
    skipped: bool  # by the loss scaler, because a gradient was not finite


def train_step(
    model: nn.Module,
    batch: dict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    precision: str = "fp32",
    parts: int = 1,
    clip_grad_norm: float = 1.0,
) -> StepResult:
    """One optimizer step on one batch of videos with all their captions.

    Args:
        batch: {frames [B,N_f,3,H,W], token_ids [T,W], text_to_video [T]} on the model's device.
        precision: of the forward; similarity and loss are float32 in any case.
        parts: compute the batch in so many parts, to save memory. The result is that of the whole
            batch, negatives included: see ``_backward_in_parts``.
        clip_grad_norm: largest norm of the gradient after unscaling.

    Raises:
        RunError: loss or gradient is not finite and no loss scaler is there to skip the step,
            or it has skipped so many that it never will find a scale. The weights are as before.
    """
    optimizer.zero_grad(set_to_none=True)
    if parts == 1:
        with autocast(batch["frames"].device, precision):
            events = model.encode_video(batch["frames"])
            texts = model.encode_text(batch["token_ids"])
        loss = video_text_loss(model.scores(texts, events), batch["text_to_video"])
        scaler.scale(loss).backward()
    else:
        loss = _backward_in_parts(model, batch, scaler, precision, parts)
    if not scaler.is_enabled() and not loss.isfinite():
        raise _not_finite("loss", loss, batch)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.grad is not None], clip_grad_norm
    )
    if not scaler.is_enabled() and not grad_norm.isfinite():
        raise _not_finite("gradient's norm", grad_norm, batch)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    model.clamp_logit_scale()
    skipped = scaler.get_scale() < scale
    if skipped and scaler.get_scale() < SMALLEST_LOSS_SCALE:
        raise _not_finite("loss or gradient", loss, batch)
    return StepResult(loss.item(), grad_norm.item(), skipped)


def _not_finite(what: str, value: Tensor, batch: dict) -> RunError:
    names = ", ".join(batch.get("vid_names", ["unknown"]))
    return RunError(
        f"the {what} is not finite ({value.item()}) on the batch of videos {names}. Try a lower "
        "--lr or another --precision"
    )


def _backward_in_parts(
    model: nn.Module, batch: dict, scaler: torch.amp.GradScaler, precision: str, parts: int
) -> Tensor:
    """Gradients of the whole batch's loss, holding the activations of one part at a time.

    Adding up the losses of small batches would be another loss: a text would meet only the videos
    of its own part. Instead (Gao et al., 2021, "GradCache") all embeddings are computed without
    their graphs, the loss gives each its gradient, and every part is encoded once more to pass
    that on. A third more work, the same numbers.
    """
    sides = ((model.encode_video, batch["frames"]), (model.encode_text, batch["token_ids"]))
    device = batch["frames"].device
    embeddings = []
    for encode, inputs in sides:
        with torch.no_grad(), autocast(device, precision):
            embeddings.append(torch.cat([encode(part) for part in inputs.chunk(parts)]))
    events, texts = (x.requires_grad_() for x in embeddings)
    loss = video_text_loss(model.scores(texts, events), batch["text_to_video"])
    scaler.scale(loss).backward()
    for (encode, inputs), whole in zip(sides, (events, texts), strict=True):
        gradients = whole.grad.chunk(parts)
        for part, gradient in zip(inputs.chunk(parts), gradients, strict=True):
            with autocast(device, precision):
                embedding = encode(part)
            if embedding.requires_grad:  # texts without prompts on a frozen CLIP do not
                embedding.backward(gradient)
    return loss.detach()


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    sums: EpochSums,
    *,
    num_steps: int,
    learning_rate: Callable[[int], float],
    first_step: int,
    device: torch.device,
    log: logging.Logger,
    precision: str = "fp32",
    parts: int = 1,
    clip_grad_norm: float = 1.0,
    display_every: int = 50,
    after_step: Callable[[StepResult], None] = lambda _: None,
) -> None:
    """The batches of one epoch, from where `sums` says that it stands.

    Args:
        batches: those that are left, as ``TrainingLoader`` gives them.
        sums: of the epoch so far; every step is added.
        num_steps: of the whole epoch, for the progress bar.
        learning_rate: the rate before a step, by its number counted from 0 over the whole run.
        first_step: number of the epoch's first step.
        display_every: log a line every so many steps of the epoch.
        after_step: called when a step is complete and added; may end the epoch by an exception.

    Raises:
        RunError: a loss that is not finite, with the step's number.
    """
    model.train()
    started = time.perf_counter()
    with tqdm(
        batches, "train", num_steps, initial=sums.steps, unit="step", dynamic_ncols=True,
        leave=False,
    ) as progress:  # fmt: skip
        for batch in progress:
            batch = to_device(batch, device)
            loaded = time.perf_counter()
            step = first_step + sums.steps
            rate = learning_rate(step)
            set_learning_rate(optimizer, rate)
            try:
                result = train_step(
                    model,
                    batch,
                    optimizer,
                    scaler,
                    precision=precision,
                    parts=parts,
                    clip_grad_norm=clip_grad_norm,
                )
            except RunError as error:
                raise RunError(f"step {step + 1}: {error}") from None
            done = time.perf_counter()
            sums.add(result.loss, result.grad_norm, result.skipped, loaded - started, done - loaded)
            shown = {
                "loss": f"{result.loss:.3f}",
                "lr": f"{rate:.1e}",
                "data": f"{sums.data_time / sums.steps:.2f}s",
                "step": f"{sums.step_time / sums.steps:.2f}s",
                "mem": f"{peak_memory_gib(device):.1f}GiB",
            }
            progress.set_postfix(shown)
            if sums.steps % display_every == 0:
                values = "  ".join(f"{k} {v}" for k, v in shown.items())
                log.info("step %d  %s", step + 1, values)
            after_step(result)
            started = time.perf_counter()
