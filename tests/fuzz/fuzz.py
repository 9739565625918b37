"""Feeds corrupted files to the program's readers and reports every answer that is none.

    .venv/bin/python -m tests.fuzz.fuzz --seconds 3600       # exit status 1 if anything was found

A reader may return its result, or raise the project's error with the file's name. Anything else is
a finding: another exception, a crash, more than 30 seconds, more than 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import torch
from tqdm import tqdm

from tests.fuzz.mutations import Cases
from tests.fuzz.readers import KINDS

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 30.0  # seconds for one file
MEMORY_LIMIT = 2**30  # bytes that a file may add at its peak
ADDRESS_LIMIT = 8 * 2**30  # bytes of address space that all may add: protects the machine
MAX_MESSAGE = 20_000  # characters of an error that someone is meant to read
BATCH = 20  # cases of one kind before the next one's turn


class Answer(NamedTuple):
    """What a reader did: "accepted", "refused" or the heading of a finding."""

    outcome: str
    details: str = ""

    @property
    def is_finding(self) -> bool:
        return self.outcome not in ("accepted", "refused")


def draw_cases(cases: Cases, seed: str, count: int) -> list[bytes]:
    """Files, the first of them valid; the same for the same seed and code."""
    drawn: list[bytes] = []
    settings = hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    hypothesis.seed(seed)(settings(hypothesis.given(cases)(lambda case: drawn.append(case))))()
    return drawn


def read_case(read: Callable[[Path], bool], error_type: type[Exception], path: Path) -> Answer:
    """Let a reader have a file, in this process, without limits."""
    try:
        return Answer("accepted" if read(path) else "wrong result")
    except error_type as error:
        text = str(error)
        printable = text.encode(errors="replace").decode() == text
        good = str(path) in text and len(text) <= MAX_MESSAGE and printable
        return Answer("refused" if good else "bad message", text)
    except BaseException as error:
        return Answer(type(error).__name__, traceback.format_exc())


def _limit(messages: Path) -> None:
    """In a child: what it and C code print goes to `messages`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with messages.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    limit = _memory("VmSize") + ADDRESS_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_limited(time_limit: float, *case: Any) -> Answer:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _memory("VmRSS")
    faulthandler.dump_traceback_later(time_limit, exit=True)
    answer = read_case(*case)
    faulthandler.cancel_dump_traceback_later()
    added = _memory("VmHWM") - before
    if added > MEMORY_LIMIT and not answer.is_finding:
        return answer._replace(outcome="memory", details=f"{added:,} bytes; {answer.details}")
    return answer


def _memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Child:
    """A process that reads within limits; when one dies of a file, another takes its place."""

    def __init__(self, folder: Path, time_limit: float = TIME_LIMIT) -> None:
        self.messages, self.time_limit = folder / "messages.txt", time_limit
        self.start()

    def start(self) -> None:
        """A fresh process; an earlier one ends with its pool."""
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _limit, (self.messages,))

    def read_case(self, *case: Any) -> Answer:
        try:
            return self.pool.submit(_read_limited, self.time_limit, *case).result()
        except BrokenProcessPool:
            self.start()
            words = self.messages.read_text(errors="replace")[-8000:]
            return Answer("hang" if "Timeout (" in words else "crash", words)


def fuzz(args: argparse.Namespace, folder: Path) -> int:
    """Corrupt and read until the time is over; returns the number of findings."""
    cases = {name: KINDS[name].cases(Path(tempfile.mkdtemp(dir=folder))) for name in args.kinds}
    counts = {name: Counter() for name in args.kinds}
    child, started, findings = Child(folder), time.monotonic(), 0
    read = read_case if args.cases else child.read_case
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=args.seconds, desc="fuzz", bar_format=layout, disable=bool(args.cases)) as bar:
        for batch in itertools.count():
            for name, count in counts.items():
                kind, seed = KINDS[name], f"{name} {args.seed} {batch}"
                path = folder / kind.file
                for case in draw_cases(cases[name], seed, args.cases or BATCH):
                    path.write_bytes(case)
                    answer = read(kind.read, kind.error, path)
                    if answer.is_finding:
                        file = f"{name}_{args.seed}_{count.total()}{path.suffix}"
                        keep_finding(answer, path, args.findings / file)
                        findings += 1
                    count["findings" if answer.is_finding else answer.outcome] += 1
                bar.update(min(time.monotonic() - started, args.seconds) - bar.n)
            bar.set_postfix(cases=sum(map(Counter.total, counts.values())), findings=findings)
            if args.cases or bar.n >= args.seconds:
                break
            if batch % 100 == 99:  # so that leaks of a decoder do not add up
                child.start()
    for name, count in counts.items():
        columns = [f"{count[outcome]} {outcome}" for outcome in ("accepted", "refused", "findings")]
        print(f"{name}: {', '.join(columns)}")
    return findings


def keep_finding(answer: Answer, path: Path, target: Path) -> None:
    """Save the input and what happened."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
    text = f"{answer.outcome}\n\n{answer.details}\n"
    target.with_name(target.name + ".txt").write_text(text, errors="backslashreplace")
    tqdm.write(f"{answer.outcome}: {target}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 nothing found, 1 findings, 2 wrong use."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="how long (default: %(default)g)")
    add("--cases", type=int, help="instead so many of each kind, in this process, without limits")
    add("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="(default: all)")
    add("--findings", type=Path, default=ROOT / "logs/fuzz", help="(default: logs/fuzz)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return int(fuzz(args, Path(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
