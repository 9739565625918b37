"""Runs main.py again and again in forks of a process that has imported everything already, which
takes milliseconds instead of seconds, and with a fault of `tests.faults` where one is asked for.

As a program it is that process: a line of JSON comes in for a run, the process id of the fork goes
out, and after its end its exit status. It computes nothing itself, which makes forking it safe.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULT_FAILED = 70  # exit status: a fault could not be put in, or the run never came to it
numbers = count()


@cache
def server() -> tuple[subprocess.Popen, Path]:
    """One a test session, and a folder for what runs print."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked_main"], cwd=ROOT, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.wait, 60)
    atexit.register(process.stdin.close)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    assert process.stdout.readline() == b"ready\n"
    return process, Path(folder.name)


class ForkedMain:
    """main.py started in `folder`, one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *flags: str, fault: str | None = None, **settings: object) -> int:
        """Process id of a run, the leader of its own process group.

        Args:
            fault: a function of `tests.faults`, called with the settings before the run.
        """
        self._server, outputs = server()
        name = outputs / str(next(numbers))
        self._outputs = [name.with_suffix(".out"), name.with_suffix(".err")]
        order = (self.folder, self._outputs, fault, settings, flags)
        self._server.stdin.write(json.dumps(order, default=str).encode() + b"\n")
        self._pid = int(self._server.stdout.readline())
        return self._pid

    def wait(self, seconds: float = 120.0) -> subprocess.CompletedProcess:
        """The run at its end; its exit status is negative if a signal ended it.

        Raises:
            AssertionError: it does not end, or its fault never happened.
        """
        late = not self._ended(seconds)
        if late:
            os.killpg(self._pid, signal.SIGKILL)
        status = int(self._server.stdout.readline())
        stdout, stderr = (path.read_text(errors="replace") for path in self._outputs)
        assert not late, f"no end within {seconds} seconds:\n{stdout}{stderr}"
        assert status != FAULT_FAILED, stdout + stderr
        return subprocess.CompletedProcess("main.py", status, stdout, stderr)

    def run(self, *flags: str, fault: str | None = None, **settings: object):
        """`start` and `wait`."""
        self.start(*flags, fault=fault, **settings)
        return self.wait()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """AssertionError: the run ended or the time was over before the condition held."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self._ended(0.002) and not condition()):
                os.killpg(self._pid, signal.SIGKILL)
                raise AssertionError(f"waited in vain: {self.wait()}")

    def _ended(self, seconds: float) -> bool:
        return bool(select.select([self._server.stdout], [], [], seconds)[0])


def serve() -> None:
    import torch.utils.tensorboard  # noqa: F401

    import main
    from dataloaders.tokenizer import tokenize
    from tests import faults
    from utils.command import run_command

    tokenize(["its table"], 8)  # read once, not in every run
    faults.log_every_step()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _end(_run(partial(run_command, main.command_line), *json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(
    program: Callable[[], None], folder: str, outputs: list[str], fault: str, settings, flags
) -> int:
    from tests import faults

    os.setpgid(0, 0)
    os.chdir(folder)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    try:
        if fault:
            getattr(faults, fault)(**settings)
    except BaseException:
        traceback.print_exc()
        return FAULT_FAILED
    sys.argv = ["main.py", *flags]
    try:
        program()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if unreached := faults.unreached():
        print(f"the run ended with {status} and never came to {unreached}", file=sys.stderr)
        return FAULT_FAILED
    return status


def _end(status: int) -> None:
    """What the interpreter does, but for taking apart all that was imported, which takes longer
    than a run."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
