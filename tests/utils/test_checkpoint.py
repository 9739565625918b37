"""Checkpoints: a round trip, the authors' files, and everything that must be refused."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import load_propy
from models.authors import convert_authors_state
from modules import ModelError
from tests.golden_model import GoldenModel, inputs
from utils import RunError
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.optim import ADAM_BETAS, build_optimizer
from utils.training.progress import EpochSums, Progress


@pytest.fixture(scope="module")
def golden() -> GoldenModel:
    return GoldenModel.read("m3")


def trained(golden: GoldenModel, seed: int = 0, freeze_clip: bool = True):
    """A model with an optimizer that has taken a step."""
    torch.manual_seed(seed)
    model = golden.build(freeze_clip=freeze_clip)
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.clamp_logit_scale()
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)


def save(path: Path, run, progress: Progress | None = None) -> None:
    save_checkpoint(path, *run, progress or Progress())


def rewrite(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def copy_of(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before: dict) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("freeze_clip", [True, False])
def test_round_trip(golden, tmp_path, freeze_clip: bool) -> None:
    path = tmp_path / "ckpt.pth.tar"
    model, optimizer, scaler = trained(golden, 0, freeze_clip)
    progress = Progress(3, 120, 51.5, 2, {"lr": 1e-3})
    save_checkpoint(path, model, optimizer, scaler, progress)
    names = torch.load(path, weights_only=True)["state_dict"]
    assert any(name.startswith("clip.") for name in names) != freeze_clip, "only what is trained"
    other, other_optimizer, other_scaler = trained(golden, 1, freeze_clip)
    loaded = load_checkpoint(path, other, other_optimizer, other_scaler)
    assert loaded == replace(progress, has_optimizer=True)
    assert_unchanged(other, copy_of(model))
    ours, theirs = other_optimizer.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert torch.equal(ours["state"][index]["exp_avg"], state["exp_avg"])
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pth.tar"], "something was left behind"


@pytest.mark.parametrize(
    ("freeze_clip", "coef_lr", "weight_decay"), [(True, 0.5, 0.0), (False, 0.5, 0.05)]
)
def test_resuming_keeps_to_the_flags_of_now(
    golden, tmp_path, freeze_clip, coef_lr, weight_decay
) -> None:
    """Moments come from the file, weight decay and learning rates do not."""
    model, optimizer, scaler = trained(golden, 0, freeze_clip)
    save_checkpoint(tmp_path / "c", model, optimizer, scaler, Progress(1, 3))
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


def test_a_run_in_float32_continues_in_float16(golden, tmp_path) -> None:
    model, optimizer, disabled = trained(golden)
    save_checkpoint(tmp_path / "c", model, optimizer, disabled, Progress(1, 3))
    enabled = torch.amp.GradScaler("cpu", enabled=True)
    load_checkpoint(tmp_path / "c", model, optimizer, enabled)
    assert enabled.state_dict()["scale"] == 2**16
    save_checkpoint(tmp_path / "c", model, optimizer, enabled, Progress(1, 3))
    load_checkpoint(tmp_path / "c", model, optimizer, disabled)


@pytest.mark.parametrize(("step", "expected"), [(0, 4.7), (3, 4.6052)])
def test_a_frozen_logit_scale_is_clamped_again(golden, tmp_path, step: int, expected) -> None:
    """Training clamps it after every step, but what is frozen is not in the file."""
    model, *rest = trained(golden)
    save(tmp_path / "c", (model, *rest), Progress(0, step))
    with torch.no_grad():
        model.clip.logit_scale.fill_(4.7)
    load_checkpoint(tmp_path / "c", model)
    assert model.clip.logit_scale.item() == pytest.approx(expected)


def test_all_of_a_runs_state_comes_back(golden, tmp_path) -> None:
    model, optimizer, scaler = trained(golden)
    sums = EpochSums(7, 1, 0.1 + 0.2, 1 / 3, 5.5, 6.5, [0.1, 0.7])
    record, facts = {"epoch": 1, "global_step": 14, "loss": 0.1}, {"precision in use": "amp"}
    progress = Progress(1, 17, None, None, {}, sums, last_record=record, facts=facts)
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


EVENTS = "prompts.event_prompts"
NO_TENSOR = r"'clip\.visual\.proj' is not a plain tensor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(sums={"stops": 1}), "not a checkpoint of this program: TypeError"),
        (lambda c: c.pop("backbone"), "not a checkpoint of this program: KeyError"),
        (lambda c: c.pop("config"), "not a checkpoint of this program: KeyError: 'config'"),
        (lambda c: c.update(epoch="3"), "numbers of epochs and steps .* are damaged"),
        (lambda c: c.update(global_step=None), "numbers of epochs and steps .* are damaged"),
        (lambda c: c.update(format="propy-99"), "'propy-99', this program's propy-3"),
        (lambda c: c.update(format=None), "its format is 'None'"),
        (lambda c: c["config"].update(readout="other"), "trained with readout 'other', not 'max'"),
        (lambda c: c["config"].update(readout="x" * 10**6), "trained with readout 'x{,1000}$"),
        (lambda c: c["config"].update(pyramid={"Nf": 8, "H": [[2, 1], [7, 1]]}),
         "trained with another pyramid"),
        (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "KeyError"),
        (lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(-1.0)),
         r"the optimizer's step of \S+ is -1"),
        (lambda c: c["optimizer"]["state"][0].update(step="x" * 10**6),
         r"ValueError: .{,300}$"),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "its optimizer has"),
        (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
         r"the optimizer's exp_avg of \S+ has shape \[3\], the model \["),
        (lambda c: c["optimizer"]["state"][0]["exp_avg_sq"].fill_(float("inf")),
         r"the optimizer's exp_avg_sq of \S+ has values that are not finite"),
        (lambda c: c["state_dict"].update({EVENTS: torch.zeros(8, 96)}),
         r"event_prompts has shape \[8, 96\], the model \[8, 128\]"),
        (lambda c: c["state_dict"][EVENTS].fill_(float("nan")), "not finite"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_of_ours_changes_nothing(golden, tmp_path, change, message) -> None:
    path = tmp_path / "wrong.pth.tar"
    save(path, trained(golden))
    rewrite(path, change)
    model, optimizer, scaler = trained(golden, 1)
    before = copy_of(model)
    with pytest.raises(ModelError, match=rf"wrong\.pth\.tar: .*{message}"):
        load_checkpoint(path, model, optimizer, scaler)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 2}, {"frame_embedding": 1}, {"text_prompts": "none"}]
)
def test_resuming_another_network_names_what_differs(golden, tmp_path, changes) -> None:
    """And not the optimizer's number of parameters, which follows from it."""
    path = tmp_path / "c.pth.tar"
    save(path, trained(golden))
    model = golden.build(**changes)
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    ((name, value),) = changes.items()
    with pytest.raises(ModelError, match=rf"trained with {name} .*, not {value!r}"):
        load_checkpoint(path, model, optimizer)


