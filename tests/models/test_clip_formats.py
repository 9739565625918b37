"""The same weights in every format that they are published in, and their activation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dataloaders.tokenizer import tokenize
from models.clip import CLIPSettings, CLIPSizes
from models.clip_weights import build_clip
from modules import ModelError
from modules.transformer import GELU, QUICK_GELU
from tests.golden_model import make_weights
from tests.models.test_clip import CAPTIONS


def features(clip: torch.nn.Module, side: int, images: str, texts: str) -> list[torch.Tensor]:
    """Of fixed inputs, both towers'."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, side, side, generator=generator)
    token_ids = tokenize(CAPTIONS, 32)
    token_ids = torch.nn.functional.pad(token_ids, (0, 77 - token_ids.shape[1]))
    with torch.no_grad():
        return [getattr(clip, images)(pixels), getattr(clip, texts)(token_ids)]


def transformers_state(state: dict) -> dict:
    """OpenAI's tensors under the names and in the shapes of transformers' CLIPModel, written down
    a second time and the other way round."""
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight",
    }
    parts = [
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("ln_final.", "text_model.final_layer_norm."),
        (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.", ".self_attn."),
        (".c_fc.", ".fc1."), (".c_proj.", ".fc2."),
    ]  # fmt: skip
    theirs = {}
    for name, tensor in state.items():
        key = names.get(name, name)
        if key.endswith("projection.weight"):
            tensor = tensor.T.contiguous()
        if key == name:
            for ours, other in parts:
                key = key.replace(ours, other)
        if ".in_proj_" in key:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                theirs[key.replace("in_proj_", f"{letter}_proj.")] = rows.clone()
        else:
            theirs[key] = tensor.clone()
    return theirs


def write_each_format(folder: Path) -> tuple[dict, dict[str, Path]]:
    """The same small weights in every format: OpenAI's tensors, and files by what they are."""
    state = make_weights.torch_state(make_weights.make("tiny", 1))
    theirs = transformers_state(state)
    contents = {
        "plain.pt": state,
        "wrapped.pt": {"epoch": 3, "name": "x", "state_dict": state},
        "parallel.pt": {"state_dict": {f"module.{name}": t for name, t in state.items()}},
        "lightning.ckpt": {"state_dict": {f"model.clip.{name}": t for name, t in state.items()}},
        "named_so.bin": {"model": state | {"attn_mask": torch.zeros(77, 77)}},
        "pytorch_model.bin": theirs
        | {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)},
        "transformers_wrapped.pt": {"state_dict": {f"module.{n}": t for n, t in theirs.items()}},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    safetensors.torch.save_file(theirs, folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "any_name")
    return state, {path.name: path for path in sorted(folder.iterdir())}


def test_every_format_gives_the_same_features(tmp_path) -> None:
    state, paths = write_each_format(tmp_path)
    assert len(paths) == 10
    names = ("encode_image", "encode_text")
    expected = features(build_clip(state), 64, *names)
    for path in paths.values():
        clip = build_clip(path)
        assert clip.sizes == CLIPSizes.of_state_dict(state), path
        torch.testing.assert_close(features(clip, 64, *names), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("activation", [QUICK_GELU, GELU])
def test_features_equal_transformers(tmp_path, activation: str, heads: int, caplog) -> None:
    """From the files that its own program writes; config.json beside them says the activation."""
    transformers = pytest.importorskip("transformers")
    state = make_weights.torch_state(make_weights.make("tiny", 2))
    layers = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 512,
              "num_attention_heads": heads, "hidden_act": activation}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=layers | {"vocab_size": 49408},
        vision_config=layers | {"image_size": 64, "patch_size": 32},
        projection_dim=64,
    )
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(transformers_state(state), strict=True)
    model.save_pretrained(tmp_path)
    images = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    clip = build_clip(tmp_path / "model.safetensors")
    width = 128 // heads
    assert clip.settings == CLIPSettings(
        activation, (width, width), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    )
    assert not caplog.text
    images, texts = features(model, 64, "get_image_features", "get_text_features")
    expected = [getattr(output, "pooler_output", output) for output in (images, texts)]
    ours = features(clip, 64, "encode_image", "encode_text")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def configure(
    folder: Path, transformers: dict | None = None, open_clip: dict | None = None
) -> None:
    """What the hubs publish beside weights."""
    if transformers is not None:
        part = {"hidden_size": 128, "num_attention_heads": 2} | transformers
        config = {"model_type": "clip", "text_config": part, "vision_config": part}
        (folder / "config.json").write_text(json.dumps(config))
    if open_clip is not None:
        config = {"vision_cfg": {"width": 128}, "text_cfg": {"width": 128, "heads": 2}} | open_clip
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def test_the_activation_is_found_named_or_warned_of(tmp_path, caplog) -> None:
    _, paths = write_each_format(tmp_path)
    theirs, plain = paths["model.safetensors"], paths["open_clip_model.safetensors"]
    for path in (theirs, plain):
        assert build_clip(path).settings.activation == QUICK_GELU
        assert f"{path}: nothing says which activation" in caplog.text
        caplog.clear()
        assert build_clip(path, activation=GELU).settings.activation == GELU
    for said in (QUICK_GELU, GELU):
        other = {QUICK_GELU: GELU, GELU: QUICK_GELU}[said]
        configure(tmp_path, {"hidden_act": said}, {"quick_gelu": said == QUICK_GELU})
        for path in (theirs, plain):
            for named in (None, said):
                assert build_clip(path, activation=named).settings.activation == said
            with pytest.raises(ModelError, match=rf"{path.name}: .*{said}, not {other}"):
                build_clip(path, activation=other)
    configure(tmp_path, {}, {})  # what each program takes where nothing is said
    assert build_clip(theirs).settings.activation == QUICK_GELU
    assert build_clip(plain).settings.activation == GELU
    assert not caplog.text


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (({"hidden_act": "gelu_new"}, None), r"config\.json: .*gelu_new"),
        (({"layer_norm_eps": 1e-6}, None), r"config\.json: layer_norm_eps"),
        (({"num_attention_heads": 3}, None), "128 is not a multiple of 42 channels per head"),
        (
            (None, {"vision_cfg": {"width": 128, "head_width": 48}}),
            "128 is not a multiple of 48 channels per head",
        ),
        ((None, {"text_cfg": {"width": 128, "heads": 3}}), "128 is not a multiple of 42"),
        (
            (None, {"vision_cfg": {"width": 128, "pool_type": "avg"}}),
            r"open_clip_config.*image setting pool_type is 'avg'",
        ),
        (
            (None, {"text_cfg": {"width": 128, "heads": 2, "no_causal_mask": True}}),
            r"open_clip_config.*text setting no_causal_mask",
        ),
        ((None, {"init_logit_bias": -10}), r"open_clip_config.*init_logit_bias is -10"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, configs, message) -> None:
    _, paths = write_each_format(tmp_path)
    configure(tmp_path, *configs)
    name = "model.safetensors" if configs[0] else "plain.pt"
    with pytest.raises(ModelError, match=message):
        build_clip(paths[name])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_cfg": 3}', '{"vision_config": {}}'])
