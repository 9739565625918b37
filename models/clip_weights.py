"""Every way in which CLIP's weights reach us, and what they are for besides their tensors.

Files are recognised by what is in them: OpenAI's TorchScript archives, what ``torch.save`` wrote,
safetensors; tensors under OpenAI's names, which open_clip uses too, or under transformers'.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.backbones import CONFIG_FILE, HUB_FILES, NAME, configured_settings, find_backbone
from models.clip import CLIP, CLIPSettings, CLIPSizes
from modules import ModelError
from modules.torch_files import (
    check_sums,
    is_plain,
    is_safetensors,
    load_safetensors,
    load_tensors,
    sha256_of,
)
from modules.transformer import GELU, QUICK_GELU

logger = logging.getLogger("propy.clip_weights")

WEIGHTS_FOLDER = Path(__file__).resolve().parent.parent / "CLIP_weights"

# OpenAI's names of the models this program is meant for, and the files they are published as.
WEIGHTS_FILES = {
    "ViT-B/32": "ViT-B-32.pt",
    "ViT-B/16": "ViT-B-16.pt",
    "ViT-L/14": "ViT-L-14.pt",
    "ViT-L/14@336px": "ViT-L-14-336px.pt",
}

# sha256 of these files, as OpenAI publishes them.
PUBLISHED_ARCHIVES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}

# What files hold besides parameters: sizes (OpenAI's archives), masks and positions (older files).
NO_PARAMETERS = {"input_resolution", "context_length", "vocab_size", "attn_mask"} | {
    f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")
}
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training programs put the tensors

# One tensor that every CLIP ViT has tells whose names they are, and what stands before all of them,
# such as DistributedDataParallel's "module.".
OPENAI_SIGN = "visual.conv1.weight"
TRANSFORMERS_SIGN = "vision_model.embeddings.patch_embedding.weight"
TRANSFORMERS_NAMES = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    TRANSFORMERS_SIGN: OPENAI_SIGN,
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # so spelled
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    # of a layer:
    "self_attn.q_proj": "attn.in_proj",
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TRANSFORMERS_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
# Products there are x Wᵀ, OpenAI's of these two x W.
TRANSPOSED = {"visual.proj", "text_projection"}


def weights_path(name: Path | str, folder: Path | str = WEIGHTS_FOLDER) -> Path:
    """The file of a model by OpenAI's or open_clip's name, in a folder; anything else is a path.

    ModelError: open_clip has no such model, or one that cannot be the backbone.
    """
    if name in WEIGHTS_FILES:
        return Path(folder) / WEIGHTS_FILES[name]
    if not _is_open_clips(name):
        return Path(name)
    files = [Path(folder) / find_backbone(name).name / file for file in HUB_FILES]
    return next((file for file in files if file.is_file()), files[0])


def _is_open_clips(name: Path | str) -> bool:
    """Whether it has the form of open_clip's names, and is no file."""
    return bool(NAME.fullmatch(str(name))) and not Path(name).is_file()


