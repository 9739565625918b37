"""scripts/setup.sh, with a Python that only pretends to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "chmod", "cmp", "cp", "dirname", "flock", "mkdir", "readlink", "sleep")
# Answers the version question, makes a .venv that holds itself, and counts what pip is asked for.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c "*) exit 0 ;;
  --version) echo "Python 3.11.0" ;;
  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip"*) sleep 0.3; echo "$*" >> installs.txt ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of setup.sh alone, and beside it a bin folder that is all of PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path, tool
        (tools / tool).symlink_to(path)
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup.sh", folder / "scripts")
    for name in ("", "-search", "-milvus", "-dev"):
        (folder / f"requirements{name}.txt").write_text(f"package{name}==1\n")
    return folder


def start(checkout: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "scripts/setup.sh", *flags], cwd=checkout, stderr=subprocess.PIPE, text=True,
        env={"PATH": str(checkout.parent / "bin"), "HOME": os.environ.get("HOME", "/")},
    )  # fmt: skip


def add_python(checkout: Path, name: str, program: str = FAKE_PYTHON) -> None:
    path = checkout.parent / "bin" / name
    path.write_text(program)
    path.chmod(0o755)


def installs(checkout: Path) -> list[str]:
    file = checkout / "installs.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_without_a_python_it_says_what_to_do(checkout: Path) -> None:
    add_python(checkout, "python3", "#!/usr/bin/env bash\nexit 1\n")  # too old, or only a launcher
    process = start(checkout)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "no Python 3.10, 3.11 or 3.12" in message and "PYTHON=/path/to/python3.11" in message
    assert not (checkout / ".venv").exists()


def test_it_installs_once_even_when_two_start_together(checkout: Path) -> None:
    """And again for new requirements and those of the tests."""
    add_python(checkout, "python3.11")
    processes = [start(checkout) for _ in range(2)]
    assert [process.wait(timeout=30) for process in processes] == [0, 0]
    assert start(checkout).wait(timeout=30) == 0
    assert len(installs(checkout)) == 1
    assert start(checkout, "--dev").wait(timeout=30) == 0
    assert ["requirements-dev.txt" in line for line in installs(checkout)] == [False, True]
    (checkout / "requirements.txt").write_text("another==2\n")
    assert start(checkout).wait(timeout=30) == 0
    assert len(installs(checkout)) == 3


def test_where_there_are_no_locks_it_installs_all_the_same(checkout: Path) -> None:
    add_python(checkout, "python3.11")
    (checkout.parent / "bin/flock").unlink()
    add_python(checkout, "flock", "#!/usr/bin/env bash\nexit 71\n")
    process = start(checkout)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 0 and "no locks" in message
    assert len(installs(checkout)) == 1
