"""Feeds spoiled files to the program's readers and reports every answer that is not an answer.

    .venv/bin/python -m tests.fuzz.fuzz --seconds 3600       # exit status 1 if anything was found
    .venv/bin/python -m tests.fuzz.fuzz --replay logs/fuzz/video_0_123.mp4   # a finding, once more

A reader may return its result, or raise its own error with the file's name. Anything else is a
finding: another exception, a crash, more than 10 seconds, more than 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from tqdm import tqdm

from dataloaders import DataError
from dataloaders.annotations import read_annotations
from dataloaders.ffmpeg import raw_input_arguments, run_ffmpeg, write_video
from dataloaders.video import load_clip
from models import ProPy, build_model
from models.clip import CLIP, CLIPSizes
from modules import ModelError
from modules.pyramid import PromptPyramid
from scripts.demo.world import annotation_lines, draw_clips
from tests.fuzz import mutations
from utils import RunError
from utils.evaluation.tables import metrics_table
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.optim import build_optimizer
from utils.training.progress import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 10.0  # seconds for one file, of computing or, on an idle machine, in all
BUSY_TIME_LIMIT = 60.0  # seconds in all, where others keep the machine busy
MEMORY_LIMIT = 2**30  # bytes that a file may add at its peak
CRASH_LIMIT = 8 * 2**30  # address space it may add: protects the machine that this runs on
MAX_MESSAGE = 20_000  # characters of an error that somebody is meant to read
CASES_PER_WORKER = 2000  # then a fresh one, so that leaks of a decoder do not add up
SIZE, NUM_FRAMES = 64, 8
CLIP_SIZES = CLIPSizes(16, 64, 1, 32, 2, 64, 1, 77, 100)
PYRAMID = {"Nf": NUM_FRAMES, "H": [[2, 2], [2, 1], [3, 1]]}


# ------------------------------------------------------------------------------- the real readers


@cache
def _model() -> tuple[ProPy, torch.optim.Optimizer, torch.amp.GradScaler]:
    torch.manual_seed(0)
    clip = CLIP(CLIP_SIZES)
    clip.initialize()
    model = build_model(clip.state_dict(), PYRAMID, adapter_channels=8)
    return (
        model,
        build_optimizer(model, 1e-3, 1e-3, 0.2),
        torch.amp.GradScaler("cpu", enabled=False),
    )


def _read_annotations(path: Path) -> bool:
    return len(read_annotations(path)) > 0


def _read_pyramid(path: Path) -> bool:
    pyramid = PromptPyramid.from_config(path)
    return pyramid.spans.shape == (pyramid.num_events, 2)


def _read_checkpoint(path: Path) -> bool:
    model, optimizer, scaler = _model()
    progress = load_checkpoint(path, model, optimizer, scaler)
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    return isinstance(progress, Checkpoint) and finite


def _read_video(path: Path) -> bool:
    # by the file's content, so that a replay does the same
    training = zlib.crc32(path.read_bytes()) & 1
    clip = load_clip(path, NUM_FRAMES, SIZE, np.random.RandomState(0) if training else None)
    return clip.dtype == torch.uint8 and clip.shape == (NUM_FRAMES, 3, SIZE, SIZE)


@dataclass(frozen=True)
class Kind:
    """A sort of input: what reads it, its own error, and the mutation that knows its structure."""

    read: Callable[[Path], bool]
    error: type[Exception]
    spoil: Callable[[bytes, mutations.Random, bytes], bytes]
    suffix: str


KINDS = {
    "annotations": Kind(_read_annotations, DataError, mutations.spoil_json, ".jsonl"),
    "pyramid": Kind(_read_pyramid, ModelError, mutations.spoil_json, ".json"),
    "checkpoint": Kind(_read_checkpoint, RunError, mutations.spoil_checkpoint, ".pth.tar"),
    "video": Kind(_read_video, DataError, mutations.spoil_mp4, ".mp4"),
}


# -------------------------------------------------------------------------------- valid inputs


def make_samples(folder: Path, videos: Path | None) -> dict[str, list[bytes]]:
    """Valid files of every kind, to be spoiled."""
    return {
        "annotations": _annotation_samples(),
        "pyramid": [
            (ROOT / "scripts/pyramids/cfg_32.json").read_bytes(),
            b'{"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}',
            b'{"Nf": 32, "offset": [0, 1, 1, 1, 1]}',
            b'{"Nf": 1, "H": [[1, 1]]}',
        ],
        "checkpoint": _checkpoint_samples(folder),
        "video": _video_samples(folder)
        if videos is None
        else [path.read_bytes() for path in sorted(videos.glob("*.mp4"))],
    }


def _annotation_samples() -> list[bytes]:
    lines = annotation_lines(draw_clips("v", 4, 0))
    dumped = [json.dumps(line).encode() for line in lines]
    several = dict(lines[0], ts=[[0, 2.5], [3, 4]], desc="日本語, “quoted”", desc_id=7)
    rich = json.dumps(several, ensure_ascii=False).encode()
    return [
        b"\n".join(dumped),
        b"\xef\xbb\xbf" + b"\r\n".join([rich, b"", *dumped]) + b"\r\n",
        rich,
    ]


def _checkpoint_samples(folder: Path) -> list[bytes]:
    """Of this program with an optimizer's state, and whole models in two formats."""
    model, optimizer, scaler = _model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = folder / "sample.pth.tar"
    progress = Checkpoint(3, 120, 51.5, 2, {"lr": 1e-3, "subtask_type": "PRVR"})
    save_checkpoint(path, model, optimizer, scaler, progress)
    samples = [path.read_bytes()]
    whole = {"epoch": 10, "best_acc1": np.float64(51.25), "arch": "ViT-B/32"}
    for state, new_format in itertools.product(
        (model.state_dict(), _authors_names(model)), (True, False)
    ):
        content = whole | {"state_dict": state}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        samples.append(path.read_bytes())
    return samples


