"""The same work done in two ways, ours and a plain reference: timed in turns, compared, counted.

A, B, A, B … in one process, so that both see the same machine; the ratio is what to trust. Memory
is that of one repetition in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from modules.pyramid import PromptPyramid
from utils.misc import disable_tf32

SIDES = ("ours", "reference")
# Dense peak of known GPUs in TFLOP/s: (float32 without TF32, 16 bit), by a part of the name.
GPU_PEAKS = {
    "H200": (67, 989), "H100 PCIe": (51, 756), "H100": (67, 989), "A100": (19.5, 312),
    "V100": (15.7, 125), "L40S": (91.6, 362), "L4": (30.3, 121), "A10G": (31.2, 70),
    "A10": (31.2, 125), "RTX A6000": (38.7, 155), "RTX 4090": (82.6, 165), "RTX 3090": (35.6, 71),
    "T4": (8.1, 65),
}  # fmt: skip


def _attention_flop(query, key, value, *_, **__) -> int:
    """Two products per head; the tensors are [B, heads, tokens, width]."""
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flop(_, query, key, value, *__, **___) -> int:
    """Five products: the logits once more, and the gradients of weights, values, keys, queries."""
    return _attention_flop(query, key, value) * 5 // 2


def _linear_flop(x, weight, *_) -> int:
    return 2 * x.numel() * weight.shape[0]


_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn
# What torch's registry lacks: the CPU's kernels of attention and oneDNN's linear maps.
CPU_OPERATIONS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    _aten.mkldnn_linear: _linear_flop,
}
if hasattr(_mkldnn, "_linear_pointwise"):
    CPU_OPERATIONS[_mkldnn._linear_pointwise] = _linear_flop


class FlopCounter(TorchDispatchMode):
    """Counts the FLOP of matrix products, convolutions and attention while it is entered.

    ``torch.utils.flop_counter.FlopCounterMode`` cannot follow a model in inference mode.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation = func._overloadpacket
        if operation in CPU_OPERATIONS:
            self.total += CPU_OPERATIONS[operation](*args)
        elif operation not in flop_registry:
            with self:  # what it is made of, in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=result)
        return result


class MismatchError(RuntimeError):
    """Ours and the reference gave different results: their times cannot be compared."""


@dataclass(frozen=True)
class Options:
    """What a stage may be told; every one reads what concerns it. None: the stage's own default."""

    model: str = "b32"  # of the models in scripts/benchmark/model.py
    videos: int | None = None  # a batch
    texts: int | None = None  # a batch; of a training step: for each video
    frames: int = 32  # N_f, a power of two
    overlap: str = "published"  # of the pyramid's events: published, none or all
    words: int = 32  # tokens of the longest text
    split: str = "charades"  # size of the corpus in stages of the evaluation
    clips: Path | None = None  # folder of prepared clips, for the content of those to load
    precision: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    compile: bool = False
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class Stage:
    """Work that can be done in two ways.

    Args:
        title: what one repetition is, with its sizes.
        ours, reference: set one side up (untimed) and return the function that does the work once;
            its result goes to `compare`. With equal options both sides get equal inputs. A process
            that measures memory sets up one side only.
        compare: largest deviation of the two results, ours first.
        tolerance: largest deviation that still is the same result.
        work: how many `unit` a repetition does.
        unit: such as "videos".
        needed_flop: what the definition needs at least, where that can be said.
        time_aim: the reference's time over ours is to be at least this.
        memory_aim: our peak memory over the reference's is to be at most this.
    """

    title: str
    ours: Callable[[], Callable[[], Any]]
    reference: Callable[[], Callable[[], Any]]
    compare: Callable[[Any, Any], float]
    tolerance: float
    work: float
    unit: str
    needed_flop: float | None = None
    time_aim: float | None = None
    memory_aim: float | None = None


Factory = Callable[[Options], Stage]


def pyramid_of(options: Options) -> PromptPyramid:
    """The pyramid of every stage: each level halves the one below, with overlapping events or not.

    32 frames with the published overlap are scripts/pyramids/cfg_32.json.
    """
    levels = options.frames.bit_length() - 1
    overlap = {"published": [0] + [1] * (levels - 1), "none": [0] * levels, "all": [1] * levels}
    return PromptPyramid.from_config({"Nf": options.frames, "offset": overlap[options.overlap]})