def test_weights_that_are_not_finite_are_not_saved(golden, tmp_path) -> None:
    path = tmp_path / "ckpt.pth.tar"
    model, optimizer, scaler = trained(golden)
    save_checkpoint(path, model, optimizer, scaler, Progress(epoch=1))
    with torch.no_grad():
        model.prompts.event_prompts[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"not written: prompts\.event_prompts"):
        save_checkpoint(path, model, optimizer, scaler, Progress(epoch=2))
    assert load_checkpoint(path, model).epoch == 1


@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoint(golden, tmp_path, prefix: str) -> None:
    """The whole of CLIP included: the file decides, not the weights the model was built with."""
    content = {
        "state_dict": {prefix + name: value for name, value in golden.authors_state().items()},
        "epoch": 7, "global_step": 700, "arch": "ViT-B/32",
        "best_acc1": np.float64(51.25),  # a numpy scalar, as in their VCMR checkpoints
        "optimizer": {"state": {}, "param_groups": []},
    }  # fmt: skip
    torch.save(content, tmp_path / "theirs.pth.tar")
    model = golden.build()
    with torch.no_grad():
        model.clip.visual.proj.zero_()
    loaded = load_checkpoint(tmp_path / "theirs.pth.tar", model)
    assert loaded == Progress(epoch=7)
    assert_unchanged(model, convert_authors_state(golden.authors_state()))


def test_numpy_1_scalar_is_read(golden, tmp_path) -> None:
    """Files written under numpy 1 name the scalar's constructor by its old module."""
    path = golden.write_authors_checkpoint(tmp_path / "new", best_acc1=np.float64(12.5))
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "old", "w") as old:
        for name in new.namelist():
            content = new.read(name).replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
            assert (b"cnumpy.core" in content) == name.endswith("data.pkl")
            old.writestr(name, content)
    assert load_checkpoint(tmp_path / "old", golden.build()).epoch == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("clip.prefix_proj.weight"), r"missing prompts\.prefix_proj\.weight"),
        (lambda s: s.update(surplus=torch.zeros(2)), "unexpected surplus"),
        (lambda s: s.update({"clip.visual.global_prompts": torch.zeros(1, 9, 128)}),
         r"event_prompts has shape \[9, 128\], the model \[8, 128\]"),
        (lambda s: s.update({"clip.visual_prompt_embedding": torch.zeros(1, 4, 130)}),
         r"visual_prompts has shape \[1, 4, 130\]"),
        (lambda s: s.update({"clip.visual.global_prompts": torch.tensor(0.0)}),
         r"event_prompts has shape \[\], the model \[8, 128\]"),
        (lambda s: s["clip.visual.proj"].fill_(float("nan")), "not finite"),
        (lambda s: s.update({"clip.visual.proj": [1, 2]}), NO_TENSOR),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(golden, tmp_path, change, message: str) -> None:
    state = {name: value.clone() for name, value in golden.authors_state().items()}
    change(state)
    torch.save({"state_dict": state}, tmp_path / "wrong.pth.tar")
    model = golden.build()
    before = copy_of(model)
    with pytest.raises(ModelError, match=rf"wrong\.pth\.tar: .*{message}") as error:
        load_checkpoint(tmp_path / "wrong.pth.tar", model)
    assert ("the same?" in str(error.value)) == (message not in ("not finite", NO_TENSOR))
    assert_unchanged(model, before)