def test_a_configuration_of_something_else_says_nothing(tmp_path, text, caplog) -> None:
    _, paths = write_each_format(tmp_path)
    for name, weights in (
        ("config.json", "model.safetensors"),
        ("open_clip_config.json", "plain.pt"),
    ):
        (tmp_path / name).write_text(text)
        assert build_clip(paths[weights]).settings.activation == QUICK_GELU
        assert str(tmp_path / name) in caplog.text and "nothing says which" in caplog.text


LAYER = "vision_model.encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{LAYER}.k_proj.bias"), f"(?s)in_proj_bias.*{LAYER}.q_proj.bias"),
        (lambda s: s.update({f"{LAYER}.x_proj.bias": torch.zeros(128)}), f"{LAYER}.x_proj.bias"),
        (lambda s: s.update({"visual.proj": torch.zeros(128, 64)}), "visual_projection.weight"),
        (lambda s: s.update({"vision_model.head.weight": torch.zeros(1)}), "vision_model.head"),
        (lambda s: s.pop("text_projection.weight"), "text_projection"),
        (lambda s: s.update({f"{LAYER}.q_proj.bias": torch.zeros(64)}), "in_proj_bias"),
        (lambda s: s.update({"logit_bias": torch.zeros(1)}), "logit_bias"),
    ],
)
def test_every_tensor_of_transformers_is_accounted_for(tmp_path, change, message) -> None:
    theirs = transformers_state(make_weights.torch_state(make_weights.make("tiny", 1)))
    change(theirs)
    safetensors.torch.save_file(theirs, tmp_path / "changed.safetensors")
    with pytest.raises(ModelError, match=message) as error:
        build_clip(tmp_path / "changed.safetensors")
    assert "changed.safetensors" in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 1000, 100_000])
def test_cut_safetensors_are_named(tmp_path, keep: int) -> None:
    path = write_each_format(tmp_path)[1]["model.safetensors"]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        build_clip(path)
