"""Files of tensors, read without executing anything that is in them and checked for damage.

torch itself compares no checksum, and explains a refusal with how to switch its protection off.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from modules import ModelError


def load_tensors(path: Path) -> object:
    """What ``torch.save`` wrote, onto the CPU: tensors, plain values and what torch was told of.

    ModelError: it is damaged, holds anything else, or is no such file.
    """
    check_sums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "it is no file of tensors and plain values, or holds more than these; nothing in it "
            "was executed"
        ) from error
    except OSError as error:
        raise ModelError(f"it cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises whatever its readers stumble over
        raise ModelError("it is no file of tensors that torch can read, or was cut off") from error


def is_safetensors(path: Path) -> bool:
    """The format's first eight bytes are the length of a JSON object that follows."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, onto the CPU; the format has no checksums.

    ModelError: it is damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # its own error, and torch's of types that torch has not
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"it is a damaged safetensors file: {reason}") from error


def check_sums(path: Path) -> None:
    """ModelError: the file is an archive of which a part has another checksum than its own."""
    try:
        if not zipfile.is_zipfile(path):  # torch's format until version 1.5 has no checksums
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever zipfile stumbles over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"it is a damaged archive: {reason}") from error
    if damaged:
        raise ModelError(f"it is damaged: the checksum of {damaged} in it is wrong")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_plain(tensor: Tensor) -> bool:
    """Numbers that can be read and copied: not sparse, quantized, or without values (meta);
    nor more of them than the file has, as a damaged shape may claim."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
