"""Small things of a run: random states, devices, precision, memory, git revision."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import resource
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from utils import RunError

logger = logging.getLogger("propy.misc")

AUTOCAST_DTYPE = {"amp": torch.float16, "bf16": torch.bfloat16, "fp32": None}
# The CPU's allocator and some CUDA libraries raise a plain RuntimeError.
OUT_OF_MEMORY = r"can't allocate memory|out of memory|_STATUS_ALLOC_FAILED"


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch. Frame sampling and shuffling have generators of their own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """States of the generators that ``set_seed`` seeds, as plain values and byte tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put the generators where ``rng_state`` saw them; GPUs only if there are as many now."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def disable_tf32() -> None:
    """From here on a float32 product of this process is computed in float32, on any GPU."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def choose_device() -> torch.device:
    """The CUDA GPU of this process's number on its machine, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)  # where collectives and pinned memory go
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast of a training forward: float16 for amp, bfloat16 for bf16, nothing for fp32."""
    dtype = AUTOCAST_DTYPE[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the GPU's tensors, or this process's on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextlib.contextmanager
def memory_advice(remedy: str) -> Iterator[None]:
    """Running out of memory within raises RunError with the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"out of memory: {remedy} ({reason})") from error


@cache
def git_revision() -> str:
    """Commit of the checkout this runs from, with -dirty if it was changed.

    "unknown" where git does not say, and why in a warning.
    """
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=True,
            env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).splitlines()[0]
        if "safe.directory" in str(getattr(error, "stderr", None)):  # another user's checkout
            reason += f"; if you trust it: git config --global --add safe.directory {root}"
    logger.warning("the revision of this program is unknown: %s", reason)
    return "unknown"


def usable_cores() -> int:
    """CPU cores that this process may use; under Slurm or taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device; names stay."""
    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    return batch | {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
