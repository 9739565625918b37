"""What is fuzzed: each kind of file that the program reads, what reads it, and corrupted ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataloaders import DataError
from dataloaders.annotations import read_annotations
from dataloaders.ffmpeg import raw_input_arguments, run_ffmpeg, write_video
from dataloaders.video import load_clip
from models import ProPy, build_model
from models.clip import CLIP, CLIPSizes
from models.clip_weights import build_clip
from modules import ModelError
from modules.pyramid import PromptPyramid
from tests.corpus import moving_noise
from tests.fuzz.mutations import Cases, json_cases, mp4_cases, torch_cases
from tests.golden_model import authors_view
from utils import RunError
from utils.report.run_log import read_args
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.optim import build_optimizer
from utils.training.progress import Progress

SIZE, NUM_FRAMES = 64, 8
PYRAMID = {"Nf": NUM_FRAMES, "H": [[2, 2], [2, 1], [3, 1]]}
OFFSETS = {"Nf": 32, "offset": [0, 1, 1, 1, 1]}  # the other form
SETTINGS = {"datatype": "tvr", "lr": 8e-4, "video_dir": "videos", "plot_ids": ["a"]}
LINE = {"vid_name": "v1", "desc_id": 7, "desc": "“日本語”", "duration": 9.5, "ts": [0, 2]}
LINES = [LINE, LINE | {"desc_id": "a", "ts": [[0, 2.5], [3, 4]], "type": "v"}]


class Kind(NamedTuple):
    """Name of the file, its reader (True: a proper result), the error that may refuse it, and what
    makes corrupted ones, given an empty folder."""

    file: str
    read: Callable[[Path], bool]
    error: type[Exception]
    cases: Callable[[Path], Cases]


@cache
def _model() -> tuple[ProPy, torch.optim.Optimizer, torch.amp.GradScaler]:
    torch.manual_seed(0)
    clip = CLIP(CLIPSizes(16, 64, 1, 32, 2, 64, 1, 77, 100))
    clip.initialize()
    model = build_model(clip.state_dict(), PYRAMID, adapter_channels=8)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return model, build_optimizer(model, 1e-3, 1e-3, 0.2), scaler


def _read_annotations(path: Path) -> bool:
    return all(
        0 < query.duration < float("inf") and query.desc.strip() and "/" not in query.vid_name
        for query in read_annotations(path)
    )


def _read_args(path: Path) -> bool:
    return isinstance(read_args(path.parent), dict)


def _read_pyramid(path: Path) -> bool:
    pyramid = PromptPyramid.from_config(path)
    return pyramid.spans.shape == (pyramid.num_events, 2)


def _read_checkpoint(path: Path) -> bool:
    return isinstance(load_checkpoint(path, *_model()), Progress) and _is_finite(_model()[0])


def _read_clip(path: Path) -> bool:
    return _is_finite(build_clip(path))


def _is_finite(model: torch.nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


def _read_video(path: Path) -> bool:
    rngs = None, np.random.RandomState(0)  # as in evaluation, as in training
    clips = [load_clip(path, NUM_FRAMES, SIZE, rng) for rng in rngs]
    return all(c.dtype == torch.uint8 and c.shape == (NUM_FRAMES, 3, SIZE, SIZE) for c in clips)


def _clips(_: Path) -> Cases:
    return torch_cases(_model()[0].clip.state_dict())


def _checkpoints(folder: Path) -> Cases:
    """Of this program with an optimizer's state, and of the authors'."""
    model, optimizer, scaler = _model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    progress = Progress(3, 120, 51.5, 2, {"lr": 1e-3, "subtask_type": "PRVR"})
    save_checkpoint(folder / "sample", model, optimizer, scaler, progress)
    state = authors_view(model.state_dict().items())
    state = {f"module.{name}": tensor.clone() for name, tensor in state.items()}
    authors = {"epoch": 10, "best_acc1": np.float64(51.25), "state_dict": state}
    return torch_cases(torch.load(folder / "sample", weights_only=False), authors)


def _videos(folder: Path) -> Cases:
    """As prepared, and as another encoder would write them, also into other containers."""
    frames = list(moving_noise(40, 64, 88))
    write_video(folder / "a.mp4", frames)
    for name, flags in (("b.mp4", "+faststart"), ("fragments.mp4", "frag_keyframe+empty_moov"),
                        ("matroska.mkv", "")):  # fmt: skip
        output = ["-c:v", "libx264", "-g", "12", "-bf", "3", "-pix_fmt", "yuv420p"]
        output += ["-movflags", flags] if flags else []
        arguments = [*raw_input_arguments(88, 64, 3), *output, "-y", str(folder / name)]
        run_ffmpeg(arguments, feed=(frame.tobytes() for frame in frames))
    return mp4_cases(*(path.read_bytes() for path in sorted(folder.iterdir())))


PYRAMIDS = json_cases([PYRAMID]) | json_cases([OFFSETS])
KINDS = {
    "annotations": Kind("annos.jsonl", _read_annotations, DataError, lambda _: json_cases(LINES)),
    "pyramid": Kind("pyramid.json", _read_pyramid, ModelError, lambda _: PYRAMIDS),
    "args": Kind("args.json", _read_args, RunError, lambda _: json_cases([SETTINGS])),
    "checkpoint": Kind("model.pth.tar", _read_checkpoint, ModelError, _checkpoints),
    "clip": Kind("clip.pt", _read_clip, ModelError, _clips),
    "video": Kind("video.mp4", _read_video, DataError, _videos),
}