def _authors_names(model: ProPy) -> dict[str, torch.Tensor]:
    """The tensors as the authors' program would save them."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "prompts.event_prompts":
            name, tensor = "clip.visual.global_prompts", tensor.unsqueeze(0)
        elif name == "prompts.visual_prompts":
            name, tensor = "clip.visual_prompt_embedding", tensor.transpose(0, 1).flatten(1)[None]
        elif name.startswith("adapters."):
            _, layer, rest = name.split(".", 2)
            name = f"clip.visual.transformer.resblocks.{layer}.temp_adapter.{rest}"
            tensor = tensor.unsqueeze(-1) if rest == "conv.weight" else tensor
        state[f"module.{name.replace('prompts.', 'clip.', 1)}"] = tensor
    return state


def _video_samples(folder: Path) -> list[bytes]:
    """Clips as prepared, and as other encoders and containers would write them."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 88, 3), dtype=np.uint8)
    samples = []
    for count in (5, 40, 150):
        path = folder / f"sample{count}.mp4"
        write_video(path, (np.roll(noise, 4 * i, axis=1) for i in range(count)))
        samples.append(path.read_bytes())
    more = {
        "b.mp4": ["-c:v", "libx264", "-g", "12", "-bf", "3", "-movflags", "+faststart"],
        "fragments.mp4": ["-c:v", "libx264", "-g", "5", "-movflags", "frag_keyframe+empty_moov"],
        "mpeg4.mp4": ["-c:v", "mpeg4"],
        "matroska.mkv": ["-c:v", "libx264"],
    }
    for name, arguments in more.items():
        frames = (np.roll(noise, 4 * i, axis=0).tobytes() for i in range(40))
        output = [*arguments, "-pix_fmt", "yuv420p", "-threads", "1", "-y", str(folder / name)]
        done = run_ffmpeg([*raw_input_arguments(88, 64, 3), *output], feed=frames)
        if done.status == 0:  # an ffmpeg without one of these encoders has the others
            samples.append((folder / name).read_bytes())
    return samples


def make_case(samples: dict[str, list[bytes]], kind: str, seed: int, number: int) -> bytes:
    """Case `number` of a kind: a sample, spoiled; the same for the same seed.

    But for torch's older checkpoint format, which contains addresses of memory.
    """
    rng = np.random.default_rng([seed, number, *kind.encode()])
    ours = samples[kind]
    data = ours[rng.integers(len(ours))]
    anything = samples[list(samples)[rng.integers(len(samples))]] if rng.random() < 0.1 else ours
    other = anything[rng.integers(len(anything))]
    if rng.random() < 0.6:
        return KINDS[kind].spoil(data, rng, other)
    return mutations.spoil_bytes(data, rng, other)


