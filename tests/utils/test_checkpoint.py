"""Checkpoints: a round trip, the authors' files, and everything that must be refused."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from utils.training.authors import convert_authors_state

from models import build_model
from tests.golden_model import GoldenModel
from utils import RunError
from utils.training import checkpoint
from utils.training.checkpoint import backbone_fingerprint, load_checkpoint, save_checkpoint
from utils.training.optim import ADAM_BETAS, build_optimizer
from utils.training.progress import Checkpoint, EpochSums


@pytest.fixture(scope="module")
def golden() -> GoldenModel:
    return GoldenModel.read("m3")


def trained(golden: GoldenModel, seed: int = 0, freeze_clip: bool = True):
    """A model with an optimizer that has taken a step."""
    torch.manual_seed(seed)
    config = golden.config
    model = build_model(
        golden.clip_state(),
        config["pyramid"],
        num_prompts=config["Nvp"],
        adapter_channels=config["adapter_channels"],
        adapter_kernel=config["temp_kernel_sz"],
        freeze_clip=freeze_clip,
    )
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.clamp_logit_scale()
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize("freeze_clip", [True, False])
def test_round_trip(golden, tmp_path, freeze_clip: bool) -> None:
    path = tmp_path / "ckpt.pth.tar"
    model, optimizer, scaler = trained(golden, 0, freeze_clip)
    progress = Checkpoint(3, 120, 51.5, 2, {"lr": 1e-3})
    save_checkpoint(path, model, optimizer, scaler, progress)
    other, other_optimizer, other_scaler = trained(golden, 1, freeze_clip)
    loaded = load_checkpoint(path, other, other_optimizer, other_scaler)
    assert (loaded.epoch, loaded.global_step, loaded.best_score, loaded.best_epoch) == (
        3, 120, 51.5, 2,
    )  # fmt: skip
    assert loaded.args == {"lr": 1e-3} and loaded.has_optimizer and not loaded.from_authors
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ours, theirs = other_optimizer.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert torch.equal(ours["state"][index]["exp_avg"], state["exp_avg"])
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pth.tar"], "something was left behind"


@pytest.mark.parametrize("freeze_clip", [True, False])
@pytest.mark.parametrize(("coef_lr", "weight_decay"), [(0.5, 0.05), (1.0, 0.0)])
def test_resuming_keeps_to_the_flags_of_now(
    golden, tmp_path, freeze_clip, coef_lr, weight_decay
) -> None:
    """Moments come from the file, weight decay and learning rates do not."""
    model, optimizer, scaler = trained(golden, 0, freeze_clip)
    save_checkpoint(tmp_path / "c", model, optimizer, scaler, Checkpoint(1, 3))
    rewrite(tmp_path / "c", lambda c: c["optimizer"]["param_groups"][0].update(betas=None))
    resumed = build_optimizer(model, 1e-3, coef_lr, weight_decay)
    before = [(group["lr_scale"], group["weight_decay"]) for group in resumed.param_groups]
    assert {scale for scale, _ in before} == ({1.0} if freeze_clip else {1.0, coef_lr})
    assert {decay for _, decay in before} == {weight_decay, 0.0}
    load_checkpoint(tmp_path / "c", model, resumed, scaler)
    after = [(group["lr_scale"], group["weight_decay"]) for group in resumed.param_groups]
    assert after == before
    assert all(group["betas"] == ADAM_BETAS for group in resumed.param_groups)
    for parameter, state in optimizer.state.items():
        assert torch.equal(resumed.state[parameter]["exp_avg"], state["exp_avg"])


def test_a_run_in_float32_goes_on_in_float16(golden, tmp_path) -> None:
    model, optimizer, disabled = trained(golden)
    save_checkpoint(tmp_path / "c", model, optimizer, disabled, Checkpoint(1, 3))
    enabled = torch.amp.GradScaler("cpu", enabled=True)
    load_checkpoint(tmp_path / "c", model, optimizer, enabled)
    assert enabled.state_dict()["scale"] == 2**16
    save_checkpoint(tmp_path / "c", model, optimizer, enabled, Checkpoint(1, 3))
    load_checkpoint(tmp_path / "c", model, optimizer, disabled)


def test_another_pyramid_of_as_many_events_is_refused(golden, tmp_path) -> None:
    def build(levels: list[list[int]]):
        return build_model(golden.clip_state(), {"Nf": 8, "H": levels}, adapter_channels=16)

    model, other = build([[2, 2], [2, 1], [3, 1]]), build([[2, 1], [7, 1]])
    assert model.pyramid.num_events == other.pyramid.num_events == 8
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    save_checkpoint(tmp_path / "c", model, optimizer, torch.amp.GradScaler("cpu"), Checkpoint())
    load_checkpoint(tmp_path / "c", model)
    with pytest.raises(RunError, match="c: trained with another pyramid"):
        load_checkpoint(tmp_path / "c", other)
    endless = torch.zeros(1).expand(2**40)
    rewrite(tmp_path / "c", lambda content: content.update(proposals=endless))
    with pytest.raises(RunError, match="c: trained with another pyramid"):
        load_checkpoint(tmp_path / "c", model)
    rewrite(tmp_path / "c", lambda content: content.pop("proposals"))
    load_checkpoint(tmp_path / "c", other)  # an earlier version's, which cannot be told apart


def test_a_frozen_logit_scale_is_clamped_again(golden, tmp_path) -> None:
    """Training clamps it after every step, but what is frozen is not in the file."""
    model, optimizer, scaler = trained(golden)
    for step, expected in ((0, 4.7), (3, 4.6052)):
        save_checkpoint(tmp_path / "c", model, optimizer, scaler, Checkpoint(0, step))
        with torch.no_grad():
            model.clip.logit_scale.fill_(4.7)
        load_checkpoint(tmp_path / "c", model)
        assert model.clip.logit_scale.item() == pytest.approx(expected)


def test_only_trained_tensors_are_saved(golden, tmp_path) -> None:
    save_checkpoint(tmp_path / "c", *trained(golden), Checkpoint())
    content = torch.load(tmp_path / "c", weights_only=True)
    assert not [name for name in content["state_dict"] if name.startswith("clip.")]


def test_a_failed_save_leaves_the_old_file(golden, tmp_path, monkeypatch) -> None:
    path = tmp_path / "ckpt.pth.tar"
    model, optimizer, scaler = trained(golden)
    save_checkpoint(path, model, optimizer, scaler, Checkpoint(epoch=1))

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, model, optimizer, scaler, Checkpoint(epoch=2))
    assert load_checkpoint(path, model).epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pth.tar"]


def test_all_of_a_runs_state_comes_back(golden, tmp_path) -> None:
    model, optimizer, scaler = trained(golden)
    sums = EpochSums(7, 1, 0.1 + 0.2, 1 / 3, 5.5, 6.5)
    progress = Checkpoint(
        1,
        17,
        None,
        None,
        {},
        sums,
        last_record={"epoch": 1, "global_step": 14, "loss": 0.1},
        facts={"precision in use": "amp"},
    )
    seeded = [random.seed, np.random.seed, torch.manual_seed]
    draws = [random.random, np.random.rand, lambda: torch.rand(3).tolist(), np.random.randn]
    for seed in seeded:
        seed(5)
    draws[-1]()  # numpy keeps the second of a pair of normal numbers
    save_checkpoint(tmp_path / "c", model, optimizer, scaler, progress)
    expected = [draw() for draw in draws]
    for seed in seeded:
        seed(6)
    loaded = load_checkpoint(tmp_path / "c", model, optimizer, scaler)
    assert [draw() for draw in draws] == expected
    assert loaded == replace(progress, has_optimizer=True)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "c", model)
    assert torch.equal(torch.get_rng_state(), before), "evaluating is no resuming"


def rewrite(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def earlier_format(content: dict) -> None:
    content["format"] = "propy-1"
    for name in ("sums", "last_record", "facts", "rng"):
        del content[name]


def test_the_earlier_format_is_resumed(golden, tmp_path) -> None:
    model, optimizer, scaler = trained(golden)
    save_checkpoint(tmp_path / "c", model, optimizer, scaler, Checkpoint(3, 30, 1.5, 2, {}))
    rewrite(tmp_path / "c", earlier_format)
    other, other_optimizer, other_scaler = trained(golden, 1)
    loaded = load_checkpoint(tmp_path / "c", other, other_optimizer, other_scaler)
    assert loaded == Checkpoint(3, 30, 1.5, 2, {}, has_optimizer=True)
    assert torch.equal(other.prompts.event_prompts, model.prompts.event_prompts)


EVENTS = "prompts.event_prompts"
NO_TENSOR = r"clip\.visual\.proj is no tensor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("epoch"), "its field 'epoch' is missing"),
        (lambda c: c.update(epoch=-3), "its field 'epoch' is missing or damaged"),
        (lambda c: c.update(global_step=True), "its field 'global_step' is missing or damaged"),
        (lambda c: c.update(sums={"stops": 1}), "its field 'sums' is missing or damaged"),
        (lambda c: c["sums"].update(loss="x"), "its field 'sums' is missing or damaged"),
        (lambda c: c["sums"].update(steps=-1), "its field 'sums' is missing or damaged"),
        (lambda c: c.update(last_record={"epoch": 1}), "its field 'last_record' is missing"),
        (lambda c: c.update(last_record={"epoch": 0, "global_step": 0, "R1": torch.ones(1)}),
         "its field 'last_record' is missing or damaged"),
        (lambda c: c.update(args={"lr": torch.ones(1)}), "its field 'args' is missing or damaged"),
        (lambda c: c.update(best_score=float("nan"), best_epoch=0), "its field 'best_score' is"),
        (lambda c: c.update(best_score=1.0, best_epoch=1), "'best_epoch', .* disagree"),
        (lambda c: c.update(best_score=1.0), "'best_epoch', .* disagree"),
        (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "does not fit: KeyError"),
        (lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(-1.0)),
         r"the optimizer's step of \S+ is -1"),
        (lambda c: c.update(scaler={"scale": "x"}), "its loss scaler is damaged"),
        (lambda c: c["optimizer"]["state"].clear() or c["optimizer"].pop("param_groups"),
         "optimizer, scaler or rng does not fit: KeyError"),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "its optimizer has"),
        (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
         r"the optimizer's exp_avg of \S+ has shape \[3\], the model \["),
        (lambda c: c["optimizer"]["state"][0]["exp_avg_sq"].fill_(float("inf")),
         r"the optimizer's exp_avg_sq of \S+ has values that are not finite"),
        (lambda c: c["rng"].pop("numpy"), "optimizer, scaler or rng does not fit: KeyError"),
        (lambda c: c["state_dict"].update({EVENTS: torch.zeros(8, 96)}),
         r"event_prompts has shape \[8, 96\], the model \[8, 128\]"),
        (lambda c: c["state_dict"][EVENTS].fill_(float("nan")), "not finite"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_of_ours_changes_nothing(golden, tmp_path, change, message) -> None:
    path = tmp_path / "wrong.pth.tar"
    save_checkpoint(path, *trained(golden), Checkpoint())
    rewrite(path, change)
    model, optimizer, scaler = trained(golden, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=rf"wrong\.pth\.tar: .*{message}"):
        load_checkpoint(path, model, optimizer, scaler)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_flipped_bit_is_found(golden, tmp_path) -> None:
    """Anywhere in the weights: torch itself does not look at the checksums."""
    path = tmp_path / "flipped.pth.tar"
    model, optimizer, scaler = trained(golden)
    save_checkpoint(path, model, optimizer, scaler, Checkpoint())
    content = bytearray(path.read_bytes())
    values = model.prompts.event_prompts.detach().numpy().tobytes()
    content[content.index(values) + len(values) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"flipped\.pth\.tar: .*checksum"):
        load_checkpoint(path, model)


def test_weights_that_are_not_finite_are_not_saved(golden, tmp_path) -> None:
    path = tmp_path / "ckpt.pth.tar"
    model, optimizer, scaler = trained(golden)
    save_checkpoint(path, model, optimizer, scaler, Checkpoint(epoch=1))
    with torch.no_grad():
        model.prompts.event_prompts[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"not written: prompts\.event_prompts"):
        save_checkpoint(path, model, optimizer, scaler, Checkpoint(epoch=2))
    assert load_checkpoint(path, model).epoch == 1


@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoint(golden, tmp_path, prefix: str) -> None:
    """The whole of CLIP included: the file decides, not the weights the model was built with."""
    state = {prefix + name: value for name, value in golden.authors_state().items()}
    content = {
        "state_dict": state,
        "epoch": 7,
        "global_step": 700,
        "best_acc1": np.float64(51.25),  # a numpy scalar, as in their VCMR checkpoints
        "optimizer": {"state": {}, "param_groups": []},
        "arch": "ViT-B/32",
    }
    torch.save(content, tmp_path / "theirs.pth.tar")
    model = golden.build()
    with torch.no_grad():
        model.clip.visual.proj.zero_()
    loaded = load_checkpoint(tmp_path / "theirs.pth.tar", model)
    assert loaded.from_authors and loaded.epoch == 7 and not loaded.has_optimizer
    expected = convert_authors_state(golden.authors_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_numpy_1_scalar_is_read(golden, tmp_path) -> None:
    """Files written under numpy 1 name the scalar's constructor by its old module."""
    path = tmp_path / "numpy1.pth.tar"
    golden.write_authors_checkpoint(path, best_acc1=np.float64(12.5))
    new, old = b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"
    source, target = zipfile.ZipFile(path), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert new in content
                content = content.replace(new, old)
            out.writestr(item.filename, content)
    path.write_bytes(target.getvalue())
    assert load_checkpoint(path, golden.build()).epoch == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("clip.prefix_proj.weight"), r"missing prompts\.prefix_proj\.weight"),
        (lambda s: s.update(surplus=torch.zeros(2)), "unexpected surplus"),
        (
            lambda s: s.update({"clip.visual.global_prompts": torch.zeros(1, 9, 128)}),
            r"event_prompts has shape \[9, 128\], the model \[8, 128\]",
        ),
        (
            lambda s: s.update({"clip.visual_prompt_embedding": torch.zeros(1, 4, 130)}),
            r"visual_prompts has shape \[1, 4, 130\]",
        ),
        (
            lambda s: s.update({"clip.visual.global_prompts": torch.tensor(0.0)}),
            r"event_prompts has shape \[\], the model \[8, 128\]",
        ),
        (lambda s: s["clip.visual.proj"].fill_(float("nan")), "not finite"),
        (lambda s: s.update({"clip.visual.proj": [1, 2]}), NO_TENSOR),
    ],
)
def test_a_wrong_tensor_is_named(golden, tmp_path, change, message: str) -> None:
    state = {name: value.clone() for name, value in golden.authors_state().items()}
    change(state)
    torch.save({"state_dict": state}, tmp_path / "wrong.pth.tar")
    model = golden.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=message) as error:
        load_checkpoint(tmp_path / "wrong.pth.tar", model)
    assert ("the same?" in str(error.value)) == (message not in ("not finite", NO_TENSOR))
    assert "wrong.pth.tar" in str(error.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["ln_final.bias", "visual.proj"])
