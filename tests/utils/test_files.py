"""Files that appear whole or not at all; folders that one run at a time writes to."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataloaders.storage import lock
from tests.corpus import in_process
from utils import OutputError
from utils.files import append_line, atomic_write, locked_folder

ROOT = Path(__file__).resolve().parents[2]


def in_a_child(act) -> int | None:
    """Do it in another process; its exit status, 0 if it returned."""
    process = in_process(act)
    process.join()
    return process.exitcode


def test_a_file_appears_with_the_end_of_its_block(tmp_path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        with atomic_write(path) as part:
            part.write_text("new")
            assert path.read_text() == "old"
        assert reader.read() == "old", "replaced, not overwritten"
    assert path.read_text() == "new" and path.stat().st_mode & 0o044
    with pytest.raises(KeyError), atomic_write(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_is_named_and_changes_nothing(tmp_path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        message = f"{path}: cannot be written: File too large"
        with pytest.raises(OutputError, match=message), atomic_write(path) as part:
            part.write_bytes(bytes(1000))
        with pytest.raises(OutputError, match="log: cannot be written: File too large"):
            append_line(tmp_path / "log", "x" * 1000)

    assert in_a_child(write_too_much) == 0
    assert path.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "log"}


def test_lines_are_appended_also_after_a_torn_one(tmp_path) -> None:
    path = tmp_path / "log"
    append_line(path, "one")
    append_line(path, "two")
    path.write_bytes(path.read_bytes() + b"thr")
    append_line(path, "four")
    append_line(path, "five")
    assert path.read_bytes() == b"one\ntwo\nthr\nfour\nfive\n"


def test_a_line_waits_for_that_of_another_process(tmp_path) -> None:
    path = tmp_path / "log"
    path.touch()
    with path.open("ab", buffering=0) as file:
        assert lock(file.fileno())
        child = in_process(lambda: append_line(path, "two"))
        file.write(b"on")
        time.sleep(0.3)
        file.write(b"e\n")
    child.join()
    assert path.read_bytes() == b"one\ntwo\n"


def test_the_second_run_is_refused_and_told_of_the_first(tmp_path) -> None:
    folder = tmp_path / "logs/run"

    def refused() -> None:
        first = f"process {os.getppid()} on {socket.gethostname()}"
        with pytest.raises(OutputError, match=first), locked_folder(folder):
            pass

    with locked_folder(folder):
        assert in_a_child(refused) == 0
        assert in_a_child(refused) == 0, "being refused has not taken the lock away"
    (tmp_path / "file").write_text("")
    message = "file/run: cannot be written: Not a directory"
    with locked_folder(folder), pytest.raises(OutputError, match=message):
        locked_folder(tmp_path / "file/run").__enter__()


def test_a_killed_run_leaves_no_lock_though_its_child_lives_on(tmp_path) -> None:
    """The child stands for a loader worker; the partial file for what was being written."""
    script = (
        "import os, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from utils.files import locked_folder, temporary_sibling\n"
        "folder = Path(sys.argv[1])\n"
        "with locked_folder(folder), temporary_sibling(folder / 'a') as part:\n"
        "    if not os.fork(): print(part.name, flush=True)\n"  # it has started, so has no lock
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(ROOT)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            part = tmp_path / run.stdout.readline().strip()
            assert part.is_file()
            with pytest.raises(OutputError), locked_folder(tmp_path):
                pass
            assert part.is_file(), "the file of a run that is alive"
            run.kill()
            run.wait()
            os.killpg(run.pid, 0)  # the child is there
            with locked_folder(tmp_path):
                assert not part.exists()
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            time.sleep(0.01)