@pytest.mark.parametrize("inference", [False, True])
def test_another_backbone_is_refused(golden, tmp_path, monkeypatch, inference: bool) -> None:
    """Also by a model that was made in inference mode."""
    save(tmp_path / "c", trained(golden))
    state = golden.clip_state()
    with torch.inference_mode(inference):
        load_checkpoint(tmp_path / "c", golden.build())
        for name in ("ln_final.bias", "visual.proj"):
            changed = state | {name: state[name] + 1}
            monkeypatch.setattr(golden, "clip_state", changed.copy)
            other = golden.build()
            with pytest.raises(ModelError, match="other CLIP weights"):
                load_checkpoint(tmp_path / "c", other)


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_code_from_a_file_is_executed(golden, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": golden.authors_state(), "extra": _Attack()}, "attack.pth.tar")
    (tmp_path / "bare.pth.tar").write_bytes(pickle.dumps(_Attack()))
    for name in ("attack.pth.tar", "bare.pth.tar"):
        with pytest.raises(ModelError, match=f"{name}.*nothing in it was executed") as error:
            load_checkpoint(name, golden.build())
        assert "weights_only" not in str(error.value), "no advice to switch the protection off"
    assert not (tmp_path / "pwned").exists()


def test_not_a_checkpoint(golden, tmp_path) -> None:
    path, model = tmp_path / "odd.pth.tar", golden.build()
    for content in (b"", b"text", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"odd\.pth\.tar: not a readable checkpoint: it is "):
            load_checkpoint(path, model)
    golden.write_authors_checkpoint(path)
    sound = path.read_bytes()
    content = bytearray(sound)
    values = golden.clip_state()["visual.proj"].numpy().tobytes()
    content[content.index(values) + len(values) // 2] ^= 1  # torch itself compares no checksums
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"odd\.pth\.tar: .*checksum"):
        load_checkpoint(path, model)
    path.write_bytes(sound[:-5000])
    for wrong, message in ((path, r"odd\.pth\.tar"), (tmp_path, "a folder, no checkpoint"),
                           (tmp_path / "none", "none: no such checkpoint")):  # fmt: skip
        with pytest.raises(ModelError, match=message):
            load_checkpoint(wrong, model)


def test_a_checkpoint_opens_without_its_flags(golden, tmp_path) -> None:
    torch.save(golden.clip_state(), tmp_path / "clip.pt")
    model, *rest = trained(golden)
    settings = {"clip_name": str(tmp_path / "clip.pt"), "max_words": 9, "clip_seconds": 30.5}
    model.config = replace(model.config, **settings)
    save_checkpoint(tmp_path / "c", model, *rest, Progress())
    opened = load_propy(tmp_path / "c")
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    assert opened.config == model.config
    assert not opened.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["config"].update(adapter_kernel=4), "kernel size must be odd"),
        (lambda c: c["config"].update(num_prompts="many"), "TypeError"),
        (lambda c: c.pop("global_step"), "KeyError: 'global_step'"),
        (lambda c: c.pop("config"), "KeyError: 'config'"),
    ],
)
def test_a_damaged_checkpoint_does_not_open(golden, tmp_path, change, message: str) -> None:
    path = tmp_path / "wrong.pth.tar"
    save(path, trained(golden))
    rewrite(path, change)
    with pytest.raises(ModelError, match=rf"wrong\.pth\.tar: .*{message}"):
        load_propy(path, golden.clip_state())


def test_the_authors_checkpoint_opens_with_the_published_setting(tmp_path, caplog) -> None:
    golden = GoldenModel.read("small224")  # on the published pyramid
    path = golden.write_authors_checkpoint(tmp_path / "theirs.pth.tar")
    opened = load_propy(path, golden.clip_state())
    assert "holds no configuration" in caplog.text
    frames = torch.from_numpy(inputs.video(*golden.config["video"]))[:1].float()
    model = golden.build()
    load_checkpoint(path, model)
    with torch.no_grad():
        assert torch.equal(opened.encode_video(frames), model.eval().encode_video(frames))
    of_eight_events = GoldenModel.read("m3")
    path = of_eight_events.write_authors_checkpoint(tmp_path / "other.pth.tar")
    with pytest.raises(ModelError, match=r"other\.pth\.tar: its 8 events .* build_model"):
        load_propy(path, of_eight_events.clip_state())