# --------------------------------------------------------------------------- reading in a child


@dataclass(frozen=True)
class Answer:
    """What a reader did: "accepted", "refused" or the heading of a finding."""

    outcome: str
    seconds: float = 0.0
    memory: int = 0  # bytes added at the peak
    details: str = ""

    @property
    def is_finding(self) -> bool:
        return self.outcome not in ("accepted", "refused")


def read_case(kind: str, path: Path) -> Answer:
    """Let the reader have the file, in this process."""
    before = _reset_peak()
    started = time.perf_counter()
    outcome, details = "accepted", ""
    try:
        if not KINDS[kind].read(path):
            outcome, details = "wrong result", "neither a proper result nor an error"
    except KINDS[kind].error as error:
        outcome, details = _judge_message(str(error), path)
    except BaseException as error:
        outcome, details = type(error).__name__, traceback.format_exc()
    memory = _peak() - before
    if memory > MEMORY_LIMIT and outcome in ("accepted", "refused"):
        outcome, details = "memory", f"{memory / 2**20:.0f} MiB at the peak; {details}"
    return Answer(outcome, time.perf_counter() - started, memory, details)


def _judge_message(message: str, path: Path) -> tuple[str, str]:
    try:
        message.encode()
    except UnicodeEncodeError:
        return "bad message", f"cannot be printed: {message!r}"
    if str(path) not in message:
        return "bad message", f"does not name the file: {message[:1000]}"
    if len(message) > MAX_MESSAGE:
        return "bad message", f"{len(message)} characters: {message[:1000]}"
    return "refused", message


def _reset_peak() -> int:
    """Bytes this process holds now; its peak is counted from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _serve(pipe, messages: str) -> None:
    """The child: answers paths until it is killed; what C code prints goes to `messages`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    faulthandler.enable(target)
    torch.set_num_threads(1)
    _model()
    limit = _status("VmSize") + CRASH_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("ready")
    while True:
        task = pipe.recv()
        faulthandler.dump_traceback_later(0.9 * TIME_LIMIT, file=target)
        answer = read_case(*task)
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)


