"""Training and evaluation: one epoch of steps, a corpus to embeddings, embeddings to metrics.

Both evaluations are readings of the same embeddings: videos and texts are embedded once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloaders.annotations import Query, Video
from modules.losses import video_text_loss
from modules.similarity import CHUNK, best_event_scores, paired_event_scores, top_moments
from utils.checkpoint import EpochSums
from utils.misc import autocast, peak_memory_gib
from utils.moment_report import Rows, level_report, moment_report
from utils.optim import set_learning_rate
from utils.predictions import MomentPredictions
from utils.retrieval_metrics import ranks_of, recall_metrics

# From 65536 the scaler halves its scale with every step that it skips; no sound training gets here.
SMALLEST_LOSS_SCALE = 2.0**-20


class TrainingError(RuntimeError):
    """Training cannot go on; the message names step and videos."""


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
        TrainingError: loss or gradient is not finite and no loss scaler is there to skip the step,
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


def _not_finite(what: str, value: Tensor, batch: dict) -> TrainingError:
    names = ", ".join(batch.get("vid_names", ["unknown"]))
    return TrainingError(
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
        batches: those that are left, as ``dataloaders.datasets.training_loader`` makes them.
        sums: of the epoch so far; every step is added.
        num_steps: of the whole epoch, for the progress bar.
        learning_rate: the rate before a step, by its number counted from 0 over the whole run.
        first_step: number of the epoch's first step.
        display_every: log a line every so many steps of the epoch.
        after_step: called when a step is complete and added; may end the epoch by an exception.

    Raises:
        TrainingError: a loss that is not finite, with the step's number.
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
            except TrainingError as error:
                raise TrainingError(f"step {step + 1}: {error}") from None
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


@dataclass
class Embeddings:
    """A corpus as the model sees it, in float32 on the model's device."""

    events: Tensor  # [V, N_e, D]
    texts: Tensor  # [T, D]

    def to(self, device: torch.device) -> Embeddings:
        """The same on another device."""
        return Embeddings(self.events.to(device), self.texts.to(device))


@torch.inference_mode()
def embed_corpus(
    model: nn.Module,
    videos: Collection[dict],
    texts: Sequence[dict],
    device: torch.device,
) -> Embeddings:
    """Every video and every text of a split, once each, in float32.

    The loader's workers decode the first videos while texts are encoded, and the next ones while
    videos are; on a GPU nothing in here waits for its results.

    Args:
        videos: batches {frames, indices} as ``evaluation_video_loader`` makes them, in order.
        texts: batches {token_ids, indices} of ``evaluation_text_batches``, in any order.
    """
    model.eval()
    shown = {"unit": "batch", "dynamic_ncols": True, "leave": False}
    clips = iter(videos)
    indices, features = [], []
    for batch in tqdm(texts, desc="texts", **shown):
        indices.append(batch["indices"])
        features.append(model.encode_text(batch["token_ids"].to(device)))
    in_order = torch.empty_like(torch.cat(features))
    in_order[torch.cat(indices).to(device)] = torch.cat(features)
    events = []
    for batch in tqdm(clips, desc="videos", total=len(videos), **shown):
        events.append(model.encode_video(batch["frames"].to(device, non_blocking=True)))
    return Embeddings(torch.cat(events), in_order)


def rank_videos(
    embeddings: Embeddings, target: Tensor, normalize_events: bool = True, chunk: int = CHUNK
) -> Tensor:
    """The rank of every text's video among all of the split, from 1: int64 [T] on the CPU.

    Args:
        target: int64 [T], the right video of each text.
        normalize_events: False is the authors' evaluation of ActivityNet, where longer vectors win.
        chunk: cosines there is memory for, beside the embeddings and normalised texts.
    """
    texts, events = embeddings.texts, embeddings.events
    # Half of the memory for a block's scores and the masks that they are ranked with.
    step = max(1, chunk // (4 * len(events)))
    blocks = zip(texts.split(step), target.to(texts.device).split(step), strict=True)
    return torch.cat([
        ranks_of(best_event_scores(some, events, normalize_events, chunk // 2), own)
        for some, own in blocks
    ]).cpu()  # fmt: skip


def evaluate_prvr(
    embeddings: Embeddings, target: Tensor, normalize_events: bool = True, chunk: int = CHUNK
) -> dict[str, float]:
    """Partially relevant video retrieval: recalls of `rank_videos`, whose arguments these are."""
    return recall_metrics(rank_videos(embeddings, target, normalize_events, chunk))


def predict_moments(
    embeddings: Embeddings,
    queries: Sequence[Query],
    videos: Sequence[Video],
    proposals: Tensor,
    *,
    per_video: int = 10,
    limit: int = 1000,
    chunk: int = CHUNK,
) -> MomentPredictions:
    """Weakly supervised moment retrieval: every event of the corpus is a proposed moment.

    Args:
        queries: what `embeddings.texts` are.
        videos: what `embeddings.events` are of.
        proposals: [N_e, 2] start and end of each event as a share of its video.
        per_video: moments of one video that count, the best.
        limit: moments kept of a query, the best.
        chunk: cosines there is memory for, beside the embeddings, their normalised copy and the
            result.
    """
    device = embeddings.texts.device
    column = {video.vid_name: index for index, video in enumerate(videos)}
    target = torch.tensor([column[query.vid_name] for query in queries], device=device)
    step = max(1, chunk // (4 * len(videos)))  # as in `rank_videos`
    ranked, ranks = [], []
    for texts, own in zip(embeddings.texts.split(step), target.split(step), strict=True):
        top = top_moments(texts, embeddings.events, per_video, limit, chunk // 2)
        ranks.append(ranks_of(top.video_scores, own))
        ranked.append((top.videos, top.events, top.scores))
    top_videos, top_events, top_scores = map(torch.cat, zip(*ranked, strict=True))
    return MomentPredictions(
        desc_ids=[str(query.desc_id) for query in queries],
        vid_names=list(column),
        durations=torch.tensor([video.duration for video in videos], device=device),
        proposals=proposals.to(device),
        per_video=per_video,
        videos=top_videos,
        events=top_events,
        scores=top_scores,
        target=target,
        target_rank=torch.cat(ranks),
        target_scores=paired_event_scores(embeddings.texts, embeddings.events, target, chunk),
    )


def evaluate_vcmr(
    predictions: MomentPredictions, queries: Sequence[Query], window_rule: str = "half"
) -> Rows:
    """Video corpus moment retrieval, and with it PRVR, as rows of metrics.

    Returns:
        "cosine": what `evaluate_prvr` gives; the rows of `moment_report`; "levels/…": those of
        `level_report`, if there are times.
    """
    rows = {"cosine": recall_metrics(predictions.target_rank)}
    rows |= moment_report(predictions, queries, window_rule)
    if any(query.windows for query in queries):
        levels = level_report(predictions, queries)
        rows |= {f"levels/{name}": row for name, row in levels.items()}
    return rows


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device; names stay."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for key, value in batch.items()
    }
