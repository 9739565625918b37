"""The whole method on a corpus of its own: videos, a small CLIP, ProPy, and a table to compare.

Run it through scripts/demo.sh. Everything is made here and depends on the seed alone: rendered
videos with captions and times (scripts/demo/world.py), a CLIP that is trained on single frames,
and then main.py, called as for the real data sets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dataloaders.annotations import VAL, Split
from dataloaders.datasets import evaluation_text_batches
from dataloaders.frame_store import FrameStore
from dataloaders.sampling import eval_indices
from dataloaders.tokenizer import tokenize
from models import load_propy
from models.clip import CLIP, CLIPSizes
from models.zero_shot import ZeroShot, events_of, span_means
from scripts.demo.world import (
    LARGE,
    SMALL,
    Clip,
    Scale,
    draw_clips,
    draw_pictures,
    render_shot,
    write_annotations,
    write_clips,
)
from utils.command import Parser, number, run_command
from utils.evaluation.embed import embed_texts, embed_videos
from utils.evaluation.ranking import video_scores
from utils.evaluation.retrieval_metrics import ranks_of, recall_metrics
from utils.evaluation.rows import ZERO_SHOT
from utils.evaluation.tables import PRVR_COLUMNS, metrics_table
from utils.misc import usable_cores
from utils.training.checkpoint import BEST
from utils.training.optim import learning_rate, set_learning_rate

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64  # pixels, of videos and of the CLIP
CLIP_SIZES = CLIPSizes(
    embed_dim=64, vision_width=64, vision_layers=3, patch_size=16, grid=SIZE // 16,
    text_width=64, text_layers=3, context_length=77, vocab_size=49408,
)  # fmt: skip
ADAPTER_CHANNELS = 64
PICTURE_BATCH = 128
BATCH = 12  # videos of a training step
QUERY_TYPES = ("appearance", "motion", "order")


@dataclass(frozen=True)
class Size:
    """How much is made and learned."""

    scale: Scale
    train_videos: int
    val_videos: int
    test_videos: int
    epochs: int
    pictures: int  # that CLIP learns from
    image_steps: int
    text_steps: int
    max_words: int  # tokens of a caption, at least those of the longest


SIZES = {
    "small": Size(SMALL, 600, 100, 100, 18, 16_000, 600, 400, 16),
    "large": Size(LARGE, 4000, 300, 500, 20, 48_000, 3000, 800, 20),
}
FOLDERS = {"small": "demo", "large": "demo_large"}  # of videos; a run's in logs and VIS is alike


def main(arguments: list[str] | None = None) -> None:
    """Each step says what it does."""
    args = parse_args(arguments)
    started = time.perf_counter()
    folder = prepare(args)
    run, pictures = ROOT / "logs" / folder.name, ROOT / "VIS" / folder.name

    print("[3/4] training and evaluating ProPy: main.py, as on a real data set")
    chosen = {"test": "the test videos, as in the authors' program", "val": "validation videos"}
    print(f"the best epoch is chosen on {chosen[args.choose_on]}", flush=True)
    shutil.rmtree(run, ignore_errors=True)
    run_main(folder, run, pictures, args)

    print("[4/4] what the same CLIP finds without ProPy")
    split = Split.read(folder / "test.jsonl", VAL)
    show(split, all_scores(folder, run, split, args))
    minutes = (time.perf_counter() - started) / 60
    print(
        f"\nThe run: {relative(run)} (log.txt, log.jsonl, checkpoints), as a page: "
        f"{relative(run)}/report.html\n"
        f"What three queries attend to: {relative(pictures)}/attention\n"
        f"Videos and annotations: {relative(folder)}\n"
        f"{minutes:.1f} minutes."
    )


def prepare(args: argparse.Namespace) -> Path:
    """The folder of videos and CLIP; what an earlier run has made with these settings is kept."""
    size, folder = SIZES[args.size], ROOT / FOLDERS[args.size]
    settings = {
        "world": zlib.crc32((ROOT / "scripts/demo/world.py").read_bytes()),
        "scale": astuple(size.scale),
        "seed": args.seed,
        "videos": [args.train_videos, args.val_videos, args.test_videos],
        "clip": [*astuple(CLIP_SIZES), size.pictures, PICTURE_BATCH, size.image_steps,
                 size.text_steps],
    }  # fmt: skip
    stamp, content = folder / "settings.json", json.dumps(settings)
    if stamp.is_file() and stamp.read_text() == content:
        print(f"[1, 2/4] videos and CLIP of an earlier run with these settings: {relative(folder)}")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make_corpus(folder, args)
    make_clip(folder / "clip.pt", size, args.seed)
    stamp.write_text(content)
    return folder


def make_corpus(folder: Path, args: argparse.Namespace) -> None:
    """Render the videos of all splits, write their annotations, and pack the frames for reading.

    Training reads every video some twenty times; so small a frame is read from the store in an
    eighth of the time that decoding takes.
    """
    for split in ("train", "val", "test"):
        count = getattr(args, f"{split}_videos")
        clips = draw_clips(split, count, args.seed, SIZES[args.size].scale)
        write_annotations(folder / f"{split}.jsonl", clips)
        written = write_clips(folder / "videos", clips, SIZE, usable_cores())
        for _ in tqdm(written, desc=f"[1/4] {split} videos", total=count, unit="video"):
            pass
    store = {"video_dir": folder / "videos", "frame_store": folder / "frames.h5", "size": SIZE}
    run_program("scripts.data.pack_frames", flags(store))


def make_clip(path: Path, size: Size, seed: int) -> None:
    """A CLIP that knows single pictures, in OpenAI's format.

    First the image tower and one vector per word learn from each other, then the text tower learns
    to say what the words say together: on so few pictures a transformer would take far longer.
    """
    torch.manual_seed(seed)
    images, captions = draw_pictures(size.pictures, SIZE, seed)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    known, words = tokenize(captions, 77).unique(return_inverse=True)  # 0 is the padding
    clip = CLIP(replace(CLIP_SIZES, vocab_size=len(known)))
    clip.initialize()
    bag = nn.Embedding(len(known), CLIP_SIZES.embed_dim)
    nn.init.normal_(bag.weight, std=0.3)
    batches = np.random.default_rng(seed).integers(
        len(captions), size=(size.image_steps + size.text_steps, PICTURE_BATCH)
    )
    batches = torch.from_numpy(batches)

    def sum_of_words(rows: Tensor) -> Tensor:
        present = (words[rows] != 0).unsqueeze(-1)
        return F.normalize((bag(words[rows]) * present).sum(1), dim=-1)

    def image_loss(rows: Tensor) -> Tensor:
        seen = F.normalize(clip.encode_image(clip.normalize(images[rows])), dim=-1)
        logits = clip.logit_scale.exp() * sum_of_words(rows) @ seen.T
        own = torch.arange(len(rows))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def text_loss(rows: Tensor) -> Tensor:
        length = int((words[rows] != 0).sum(1).max())
        said = F.normalize(clip.encode_text(words[rows, :length]), dim=-1)
        return (said - sum_of_words(rows).detach()).square().sum(1).mean()

    image_side = [*clip.visual.parameters(), *bag.parameters(), clip.logit_scale]
    inner = {id(p) for p in image_side}
    text_side = [p for p in clip.parameters() if id(p) not in inner]
    fit(image_loss, image_side, batches[: size.image_steps], "[2/4] CLIP, pictures and words")
    fit(text_loss, text_side, batches[size.image_steps :], "[2/4] CLIP, text tower")
    state = clip.state_dict()
    # words that no picture had keep random vectors, as small as a new CLIP's
    table = torch.randn(CLIP_SIZES.vocab_size, CLIP_SIZES.text_width) * 0.02
    table[known] = state["token_embedding.weight"]
    torch.save(state | {"token_embedding.weight": table}, path)


def fit(
    loss_of: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], batches: Tensor, what: str
) -> None:
    """AdamW over the batches with warm-up and cosine."""
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr_scale": 1.0}], betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )
    with tqdm(batches, desc=what, unit="step") as progress:
        for step, rows in enumerate(progress):
            set_learning_rate(optimizer, learning_rate(step + 1, len(batches), 2e-3))
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")


def run_main(folder: Path, run: Path, pictures: Path, args: argparse.Namespace) -> None:
    """main.py as for a real split: training for PRVR, then an evaluation that adds the moments."""
    evaluation = {"resume": run / BEST, "save_predictions": 1, "do_plot": 1, "plot_limit": 3}
    common = {"output_dir": run, "plot_dir": pictures, "seed": args.seed}
    run_program("main", flags(training_flags(folder, args) | common))
    run_program("main", flags(evaluation_flags(folder, args) | common | evaluation))
    report = {"queries": 3, "video_dir": folder / "videos", "annotations": folder / "test.jsonl"}
    run_program("scripts.report", [str(run), *flags(report)])


def training_flags(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """main.py's for a training that evaluates every epoch on the split which chooses the best."""
    return {
        "do_train": 1,
        "prvr_train_annos": folder / "train.jsonl",
        "prvr_val_annos": folder / f"{args.choose_on}.jsonl",
        "epochs": args.epochs,
        "batch_size": BATCH,
        "lr": 2e-2,
    } | model_flags(folder, args)