def test_another_backbone_is_refused(golden, tmp_path, name: str) -> None:
    save_checkpoint(tmp_path / "c", *trained(golden), Checkpoint())
    state = golden.clip_state()
    state[name] = state[name] + 1
    other = build_model(state, golden.config["pyramid"], adapter_channels=48)
    with pytest.raises(RunError, match="other CLIP weights"):
        load_checkpoint(tmp_path / "c", other)


@torch.inference_mode()
def test_a_model_made_in_inference_mode_is_compared_too(golden, tmp_path) -> None:
    with torch.inference_mode(mode=False):
        save_checkpoint(tmp_path / "c", *trained(golden), Checkpoint())
    pyramid, state = golden.config["pyramid"], golden.clip_state()
    load_checkpoint(tmp_path / "c", build_model(state, pyramid, adapter_channels=48))
    state["visual.proj"] = state["visual.proj"] + 1
    with pytest.raises(RunError, match="other CLIP weights"):
        load_checkpoint(tmp_path / "c", build_model(state, pyramid, adapter_channels=48))


def test_the_backbone_is_digested_again_after_a_change_only(golden, monkeypatch) -> None:
    model, digests = golden.build(), []
    digest = checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda t: digests.append(1) or digest(t))
    first = backbone_fingerprint(model.clip)
    model.clamp_logit_scale()
    assert backbone_fingerprint(model.clip) == first and len(digests) == 1
    with torch.no_grad():
        model.clip.visual.proj[0, 0] += 1
    assert backbone_fingerprint(model.clip) != first


