#!/usr/bin/env python3
"""Train and evaluate ProPy. The only reader of the flags: everything else takes plain values.

    python main.py --do_train 1 --prvr_train_annos … --prvr_val_annos … --video_dir …
    python main.py --do_eval 1 --resume logs/prvr_tvr/ckpt.best.pth.tar --prvr_val_annos … …
    python main.py --do_plot 1 --resume logs/prvr_tvr/ckpt.best.pth.tar --prvr_val_annos … …

The published settings of every split are in scripts/prvr_<split>.sh.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import torch

from dataloaders.annotations import AnnotationError, Query, corpus_videos, read_annotations
from dataloaders.clips import ClipSource, VideoFolder
from dataloaders.datasets import TrainingLoader, training_loader
from dataloaders.frame_store import FrameStore
from dataloaders.video import VideoError
from models import ProPy, build_model
from models.clip import WeightsError, weights_path
from modules.pyramid import PyramidError
from utils.arguments import parse_args
from utils.checkpoint import (
    Checkpoint,
    CheckpointError,
    copy_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from utils.engine import TrainingError, train_one_epoch
from utils.evaluation import Evaluation, tables
from utils.logger import EpochLog, append_json, setup_logging
from utils.misc import git_revision, parameter_report, pick_device, set_seed
from utils.moment_report import times_missing
from utils.optim import build_optimizer, learning_rate
from utils.plots import PlotError, PlotSettings, check_request
from utils.published import split_size_warning


class SettingsError(ValueError):
    """Flags that do not fit the data or the weights."""


# What a user can mend; everything else is a bug and keeps its traceback.
USER_ERRORS = (
    AnnotationError,
    CheckpointError,
    PlotError,
    PyramidError,
    SettingsError,
    TrainingError,
    VideoError,
    WeightsError,
)


def main(args: argparse.Namespace) -> None:
    """Wire everything up from the flags, then train, evaluate and plot as asked for."""
    log = setup_logging(args.output_dir)
    log.info("propy %s, torch %s", git_revision(), torch.__version__)
    set_seed(args.seed)
    device = pick_device()
    precision = args.precision or ("amp" if device.type == "cuda" else "fp32")
    log.info("device %s, precision %s", device, precision)

    val_queries = read_split(args.prvr_val_annos, args.datatype, "val", log)
    train_queries = (
        read_split(args.prvr_train_annos, args.datatype, "train", log) if args.do_train else []
    )
    model = build_model(
        weights_path(args.pretrained_clip_name, args.pretrained_dir),
        args.pyr_config_path,
        num_prompts=args.Nvp,
        adapter_channels=args.adapter_channels,
        adapter_kernel=args.temp_kernel_sz,
        num_adapter_layers=args.num_adapter_layers,
        freeze_clip=bool(args.freeze_clip),
    ).to(device)
    check_settings(args, model, train_queries)
    clips = FrameStore(args.frame_store) if args.frame_store else VideoFolder(args.video_dir)
    evaluation = Evaluation(
        val_queries,
        clips,
        model.pyramid.proposals,
        num_frames=model.pyramid.num_frames,
        size=model.input_resolution,
        max_words=args.max_words,
        batch_size=args.batch_size_val,
        num_workers=args.num_thread_reader,
        moments=args.subtask_type == "VCMR",
        event_scores=args.event_scores,
        per_video=args.npev,
        limit=args.max_event_per_text,
        window_rule=args.window_rule,
        memory_gib=args.eval_memory_gib,
    )
    if args.subtask_type == "VCMR":
        check_times(args, val_queries, log)
    plots = PlotSettings(
        args.plot_dir, args.plot_layer, args.plot_head, args.plot_style, args.plot_format
    )
    if args.do_plot:
        check_request(plots, args.plot_ids, val_queries, model)

    best = args.resume
    if args.do_train:
        best = train(args, model, evaluation, train_queries, clips, device, precision, log)
    if args.do_eval or args.do_plot:
        checkpoint = load_checkpoint(best, model)
        log.info("using %s, %d epochs trained", best, checkpoint.epoch)
        embeddings = evaluation.embed(model, device)
    if args.do_eval:
        rows = evaluation.run(embeddings, args.output_dir if args.save_predictions else None)
        for table in tables(rows, args.datatype):
            log.info("\n%s", table)
        record = {"checkpoint": str(best), "epoch": checkpoint.epoch, "git": git_revision()}
        append_json(args.output_dir / "eval.jsonl", record | {"metrics": rows})
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
            f"{hits:,} of {len(val_queries):,}",
            plots.folder / "attention",
        )


def check_settings(args: argparse.Namespace, model: ProPy, train_queries: list[Query]) -> None:
    """What could only be said once weights and annotations were read."""
    context = model.clip.sizes.context_length
    if args.max_words > context:
        raise SettingsError(f"--max_words {args.max_words}: CLIP reads at most {context} tokens")
    videos = len(corpus_videos(train_queries))
    if args.do_train and videos < args.batch_size:
        raise SettingsError(
            f"--batch_size {args.batch_size}: {args.prvr_train_annos} has only {videos} videos"
        )


def check_times(args: argparse.Namespace, queries: list[Query], log: logging.Logger) -> None:
    """Moments are scored, and the best epoch chosen by them, where their times are known."""
    missing = times_missing(queries)
    if missing and args.do_train and not any(query.windows for query in queries):
        raise SettingsError(
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
    )
    optimizer = build_optimizer(model, args.lr, args.coef_lr, args.wd)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")
    progress = start(args, model, optimizer, scaler, log)
    total_steps = len(loader) * args.epochs
    rate = partial(
        learning_rate,
        total_steps=total_steps,
        peak=args.lr,
        warmup_proportion=args.warmup_proportion,
    )
    report = parameter_report(model, model.unreachable_parameters())
    log.info(
        "%s parameters, %s trainable (%s can receive a gradient)",
        *(f"{count / 1e6:.2f} M" for count in report.values()),
    )
    progress.args = {key: plain(value) for key, value in vars(args).items()}
    record = progress.args | report | {"git": git_revision(), "used_precision": precision}
    (args.output_dir / "args.json").write_text(json.dumps(record, indent=1) + "\n")
    log.info("%d epochs of %d steps", args.epochs, len(loader))

    latest, best = args.output_dir / "ckpt.pth.tar", args.output_dir / "ckpt.best.pth.tar"
    epoch_log = EpochLog(args.output_dir)
    for epoch in range(progress.epoch, args.epochs):
        loader.set_epoch(epoch)
        trained = train_one_epoch(
            model,
            loader,
            optimizer,
            scaler,
            learning_rate=rate,
            first_step=progress.global_step,
            device=device,
            log=log,
            precision=precision,
            parts=args.gradient_accumulation_steps,
            clip_grad_norm=args.clip_grad_norm,
            display_every=args.n_display,
        )
        rows = evaluation.run(evaluation.embed(model, device))
        score = evaluation.score(rows)
        progress.epoch = epoch + 1
        progress.global_step += trained["steps"]
        if progress.best_score is None or score >= progress.best_score:  # a tie: the later epoch
            progress.best_score, progress.best_epoch = score, epoch + 1
        save_checkpoint(latest, model, optimizer, scaler, progress)
        if progress.best_epoch == epoch + 1:
            copy_checkpoint(latest, best)
        metrics = {
            key if row == next(iter(rows)) else f"{row}/{key}": value
            for row, numbers in rows.items()
            for key, value in numbers.items()
        }
        counts = {"epoch": epoch + 1, "global_step": progress.global_step}
        epoch_log.write(counts | trained | metrics | {"best_epoch": progress.best_epoch})
        log.info(
            "epoch %d/%d  loss %.4f  %.2f s a step, of which %.2f s waiting for data",
            epoch + 1,
            args.epochs,
            trained["loss"],
            trained["data_time"] + trained["step_time"],
            trained["data_time"],
        )
        for table in tables(rows, args.datatype):
            log.info("\n%s", table)
    epoch_log.close()
    log.info("best epoch %s, score %.2f: %s", progress.best_epoch, progress.best_score, best)
    return best


def start(
    args: argparse.Namespace,
    model: ProPy,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    log: logging.Logger,
) -> Checkpoint:
    """Where training starts: from nothing, from a checkpoint's weights, or where a run stopped."""
    if args.load_from_pretrained:
        load_checkpoint(args.load_from_pretrained, model)
        log.info("starting from the weights of %s", args.load_from_pretrained)
    if not args.resume:
        return Checkpoint()
    progress = load_checkpoint(args.resume, model, optimizer, scaler)
    if not progress.has_optimizer:
        raise CheckpointError(
            f"{args.resume}: training cannot go on from it, it holds no optimizer state of this "
            "program. To start a new training from its weights: --load_from_pretrained"
        )
    task = progress.args.get("subtask_type", args.subtask_type)
    if task != args.subtask_type:
        raise CheckpointError(
            f"{args.resume}: its best epoch was chosen by {task}, which does not compare with "
            f"{args.subtask_type}: resume with --subtask_type {task}"
        )
    log.info("resuming %s after epoch %d", args.resume, progress.epoch)
    return progress


def plain(value: object) -> object:
    """A flag's value as JSON and checkpoints can hold it."""
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    try:
        main(parse_args())
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
