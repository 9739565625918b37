"""Backbones by open_clip's names: which, with which settings, and that their features are its."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch

from dataloaders.tokenizer import tokenize
from models import build_model, load_propy
from models.backbones import HUB_FILES, find_backbone, list_backbones
from models.clip import CLIP, CLIPSettings
from models.clip_weights import build_clip
from modules import ModelError
from modules.transformer import GELU, QUICK_GELU
from scripts.download_clip import main
from tests.golden_model import ROOT, make_weights, save_model
from tests.models.server import serving

PYRAMID = {"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}
INCEPTION = (0.5, 0.5, 0.5)


def test_what_is_listed_has_open_clips_settings() -> None:
    found = {backbone.name: backbone for backbone in list_backbones()}
    for name in (
        "ViT-B-32-quickgelu/openai", "ViT-B-32/laion2b_s34b_b79k", "ViT-B-32/datacomp_xl_s13b_b90k",
        "ViT-B-16/laion2b_s34b_b88k", "ViT-L-14/datacomp_xl_s13b_b90k",
    ):  # fmt: skip
        assert name in found
    for name, backbone in found.items():
        architecture, tag = name.split("/")
        published = open_clip.get_pretrained_cfg(architecture, tag)
        settings = backbone.settings
        assert (settings.image_mean, settings.image_std) == (published["mean"], published["std"])
        assert (settings.activation == QUICK_GELU) == published.get("quick_gelu", False)
    assert found["ViT-L-14/laion2b_s32b_b82k"].settings == CLIPSettings(
        GELU, (64, 64), INCEPTION, INCEPTION
    )
    assert found["ViT-L-14-336-quickgelu/openai"].sizes.input_resolution == 336
    assert found["ViT-B-32-256/datacomp_s34b_b86k"].sizes.input_resolution == 256
    assert found["ViT-B-32-quickgelu/openai"].settings == CLIPSettings()


def test_the_networks_are_those_that_open_clip_builds() -> None:
    """Of every architecture that is listed; every plain one of open_clip's is."""
    listed = {backbone.name.split("/")[0]: backbone for backbone in list_backbones()}
    for architecture in sorted({name for name, _ in open_clip.list_pretrained()}):
        config = open_clip.get_model_config(architecture)
        vision, text = config["vision_cfg"], config["text_cfg"]
        another_text = {"hf_model_name", "hf_tokenizer_name"} & text.keys()
        if not isinstance(vision.get("layers"), int) or another_text or "multimodal_cfg" in config:
            assert architecture not in listed
            continue
        assert architecture in listed or f"{architecture}-quickgelu" in listed
        if architecture not in listed:
            continue
        with torch.device("meta"):
            theirs = open_clip.CLIP(**config)
            ours = CLIP(listed[architecture].sizes, listed[architecture].settings)
        shapes = {name: value.shape for name, value in theirs.state_dict().items()}
        assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
        for tower in ("visual.transformer", "transformer"):
            block, other = (m.get_submodule(tower).resblocks[0] for m in (ours, theirs))
            assert block.attn.num_heads == other.attn.num_heads


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-B-16-SigLIP/webli", "timm's vit_base_patch16_siglip_224"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("convnext_base/laion400m_s13b_b51k", "timm's convnext_base"),
        ("EVA02-B-16/merged2b_s8b_b131k", "timm's eva02"),
        ("RN50-quickgelu/openai", "ResNet"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "transformers' roberta-base"),
        ("ViT-L-14-CLIPA/datacomp1b", "tokenizer"),
        ("ViT-H-14-worldwide-quickgelu/metaclip2_worldwide", "tokenizer"),
        ("ViT-B-32/openai", "trained with quick_gelu.*name ViT-B-32-quickgelu/openai"),
        ("ViT-B-32/no_such_tag", "of ViT-B-32 it has .*laion2b_s34b_b79k"),
        ("some/folder", "neither a file nor a model of open_clip's"),
    ],
)
def test_what_cannot_be_the_backbone_is_refused_by_reason(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: .*{reason}"):
        build_clip(name)


def small_open_clip(head_width: int, text_heads: int, ratio: float, activation: str):
    vision = {"layers": 3, "width": 160, "head_width": head_width, "patch_size": 32,
              "image_size": 64, "mlp_ratio": ratio}  # fmt: skip
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": text_heads,
            "layers": 2, "mlp_ratio": ratio}  # fmt: skip
    torch.manual_seed(0)
    model = open_clip.CLIP(64, vision, text, quick_gelu=activation == QUICK_GELU).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases are 0 at first
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    return model, config | {"quick_gelu": activation == QUICK_GELU}


