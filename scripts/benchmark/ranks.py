"""Step time against the number of processes, started by torchrun; one thread each on a CPU.

    for n in 1 2 4; do
      .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node $n \\
        -m scripts.benchmark.ranks --videos 24
    done

--videos is the global batch (strong scaling); --videos_each that of one process (weak scaling).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from scripts.benchmark.harness import Options
from scripts.benchmark.model import SIZES, build, draw_texts, draw_videos
from utils import distributed
from utils.command import Parser, run_command
from utils.distributed import is_main, own_share, process_group, world_size
from utils.misc import choose_device, disable_tf32, peak_memory_gib
from utils.training.engine import train_step
from utils.training.optim import build_optimizer


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(SIZES), default="b32", help="CLIP's size (default b32)")
    add("--videos", type=int, default=24, help="of the global batch (default 24)")
    add("--videos_each", type=int, help="of a process, instead")
    add("--captions", type=int, default=5, help="of a video (default 5)")
    add("--precision", choices=["amp", "bf16", "fp32"], default="fp32", help="(default fp32)")
    add("--steps", type=int, default=5, help="timed steps, after two (default 5)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    disable_tf32()
    device = choose_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    with process_group(None, device):
        measure(args, device)


def measure(args: argparse.Namespace, device: torch.device) -> None:
    videos = args.videos_each * world_size() if args.videos_each else args.videos
    own = own_share(videos)
    options = Options(model=args.model, videos=own.stop - own.start, device=device.type)
    model, texts = build(options).train(), videos * args.captions
    batch = {
        "frames": draw_videos(model, options),
        "token_ids": draw_texts(model, texts, options),
        "text_to_video": torch.arange(videos, device=device).repeat_interleave(args.captions),
        "vid_names": [""] * videos,
    }
    optimizer = build_optimizer(model, 8e-4, 1e-3, 0.2)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "amp")
    waited, sent = count_collectives(device)
    steps = []
    for _ in range(2 + args.steps):
        distributed.barrier()
        waited.clear(), sent.clear()
        started = time.perf_counter()
        train_step(model, batch, optimizer, scaler, precision=args.precision)
        synchronize(device)
        steps.append((time.perf_counter() - started, sum(waited), sum(sent)))
    seconds, communicating, bytes_ = (statistics.median(x) for x in zip(*steps[2:], strict=True))
    if is_main():
        print(
            f"{world_size()} processes, {videos} videos, {texts} texts on {device.type}: "
            f"{seconds:.3f} s a step, of which {communicating:.3f} s in collectives (waiting for "
            f"the slowest among it); {bytes_ / 2**20:.1f} MiB a process and step; "
            f"{peak_memory_gib(device):.2f} GiB"
        )


def count_collectives(device: torch.device) -> tuple[list[float], list[int]]:
    """Seconds and bytes of every collective operation from now on."""
    waited: list[float] = []
    sent: list[int] = []
    for name in ("all_gather", "all_reduce"):
        real = getattr(dist, name)

        def timed(*arguments, real=real, **settings):
            synchronize(device)
            started = time.perf_counter()
            result = real(*arguments, **settings)
            synchronize(device)
            waited.append(time.perf_counter() - started)
            sent.append(arguments[-1].nbytes if torch.is_tensor(arguments[-1]) else 0)
            return result

        setattr(dist, name, timed)
    return waited, sent


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_command(main)
