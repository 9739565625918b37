"""The further terms of the loss against loops over their definitions, and what they are for."""

from __future__ import annotations

import math

import pytest
import torch

import modules.losses
from modules.losses import hardest_negative_loss, reversed_negative_loss, text_relation_loss
from tests.models.test_propy import random_batch, random_model
from utils.training.engine import PUBLISHED_LOSS, LossWeights, batch_gradient

TARGET = [0, 0, 1, 2, 2, 2]


def test_hardest_negatives_are_found() -> None:
    cosines = torch.rand(6, 3, dtype=torch.float64)
    expected = 0.0
    for text, video in enumerate(TARGET):
        own = cosines[text, video]
        other_videos = max(cosines[text, v] for v in range(3) if v != video)
        other_texts = max(cosines[t, video] for t in range(6) if TARGET[t] != video)
        for hardest in (other_videos, other_texts):
            expected += max(0.0, 0.2 + hardest - own) / 6
    loss = hardest_negative_loss(cosines, torch.tensor(TARGET))
    assert loss.item() == pytest.approx(float(expected), abs=1e-12)
    apart = torch.nn.functional.one_hot(torch.tensor(TARGET), 3) * 1.0
    assert hardest_negative_loss(apart, torch.tensor(TARGET)) == 0


def test_reversed_negatives() -> None:
    forward, backward = torch.randn(2, 5, dtype=torch.float64)
    pairs = zip(forward.tolist(), backward.tolist(), strict=True)
    expected = sum(math.log(1 + math.exp(b - f)) for f, b in pairs) / 5
    assert reversed_negative_loss(forward, backward).item() == pytest.approx(expected)


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


@pytest.mark.parametrize("at_a_time", [1, 2**24])
def test_text_relations_are_distances_and_angles(monkeypatch, at_a_time: int) -> None:
    monkeypatch.setattr(modules.losses, "ANGLES", at_a_time)
    trained = torch.randn(5, 8, dtype=torch.float64).requires_grad_()
    frozen = torch.randn(5, 12, dtype=torch.float64)
    distances, angles = [], []
    for x in (trained.detach(), frozen):
        x = x / x.norm(dim=-1, keepdim=True)
        pairs = [(x[i] - x[j]).norm().item() for i in range(5) for j in range(5) if i != j]
        distances.append([d / (sum(pairs) / 20) for d in pairs])
        sides = [[(x[i] - x[j]) / (x[i] - x[j]).norm().clamp_min(1e-9) for i in range(5)]
                 for j in range(5)]  # fmt: skip
        angles.append([(a @ b).item() for corner in sides for a in corner for b in corner])
    expected = sum(huber(a - b) for a, b in zip(*distances, strict=True)) / 20
    expected += 2 * sum(huber(a - b) for a, b in zip(*angles, strict=True)) / 125
    loss = text_relation_loss(trained, frozen)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: text_relation_loss(x, frozen), trained)
    assert text_relation_loss(frozen * 2, frozen) == 0, "lengths do not matter"


def test_equal_captions_have_no_direction() -> None:
    """Their features differ by rounding only, which must not become a gradient."""
    torch.manual_seed(0)
    frozen = torch.randn(4, 8)
    trained = frozen + 0.1 * torch.randn(4, 8)
    frozen[1], trained[1] = frozen[0] + 1e-7, trained[0] - 1e-7
    trained.requires_grad_()
    text_relation_loss(trained, frozen).backward()
    assert trained.grad.abs().max() < 1
    same = torch.ones(3, 8, requires_grad=True)
    text_relation_loss(same, frozen[:3]).backward()
    assert same.grad.isfinite().all()


WEIGHTS = {
    "hard_negatives": LossWeights(hard_negatives=0.5),
    "text_relations": LossWeights(text_relations=2.0),
    "reversed_negatives": LossWeights(reversed_negatives=0.3, reversed_share=1.0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_step_adds_the_weighted_term(name: str) -> None:
    model, weights = random_model(), WEIGHTS[name]
    batch = random_batch(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses, gradients = [], []
    for used in (PUBLISHED_LOSS, weights):
        model.zero_grad()
        losses.append(batch_gradient(model, batch, scaler, "fp32", 1, used)[0].item())
        gradients.append(model.prompts.visual_prompts.grad.clone())
    with torch.no_grad():
        texts, target = model.encode_text(batch["token_ids"]), batch["text_to_video"]
        scores = model.scores(texts, model.encode_video(batch["frames"]))
        if name == "hard_negatives":
            term = hardest_negative_loss(scores / model.clip.logit_scale.exp(), target)
        elif name == "text_relations":
            term = text_relation_loss(texts, model.clip.encode_text(batch["token_ids"]))
        else:
            backward = model.scores(texts, model.encode_video(batch["frames"].flip(1)))
            own = torch.arange(len(texts)), target
            term = reversed_negative_loss(scores[own], backward[own])
    expected = losses[0] + getattr(weights, name) * term.item()
    assert term > 0 and losses[1] == pytest.approx(expected, abs=1e-10)
    assert not torch.allclose(*gradients), "the term has no gradient"
