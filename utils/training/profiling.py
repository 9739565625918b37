"""A trace of some training steps, to see what bounds a run (``--profile``)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# Steps before those that are traced: torch's schedule wants both. They allocate memory, start
# threads, choose kernels and compile.
SKIPPED, WARM_UP = 2, 1


@contextlib.contextmanager
def traced_steps(
    folder: Path, steps: int, device: torch.device, log: logging.Logger
) -> Iterator[Callable[[], None]]:
    """Gives a function to be called after every training step; writes a trace of some steps.

    Args:
        folder: for steps.json, in Chrome's trace format.
        steps: how many are traced, after a few that are not; 0 traces nothing.
    """
    if not steps:
        yield lambda: None
        return
    path = folder / "steps.json"
    written = False

    def write(profiler: profile) -> None:
        nonlocal written
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        written = True
        log.info(
            "profile of %d training steps: %s (open it at https://ui.perfetto.dev, which keeps it "
            "in the browser, or at chrome://tracing)",
            steps,
            path,
        )
        by_time = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by_time, row_limit=15)
        log.info("\n%s", table)

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        log.warning(
            "--profile: training ended within its first %d steps, before any was traced",
            SKIPPED + WARM_UP,
        )