@pytest.mark.parametrize("activation", [QUICK_GELU, GELU])
@pytest.mark.parametrize(("head_width", "text_heads", "ratio"), [(80, 2, 4.0), (32, 4, 4.9231)])
def test_features_equal_open_clips(tmp_path, activation, head_width, text_heads, ratio) -> None:
    """From the files that it publishes: heads that are not 64 wide, wider MLPs, other means."""
    theirs, config = small_open_clip(head_width, text_heads, ratio, activation)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / HUB_FILES[0])
    content = {"model_cfg": config, "preprocess_cfg": {"mean": INCEPTION, "std": INCEPTION}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    ours = build_clip(tmp_path / HUB_FILES[0])
    widths = (head_width, 128 // text_heads)
    assert ours.settings == CLIPSettings(activation, widths, INCEPTION, INCEPTION)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    token_ids = tokenize(["a man opens the door", "two dogs"], 32)
    padded = torch.nn.functional.pad(token_ids, (0, 77 - token_ids.shape[1]))
    with torch.no_grad():
        expected = theirs.encode_image((images / 255 - 0.5) / 0.5), theirs.encode_text(padded)
        features = ours.encode_image(ours.normalize(images)), ours.encode_text(token_ids)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def weights_folder(tmp_path, monkeypatch) -> Path:
    """In place of CLIP_weights."""
    folder = tmp_path / "CLIP_weights"
    monkeypatch.setattr("models.clip_weights.WEIGHTS_FOLDER", folder)
    return folder


def put(folder: Path, name: str, file: str = HUB_FILES[0]) -> dict:
    state = make_weights.torch_state(make_weights.make("tiny", 1))
    (folder / name).mkdir(parents=True)
    if file == HUB_FILES[0]:
        safetensors.torch.save_file(state, folder / name / file)
    else:
        torch.save(state, folder / name / file)
    return state


@pytest.mark.parametrize("file", HUB_FILES)
def test_a_name_says_what_its_weights_are(weights_folder, caplog, file: str) -> None:
    name = "ViT-L-14/laion2b_s32b_b82k"
    with pytest.raises(ModelError, match=rf"{name}/.*: no CLIP.*download_clip\.sh {name}`"):
        build_clip(name)
    state = put(weights_folder, name, file)
    clip = build_clip(name)
    assert clip.settings == CLIPSettings(GELU, (64, 64), INCEPTION, INCEPTION)
    assert torch.equal(clip.visual.proj, state["visual.proj"]) and not caplog.text
    assert build_clip(name, activation=GELU).settings == clip.settings
    with pytest.raises(ModelError, match="its activation is gelu, not quick_gelu"):
        build_clip(name, activation=QUICK_GELU)


def test_images_are_normalised_as_the_backbone_wants(weights_folder) -> None:
    """Float images are normalised already."""
    put(weights_folder, "ViT-L-14/laion2b_s32b_b82k")
    model = build_model("ViT-L-14/laion2b_s32b_b82k", PYRAMID, adapter_channels=16).eval()
    frames = torch.randint(0, 256, (1, 8, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        events = model.encode_video(frames)
        assert torch.equal(events, model.encode_video((frames.float() / 255 - 0.5) / 0.5))
    state = make_weights.torch_state(make_weights.make("tiny", 1))
    other = build_model(state, PYRAMID, clip_activation=GELU, adapter_channels=16).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(events, other.encode_video(frames), atol=1e-3)


def test_a_checkpoint_finds_its_backbone_and_refuses_another(weights_folder, tmp_path) -> None:
    name = "ViT-L-14/laion2b_s32b_b82k"
    state = put(weights_folder, name)
    model = build_model(name, PYRAMID, adapter_channels=16, clip_name=name)
    opened = load_propy(save_model(tmp_path / "c", model))
    assert opened.config == model.config and opened.clip.settings == model.clip.settings
    frames = torch.randint(0, 256, (1, 8, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(opened.encode_video(frames), model.eval().encode_video(frames))
    with pytest.raises(
        ModelError, match=r"clip_image_mean \(0\.48\d+, .*, not \(0\.5, 0\.5, 0\.5\)"
    ):
        load_propy(tmp_path / "c", state)  # the same tensors, but nothing says how they see


@pytest.fixture
def hub(tmp_path):
    """scripts/download_clip.sh with a local hub, in a checkout of what it needs."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in (".venv", "models", "modules", "dataloaders", "utils"):
        (checkout / name).symlink_to(ROOT / name)
    for name in ("download_clip.sh", "download_clip.py"):
        (checkout / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (checkout / "scripts/setup.sh").write_text("")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": run.server.url}
        return subprocess.run(
            ["bash", "scripts/download_clip.sh", *arguments], cwd=checkout, capture_output=True,
            text=True, env=env | {"no_proxy": "127.0.0.1"},
        )  # fmt: skip

    with serving() as run.server:
        run.folder = checkout / "CLIP_weights"
        yield run


NAME = "ViT-B-32/laion2b_s34b_b79k"
ADDRESS = "/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/resolve/main/"


def test_a_name_is_fetched_from_the_hub_resumed_and_checked(hub) -> None:
    put(hub.folder, NAME, HUB_FILES[1])
    weights = hub.folder / NAME / HUB_FILES[1]
    hub.server.files[ADDRESS + HUB_FILES[1]] = body = weights.read_bytes()  # no safetensors there
    weights.unlink()
    hub.server.cut = 100_000
    broken = hub(NAME)
    assert broken.returncode == 1 and "run the same command to resume it" in broken.stderr
    done = hub(NAME)
    assert done.returncode == 0, done.stderr
    assert hub.server.answers == ["200 from 0", "206 from 100000"]
    assert weights.read_bytes() == body
    assert build_clip(weights).settings == find_backbone(NAME).settings  # open_clip's, beside it


def test_what_is_not_as_the_hub_publishes_it_is_removed(hub) -> None:
    hub.server.files[ADDRESS + HUB_FILES[0]] = b"weights"
    hub.server.sha256 = lambda body: "a" * 64
    done = hub(NAME)
    assert done.returncode == 1 and "not the published file" in done.stderr
    assert [path.name for path in (hub.folder / NAME).iterdir()] == ["open_clip_config.json"]


def test_a_hub_that_has_not_what_is_needed(hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.server.url)
    hub.server.files[ADDRESS + HUB_FILES[0]] = b"weights"
    hub.server.sha256 = lambda body: "no sha256"
    with pytest.raises(ModelError, match=f"{HUB_FILES[0]}: no sha256 is published"):
        main([NAME])
    hub.server.files.clear()
    with pytest.raises(ModelError, match=f"has none of {HUB_FILES[0]}"):
        main([NAME])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/.*HF_ENDPOINT"):
        main([NAME])
    with pytest.raises(ModelError, match="timm's"):  # not asked for
        main(["ViT-B-16-SigLIP/webli"])


def test_what_can_be_had_is_listed(capsys) -> None:
    main(["--list"])
    listed = capsys.readouterr().out
    assert NAME in listed and "ViT-B/32" in listed and "SigLIP" not in listed
