"""The processes of a run: one, or several that torchrun starts, on one machine or on many.

All compute the same run: rows are encoded by shares, gathered, and everything after that is
computed by every process alike. With one process every function here is the identity.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataloaders.sampling import share
from utils import RunError

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes, logs and draws progress bars."""
    return rank() == 0


@contextlib.contextmanager
def process_group(backend: str | None, device: torch.device) -> Iterator[None]:
    """Join the other processes, if torchrun says in the environment that there are any.

    Args:
        backend: nccl or gloo; by default nccl for GPUs and gloo for CPUs.

    Raises:
        RunError: a collective operation failed, as when another process ended or hangs; or
            PROPY_TIMEOUT_MINUTES, for which the others are waited for, is no time.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    minutes = os.environ.get("PROPY_TIMEOUT_MINUTES", "10")
    try:
        timeout = timedelta(minutes=float(minutes))
    except (OverflowError, ValueError):
        raise RunError(f"PROPY_TIMEOUT_MINUTES is no number of minutes: {minutes!r}") from None
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    # Imported later, by the first optimizer, it would hold the group (torch 2.11), whose threads
    # then outlive the interpreter: now and then they abort a process that is done.
    importlib.import_module("torch._dynamo")
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    except RuntimeError as error:
        # Errors of the libraries may be plain ones, with their names in the text.
        named = any(library in str(error).lower() for library in ("gloo", "nccl"))
        if not (named or isinstance(error, dist.DistError)):
            raise
        raise RunError(
            f"process {rank()} of {world_size()}: another process of the run ended or does not "
            f"answer ({str(error).splitlines()[0]}): its own message says why. The same command "
            "with --resume auto resumes the run"
        ) from error
    finally:
        dist.destroy_process_group()


def own_share(count: int) -> slice:
    """This process's rows of `count`."""
    return share(count, rank(), world_size())


def shares(count: int) -> list[range]:
    """Every process's rows of `count`."""
    return [range(count)[share(count, r, world_size())] for r in range(world_size())]


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes in the order of their ranks; backward keeps the own ones.

    The loss over all rows is computed by every process, so nothing is added up on the way back: the
    gradient of the own rows is whole.

    Args:
        rows: [own count, …].
        counts: rows of each process.

    Returns:
        [sum of the counts, …].
    """
    if world_size() == 1:
        return rows
    first = sum(counts[: rank()])
    gathered = gather(rows, counts)
    return torch.cat([gathered[:first], rows, gathered[first + len(rows) :]])


@torch.no_grad()
def gather(rows: Tensor, count: int | Sequence[int]) -> Tensor:
    """`gather_rows` without a gradient, of any dtype.

    Args:
        count: rows of all processes, cut as `own_share` does, or how many each has.
    """
    if world_size() == 1:
        return rows
    if isinstance(count, int):
        count = [len(cut) for cut in shares(count)]
    # All send as many: gloo takes nothing else.
    padded = rows.new_zeros(max(count), *rows.shape[1:])
    padded[: len(rows)] = rows
    bytes_ = padded.view(-1).view(torch.uint8)
    received = [torch.empty_like(bytes_) for _ in count]
    dist.all_gather(received, bytes_)
    parts = (x.view(rows.dtype).view_as(padded) for x in received)
    return torch.cat([part[:n] for part, n in zip(parts, count, strict=True)])


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Give every trained parameter the sum of its gradients in all processes.

    One reduction of all of them, in the order of the names. A parameter that has a gradient nowhere
    has none afterwards; one that has it here alone is sent by the others as zeros.
    """
    if world_size() == 1:
        return
    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    device = parameters[0].device
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32).to(device)
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    parameters = [p for p, yes in zip(parameters, reached.tolist(), strict=True) if yes]
    flat = torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters
    ])  # fmt: skip
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = gradient.view_as(p)


def largest(value: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return value
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def from_main(compute: Callable[[], T]) -> T:
    """What the main process computes, which alone does, in all of them."""
    value = compute() if is_main() else None
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