@dataclass
class Measured:
    """One side of a stage; times in seconds of one repetition, memory in bytes."""

    times: list[float]
    cpu_times: list[float]  # of all threads of this process
    flop: int
    peak: int | None = None  # of the process, or of the GPU's tensors
    increment: int | None = None  # the same, above what was there before the repetition


@dataclass
class Result:
    """A measured stage."""

    name: str
    title: str
    work: float
    unit: str
    ours: Measured
    reference: Measured
    deviation: float
    tolerance: float
    needed_flop: float | None
    time_aim: float | None
    memory_aim: float | None

    def ratio(self, of: Callable[[Sequence[float]], float] = min) -> float:
        """How many times faster we are, by the minimum or the median of the times."""
        return of(self.reference.times) / of(self.ours.times)

    def cpu_ratio(self) -> float:
        """The same by processor time, which other programs disturb less."""
        return min(self.reference.cpu_times) / min(self.ours.cpu_times)

    def memory_ratio(self) -> float | None:
        """Our additional memory over the reference's."""
        if not self.reference.increment or self.ours.increment is None:
            return None
        return self.ours.increment / self.reference.increment


def set_up(options: Options) -> torch.device:
    """Threads and device of this process; float32 is float32 as in main.py."""
    disable_tf32()
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device(options.device)


def measure(name: str, factory: Factory, options: Options, repeats: int, memory: bool) -> Result:
    """Warm up, compare, count, time in turns, then measure memory.

    Args:
        factory: makes the stage; a function of a module, since other processes call it too.
        repeats: timed repetitions of each side.
        memory: measure it, at the cost of setting each side up once more.

    Raises:
        MismatchError: the results differ by more than the stage's tolerance.
    """
    device = set_up(options)
    stage = factory(options)
    runs = {side: getattr(stage, side)() for side in SIDES}
    results, measured = {}, {}
    for side, run in runs.items():
        with FlopCounter() as counter:
            results[side] = run()
        measured[side] = Measured([], [], counter.total)
    deviation = _check(name, stage, results)
    for run in runs.values():  # counting is slow, and compiles nothing
        run()
    for _ in range(repeats):
        for side, run in runs.items():
            results[side], seconds, cpu_seconds = _time(run, device)
            measured[side].times.append(seconds)
            measured[side].cpu_times.append(cpu_seconds)
    deviation = max(deviation, _check(name, stage, results))
    del runs, results
    if memory:
        for side in SIDES:
            peak, increment = _in_child(_peak_memory, factory, options, side)
            measured[side].peak, measured[side].increment = peak, increment
    return Result(
        name, stage.title, stage.work, stage.unit, **measured, deviation=deviation,
        tolerance=stage.tolerance, needed_flop=stage.needed_flop, time_aim=stage.time_aim,
        memory_aim=stage.memory_aim,
    )  # fmt: skip


