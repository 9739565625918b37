"""An epoch of steps: what is said when the loss scaler skips them."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from tests.golden_model import GoldenModel
from utils import RunError
from utils.training import engine
from utils.training.engine import SKIPPED_TO_WARN, TrainConfig, train_one_epoch
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
