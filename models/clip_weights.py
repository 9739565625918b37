"""Every way in which CLIP's weights reach us: OpenAI's archives and plain state dicts."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.clip import CLIP, CLIPSizes
from modules import ModelError
from modules.torch_files import check_sums, is_plain, load_tensors, sha256_of

# Besides its parameters OpenAI's archive states three sizes.
ARCHIVE_EXTRAS = {"input_resolution", "context_length", "vocab_size"}

# OpenAI's names of the models this program is meant for, and the files they are published as.
WEIGHTS_FILES = {"ViT-B/32": "ViT-B-32.pt", "ViT-B/16": "ViT-B-16.pt", "ViT-L/14": "ViT-L-14.pt"}

# sha256 of these files, as OpenAI publishes them.
PUBLISHED_ARCHIVES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}


def weights_path(name: str, folder: Path | str) -> Path:
    """The file of a model by OpenAI's name, in a folder; anything else is a path itself."""
    return Path(folder) / WEIGHTS_FILES[name] if name in WEIGHTS_FILES else Path(name)


def read_weights(path: Path | str, trust_archive: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file, in float32.

    Args:
        path: OpenAI's TorchScript archive or a state dict saved with ``torch.save``.
        trust_archive: load a TorchScript archive that is none of OpenAI's too, which runs code
            that is in it. Reading a state dict runs none.

    Raises:
        ModelError: no such file, not a file of either kind, a damaged one, an archive that is not
            trusted, or values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            f"{path}: no CLIP weights there. `bash scripts/download_clip.sh` fetches them"
        )
    is_archive = _is_torchscript(path)
    if is_archive and not trust_archive:
        _check_published(path)
    try:
        state = _read_archive(path) if is_archive else load_tensors(path)
    except ModelError as error:
        raise ModelError(f"{path}: {error}. If the download broke off, fetch it again") from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise ModelError(f"{path}: not a state dict, but a {type(state).__name__}")
    state = {str(key): value for key, value in state.items() if key not in ARCHIVE_EXTRAS}
    for key, value in state.items():
        if not is_plain(value):
            raise ModelError(f"{path}: {key!r} is not a plain tensor of floats")
        state[key] = value.float()
        if not state[key].isfinite().all():
            raise ModelError(f"{path}: {key!r} has values that are not finite")
    return state


def build_clip(weights: Path | str | Mapping[str, Tensor], trust_archive: bool = False) -> CLIP:
    """A CLIP with all of the given weights, a file or its content, in evaluation mode.

    Raises:
        ModelError: see `read_weights`; or keys or shapes are not those of one CLIP ViT.
    """
    state, name = weights, "the state dict"
    if not isinstance(weights, Mapping):
        state, name = read_weights(weights, trust_archive), weights
    try:
        clip = CLIP(CLIPSizes.of_state_dict(state))
        clip.load_state_dict(state, strict=True)
    except (ModelError, RuntimeError, ValueError) as error:
        raise ModelError(f"{name}: {error}") from error
    return clip.eval()


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


def _check_published(path: Path) -> None:
    sha256 = sha256_of(path)
    if sha256 not in PUBLISHED_ARCHIVES:
        raise ModelError(
            f"{path}: a TorchScript archive, but none of OpenAI's (its sha256 is {sha256}). "
            "Loading one runs code that is in it: fetch OpenAI's with `bash "
            "scripts/download_clip.sh`, or, if you trust this one, set TRUST_CLIP_ARCHIVE=1"
        )
