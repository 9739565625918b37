"""The demo, end to end at a small size; its flags that make no sense."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from scripts.demo import run as demo
from tests.corpus import WITHOUT_CACHES

# Once; and again, up to where it would train. Its programs run in forks, which have torch imported.
SMALL = """
import os, runpy, sys
from dataclasses import replace
from scripts.demo import run as demo

def run_program(module, arguments):
    if not (child := os.fork()):
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module

demo.run_program = run_program
demo.PICTURE_BATCH = 32
for name, size in demo.SIZES.items():
    demo.SIZES[name] = replace(size, pictures=64, image_steps=2, text_steps=2)
flags = "--train_videos 12 --val_videos 2 --test_videos 4 --epochs 1".split() + sys.argv[1:]
demo.main(flags)
os.rename("logs", "finished")
demo.run_main = lambda *_: exit(0)
demo.main(flags)
"""


@pytest.mark.parametrize(
    ("given", "name", "chosen_on"),
    [((), "demo", "test"), (("--size", "large", "--choose_on", "val"), "demo_large", "val")],
)
def test_the_demo_from_its_first_step_to_its_table(tmp_path, given, name, chosen_on) -> None:
    """In a copy, since it writes into the checkout that it is of."""
    shutil.copy(demo.ROOT / "main.py", tmp_path)
    for folder in ("models", "modules", "dataloaders", "utils", "scripts"):
        shutil.copytree(demo.ROOT / folder, tmp_path / folder, ignore=WITHOUT_CACHES)
    command = [sys.executable, "-c", SMALL, *given]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # no others that a fork would lack
    done = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table, again = done.stdout.split("[4/4]")[1].split("[1, 2/4]")
    for row in ("chance", "zero-shot CLIP, best frame", "ProPy"):
        assert re.search(rf"^\s*{row}(  +\d+\.\d\d)+", table, re.MULTILINE), table
    assert list((tmp_path / "VIS" / name / "attention").glob("*/overview.png"))
    run = tmp_path / "finished" / name
    assert (run / "report.html").is_file()
    assert json.loads((run / "args.json").read_text())["prvr_val_annos"] == str(
        tmp_path / name / f"{chosen_on}.jsonl"
    )
    assert ("order captions" in table) == (name == "demo_large")
    assert "left out" not in done.stderr, "a part of the report"
    assert "videos and CLIP of an earlier run" in again


@pytest.mark.parametrize(
    "flags",
    [("--train_videos", "13"), ("--train_videos", "10"), ("--test_videos", "0"),
     ("--test_videos", "-2"), ("--val_videos", "1"), ("--epochs", "0"), ("--seed", "-1")],
)  # fmt: skip
def test_the_demo_keeps_an_earlier_one_when_it_is_called_wrongly(
    tmp_path, monkeypatch, capsys, flags
) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "clip.pt").touch()
    with pytest.raises(SystemExit):
        demo.main(flags)
    assert re.search(rf"error: .*{flags[0]}:? must be", capsys.readouterr().err)
    assert (tmp_path / "demo" / "clip.pt").exists()
