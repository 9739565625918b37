"""Runs that end anywhere and go on: all losses, lines and checkpoints of a run never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_main import ForkedMain
from golden_model import make_weights
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from utils.ffmpeg import write_video
from utils.logger import MEASURED

NUM_CLIPS, BATCH, EPOCHS = 7, 2, 3
STEPS = NUM_CLIPS // BATCH  # of an epoch
RUN = "run"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """main.py in a folder with clips of two random colours, captions and small CLIP weights."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "videos").mkdir()
    colours = np.random.RandomState(0).randint(256, size=(NUM_CLIPS, 2, 3))
    lines = []
    for index in range(NUM_CLIPS):
        frames = np.empty((20, 64, 64, 3), np.uint8)
        frames[:10], frames[10:] = colours[index]
        write_video(folder / f"videos/{index}.mp4", frames)
        for part in range(2):
            lines.append({
                "vid_name": str(index), "desc_id": f"{index}#{part}", "duration": 20 / 3,
                "desc": f"a wall of colour {colours[index, part].sum()}", "ts": [0, 3],
            })  # fmt: skip
    (folder / "annos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(make_weights.torch_state(make_weights.make("tiny", 1, "fp16")), folder / "clip.pt")
    (folder / "pyramid.json").write_text('{"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}')
    with ForkedMain(folder) as program:
        yield program


def flags(output: Path, *more: str, workers: int = 0) -> list[str]:
    return [
        "--do_train", "1", "--prvr_train_annos", "annos.jsonl", "--prvr_val_annos", "annos.jsonl",
        "--video_dir", "videos", "--pretrained_clip_name", "clip.pt",
        "--pyr_config_path", "pyramid.json", "--adapter_channels", "16", "--lr", "5e-3",
        "--batch_size", str(BATCH), "--epochs", str(EPOCHS), "--n_display", "1",
        "--save_every_steps", "2", "--output_dir", str(output), "--resume", "auto",
        "--num_thread_reader", str(workers), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory) -> Path:
    """The run that was never stopped, and how long it took."""
    output = tmp_path_factory.mktemp("whole") / RUN
    assert program.run(*flags(output)) == 0, program.output.read_text()
    return output


def step_losses(output: Path) -> dict[int, set[float]]:
    """All losses that TensorBoard has of every step, by whatever attempt."""
    losses: dict[int, set[float]] = {}
    for path in output.glob("events.out.tfevents.*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "step/loss":
                    losses.setdefault(event.step, set()).add(value.simple_value)
    return losses


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def outcome(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in MEASURED}


def checkpoint(output: Path, name: str = "ckpt.pth.tar") -> dict:
    content = torch.load(output / name, weights_only=True)
    content["last_record"] = outcome(content["last_record"])
    del content["args"]  # the number of workers
    return content


def assert_equal(ours: object, theirs: object, where: str = "") -> None:
    """Bit for bit, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(output: Path, whole: Path) -> None:
    expected = step_losses(whole)
    assert expected.keys() == set(range(1, STEPS * EPOCHS + 1))
    assert all(len(losses) == 1 for losses in expected.values())
    assert step_losses(output) == expected
    assert [outcome(line) for line in lines(output)] == [outcome(line) for line in lines(whole)]
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_equal(checkpoint(output, name), checkpoint(whole, name), name)
    assert not list(output.glob("*.part")) and not list(output.glob(".*.part"))


def kill_and_resume(program, whole: Path, output: Path, kills: int, seed: int) -> list[str]:
    """SIGKILL after random times, with another number of workers each time, then to the end.

    Returns:
        Where the run stood after each kill: epoch and step of its checkpoint.
    """
    draw = random.Random(seed)
    started = time.monotonic()
    assert program.run(*flags(output / "timed")) == 0
    duration = time.monotonic() - started
    stood = []
    for _ in range(kills):
        run = program.start(*flags(output / RUN, workers=draw.choice([0, 0, 1, 2])))
        time.sleep(draw.uniform(0.1, 1) * duration)
        try:
            os.kill(run, signal.SIGKILL)
        except ProcessLookupError:
            assert program.wait() == 0
            break
        assert program.wait() in (0, -signal.SIGKILL)
        latest = output / RUN / "ckpt.pth.tar"
        if latest.is_file():  # every one can be read
            content = torch.load(latest, weights_only=True)
            stood.append(f"{content['epoch']}.{content['sums']['steps']}")
    assert program.run(*flags(output / RUN, workers=draw.choice([0, 2]))) == 0
    assert_same_run(output / RUN, whole)
    return stood


def test_killed_at_random_points(program, whole, tmp_path) -> None:
    kill_and_resume(program, whole, tmp_path, kills=3, seed=1)
