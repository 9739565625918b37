"""What a process of tests/test_distributed.py computes; torchrun starts it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloaders.sampling import share
from tests.golden_model import GoldenModel, inputs
from utils.distributed import is_main, process_group, rank, world_size
from utils.training.checkpoint import load_checkpoint
from utils.training.engine import PUBLISHED_LOSS, LossWeights, batch_gradient, train_step
from utils.training.optim import build_optimizer, learning_rate, set_learning_rate

CAPTIONS = [1, 4, 2, 1, 5, 3]  # of the six videos: ragged


def random_batch(model, dtype: torch.dtype) -> dict:
    """The whole batch, of which this process gets its share of the videos."""
    generator = torch.Generator().manual_seed(1)
    side, frames = model.input_resolution, model.pyramid.num_frames
    videos = torch.randn(len(CAPTIONS), frames, 3, side, side, generator=generator, dtype=dtype)
    token_ids = torch.randint(1, 30, (sum(CAPTIONS), 9), generator=generator)
    token_ids[:, 6] = model.clip.sizes.vocab_size - 1
    target = torch.arange(len(CAPTIONS)).repeat_interleave(torch.tensor(CAPTIONS))
    return {
        "frames": videos[share(len(videos), rank(), world_size())],
        "token_ids": token_ids,
        "text_to_video": target,
        "vid_names": [str(i) for i in range(len(videos))],
    }


def gradients(
    folder: Path, micro_batches: int, weights: LossWeights = PUBLISHED_LOSS, **chosen: object
) -> None:
    """The loss and every gradient of a batch."""
    torch.manual_seed(0)
    model = GoldenModel.read("m3").build(**chosen).double()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = random_batch(model, torch.float64)
    loss, _ = batch_gradient(model, batch, scaler, "fp32", micro_batches, weights)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    save(folder, found | {"loss": loss})


def steps(folder: Path, precision: str, inf_on: int = -1) -> None:
    """Four steps, before the third of which an inf is planted in a process's own gradient."""
    torch.manual_seed(0)
    model = GoldenModel.read("m3").build()
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.2)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "amp", init_scale=16.0)
    skipped = []
    for step in range(4):
        if step == 2 and inf_on == rank():
            handle = model.prompts.event_prompts.register_hook(lambda g: torch.full_like(g, np.inf))
        batch = random_batch(model, torch.float32)
        skipped.append(train_step(model, batch, optimizer, scaler, precision=precision).skipped)
        if step == 2 and inf_on == rank():
            handle.remove()
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    scale = torch.tensor(scaler.get_scale())
    save(folder, state | {"scale": scale, "skipped": torch.tensor(skipped)}, every_rank=True)


def golden_steps(folder: Path) -> None:
    """Losses and gradient norms of the twelve steps that the authors' program took."""
    golden = GoldenModel.read("m3")
    model = golden.build()
    folder.mkdir(exist_ok=True)
    load_checkpoint(
        golden.write_authors_checkpoint(folder / f"authors{world_size()}-{rank()}.pth.tar"), model
    )
    model.double()
    settings = golden.config["train"]
    optimizer = build_optimizer(model, settings["lr"], settings["coef_lr"], settings["wd"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    _, *shape = golden.config["video"]
    found = []
    for step in range(12):
        set_learning_rate(optimizer, learning_rate(step, 12, settings["lr"]))
        videos = torch.from_numpy(inputs.video(20 + step % 3, *shape)).double()
        batch = {
            "frames": videos[share(len(videos), rank(), world_size())],
            "token_ids": golden.token_ids().roll(step % 3, dims=0),
            "text_to_video": torch.from_numpy(golden["labels"]),
            "vid_names": [str(i) for i in range(len(videos))],
        }
        result = train_step(model, batch, optimizer, scaler)
        found.append((result.loss, result.grad_norm))
    save(folder, {"steps": torch.tensor(found, dtype=torch.float64)}, every_rank=True)


def save(folder: Path, tensors: dict[str, Tensor], every_rank: bool = False) -> None:
    if every_rank or is_main():
        folder.mkdir(exist_ok=True)
        torch.save(tensors, folder / f"{world_size()}-{rank()}.pt")


# With CLIP trained too; with every further term of the loss, and another read-out.
WORKS = {
    **{
        f"gradients-{micro}-{freeze}": partial(
            gradients, micro_batches=micro, freeze_clip=freeze == 1
        )
        for micro in (1, 2)
        for freeze in (1, 0)
    },
    **{
        f"more-{micro}-{share}": partial(
            gradients, micro_batches=micro, weights=LossWeights(0.7, 3.0, 0.3, share),
            readout="consensus",
        )
        for micro, share in ((1, 0.5), (2, 0.5), (1, 0.2))
    },
    **{f"steps-{name}": partial(steps, precision=name) for name in ("fp32", "bf16", "amp")},
    "inf": partial(steps, precision="amp", inf_on=1),
    "golden": golden_steps,
}  # fmt: skip

if __name__ == "__main__":
    base, *chosen = sys.argv[1:]
    torch.set_num_threads(1)
    with process_group("gloo", torch.device("cpu")):
        for name in chosen or WORKS:
            WORKS[name](Path(base) / name)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert "pt_gloo_runloop" not in threads, "it would outlive the interpreter, and may abort it"