def evaluation_flags(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """main.py's for all metrics of the test split."""
    test = {"do_eval": 1, "subtask_type": "VCMR", "prvr_val_annos": folder / "test.jsonl"}
    return test | model_flags(folder, args)


def model_flags(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    return {
        "frame_store": folder / "frames.h5",
        "pretrained_clip_name": folder / "clip.pt",
        "clip_activation": "quick_gelu",
        "adapter_channels": ADAPTER_CHANNELS,
        "max_words": SIZES[args.size].max_words,
    }


def flags(values: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def run_program(module: str, arguments: list[str]) -> None:
    """One of the project's programs, in a process of its own; stops here if it fails."""
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


@torch.inference_mode()
def all_scores(
    folder: Path, run: Path, split: Split, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Scores [T, V] of CLIP alone, with a video's mean and with its best frame, and of ProPy.

    CLIP alone also sees the videos as clear as the pictures it knows, which ProPy never does.
    """
    model = load_propy(run / BEST)
    pyramid, store = model.pyramid, FrameStore(folder / "frames.h5")
    num_frames = pyramid.num_frames
    seen = torch.stack([store.load(video.vid_name, num_frames, SIZE) for video in split.videos])
    clips = draw_clips("test", args.test_videos, args.seed, SIZES[args.size].scale)
    clear = clear_frames(clips, num_frames)
    cpu = torch.device("cpu")
    max_words = SIZES[args.size].max_words
    texts = evaluation_text_batches(split.queries, max_words, len(split.queries))

    def embed(model: nn.Module, videos: Tensor) -> Tensor:
        batches = [{"frames": some} for some in videos.split(16)]
        return torch.cat(embed_videos(model, batches, cpu))  # [V, N_e, D]

    alone = ZeroShot(model.clip, model.config, "best")
    frames, sentences = embed(alone, seen), embed_texts(alone, texts, cpu)
    return {
        ZERO_SHOT["mean"]: video_scores(sentences, span_means(frames, events_of("mean", pyramid))),
        ZERO_SHOT["best"]: video_scores(sentences, frames),
        "the same on clear videos": video_scores(sentences, embed(alone, clear)),
        "ProPy": video_scores(embed_texts(model, texts, cpu), embed(model, seen)),
    }


def clear_frames(clips: Sequence[Clip], num_frames: int) -> Tensor:
    """The evaluation frames of clips as they were before the camera: uint8 [V, N_f, 3, S, S]."""
    videos = []
    for clip in clips:
        frames = np.concatenate([render_shot(shot, SIZE) for shot in clip.shots])
        videos.append(frames[eval_indices(len(frames), num_frames)])
    return torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3)


def show(split: Split, scores: dict[str, Tensor]) -> None:
    """One table: all captions, then those of appearance and of motion alone.

    Args:
        scores: [T, V] of every row of the table.
    """
    queries, target = split.queries, split.target
    num_videos = scores["ProPy"].shape[1]
    columns = {key: PRVR_COLUMNS[key] for key in ("R1", "R5", "R10", "R100", "SumR")}
    print(f"\n{len(queries)} captions, {num_videos} held-out videos; in %:")
    for kind in (None, *(t for t in QUERY_TYPES if any(q.query_type == t for q in queries))):
        chosen = torch.tensor([kind in (None, query.query_type) for query in queries])
        rows = {"chance": chance(num_videos)}
        for name, all_rows in scores.items():
            own, right = all_rows[chosen], target[chosen]
            found = recall_metrics(ranks_of(own, right))
            rows[name] = found | {"twin": against_twin(own, right)}
        print(f"\n{kind or 'all'} captions ({int(chosen.sum())})")
        print(metrics_table(rows, columns | {"twin": "vs twin"}))
    print(
        "\nvs twin: how often the right video beats its twin, which shows the same motion played\n"
        "backwards. No single frame can tell the two apart by a motion caption: 50 is chance."
    )


def against_twin(scores: Tensor, target: Tensor) -> float:
    """In %, how often a text's right video, int64 [T], has a higher score, [T, V], than its twin.

    Clips come in pairs of the same moving shots played forwards and backwards.
    """
    right, twin = (scores.gather(1, column[:, None]) for column in (target, target ^ 1))
    return 50 * ((right - twin).sign() + 1).mean().item()


def chance(videos: int) -> dict[str, float]:
    """What a random order of the videos gives."""
    recalls = {f"R{k}": 100 * min(k, videos) / videos for k in (1, 5, 10, 100)}
    return recalls | {"SumR": sum(recalls.values()), "twin": 50.0}


def relative(path: Path) -> Path:
    return path.relative_to(ROOT)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    add, small = parser.add_argument, SIZES["small"]
    # fmt: off
    add("--size", choices=SIZES, default="small",
        help="large: more and longer videos with moments of all lengths, an hour (default small)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything (default 42)")
    add("--train_videos", type=int,
        help=f"even, at least {BATCH} (default {small.train_videos}; large: more)")
    add("--val_videos", type=int, help=f"even (default {small.val_videos}; large: more)")
    add("--test_videos", type=int, help=f"even (default {small.test_videos}; large: more)")
    add("--epochs", type=number(int, 1), help=f"of ProPy (default {small.epochs}; large: more)")
    add("--choose_on", choices=["test", "val"], default="test",
        help="split that chooses the best epoch: test, which is reported, as in the authors' "
        "program, or val, videos of its own (default test)")
    # fmt: on
    args = parser.parse_args(arguments)
    for name in ("train_videos", "val_videos", "test_videos", "epochs"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(SIZES[args.size], name))
    for name, least in (("train_videos", BATCH), ("val_videos", 2), ("test_videos", 2)):
        count = getattr(args, name)
        if count < least or count % 2:  # clips come in pairs
            parser.error(f"--{name} must be even and at least {least}: {count}")
    return args


if __name__ == "__main__":
    run_command(main)
