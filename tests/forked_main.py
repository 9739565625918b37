"""Runs main.py again and again in forks of a process that has imported everything already.

As a program it is that process: a line of JSON with main.py's arguments comes in, the process id of
the fork goes out, and after its end its exit status. It computes nothing itself, which is what
makes forking it safe.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ForkedMain:
    """main.py in `folder`; every run appends to `folder`/output.txt. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output.txt"
        self.seconds = 0.0  # that a run takes, for who measures it
        self._told = 0
        self._server = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._server.stdout.readline()  # it is ready

    def __enter__(self) -> ForkedMain:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, *flags: str, patch: str = "") -> int:
        """Process id of a run, the leader of its own process group.

        Args:
            patch: Python to execute before.
        """
        print(json.dumps([patch, *flags]), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """Exit status of the run, negative if a signal ended it."""
        return int(self._server.stdout.readline())

    def told(self) -> str:
        """What runs have printed since this was asked last."""
        text = self.output.read_text()[self._told :]
        self._told += len(text)
        return text

    def run(self, *flags: str, patch: str = "") -> int:
        self.start(*flags, patch=patch)
        return self.wait()


def serve() -> None:
    import torch.utils.tensorboard  # noqa: F401

    import main
    from dataloaders.tokenizer import tokenize

    tokenize(["its table"], 8)  # read once, not in every run

    answers = os.fdopen(os.dup(1), "w")
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        patch, *flags = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            exec(patch, {"main": main})
            sys.argv = ["main.py", *flags]
            _end(_status_of(main.command_line))
        print(child, file=answers, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


def _status_of(program: Callable[[], None]) -> int:
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def _end(status: int) -> None:
    """What the interpreter does, but for taking apart all that was imported, which takes longer
    than a run."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