def report(results: Sequence[Result], options: Options) -> str:
    """The table, in Markdown; times are minima and medians."""
    rows = []
    peak = _peak_flops(options)
    for r in results:
        memory = r.memory_ratio()
        rows.append({
            "stage": r.name,
            "ours": _seconds(r.ours.times),
            "reference": _seconds(r.reference.times),
            "× faster (min, median, CPU)": f"{r.ratio():.2f}, {r.ratio(statistics.median):.2f}, "
            f"{r.cpu_ratio():.2f}",
            "aim": _aim("≥", r.time_aim, r.ratio()),
            "memory above the start": _memory(r.ours.increment, r.reference.increment),
            "× memory": "" if memory is None else f"{memory:.2f}",
            "process's peak": _memory(r.ours.peak, r.reference.peak),
            "memory aim": _aim("≤", r.memory_aim, memory),
            "per s": f"{r.work / min(r.ours.times):.3g} {r.unit}",
            "GFLOP ours / reference": _flop(r.ours.flop, r.reference.flop),
            "needed": f"{r.needed_flop / r.ours.flop:.0%}" if r.needed_flop and r.ours.flop else "",
            "GFLOP/s": f"{r.ours.flop / min(r.ours.times) / 1e9:.0f}" if r.ours.flop else "",
            "of peak": f"{r.ours.flop / min(r.ours.times) / peak:.0%}" if peak else "",
            "deviation": f"{r.deviation:.1e}",
        })  # fmt: skip
    columns = [c for c in rows[0] if any(row[c] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(options: Options) -> str:
    """What the times were measured on."""
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def save_json(path: Path, results: Sequence[Result], options: Options) -> None:
    """Everything measured, each repetition of it."""
    record = {
        "machine": machine(options),
        "options": asdict(options),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def save_plot(path: Path, results: Sequence[Result], options: Options) -> None:
    """Bars of the ratios; a mark where the aim is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, result in enumerate(results):
        axes.barh(row, result.ratio(), color="#4477aa", height=0.6)
        axes.text(result.ratio(), row, f" {result.ratio():.2f}×", va="center")
        if result.time_aim:
            axes.plot([result.time_aim] * 2, [row - 0.4, row + 0.4], color="#cc3311", linewidth=2)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("times faster than the plain reference (minimum; red: the aim)")
    axes.set_title(machine(options), fontsize="medium")
    figure.savefig(path, dpi=150)


def largest_deviation(ours: Any, reference: Any) -> float:
    """Of tensors or equally nested dicts and sequences of them: max |a − b| / max |b|, the worst.

    NaN where shapes or keys differ, which no tolerance allows.
    """
    if torch.is_tensor(reference):
        if ours.shape != reference.shape:
            return float("nan")
        scale = reference.abs().max().clamp_min(1e-30)
        return ((ours - reference).abs().max() / scale).item()
    if isinstance(reference, dict):
        if ours.keys() != reference.keys():
            return float("nan")
        ours, reference = list(ours.values()), list(reference.values())
    if len(ours) != len(reference):
        return float("nan")
    worst = [largest_deviation(a, b) for a, b in zip(ours, reference, strict=True)]
    return float("nan") if any(w != w for w in worst) else max(worst, default=0.0)


def _check(name: str, stage: Stage, results: dict[str, Any]) -> float:
    deviation = stage.compare(results["ours"], results["reference"])
    if not deviation <= stage.tolerance:  # NaN is no result either
        raise MismatchError(
            f"{name}: ours and the reference differ by {deviation:.2e}, more than "
            f"{stage.tolerance:.0e}: one of the two is wrong"
        )
    return deviation


def _time(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Result, seconds, and seconds of processor time; a GPU's work is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    cpu, start = time.process_time(), time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, time.process_time() - cpu


def _in_child(function: Callable, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _peak_memory(factory: Factory, options: Options, side: str) -> tuple[int, int]:
    """Peak of the first repetition, in all and above what was there before, in bytes."""
    device = set_up(options)
    run = getattr(factory(options), side)()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: man 5 proc
        before = _status("VmRSS")
        run()
        peak = _status("VmHWM")
    return peak, peak - before


def _status(field: str) -> int:
    """A size of this process in bytes, as Linux states it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {field}")


def _peak_flops(options: Options) -> float | None:
    """The GPU's peak in FLOP/s, if it is a known one."""
    if options.device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    for key, peaks in GPU_PEAKS.items():
        if key in name:
            return peaks[options.precision != "fp32"] * 1e12
    return None


def _seconds(times: Sequence[float]) -> str:
    return f"{min(times):.3g} ({statistics.median(times):.3g}) s"


def _memory(ours: int | None, reference: int | None) -> str:
    if ours is None or reference is None:
        return ""
    return f"{ours / 2**30:.2f} / {reference / 2**30:.2f} GiB"


def _flop(ours: int, reference: int) -> str:
    return f"{ours / 1e9:.4g} / {reference / 1e9:.4g}" if ours and reference else ""


def _aim(sign: str, aim: float | None, value: float | None) -> str:
    if aim is None or value is None:
        return ""
    met = value >= aim if sign == "≥" else value <= aim
    return f"{sign} {aim:g} {'met' if met else 'MISSED'}"
