#!/usr/bin/env python3
"""Train and evaluate ProPy. The only reader of the flags: everything else takes plain values.

    .venv/bin/python main.py --do_train 1 --prvr_train_annos … --prvr_val_annos … --video_dir …
    .venv/bin/python main.py --do_eval 1 --resume logs/prvr_tvr/ckpt.best.pth.tar …
    .venv/bin/python main.py --do_plot 1 --resume logs/prvr_tvr/ckpt.best.pth.tar …

The published settings of every split are in scripts/prvr_<split>.sh.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import torch

from dataloaders import DataError
from dataloaders.annotations import Query, corpus_videos, read_annotations, summary
from dataloaders.clips import ClipSource, VideoFolder, listed
from dataloaders.datasets import training_loader
from dataloaders.frame_store import FrameStore
from dataloaders.loader import LeaveOut, TrainingLoader
from dataloaders.preflight import find_unusable
from models import ProPy, build_model
from models.clip_weights import weights_path
from modules import ModelError
from modules.pyramid import PromptPyramid
from utils import OutputError, RunError
from utils.arguments import AUTO, parse_args
from utils.evaluation.embeddings import KeptEmbeddings, load_embeddings, save_embeddings
from utils.evaluation.evaluator import VAL, Evaluation, Reading
from utils.evaluation.moment_tables import times_missing
from utils.evaluation.predictions import EXPORTS, SAVED
from utils.evaluation.published import split_size_warning
from utils.files import atomic_write, check_outputs, locked_folder, writing
from utils.logger import append_json, log_to_file, setup_logging
from utils.misc import git_revision, memory_advice, parameter_report, pick_device, set_seed
from utils.missing_videos import LeftOut
from utils.pictures.attention_store import ATTENTION, HITS, SCORES
from utils.pictures.plots import PlotSettings, check_request
from utils.training.checkpoint import BEST, LATEST, load_checkpoint
from utils.training.optim import build_optimizer, learning_rate
from utils.training.profiling import traced_steps
from utils.training.progress import Checkpoint
from utils.training.signals import Stopped
from utils.training.trainer import CHANGE_A_RUN, LESS_MEMORY_EVALUATING, Trainer, adapt

TRAIN = "train"  # what records and lists call the split
FRAMES = "frames of a video"  # what checkpoints call it


# What a user can mend; everything else is a bug and keeps its traceback.
USER_ERRORS = (
    DataError,
    RunError,
    RunError,
    RunError,
    OutputError,
    RunError,
    ModelError,
    RunError,
    RunError,
    DataError,
    ModelError,
)


def main(args: argparse.Namespace) -> None:
    """One run, which has its output folder to itself."""
    with locked_folder(args.output_dir):
        run(args, setup_logging(args.output_dir))


def run(args: argparse.Namespace, log: logging.Logger) -> None:
    """Wire everything up from the flags, then train, evaluate and plot as asked for."""
    log.info("propy %s, torch %s", git_revision(), torch.__version__)
    set_seed(args.seed)
    device = pick_device()
    precision = args.precision or ("amp" if device.type == "cuda" else "fp32")
    log.info("device %s, precision %s; float32 is computed as such, TF32 is off", device, precision)

    check_outputs(outputs(args))
    val_queries = read_split(args.prvr_val_annos, args.datatype, "val", log)
    train_queries = (
        read_split(args.prvr_train_annos, args.datatype, "train", log) if args.do_train else []
    )
    if args.load_embeddings:
        evaluate_kept(args, val_queries, device, log)
        return
    model = build_model(
        weights_path(args.pretrained_clip_name, args.pretrained_dir),
        args.pyr_config_path,
        num_prompts=args.Nvp,
        adapter_channels=args.adapter_channels,
        adapter_kernel=args.temp_kernel_sz,
        num_adapter_layers=args.num_adapter_layers,
        freeze_clip=bool(args.freeze_clip),
        trust_archive=bool(args.trust_clip_archive),
        checkpoint_activations=bool(args.checkpoint_activations),
    ).to(device)
    if args.compile:
        model.compile_encoders()
    clips = FrameStore(args.frame_store) if args.frame_store else VideoFolder(args.video_dir)
    splits = {VAL: val_queries} | ({TRAIN: train_queries} if args.do_train else {})
    left_out = LeftOut(args.output_dir / "missing_videos.jsonl", splits)
    check_videos(args, splits, left_out, clips, model.input_resolution, log)
    val_queries = left_out.kept(VAL, val_queries)
    train_queries = left_out.kept(TRAIN, train_queries)
    check_times(args, val_queries, log)
    check_settings(args, model, train_queries)
    evaluation = Evaluation(
        val_queries,
        clips,
        model.pyramid.proposals,
        num_frames=model.pyramid.num_frames,
        size=model.input_resolution,
        max_words=args.max_words,
        batch_size=args.batch_size_val,
        num_workers=args.num_thread_reader,
        left_out=left_out if args.allow_missing else None,
        **reading_settings(args),
    )
    plots = PlotSettings(
        args.plot_dir, args.plot_layer, args.plot_head, args.plot_style, args.plot_format
    )
    if args.do_plot:
        check_request(plots, args.plot_ids, val_queries, model)

    best = args.resume
    if args.do_train:
        leave_out = partial(left_out.leave_out, TRAIN) if args.allow_missing else None
        best = train(
            args, model, evaluation, train_queries, clips, leave_out, device, precision, log
        )
        if note := left_out.note(TRAIN):
            log.warning("trained %s", note)
    if args.do_eval or args.do_plot:
        checkpoint = load_weights(args, best, model, log)
        log.info("using %s, %d epochs trained", best, checkpoint.epoch)
        with memory_advice(LESS_MEMORY_EVALUATING):
            embeddings = evaluation.embed(model, device)
        if args.save_embeddings:
            kept = KeptEmbeddings.of(
                embeddings,
                evaluation.queries,
                evaluation.proposals,
                max_words=args.max_words,
                checkpoint=best,
                epoch=checkpoint.epoch,
            )
            save_embeddings(args.save_embeddings, kept)
            log.info("embeddings kept in %s", args.save_embeddings)
    if args.do_eval:
        rows = evaluation.run(embeddings, args.output_dir if args.save_predictions else None)
        report(args, evaluation, rows, str(best), checkpoint.epoch, log)
    if args.do_plot:
        drawn, hits = evaluation.plot(
            embeddings,
            model,
            plots,
            ids=args.plot_ids,
            limit=args.plot_limit,
            seed=args.seed,
            source=str(best),
        )
        log.info(
            "%d queries drawn, of %s the right video is ranked first: %s",
            drawn,
            f"{hits:,} of {len(evaluation.queries):,}",
            plots.folder / "attention",
        )


def outputs(args: argparse.Namespace) -> list[Path]:
    """The files that a run with these flags writes, as far as they have fixed names."""
    names = ["missing_videos.jsonl"]
    if args.do_train:
        names += ["args.json", "log.jsonl", LATEST, BEST]
    if args.do_eval:
        names += ["eval.jsonl"]
    if args.save_predictions:
        names += [SAVED, *EXPORTS]
    files = [args.output_dir / name for name in names]
    if args.save_embeddings:
        files.append(args.save_embeddings)
    if args.do_plot:
        with writing(args.plot_dir):
            args.plot_dir.mkdir(parents=True, exist_ok=True)
        files += [args.plot_dir / name for name in (ATTENTION, SCORES, HITS)]
    return files


def evaluate_kept(
    args: argparse.Namespace, queries: list[Query], device: torch.device, log: logging.Logger
) -> None:
    """Metrics of kept embeddings: needs no videos, no CLIP, and no checkpoint but to compare."""
    kept = load_embeddings(args.load_embeddings)
    left_out = LeftOut(args.output_dir / "missing_videos.jsonl", {VAL: queries})
    if args.allow_missing and (lacking := kept.lacking(queries)):
        left_out.add(VAL, dict.fromkeys(lacking, f"{args.load_embeddings}: made without it"))
        queries = left_out.kept(VAL, queries)
        log.warning("%s: %s", VAL, left_out.note(VAL))
    check_times(args, queries, log)
    proposals = PromptPyramid.from_config(args.pyr_config_path).proposals
    try:
        kept.check(queries, proposals, max_words=args.max_words, checkpoint=args.resume)
    except RunError as error:
        raise RunError(f"{args.load_embeddings}: {error}") from None
    log.info("using %s, of %s after epoch %d", args.load_embeddings, kept.checkpoint, kept.epoch)
    reading = Reading(queries, proposals, left_out=left_out, **reading_settings(args))
    embeddings = kept.embeddings.to(device)
    rows = reading.run(embeddings, args.output_dir if args.save_predictions else None)
    report(args, reading, rows, kept.checkpoint, kept.epoch, log)


def reading_settings(args: argparse.Namespace) -> dict:
    """The flags that say how metrics are read off embeddings, see `Reading`."""
    return {
        "moments": args.subtask_type == "VCMR",
        "event_scores": args.event_scores,
        "per_video": args.npev,
        "limit": args.max_event_per_text,
        "window_rule": args.window_rule,
        "memory_gib": args.eval_memory_gib,
    }


def report(
    args: argparse.Namespace,
    reading: Reading,
    rows: dict[str, dict[str, float]],
    checkpoint: str,
    epoch: int,
    log: logging.Logger,
) -> None:
    """Show the metrics of an evaluation, and keep them in eval.jsonl."""
    for table in reading.tables(rows, args.datatype):
        log.info("\n%s", table)
    record = {"checkpoint": checkpoint, "epoch": epoch, "git": git_revision()} | reading.numbers()
    append_json(args.output_dir / "eval.jsonl", record | {"metrics": rows})


def check_videos(
    args: argparse.Namespace,
    splits: dict[str, list[Query]],
    left_out: LeftOut,
    clips: ClipSource,
    size: int,
    log: logging.Logger,
) -> None:
    """Which videos cannot be used, by their headers: an error, or they are left out."""
    reasons = []
    for split, queries in splits.items():
        unusable, doubtful = find_unusable(
            corpus_videos(queries),
            clips,
            size,
            open_files=not args.skip_check,
            num_threads=args.num_thread_reader,
        )
        left_out.add(split, unusable)
        reasons += unusable.values()
        if doubtful:
            log.warning(
                "%s: %d videos have less than half or more than twice the 3 frames a second that "
                "their annotated length asks for: were they prepared?\n%s",
                *(split, len(doubtful), listed(doubtful)),
            )
        if unusable and args.allow_missing:
            log.warning("%s: %s", split, left_out.note(split))
        if args.allow_missing and not left_out.kept(split, queries):
            raise DataError(f"no video of the {split} split can be used: {left_out.path} says why")
    if reasons and not args.allow_missing:
        reasons = list(dict.fromkeys(reasons))  # a video may be in both splits
        raise DataError(
            f"{len(reasons)} videos are missing or unreadable:\n{listed(reasons)}\n"
            f"{left_out.path} has the whole list. Set --video_dir, make them with `bash "
            "scripts/prepare.sh` (a frame store's with scripts/data/pack_frames.py), or go on "
            "without them: --allow_missing 1"
        )


def check_settings(args: argparse.Namespace, model: ProPy, train_queries: list[Query]) -> None:
    """What could only be said once weights and annotations were read."""
    context = model.clip.sizes.context_length
    if args.max_words > context:
        raise RunError(f"--max_words {args.max_words}: CLIP reads at most {context} tokens")
    videos = len(corpus_videos(train_queries))
    if args.do_train and videos < args.batch_size:
        raise RunError(
            f"--batch_size {args.batch_size}: {args.prvr_train_annos} has only {videos} videos"
        )


def check_times(args: argparse.Namespace, queries: list[Query], log: logging.Logger) -> None:
    """Moments are scored, and the best epoch chosen by them, where their times are known.

    Args:
        queries: of the evaluation, as far as their videos can be used.
    """
    if args.subtask_type != "VCMR":
        return
    missing = times_missing(queries)
    if missing and args.do_train and not any(query.windows for query in queries):
        raise RunError(
            f"{args.prvr_val_annos}: {missing}, so no best epoch can be chosen: train with "
            "--subtask_type PRVR, or give validation annotations with times"
        )
    if missing:
        log.warning("%s: %s", args.prvr_val_annos, missing)


def read_split(path: Path, datatype: str, split: str, log: logging.Logger) -> list[Query]:
    """Annotations of one split, with a warning if it is not the data set's standard one."""
    queries = read_annotations(path)
    videos = len(corpus_videos(queries))
    log.info("%s: %s videos, %s queries", path, f"{videos:,}", f"{len(queries):,}")
    warning = split_size_warning(datatype, split, videos, len(queries))
    if warning:
        log.warning("%s: %s", path, warning)
    return queries


