"""The model against the authors' program: every array of tests/golden/ that concerns it.

Weights come in through the authors' checkpoint format, so its reading is tested along.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modules.losses import video_text_loss
from modules.similarity import event_scores
from tests.golden_model import SMALL, GoldenModel, authors_view, checksums, inputs
from utils.training.checkpoint import load_checkpoint
from utils.training.engine import train_step
from utils.training.optim import build_optimizer, learning_rate, set_learning_rate
from utils.training.progress import Progress


@pytest.fixture(scope="module", params=[*SMALL, "small224"])
def case(request, tmp_path_factory) -> tuple[GoldenModel, torch.nn.Module]:
    return load(request.param, tmp_path_factory.mktemp("authors"))


def load(name: str, folder, dtype: torch.dtype = torch.float64):
    golden = GoldenModel.read(name)
    model = golden.build()
    path = golden.write_authors_checkpoint(folder / f"{name}.pth.tar")
    assert load_checkpoint(path, model) == Progress(epoch=10)
    return golden, model.to(dtype).eval()


def gradients(model) -> dict:
    return authors_view((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)


def close(ours, theirs, tolerance: float) -> None:
    ours = ours.detach().numpy() if torch.is_tensor(ours) else ours
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_pyramid(case) -> None:
    golden, model = case
    assert model.pyramid.events_per_level[::-1] == golden["level_event_cnts"].tolist()
    assert (model.visibility.numpy() == golden["attention_allowed"].astype(bool)).all()
    assert (model.pyramid.proposals.numpy() == golden["proposals"]).all()


def test_embeddings_scores_and_best_moments(case) -> None:
    golden, model = case
    with torch.no_grad():
        events = model.encode_video(golden.video())
        texts = model.encode_text(golden.token_ids())
        logits = model.scores(texts, events)
        model.float()
        close(model.encode_video(golden.video(torch.float32)), golden["event_f32"], 1e-5)
        close(model.encode_text(golden.token_ids()), golden["text_f32"], 1e-5)
        model.double()
    close(events, golden["event_f64"], 1e-12)
    close(texts, golden["text_f64"], 1e-12)
    close(logits, golden["logits_train_f64"], 1e-11)
    cosines = event_scores(texts, events)
    as_evaluated = golden.config.get("datatype") != "activity"
    per_event = cosines if as_evaluated else event_scores(texts, events, normalize_events=False)
    close(per_event, golden["scores_eval_f64"], 1e-11)
    scale = model.clip.logit_scale.exp()
    close(per_event.amax(-1) * scale, golden["logits_eval_f64"], 1e-10)
    best, index = cosines.topk(5, dim=-1)
    close(best, golden["vcmr_scores_f32"], 1e-5)
    ours = model.pyramid.proposals[index].numpy()
    assert (ours == golden["vcmr_props_f32"]).all(), "another order of the best events"


def test_attention_weights(case) -> None:
    golden, model = case
    if "attention_weights" not in golden:
        pytest.skip("not stored for this model")
    with torch.no_grad():
        embeddings, attention = model.encode_video(golden.video(), return_attention=True)
        plain = model.encode_video(golden.video())
    close(attention, golden["attention_weights"], 5e-7)
    assert torch.equal(embeddings, plain)


def test_loss_and_gradients(case) -> None:
    golden, model = case
    labels = torch.from_numpy(golden["labels"])
    model.zero_grad()
    scores = model(golden.video(), golden.token_ids())
    loss = video_text_loss(scores, labels)
    loss.backward()
    close(loss, golden["losses_f64"][0], 1e-12)
    if "labels_mixed" in golden:
        mixed = video_text_loss(scores, torch.from_numpy(golden["labels_mixed"]))
        close(mixed, golden["losses_mixed_f64"][0], 1e-12)

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert {n for n, p in named if p.grad is None} == model.unreachable_parameters()
    trained = {n for n, p in authors_view(model.named_parameters()).items() if p.requires_grad}
    assert trained == set(golden["trainable"])
    ours = gradients(model)
    for row, name in enumerate(golden["grad_names"]):
        gradient = ours[name]
        if gradient is None:  # nothing computes it, where the authors compute an exact zero
            assert (golden["grad_checksums_f64"][row] == 0).all(), name
            continue
        sums = golden["grad_checksums_f64"][row]
        close(checksums(name, gradient.numpy()), sums, 1e-10 * max(1, sums[1]))
        if f"grad/{name}" in golden:  # stored in float32
            stored = golden[f"grad/{name}"]
            close(gradient, stored, 5e-7 * max(1, np.abs(stored).max()))


@pytest.mark.parametrize("name", SMALL)
def test_twelve_training_steps(name: str, tmp_path) -> None:
    """Loss and gradient norm of each step of a short run, parameters after some of them."""
    golden, model = load(name, tmp_path)
    settings = golden.config["train"]
    optimizer = build_optimizer(model, settings["lr"], settings["coef_lr"], settings["wd"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    _, *shape = golden.config["video"]
    dead = model.unreachable_parameters()
    rates = golden["traj_lr"].max(axis=1)
    for step in range(12):
        batch_number = step % 3
        rate = learning_rate(step, 12, settings["lr"])
        assert rate == pytest.approx(rates[step], rel=1e-12)
        set_learning_rate(optimizer, rate)
        batch = {
            "frames": torch.from_numpy(inputs.video(20 + batch_number, *shape)).double(),
            "token_ids": golden.token_ids().roll(batch_number, dims=0),
            "text_to_video": torch.from_numpy(golden["labels"]),
        }
        result = train_step(model, batch, optimizer, scaler)
        assert result.loss == pytest.approx(golden["traj_loss_f64"][step], abs=1e-9)
        assert result.grad_norm == pytest.approx(golden["traj_grad_norm_f64"][step], rel=1e-9)
        if step not in (0, 5, 11):
            continue
        # the parameters that no gradient reaches decay in their program, in ours they stay
        ours = authors_view((n, p) for n, p in model.named_parameters() if n not in dead)
        for row, key in enumerate(golden["traj_names"]):
            if key in ours:
                sums = golden["traj_sums_f64"][step, row]
                found = checksums(key, ours[key].detach().numpy())
                close(found, sums, 1e-9 * max(1, sums[1]))
    for key, value in ours.items():
        if f"final/{key}" in golden:
            close(value, golden[f"final/{key}"], 5e-7)


@pytest.mark.slow
def test_vitb32(tmp_path) -> None:
    """The published size: 42 events of one video, gradients of two."""
    golden, model = load("vitb32", tmp_path, torch.float32)
    with torch.no_grad():
        close(model.encode_video(golden.video(torch.float32)), golden["event_f32"], 2e-5)
        close(model.encode_text(golden.token_ids()), golden["text_f32"], 2e-5)
    video = torch.from_numpy(inputs.video(*golden["train_video"]))
    labels = torch.from_numpy(golden["train_labels"])
    loss = video_text_loss(model(video, golden.token_ids()[: len(labels)]), labels)
    loss.backward()
    close(loss, golden["losses_f32"][0], 1e-4)
    ours = gradients(model)
    for row, name in enumerate(golden["grad_names"]):
        sums = golden["grad_checksums_f32"][row]
        if ours[name] is None:
            assert (sums == 0).all(), name
            continue
        scale = max(1e-3, sums[1])
        np.testing.assert_allclose(
            checksums(name, ours[name].numpy()), sums, rtol=2e-3, atol=1e-4 * scale
        )