def read_weights(
    name: Path | str, trust_archive: bool = False
) -> tuple[dict[str, Tensor], CLIPSettings | None]:
    """The tensors of a weights file under OpenAI's names, float32, and what none of them shows:
    None if neither name, file nor configuration says it.

    Args:
        name: of a model, see `weights_path`, or a file: an archive of OpenAI's, or tensors saved
            with ``torch.save`` or as safetensors.
        trust_archive: load a TorchScript archive that is none of OpenAI's too, which runs code
            that is in it. Reading tensors runs none.

    Raises:
        ModelError: no such file, not a file of any kind, a damaged one, an archive that is not
            trusted, values that are not finite, or a name or a configuration beside it of what
            cannot be the backbone.
    """
    path, by_name = weights_path(name, WEIGHTS_FOLDER), _is_open_clips(name)
    if not path.is_file():
        argument = f" {name}" if by_name or name in WEIGHTS_FILES else ""
        raise ModelError(
            f"{path}: no CLIP weights there. `bash scripts/download_clip.sh{argument}` fetches them"
        )
    is_archive = _is_torchscript(path)
    published = is_archive and sha256_of(path) in PUBLISHED_ARCHIVES
    if is_archive and not published and not trust_archive:
        raise ModelError(
            f"{path}: a TorchScript archive, but none of OpenAI's (its sha256 is "
            f"{sha256_of(path)}). Loading one runs code that is in it: fetch OpenAI's with `bash "
            "scripts/download_clip.sh`, or, if you trust this one, set TRUST_CLIP_ARCHIVE=1"
        )
    try:
        if is_archive:
            content = _read_archive(path)
        else:
            content = load_safetensors(path) if is_safetensors(path) else load_tensors(path)
    except ModelError as error:
        raise ModelError(f"{path}: {error}. If the download broke off, fetch it again") from error
    tensors = content
    if isinstance(content, Mapping):
        wrapped = (content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
        tensors = next(wrapped, content)
    if not isinstance(tensors, Mapping) or not all(torch.is_tensor(v) for v in tensors.values()):
        raise ModelError(f"{path}: not a state dict, but a {type(tensors).__name__}")
    state, prefix = _without_prefix(tensors)
    for key, value in state.items():
        if not is_plain(value):
            raise ModelError(f"{path}: {prefix + key!r} is not a plain tensor of floats")
        state[key] = value.float()
        if not state[key].isfinite().all():
            raise ModelError(f"{path}: {prefix + key!r} has values that are not finite")
    if published:
        settings = CLIPSettings()
    elif by_name:
        settings = find_backbone(name).settings
    else:
        settings = _configured(path.parent, state)
    return openai_names(state), settings


def build_clip(
    weights: Path | str | Mapping[str, Tensor],
    trust_archive: bool = False,
    activation: str | None = None,
) -> CLIP:
    """A CLIP with all of the given weights, in evaluation mode.

    Args:
        weights: a name or a file, see ``read_weights``, or its tensors.
        trust_archive: see ``read_weights``.
        activation: QUICK_GELU or GELU, which the weights were trained with; None takes what the
            name, the file or its configuration says, else QUICK_GELU with a warning.

    Raises:
        ModelError: the file cannot be read, keys or shapes are not those of one CLIP ViT, or it is
            known to have another activation.
    """
    if isinstance(weights, Mapping):
        name, state, known = "the state dict", openai_names(_without_prefix(weights)[0]), None
    else:
        name, (state, known) = weights, read_weights(weights, trust_archive)
    if activation not in (None, QUICK_GELU, GELU):
        raise ModelError(f"no activation {activation!r}: there are {QUICK_GELU} and {GELU}")
    if activation and known and known.activation != activation:
        raise ModelError(f"{name}: its activation is {known.activation}, not {activation}")
    if not (activation or known):
        logger.warning(
            "%s: nothing says which activation these weights were trained with; quick_gelu is "
            "taken, as in OpenAI's. Most of open_clip's have gelu: --clip_activation names it",
            name,
        )
    settings = known or CLIPSettings(activation or QUICK_GELU)
    try:
        clip = CLIP(CLIPSizes.of_state_dict(state), settings)
        clip.load_state_dict(state, strict=True)
    except (ModelError, RuntimeError, ValueError) as error:
        raise ModelError(f"{name}: {error}") from error
    return clip.eval()


def openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under OpenAI's names, those under transformers' renamed, transposed and joined.

    Whatever has no place, or one that is taken, stays under its name, for loading to refuse it.
    """
    if TRANSFORMERS_SIGN not in state:
        return dict(state)
    places: dict[str, list[str]] = {}  # their names by ours
    for name in state:
        places.setdefault(_openai_name(name), []).append(name)
    converted = {}
    for name, sources in places.items():
        tensors = [state[source] for source in sources]
        letters = {source.split(".")[-2][0]: state[source] for source in sources if "." in source}
        one_shape = len({tensor.shape for tensor in tensors}) == 1 and tensors[0].dim() > 0
        if ".attn.in_proj_" not in name and len(sources) == 1:
            transposed = name in TRANSPOSED and tensors[0].dim() == 2
            converted[name] = tensors[0].T if transposed else tensors[0]
        elif len(sources) == 3 and letters.keys() == set("qkv") and one_shape:
            converted[name] = torch.cat([letters[letter] for letter in "qkv"])
        else:
            converted |= {source: state[source] for source in sources}
    return converted


def _openai_name(name: str) -> str:
    """Of a tensor of transformers'; what is none of theirs keeps its name."""
    if name in TRANSFORMERS_NAMES:
        return TRANSFORMERS_NAMES[name]
    module, _, end = name.rpartition(".")
    layer = TRANSFORMERS_LAYER.fullmatch(module)
    ours = TRANSFORMERS_NAMES.get(layer[3] if layer else module)
    if ours is None or end not in ("weight", "bias"):
        return name
    ours += ("_" if ours == "attn.in_proj" else ".") + end
    if not layer:
        return ours
    return f"{'visual.' if layer[1] == 'vision' else ''}transformer.resblocks.{layer[2]}.{ours}"


def _without_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The parameters without what stands before the name of every one of them, and that."""
    sign = re.compile(rf"(.*\.)?({re.escape(OPENAI_SIGN)}|{re.escape(TRANSFORMERS_SIGN)})")
    found = next(filter(None, map(sign.fullmatch, map(str, state))), None)
    prefix = found[1] or "" if found else ""
    stripped = {}
    for key, value in state.items():
        name = str(key).removeprefix(prefix)
        if name not in NO_PARAMETERS:
            stripped[name if name not in stripped else str(key)] = value
    return stripped, prefix


def _configured(folder: Path, state: Mapping[str, Tensor]) -> CLIPSettings | None:
    """What the configuration beside a file says, that of the format of its tensors.

    ModelError: it says what CLIP's towers here are not.
    """
    of_transformers = TRANSFORMERS_SIGN in state
    path = folder / ("config.json" if of_transformers else CONFIG_FILE)
    if not path.is_file():
        return None
    try:
        if not of_transformers:
            return configured_settings(json.loads(path.read_bytes()))
        images = folder / "preprocessor_config.json"
        return _transformers_settings(
            json.loads(path.read_bytes()),
            json.loads(images.read_bytes()) if images.is_file() else {},
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        logger.warning("%s: not the configuration of a CLIP, so it says nothing here", path)
        return None


def _transformers_settings(config: Mapping, images: Mapping) -> CLIPSettings:
    """Of transformers' ``config.json`` and ``preprocessor_config.json``; what neither says has
    the default of its CLIPConfig."""
    towers = (config["vision_config"], config["text_config"])
    activations = {tower.get("hidden_act", QUICK_GELU) for tower in towers}
    if len(activations) != 1 or not activations <= {QUICK_GELU, GELU}:
        raise ModelError(
            f"its activation is {' and '.join(sorted(map(str, activations)))}; {QUICK_GELU} or "
            f"{GELU} can be used"
        )
    if any(tower.get("layer_norm_eps", 1e-5) != 1e-5 for tower in towers):
        raise ModelError("layer_norm_eps is not 1e-5")
    widths = tuple(
        tower.get("hidden_size", width) // tower.get("num_attention_heads", heads)
        for tower, width, heads in zip(towers, (768, 512), (12, 8), strict=True)
    )
    default = CLIPSettings()
    return CLIPSettings(
        activations.pop(), widths,
        tuple(images.get("image_mean", default.image_mean)),
        tuple(images.get("image_std", default.image_std)),
    )  # fmt: skip


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives hold code beside the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # whatever zipfile stumbles over; load_tensors says what it is
        return False


def _read_archive(path: Path) -> Mapping[str, Tensor]:
    check_sums(path)
    try:
        with warnings.catch_warnings():  # deprecated, but the format OpenAI publishes
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception as error:  # torch raises whatever it stumbles over
        raise ModelError("it is no TorchScript archive that torch can load") from error
