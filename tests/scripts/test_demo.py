"""The demo, end to end at a small size; flags that make no sense, of it and of the soak test."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from scripts.demo import run as demo
from tests.fuzz import soak

SMALL = """
from scripts.demo import run as demo
demo.PICTURES, demo.PICTURE_BATCH, demo.IMAGE_STEPS, demo.TEXT_STEPS = 64, 32, 2, 2
{before}
demo.main(["--train_videos", "12", "--test_videos", "4", "--epochs", "1"])
"""
WITHOUT_TRAINING = "demo.run_main = lambda *_: exit(0)"


def test_the_demo_from_its_first_step_to_its_table(tmp_path) -> None:
    """In a copy, since it writes into the checkout that it is of."""
    shutil.copy(demo.ROOT / "main.py", tmp_path)
    for folder in ("models", "modules", "dataloaders", "utils", "scripts"):
        shutil.copytree(demo.ROOT / folder, tmp_path / folder)

    def run(before: str = "") -> str:
        command = [sys.executable, "-c", SMALL.format(before=before)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    table = run().split("[4/4]")[1]
    for row in ("chance", "zero-shot CLIP, best frame", "ProPy"):
        assert re.search(rf"^\s*{row}(  +\d+\.\d\d)+", table, re.MULTILINE), table
    assert (tmp_path / "logs/demo/report.html").is_file()
    assert list((tmp_path / "VIS/demo/attention").glob("*/overview.png"))
    assert "videos and CLIP of an earlier run" in run(before=WITHOUT_TRAINING)


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


def test_the_soak_test_refuses_no_steps(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--steps", "0", "--output_dir", str(tmp_path / "soak")])
    assert "--steps and --epochs must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "soak").exists()
