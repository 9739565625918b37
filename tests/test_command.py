"""How every command begins and ends: its streams, its mistakes, and what it leaves behind."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from utils import RunError
from utils.command import run_command
from utils.files import locked_folder, new_folder
from utils.misc import git_revision, usable_cores

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "main", "scripts.report", "scripts.score_predictions", "scripts.plot.plot_curves",
    "scripts.plot.plot_run", "scripts.data.check_videos", "scripts.data.convert_annotations",
    "scripts.data.pack_frames", "scripts.data.prepare_videos", "scripts.benchmark.__main__",
    "scripts.benchmark.ranks", "scripts.benchmark.backbones", "scripts.demo.run",
    "scripts.reproduce", "scripts.ablate",
    "scripts.download_clip", "scripts.search",
]  # fmt: skip


def test_these_are_all_commands() -> None:
    files = [ROOT / "main.py", *(ROOT / "scripts").rglob("*.py")]
    found = [path for path in files if "__name__ ==" in path.read_text(encoding="utf-8")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found}
    assert names == set(COMMANDS)


def in_a_fork(act, closed=(), encoding="utf-8", ends=False) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `act` in a process with such streams.

    Args:
        ends: whether stdout is a pipe that no one reads.
    """
    outputs = [os.memfd_create(name) for name in ("out", "err")]
    reader, writer = os.pipe()
    os.close(reader)
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(writer if ends else outputs[0], 1)
            os.dup2(outputs[1], 2)
            for number, name in ((1, "stdout"), (2, "stderr")):
                stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding)
                setattr(sys, name, None if number in closed else stream)
            for number in closed:
                os.close(number)
            act()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            os.write(outputs[1], repr(error).encode())
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    texts = []
    for output in outputs:
        with os.fdopen(output, "rb") as file:
            file.seek(0)
            texts.append(file.read().decode(encoding))
    return status, *texts


def as_program(name: str, *flags: str):
    def act() -> None:
        sys.argv = [name, *flags]
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return act


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads
@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistakes_on_any_terminal(name: str) -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        status, out, err = in_a_fork(as_program(name, "--help"), encoding=encoding)
        assert (status, err) == (0, "") and out.startswith("usage: "), (out, err)
    for streams in ({"closed": (1,)}, {"closed": (2,)}, {"closed": (1, 2)}, {"ends": True}):
        status, _, err = in_a_fork(as_program(name, "--help"), **streams)
        assert (status, err) == (0, ""), streams
    status, out, err = in_a_fork(as_program(name, "--no_such_flag", "é"), encoding="ascii")
    assert (status, out) == (2, "")
    if name != "scripts.plot.plot_run":  # which passes flags on
        assert err.count("\n") == 1 and err.startswith("error: "), err
        assert "--help explains the flags)" in err


def test_what_is_printed_on_a_poor_terminal() -> None:
    def program() -> None:
        print("vidéo × 3 … \udcff")
        raise RunError("naïve: 視頻")

    status, out, err = in_a_fork(lambda: run_command(program), encoding="ascii")
    assert (status, out, err) == (1, "vid?o ? 3 ? ?\n", "error: na?ve: ??\n")
    status, out, err = in_a_fork(lambda: run_command(program))
    assert (status, out, err) == (1, "vidéo × 3 … \\udcff\n", "error: naïve: 視頻\n")


def test_work_is_done_where_no_one_reads(tmp_path) -> None:
    def program() -> None:
        for number in range(10_000):
            print(number)
        (tmp_path / "done").write_text("")
        os.write(1, b"of a library")

    for streams in ({"ends": True}, {"closed": (1,)}, {"closed": (1, 2)}):
        status, _, err = in_a_fork(lambda: run_command(program), **streams)
        assert (status, err) == (0, ""), streams
        assert (tmp_path / "done").read_text() == "", "no stream took the place of a file"
        (tmp_path / "done").unlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_table_that_is_lost_is_an_error() -> None:
    def act() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        run_command(lambda: print("table"))

    status, _, err = in_a_fork(act)
    assert status == 1 and err == "error: standard output is incomplete: No space left on device\n"


def test_main_in_a_shell(tmp_path) -> None:
    """What the tests above do to streams, done by a shell."""
    for redirect in ("| head -n 1 >/dev/null", ">&-", ">&- 2>&-"):
        line = f'set -o pipefail; "$0" main.py --help {redirect}'
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(
            ["bash", "-c", line, sys.executable], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), redirect


# ------------------------------------------------------------------------------- what starts leave


def test_only_what_was_made_and_is_empty_goes(tmp_path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(RunError), new_folder(tmp_path / "old"):
        raise RunError
    with pytest.raises(RunError), locked_folder(tmp_path / "run"):
        (tmp_path / "run/ckpt").write_text("weights")
        raise RunError
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path / "bug"):
        raise ZeroDivisionError  # its traceback is in log.txt
    assert {path.name for path in tmp_path.iterdir()} == {"old", "run", "bug"}
    assert (tmp_path / "run/ckpt").exists()


def test_an_unknown_revision_says_why(monkeypatch, caplog, tmp_path) -> None:
    git_revision.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
        assert git_revision() == git_revision() == "unknown"
    assert caplog.text.count("git config --global --add safe.directory") == 1
    git_revision.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "unknown"
    assert "No such file" in caplog.records[-1].getMessage()
    git_revision.cache_clear()


def test_cores_that_may_not_be_used_are_not_counted() -> None:
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