def test_the_earlier_fingerprint_is_compared_still(golden, tmp_path) -> None:
    """Written by a version that digested CLIP's vectors only."""
    model, *rest = trained(golden)
    save_checkpoint(tmp_path / "c", model, *rest, Checkpoint())
    earlier = hashlib.sha256()
    for name, tensor in sorted(model.clip.state_dict().items()):
        if tensor.dim() == 1:
            earlier.update(name.encode() + tensor.numpy().tobytes())
    rewrite(tmp_path / "c", lambda content: content.update(backbone=earlier.hexdigest()))
    load_checkpoint(tmp_path / "c", model)
    with torch.no_grad():
        model.clip.ln_final.bias[0] += 1
    with pytest.raises(RunError, match="other CLIP weights"):
        load_checkpoint(tmp_path / "c", model)


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_code_from_a_file_is_executed(golden, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": golden.authors_state(), "extra": _Attack()}, "attack.pth.tar")
    (tmp_path / "bare.pth.tar").write_bytes(pickle.dumps(_Attack()))
    for name in ("attack.pth.tar", "bare.pth.tar"):
        with pytest.raises(RunError, match=f"{name}.*nothing in it was executed") as error:
            load_checkpoint(name, golden.build())
        assert "weights_only" not in str(error.value), "no advice to switch the protection off"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100)])
def test_not_a_checkpoint(golden, tmp_path, content: bytes) -> None:
    (tmp_path / "odd.pth.tar").write_bytes(content)
    with pytest.raises(RunError, match=r"odd\.pth\.tar: not a readable checkpoint: it is "):
        load_checkpoint(tmp_path / "odd.pth.tar", golden.build())


def test_cut_checkpoint_and_missing_one(golden, tmp_path) -> None:
    path = tmp_path / "cut.pth.tar"
    golden.write_authors_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(RunError, match=r"cut\.pth\.tar"):
        load_checkpoint(path, golden.build())
    with pytest.raises(RunError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pth.tar", golden.build())


def test_the_folder_of_a_run_is_no_checkpoint(golden, tmp_path) -> None:
    with pytest.raises(RunError, match=r"a folder, .* no checkpoint in it"):
        load_checkpoint(tmp_path, golden.build())
    (tmp_path / "ckpt.pth.tar").touch()
    (tmp_path / "ckpt.best.pth.tar").touch()
    with pytest.raises(RunError, match=r"name ckpt\.best\.pth\.tar or ckpt\.pth\.tar in it"):
        load_checkpoint(tmp_path, golden.build())
