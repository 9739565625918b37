"""How many processes are worth starting."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """CPU cores that this process may use; under Slurm or taskset fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # absent on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
