"""The demo, end to end at a small size; its flags that make no sense."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from scripts.demo import run as demo

# Once; and again, up to where it would train. Its programs run in forks, which have torch imported.
SMALL = """
import os, runpy, sys
from scripts.demo import run as demo

def run_program(module, arguments):
    if not (child := os.fork()):
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module

demo.run_program = run_program
demo.PICTURES, demo.PICTURE_BATCH, demo.IMAGE_STEPS, demo.TEXT_STEPS = 64, 32, 2, 2
for _ in range(2):
    demo.main(["--train_videos", "12", "--test_videos", "4", "--epochs", "1"])
    assert os.path.isfile("logs/demo/report.html")
    demo.run_main = lambda *_: exit(0)
"""


def test_the_demo_from_its_first_step_to_its_table(tmp_path) -> None:
    """In a copy, since it writes into the checkout that it is of."""
    shutil.copy(demo.ROOT / "main.py", tmp_path)
    for folder in ("models", "modules", "dataloaders", "utils", "scripts"):
        shutil.copytree(demo.ROOT / folder, tmp_path / folder)
    command = [sys.executable, "-c", SMALL]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # no others that a fork would lack
    done = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table, again = done.stdout.split("[4/4]")[1].split("[1, 2/4]")
    for row in ("chance", "zero-shot CLIP, best frame", "ProPy"):
        assert re.search(rf"^\s*{row}(  +\d+\.\d\d)+", table, re.MULTILINE), table
    assert list((tmp_path / "VIS/demo/attention").glob("*/overview.png"))
    assert "videos and CLIP of an earlier run" in again


@pytest.mark.parametrize(
    "flags",
    [("--train_videos", "13"), ("--train_videos", "10"), ("--test_videos", "0"),
     ("--test_videos", "-2"), ("--epochs", "0"), ("--seed", "-1")],
)  # fmt: skip
def test_the_demo_keeps_an_earlier_one_when_it_is_called_wrongly(
    tmp_path, monkeypatch, capsys, flags
) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "clip.pt").touch()
    with pytest.raises(SystemExit):
        demo.main(flags)
    assert f"error: {flags[0]} must be" in capsys.readouterr().err
    assert (tmp_path / "demo" / "clip.pt").exists()
