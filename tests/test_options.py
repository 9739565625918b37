"""A new option takes three edits: a field, a flag, and what reads it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, fields, replace

import pytest
import torch

import models.trained
from dataloaders.datasets import LoaderConfig
from models import ProPy, ProPyConfig, load_propy
from models.clip import CLIPSettings
from models.clip_weights import build_clip
from modules import ModelError
from tests.golden_model import ROOT, GoldenModel, save_model
from utils.arguments import AUTO, FLAG_OF_FIELD, build_parser, config_from
from utils.evaluation.evaluator import EvalConfig
from utils.training.checkpoint import load_checkpoint
from utils.training.engine import TrainConfig

CONFIGS = (ProPyConfig, LoaderConfig, TrainConfig, EvalConfig)
NO_FLAGS = {  # main.py decides these
    "pyramid", "clip_seconds", "clip_head_widths", "clip_image_mean", "clip_image_std",
}  # fmt: skip


@dataclass(frozen=True)
class WithDummy(ProPyConfig):
    dummy: float = 0.0  # 1. the field


class DummyProPy(ProPy):
    def scores(self, texts: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
        return super().scores(texts, events) + self.config.dummy  # 3. what reads it


def test_a_new_option_takes_three_edits(tmp_path, monkeypatch) -> None:
    """Its value comes from the command line, decides what the model computes, is in the checkpoint,
    and is compared when the checkpoint is read; nothing else names it."""
    parser = build_parser()
    parser.add_argument("--dummy", type=float, default=0.0)  # 2. the flag
    args = parser.parse_args(["--prvr_val_annos", "x", "--adapter_channels", "48", "--dummy", "2"])
    golden = GoldenModel.read("m3")
    decided = CLIPSettings().as_fields() | {"clip_seconds": None}  # by main.py
    config = config_from(WithDummy, args, pyramid=golden.config["pyramid"], **decided)
    assert (config.dummy, config.adapter_channels, config.num_prompts) == (2, 48, 4)

    def build(config: WithDummy) -> ProPy:
        return DummyProPy(build_clip(golden.clip_state()), config)

    model = build(config)
    texts, events = torch.randn(2, 64), torch.randn(3, 8, 64)
    without = ProPy.scores(model, texts, events)
    assert torch.equal(model.scores(texts, events), without + 2)
    save_model(tmp_path / "c", model)
    with pytest.raises(ModelError, match=r"trained with dummy 2\.0, not 0\.0"):
        load_checkpoint(tmp_path / "c", build(replace(config, dummy=0.0)))
    monkeypatch.setattr(models.trained, "ProPy", DummyProPy)
    monkeypatch.setattr(models.trained, "ProPyConfig", WithDummy)
    opened = load_propy(tmp_path / "c", golden.clip_state())
    assert opened.config == model.config and torch.equal(opened.scores(texts, events), without + 2)


NETWORK = {
    "visibility": "self", "text_prompts": "none", "lora_rank": 2, "frame_groups": "2",
    "frame_embedding": 1, "readout": "consensus", "clip_activation": "gelu",
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORK)
def test_an_option_of_the_network_is_in_the_checkpoint(tmp_path, name: str) -> None:
    """It opens as it was, and a model of another setting refuses it; a checkpoint that is older
    than the option, and one of the authors', has the published setting."""
    golden = GoldenModel.read("m3")
    published, other = golden.build(), golden.build(**{name: NETWORK[name]})
    with pytest.raises(ModelError, match=f"trained with .*{name} .*give the same settings"):
        load_checkpoint(save_model(tmp_path / "other", other), published)
    opened = load_propy(tmp_path / "other", golden.clip_state())
    assert opened.config == other.config
    frames = golden.video(torch.float32)
    with torch.no_grad():
        assert torch.equal(opened.encode_video(frames), other.eval().encode_video(frames))
    save_model(tmp_path / "old", published)
    content = torch.load(tmp_path / "old", weights_only=True)
    for option in (*NETWORK, "rank_readout"):
        del content["config"][option]
    torch.save(content, tmp_path / "old")
    load_checkpoint(tmp_path / "old", golden.build())
    golden.write_authors_checkpoint(tmp_path / "theirs")
    for path in (tmp_path / "old", tmp_path / "theirs"):
        with pytest.raises(ModelError, match=f"{path}: trained with {name} "):
            load_checkpoint(path, other)


def test_another_ranking_is_no_other_network(tmp_path, caplog) -> None:
    golden = GoldenModel.read("m3")
    model = golden.build(readout="consensus")
    assert model.config.rank_readout == "half"
    path = save_model(tmp_path / "c", model)
    load_checkpoint(path, golden.build(readout="consensus", rank_readout="half"))
    assert "rank_readout" not in caplog.text
    load_checkpoint(path, golden.build(readout="consensus", rank_readout="max"))
    assert "trained with rank_readout half, but is used with max" in caplog.text


def test_every_flag_fills_a_field_or_is_read_by_main() -> None:
    flags = {action.dest for action in build_parser()._actions} - {"help"}
    filled = {FLAG_OF_FIELD.get(f.name, f.name) for c in CONFIGS for f in fields(c)} - NO_FLAGS
    assert filled <= flags
    main = ast.parse((ROOT / "main.py").read_text())
    read = {
        node.attr
        for node in ast.walk(main)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"
    }
    assert flags == filled | read


def test_every_flag_is_explained_with_its_default() -> None:
    for action in build_parser()._actions:
        assert action.help, action.dest
        assert len(re.findall(r"\(default", action.help)) <= 1, action.dest


def test_a_checkpoint_may_be_called_auto() -> None:
    parse = build_parser().parse_args
    assert parse(["--prvr_val_annos", "x", "--resume", "auto"]).resume == AUTO
    assert parse(["--prvr_val_annos", "x", "--resume", "./auto"]).resume != AUTO
