"""CLIP models by open_clip's names, "architecture/tag" as in ViT-B-32/laion2b_s34b_b79k: which of
them can be the backbone, what their weights were trained with, and where these are published.

The tables are open_clip's own. Nothing is fetched here: scripts/download_clip.py does that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from models.clip import CLIPSettings, CLIPSizes
from modules import ModelError
from modules.transformer import GELU, HEAD_WIDTH, QUICK_GELU

NAME = re.compile(r"[\w.-]+/\w+")
# The weights in a repository of the hub: the first of these files that it has.
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG_FILE = "open_clip_config.json"  # beside them

# What may differ between plain CLIP ViTs; anything else in a configuration has to be its default.
PLAIN = {
    "model": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "image": {
        "image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout",
    },
    "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}  # fmt: skip
VOCABULARY = 49408  # of the tokenizer that OpenAI's models have, and the one here


@dataclass(frozen=True)
class Backbone:
    """A model of open_clip's that can be the backbone."""

    name: str
    sizes: CLIPSizes
    settings: CLIPSettings
    repository: str  # owner/name on huggingface.co
    config: Mapping[str, Any] = field(compare=False)  # what an open_clip_config.json says of it


def find_backbone(name: str) -> Backbone:
    """The model of a name.

    ModelError: open_clip has none of that name, or it is no plain CLIP ViT; says what it is.
    """
    from open_clip import get_model_config, get_pretrained_cfg, list_pretrained_tags_by_model

    architecture, _, tag = name.partition("/")
    published, config = get_pretrained_cfg(architecture, tag), get_model_config(architecture)
    if not published or config is None:
        tags = list_pretrained_tags_by_model(architecture)
        known = f"; of {architecture} it has {', '.join(tags)}" if tags else ""
        raise ModelError(
            f"{name}: neither a file nor a model of open_clip's{known}. `bash "
            "scripts/download_clip.sh --list` shows all that can be used"
        )
    preprocess = {key: published[key] for key in ("mean", "std")}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    try:
        settings = configured_settings(content)
    except ModelError as error:
        raise ModelError(f"{name}: cannot be the backbone: {error}") from None
    trained_with = QUICK_GELU if published.get("quick_gelu") else GELU
    if settings.activation != trained_with:
        raise ModelError(
            f"{name}: these weights were trained with {trained_with}, and {architecture} has "
            f"{settings.activation}: name {architecture}-quickgelu/{tag}"
        )
    return Backbone(name, _sizes(config), settings, published["hf_hub"].strip("/"), content)


def list_backbones() -> list[Backbone]:
    """All of open_clip's that can be the backbone, in its order."""
    from open_clip import list_pretrained

    found = []
    for architecture, tag in list_pretrained():
        try:
            found.append(find_backbone(f"{architecture}/{tag}"))
        except ModelError:
            continue  # no plain ViT, or the name is not that of its activation
    return found


def configured_settings(config: Mapping[str, Any]) -> CLIPSettings:
    """What an ``open_clip_config.json`` says that no tensor shows.

    Raises:
        ModelError: it is not of a plain CLIP ViT (square patches, class token, learned positions,
            a causal text transformer that is read at the end-of-text token); says what it is.
        ArithmeticError, AttributeError, LookupError, TypeError: it is no such file.
    """
    model, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
    if reason := _no_plain_vit(model):
        raise ModelError(reason)
    vision, text = model["vision_cfg"], model["text_cfg"]
    default = CLIPSettings()
    return CLIPSettings(
        QUICK_GELU if model.get("quick_gelu") else GELU,
        (vision.get("head_width", HEAD_WIDTH), text.get("width", 512) // text.get("heads", 8)),
        tuple(preprocess.get("mean", default.image_mean)),
        tuple(preprocess.get("std", default.image_std)),
    )


def _no_plain_vit(model: Mapping[str, Any]) -> str | None:
    """Why a model of open_clip's cannot be the backbone."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    vision, text = model["vision_cfg"], model["text_cfg"]
    if "multimodal_cfg" in model:
        return "it is a CoCa, whose towers pool by attention"
    if vision.get("timm_model_name"):
        return f"its image tower is timm's {vision['timm_model_name']}, no plain CLIP ViT"
    if isinstance(vision.get("layers"), list | tuple):
        return "its image tower is a ResNet"
    if text.get("hf_model_name"):
        return f"its text tower is transformers' {text['hf_model_name']}"
    if text.get("hf_tokenizer_name") or text.get("vocab_size", VOCABULARY) != VOCABULARY:
        return f"it has another tokenizer ({text.get('hf_tokenizer_name', 'not named')})"
    if not isinstance(vision.get("image_size", 224), int):
        return "its images are not square"
    defaults = {
        "model": {},
        "image": {each.name: each.default for each in fields(CLIPVisionCfg)},
        "text": {each.name: each.default for each in fields(CLIPTextCfg)},
    }
    for part, content in (("model", model), ("image", vision), ("text", text)):
        for key, value in content.items():
            if key not in PLAIN[part] and value and value != defaults[part].get(key):
                return f"it is no plain CLIP ViT: {part} setting {key} is {value!r}"
    return None


def _sizes(model: Mapping[str, Any]) -> CLIPSizes:
    vision, text = model["vision_cfg"], model["text_cfg"]
    return CLIPSizes(
        embed_dim=model["embed_dim"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        patch_size=vision["patch_size"],
        grid=vision["image_size"] // vision["patch_size"],
        text_width=text["width"],
        text_layers=text["layers"],
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        vision_hidden=int(vision["width"] * vision.get("mlp_ratio", 4)),
        text_hidden=int(text["width"] * text.get("mlp_ratio", 4)),
    )
