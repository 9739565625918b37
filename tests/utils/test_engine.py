"""An epoch of steps: what is said when the loss scaler skips them, and levels' shares of the
gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_model
from modules.losses import video_text_loss
from tests.distributed_program import random_batch
from tests.golden_model import GoldenModel
from utils import RunError
from utils.training import engine
from utils.training.engine import SKIPPED_TO_WARN, TrainConfig, batch_gradient, train_one_epoch
from utils.training.optim import build_optimizer
from utils.training.progress import EpochSums


@pytest.mark.parametrize(
    ("taken", "steps", "warned"),
    [
        ((), 8, True),
        ((7,), 8, True),
        ((3,), 8, False),  # a scale that was found late
        ((), 2, False),
        (range(8), 8, False),
    ],
)
def test_skipped_steps_are_warned_of_and_an_epoch_of_them_is_an_error(
    monkeypatch, caplog, taken, steps: int, warned: bool
) -> None:
    model = build_model(GoldenModel.read("m3").clip_state(), {"Nf": 1, "H": [[1, 1]]})
    side, count, sums = model.input_resolution, iter(range(steps)), EpochSums()
    batch = {
        "frames": torch.zeros(2, 1, 3, side, side, dtype=torch.uint8),
        "token_ids": torch.tensor([[49406, 5, 49407], [49406, 6, 49407]]),
        "text_to_video": torch.tensor([0, 1]),
    }

    def loss(scores, text_to_video):
        return scores.diagonal().sum() * (1 if next(count) in taken else float("inf"))

    monkeypatch.setattr(engine, "video_text_loss", loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    arguments = (model, [batch] * steps, optimizer, scaler, sums, TrainConfig())
    schedule = {"num_steps": steps, "learning_rate": lambda step: 1e-3, "first_step": 0}
    before = model.prompts.event_prompts.clone()
    if taken:
        train_one_epoch(*arguments, **schedule, device=torch.device("cpu"))
    else:
        with pytest.raises(RunError, match=f"skipped all {steps} steps"):
            train_one_epoch(*arguments, **schedule, device=torch.device("cpu"))
    assert torch.equal(before, model.prompts.event_prompts) == (not taken)
    assert sums.skipped_steps == steps - len(taken)
    assert (f"skipped all {SKIPPED_TO_WARN} steps" in caplog.text) == warned


@pytest.mark.parametrize("readout", ["max", "consensus", "levels"])
def test_a_level_gets_gradient_where_the_score_asks_it(readout: str) -> None:
    """By the best events' levels for "max", in some measure always where every level is asked."""
    torch.manual_seed(0)
    model = GoldenModel.read("m3").build(readout=readout).double()
    batch = random_batch(model, torch.float64)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    _, shares = batch_gradient(model, batch, scaler, "fp32", 1)
    assert shares.sum().item() == pytest.approx(1)

    events = model.encode_video(batch["frames"]).detach().requires_grad_()
    texts = model.encode_text(batch["token_ids"]).detach()
    video_text_loss(model.scores(texts, events), batch["text_to_video"]).backward()
    levels, norms = model.pyramid.level_of_event.tolist(), [0.0] * len(shares)
    for video in events.grad:
        for level, gradient in zip(levels, video, strict=True):
            norms[level - 1] += sum(x * x for x in gradient.tolist()) ** 0.5
    assert shares.tolist() == pytest.approx([norm / sum(norms) for norm in norms])

    unit_texts, unit_events = (nn.functional.normalize(rows, dim=-1) for rows in (texts, events))
    cosines = torch.einsum("td,ved->tve", unit_texts, unit_events)
    winners = {levels[e] for e in cosines.argmax(-1).flatten().tolist()}
    rewarded = {level for level, share in enumerate(shares.tolist(), start=1) if share}
    assert rewarded == (winners if readout == "max" else set(levels))


def test_the_annealed_readout_follows_the_steps_of_all_epochs() -> None:
    model = GoldenModel.read("m3").build(readout="annealed")
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch, seen = random_batch(model, torch.float32), []
    train_one_epoch(
        model, [batch] * 2, optimizer, scaler, EpochSums(), TrainConfig(epochs=2),
        num_steps=2, learning_rate=lambda step: 1e-3, first_step=2, device=torch.device("cpu"),
        after_step=lambda _: seen.append(model.training_readout.temperature.item()),
    )  # fmt: skip
    assert seen == pytest.approx([0.5 * 0.01 ** (2 / 4), 0.5 * 0.01 ** (3 / 4)])