def train(
    args: argparse.Namespace,
    model: ProPy,
    evaluation: Evaluation,
    queries: list[Query],
    clips: ClipSource,
    leave_out: LeaveOut | None,
    device: torch.device,
    precision: str,
    log: logging.Logger,
) -> Path:
    """All epochs, each with its evaluation and checkpoint; returns the best checkpoint's path."""
    loader: TrainingLoader = training_loader(
        queries,
        clips,
        num_frames=model.pyramid.num_frames,
        size=model.input_resolution,
        max_words=args.max_words,
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.num_thread_reader,
        pin_memory=device.type == "cuda",
        leave_out=leave_out,
    )
    optimizer = build_optimizer(model, args.lr, args.coef_lr, args.wd)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")
    facts = {
        "training annotations": summary(queries),
        "validation annotations": summary(evaluation.queries),
        "precision in use": precision,
        FRAMES: str(model.pyramid.num_frames),
    }
    resume = checkpoint_to_resume(args.resume, args.output_dir, log)
    progress = start(args, resume, facts, model, optimizer, scaler, log)
    report = parameter_report(model, model.unreachable_parameters())
    log.info(
        "%s parameters, %s trainable (%s can receive a gradient)",
        *(f"{count / 1e6:.2f} M" for count in report.values()),
    )
    progress.args = {key: plain(value) for key, value in vars(args).items()}
    progress.facts = facts
    record = progress.args | report | {"git": git_revision(), "used_precision": precision}
    with atomic_write(args.output_dir / "args.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    log.info("%d epochs of %d steps", args.epochs, len(loader))
    rate = partial(
        learning_rate,
        total_steps=len(loader) * args.epochs,
        peak=args.lr,
        warmup_proportion=args.warmup_proportion,
    )
    with traced_steps(args.output_dir / "profile", args.profile, device, log) as on_step:
        trainer = Trainer(
            model,
            loader,
            evaluation,
            optimizer,
            scaler,
            progress,
            args.output_dir,
            resumed_from=resume,
            epochs=args.epochs,
            learning_rate=rate,
            device=device,
            log=log,
            precision=precision,
            parts=args.gradient_accumulation_steps,
            clip_grad_norm=args.clip_grad_norm,
            display_every=args.n_display,
            save_every=args.save_every_steps,
            datatype=args.datatype,
            on_step=on_step,
        )
        return trainer.run()


def checkpoint_to_resume(resume: Path | None, output_dir: Path, log: logging.Logger) -> Path | None:
    """What ``--resume`` stands for; None starts anew."""
    latest = output_dir / LATEST
    if resume == AUTO:
        resume = latest if latest.is_file() else None
        found = f"going on from {latest}" if resume else f"no {latest} yet, starting anew"
        log.info("--resume auto: %s", found)
    elif resume is None and latest.is_file():
        log.warning("%s, of an earlier run, will be overwritten; see --resume", latest)
    return resume


def start(
    args: argparse.Namespace,
    resume: Path | None,
    facts: dict[str, str],
    model: ProPy,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    log: logging.Logger,
) -> Checkpoint:
    """Where training starts: from nothing, from a checkpoint's weights, or where a run stopped."""
    if resume is None:
        if args.load_from_pretrained:
            load_weights(args, args.load_from_pretrained, model, log)
            log.info("starting from the weights of %s", args.load_from_pretrained)
        return Checkpoint()
    progress = load_checkpoint(resume, model, optimizer, scaler)
    if not progress.has_optimizer:
        raise RunError(
            f"{resume}: training cannot go on from it, it holds no optimizer state of this "
            "program. To start a new training from its weights: --load_from_pretrained"
        )
    task = progress.args.get("subtask_type", args.subtask_type)
    if task != args.subtask_type:
        raise RunError(
            f"{resume}: its best epoch was chosen by {task}, which does not compare with "
            f"{args.subtask_type}: resume with --subtask_type {task}"
        )
    log.info("resuming %s after epoch %d, step %d", resume, progress.epoch, progress.sums.steps)
    settings = {name: value for name, value in vars(args).items() if name in CHANGE_A_RUN}
    for warning in adapt(progress, settings | facts):
        log.warning("%s", warning)
    return progress


def load_weights(
    args: argparse.Namespace, path: Path, model: ProPy, log: logging.Logger
) -> Checkpoint:
    """A checkpoint's weights into the model, with a warning where they were trained to read more
    or less of a video or a sentence than they are given now."""
    checkpoint = load_checkpoint(path, model)
    trained = checkpoint.args | checkpoint.facts
    for name, now in {FRAMES: str(model.pyramid.num_frames), "max_words": args.max_words}.items():
        if trained.get(name, now) != now:
            log.warning(
                "%s was trained with %s %s, but is used with %s: scores differ from those of its "
                "training",
                *(path, name, trained[name], now),
            )
    return checkpoint


def plain(value: object) -> object:
    """A flag's value as JSON and checkpoints can hold it."""
    return str(value) if isinstance(value, Path) else value


def command_line() -> None:
    """The program: what a user can mend ends it with a message, a signal with 128 + its number."""
    try:
        main(parse_args())
    except USER_ERRORS as error:
        log_to_file(f"error: {error}")
        sys.exit(f"error: {error}")
    except Stopped as stop:
        logging.getLogger("propy").warning(
            "stopped by %s, everything is saved: the same command with --resume auto goes on "
            "(the scripts: resume=auto)",
            stop,
        )
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception:
        log_to_file(traceback.format_exc())
        raise


if __name__ == "__main__":
    command_line()
