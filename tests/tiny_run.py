"""A whole run in seconds: four clips, two epochs, evaluated with predictions, three queries drawn.

Its query ids and captions are what pictures and pages have to survive.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dataloaders.ffmpeg import write_video
from tests.golden_model import make_weights

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128,) * 3}
IDS = ["v/0#0", "v/0#1", "v_1#0", "v_1#1", 7, "..", "3%2F#0", "<b>3</b>"]
CAPTIONS = {"v/0#1": "it costs $5 and then $6 <script>alert(1)</script> & more"}
PYRAMID = '{"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]}'


@dataclass(frozen=True)
class TinyRun:
    """Where everything is; `logs` is the run's folder, `plots` what was drawn."""

    corpus: Path

    @property
    def logs(self) -> Path:
        return self.corpus / "logs"

    @property
    def plots(self) -> Path:
        return self.corpus / "plots"

    def main(self, *flags: str) -> subprocess.CompletedProcess:
        """main.py on the corpus, whose videos are in a folder unless `flags` name a frame store."""
        videos = [] if "--frame_store" in flags else ["--video_dir", "videos"]
        command = [
            sys.executable, str(ROOT / "main.py"), "--prvr_val_annos", "annos.jsonl",
            *videos, "--output_dir", str(self.logs), "--plot_dir", str(self.plots),
            "--pretrained_clip_name", "clip.pt", "--pyr_config_path", "pyramid.json",
            "--adapter_channels", "16", "--batch_size", "2", "--num_thread_reader", "0",
            "--lr", "2e-3", *flags,
        ]  # fmt: skip
        return subprocess.run(command, cwd=self.corpus, capture_output=True, text=True, timeout=300)


@cache
def make_run(base: Path) -> TinyRun:
    """Made once a session; `base` is the session's temporary folder."""
    run = TinyRun(base / "tiny_run")
    (run.corpus / "videos").mkdir(parents=True)
    names = list(COLOURS)
    lines = []
    for index, first in enumerate(names):
        second = names[(index + 1) % len(names)]
        frames = np.empty((20, 64, 64, 3), np.uint8)
        frames[:10], frames[10:] = COLOURS[first], COLOURS[second]
        write_video(run.corpus / "videos" / f"clip {index}.mp4", frames)
        for part, colour in enumerate((first, second)):
            name = IDS[2 * index + part]
            lines.append({
                "vid_name": f"clip {index}", "desc_id": name, "duration": 20 / 3,
                "desc": CAPTIONS.get(name, f"a {colour} wall before a {second} one"),
                "ts": [part * 3, part * 3 + 3],
            })  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.corpus / "annos.jsonl").write_text(text)
    torch.save(
        make_weights.torch_state(make_weights.make("tiny", 1, "fp16")), run.corpus / "clip.pt"
    )
    (run.corpus / "pyramid.json").write_text(PYRAMID)
    done = run.main(
        "--do_train", "1", "--prvr_train_annos", "annos.jsonl", "--epochs", "2", "--do_eval", "1",
        "--save_predictions", "1", "--datatype", "tvr",
        "--do_plot", "1", "--plot_ids", "v/0#1", "..", "7",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return run