def _cpu_seconds(pid: int) -> float:
    """Computing time of a process and of what it waited for, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Reader:
    """A child process that survives anything by being replaced."""

    def __init__(self, folder: Path) -> None:
        self.messages = folder / "messages.txt"
        self.process: multiprocessing.process.BaseProcess | None = None
        self.cases = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end()

    def ask(self, kind: str, path: Path) -> Answer:
        """What the reader makes of a file. A slow one is asked again, alone, in a fresh process."""
        answer = self._ask_once(kind, path)
        if answer.outcome == "hang":
            answer = self._ask_once(kind, path)
        return answer

    def _ask_once(self, kind: str, path: Path) -> Answer:
        if self.process is None or self.cases >= CASES_PER_WORKER:
            self._start()
        self.cases += 1
        started = time.perf_counter()
        self.cpu_before = _cpu_seconds(self.process.pid)
        try:
            self.pipe.send((kind, path))
            if self.pipe.poll(TIME_LIMIT) or self._may_go_on():
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self.process = None
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return Answer(name, time.perf_counter() - started, details=self._last_words())
        words = self._last_words()
        self._end()
        return Answer("hang", time.perf_counter() - started, details=words)

    def _may_go_on(self) -> bool:
        """Wait on while the machine is busy with other things; True when there is an answer."""
        waited = TIME_LIMIT
        while os.getloadavg()[0] > (os.cpu_count() or 1) and waited < BUSY_TIME_LIMIT:
            if _cpu_seconds(self.process.pid) - self.cpu_before > TIME_LIMIT:
                return False
            if self.pipe.poll(1.0):
                return True
            waited += 1.0
        return False

    def _start(self) -> None:
        self._end()
        self.messages.unlink(missing_ok=True)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, str(self.messages)), daemon=True
        )
        self.process.start()
        theirs.close()
        self.pipe.recv()
        self.cases = 0

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _last_words(self) -> str:
        return self.messages.read_text(errors="replace")[-8000:]


# ---------------------------------------------------------------------------------- the program


@dataclass
class Count:
    """The line of one kind in the final table."""

    outcomes: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0
    memory: int = 0

    def add(self, answer: Answer) -> None:
        outcome = "findings" if answer.is_finding else answer.outcome
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.slowest = max(self.slowest, answer.seconds)
        self.memory = max(self.memory, answer.memory)

    def row(self) -> dict[str, float]:
        row = {name: self.outcomes.get(name, 0) for name in ("accepted", "refused", "findings")}
        cases = {"cases": sum(row.values())}
        return cases | row | {"slowest (s)": self.slowest, "peak (MiB)": self.memory / 2**20}


def fuzz(args: argparse.Namespace, folder: Path) -> int:
    """Spoil and read until the time is over; returns the number of findings."""
    samples = make_samples(folder, args.videos)
    counts = {kind: Count() for kind in args.kinds}
    started = time.monotonic()
    bar = tqdm(
        total=args.seconds,
        unit="s",
        desc="fuzz",
        bar_format="{l_bar}{bar}| {n:.0f}/{total} s{postfix}",
        mininterval=args.refresh,
    )
    with Reader(folder) as reader, bar:
        for number in itertools.count():
            for kind, count in counts.items():
                path = folder / f"{kind}_{args.seed}_{number}{KINDS[kind].suffix}"
                path.write_bytes(make_case(samples, kind, args.seed, number))
                answer = reader.ask(kind, path)
                count.add(answer)
                if answer.is_finding:
                    keep_finding(path, answer, args.findings)
                path.unlink()
            elapsed = time.monotonic() - started
            found = sum(count.outcomes.get("findings", 0) for count in counts.values())
            bar.set_postfix(cases=len(counts) * (number + 1), findings=found, refresh=False)
            bar.update(min(elapsed, args.seconds) - bar.n)
            if elapsed >= args.seconds:
                break
    rows = {kind: count.row() for kind, count in counts.items()}
    print(metrics_table(rows, list(next(iter(rows.values())))))
    if found:
        print(f"{found} findings, to be read and replayed: {args.findings}")
    return found


def keep_finding(path: Path, answer: Answer, folder: Path) -> None:
    """Save the input and what happened, for --replay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    text = f"{answer.outcome} after {answer.seconds:.1f} s\n\n{answer.details}\n"
    (folder / f"{path.name}.txt").write_text(text, errors="backslashreplace")
    tqdm.write(f"{answer.outcome}: {folder / path.name}")


def replay(files: list[Path], folder: Path) -> int:
    """Read saved inputs again and print what happens; returns the number of findings."""
    findings = 0
    with Reader(folder) as reader:
        for path in files:
            answer = reader.ask(path.name.split("_")[0], path.absolute())
            findings += answer.is_finding
            print(f"{path}: {answer.outcome}, {answer.seconds:.1f} s\n{answer.details}")
    return findings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="how long (default: %(default)g)")
    add("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="(default: all)")
    add("--videos", type=Path, metavar="DIR", help="clips to spoil (default: some are made)")
    add("--findings", type=Path, default=ROOT / "logs/fuzz", metavar="DIR",
        help="where findings are saved (default: logs/fuzz)")  # fmt: skip
    add("--refresh", type=float, default=0.5, metavar="SECONDS",
        help="between two updates of the progress bar (default: %(default)g)")  # fmt: skip
    add("--replay", type=Path, nargs="+", metavar="FILE", help="read saved findings again instead")
    args = parser.parse_args(arguments)
    for path in args.replay or []:
        if not path.is_file() or path.name.split("_")[0] not in KINDS:
            parser.error(f"--replay: no finding of this program: {path}")
    if args.videos and not any(args.videos.glob("*.mp4")):
        parser.error(f"--videos: no .mp4 in {args.videos}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 nothing found, 1 findings, 2 wrong use."""
    args = parse_arguments(arguments)
    warnings.simplefilter("ignore")  # zipfile's, of the doubled names that are meant here
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if args.replay:
            return int(replay(args.replay, Path(folder)) > 0)
        return int(fuzz(args, Path(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
