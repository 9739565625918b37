"""The same work done in two ways, ours and a plain reference: timed in turns, compared, counted.

A, B, A, B … in one process, so that both see the same machine; the ratio of the minima is what to
trust. Memory is that of one repetition in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from utils import RunError
from utils.evaluation.published import SPLIT_SIZES
from utils.misc import disable_tf32

SIDES = ("ours", "reference")


def _linear_flop(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * x.numel() * weight[0]


_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn
# What torch's counter lacks: the CPU's kernels of attention and oneDNN's linear maps.
CPU_FLOP = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
    _aten.mkldnn_linear: _linear_flop,
} | ({_mkldnn._linear_pointwise: _linear_flop} if hasattr(_mkldnn, "_linear_pointwise") else {})


@dataclass(frozen=True)
class Options:
    """What a stage may be told, as the flags explain it; each stage reads what concerns it."""

    model: str = "b32"
    videos: int | None = None
    texts: int | None = None
    words: int = 32
    frames: int = 32
    split: str = "charades"
    readout: str = "max"
    clips: Path | None = None
    precision: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    clock: str = "wall"
    checkpoint_activations: int = 0


def relative_error(ours: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest |a − b| / |b| of equally named tensors or numbers.

    NaN where names or shapes differ, which no tolerance allows.
    """
    if ours.keys() != reference.keys():
        return float("nan")
    errors = []
    for name, value in reference.items():
        a, b = torch.as_tensor(ours[name]).float(), torch.as_tensor(value).float()
        if a.shape != b.shape:
            return float("nan")
        errors.append(((a - b).norm() / b.norm().clamp_min(1e-30)).item())
    return torch.tensor(errors).max().item()  # NaN if one is


@dataclass(frozen=True)
class Stage:
    """Work that can be done in two ways.

    Args:
        prepare: (options, whether by us) -> the function that does the work once and returns its
            results by name. With equal options both ways get equal inputs.
        title: what one repetition is, in terms of the options.
        tolerance: largest error that still is the same result: in float32, in 16 bit.
        error: of two results, ours first.
        videos, texts: what the options leave open; no videos: those of the split.
    """

    prepare: Callable[[Options, bool], Callable[[], dict[str, Any]]]
    title: str
    tolerance: tuple[float, float]
    error: Callable[[dict, dict], float] = relative_error
    videos: int | None = None
    texts: int | None = None


def set_up(options: Options) -> None:
    """Threads of this process; float32 is float32 as in main.py."""
    disable_tf32()
    if options.threads:
        torch.set_num_threads(options.threads)


def measure(name: str, stage: Stage, options: Options, repeats: int, memory: bool) -> dict:
    """Count, compare, time in turns, compare again, then measure memory.

    Args:
        repeats: timed repetitions of each side.
        memory: measure it, at the cost of setting each side up once more.

    Returns:
        The stage's name, title and error; FLOP, seconds of each repetition and, if measured, memory
        in bytes by side.

    Raises:
        RunError: the results differ by more than the stage's tolerance.
    """
    videos = options.videos or stage.videos or SPLIT_SIZES[options.split]["val"][0]
    options = replace(options, videos=videos, texts=options.texts or stage.texts)
    title = stage.title.format(**asdict(options))
    result = {"stage": name, "title": title} | _count_and_time(name, stage, options, repeats)
    if memory:
        result["memory"] = {
            side: peak_memory(partial(stage.prepare, options, side == "ours"), options)
            for side in SIDES
        }
    return result


def peak_memory(prepare: Callable[[], Callable[[], Any]], options: Options) -> int:
    """What the first call of the function that `prepare` returns takes at its peak above what was
    there before, in bytes; in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory, prepare, options).result()


def _count_and_time(name: str, stage: Stage, options: Options, repeats: int) -> dict:
    set_up(options)
    runs = {side: stage.prepare(options, side == "ours") for side in SIDES}
    results, flop, seconds = {}, {}, {side: [] for side in SIDES}

    def clock() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if options.clock == "cpu" else time.perf_counter()

    def check() -> float:
        error, tolerance = stage.error(*results.values()), stage.tolerance
        if not error <= tolerance[options.precision != "fp32"]:  # NaN is no result either
            raise RunError(
                f"{name}: the results of ours and the reference differ by {error:.2e} of their "
                "size: one of the two is wrong"
            )
        return error

    for side, run in runs.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_FLOP) as counter:
            results[side] = run()
        flop[side] = counter.get_total_flops()
    error = check()
    for run in runs.values():  # counting takes other paths: it was no warm-up
        run()
    for _ in range(repeats):
        for side, run in runs.items():
            start = clock()
            results[side] = run()
            seconds[side].append(clock() - start)
    return {"error": max(error, check()), "flop": flop, "seconds": seconds}


def _memory(prepare: Callable[[], Callable[[], Any]], options: Options) -> int:
    set_up(options)
    run = prepare()
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: man 5 proc
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def ratio(result: dict, of: Callable[[Sequence[float]], float] = min) -> float:
    """How many times faster we are, by the minimum or the median of the times."""
    ours, reference = (of(result["seconds"][side]) for side in SIDES)
    return reference / ours


def table(results: Sequence[dict]) -> str:
    """What was measured, in Markdown; times are minima, with the medians in brackets."""
    rows = ["| stage | ours | reference | × faster | memory above the start | GFLOP | error |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        seconds = [f"{min(r['seconds'][s]):.3g} ({median(r['seconds'][s]):.3g}) s" for s in SIDES]
        memory = [f"{size / 2**30:.2f}" for size in r.get("memory", {}).values()]
        flop = [f"{count / 1e9:.4g}" for count in r["flop"].values() if count]
        cells = [
            r["stage"], *seconds, f"{ratio(r):.2f} ({ratio(r, median):.2f})",
            " / ".join(memory) + " GiB" * bool(memory), " / ".join(flop), f"{r['error']:.1e}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
