"""Learning rate and parameter groups against the authors' program."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.golden_model import SMALL, GoldenModel, authors_view
from utils.training.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate


class WithBackbone(torch.nn.ModuleDict):
    def backbone_names(self) -> set[str]:
        return {f"clip.{name}" for name, _ in self["clip"].named_parameters()}


@pytest.mark.parametrize("total", ["12", "100", "1000", "7.5"])
def test_learning_rate_of_every_step(golden, total: str) -> None:
    with np.load(golden / "lr_schedule.npz") as file:
        expected = file[f"lr_wd_{total}"]  # [step, group, (lr, weight decay)]
    model = WithBackbone({"clip": torch.nn.Linear(1, 1), "prompts": torch.nn.Linear(1, 1)})
    optimizer = build_optimizer(model, lr=1e-3, coef_lr=1e-3, weight_decay=0.2)
    for step, groups in enumerate(expected):
        set_learning_rate(optimizer, learning_rate(step, float(total), 1e-3))
        ours = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        np.testing.assert_allclose(ours, groups, rtol=1e-12)


def test_learning_rate_is_never_below_its_floor_nor_above_its_peak() -> None:
    for proportion in (0.0, 0.1, 1.0):
        rates = [learning_rate(step, 50, 1e-3, proportion) for step in range(50)]
        assert min(rates) >= 1e-8 and max(rates) <= 1e-3, proportion


@pytest.mark.parametrize("name", SMALL)
def test_parameter_groups(name: str) -> None:
    golden = GoldenModel.read(name)
    model = golden.build()
    names = authors_view(model.named_parameters())  # in the order of our parameters
    authors_name = {id(p): n for n, p in zip(names, model.parameters(), strict=True)}
    found = {
        (g["lr_scale"], g["weight_decay"]): {authors_name[id(p)] for p in g["params"]}
        for g in parameter_groups(model, 1e-3, 0.2)
    }
    expected = {
        (group["lr_mult"], 0.2 * group["decay_mult"]): set(group["names"])
        for group in json.loads(str(golden["optim_groups"]))
        if group["names"]
    }
    assert found == expected
