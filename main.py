#!/usr/bin/env python3
"""Train and evaluate ProPy: from the flags to the wiring, from top to bottom.

    .venv/bin/python main.py --do_train 1 --prvr_train_annos … --prvr_val_annos … --video_dir …
    .venv/bin/python main.py --do_eval 1 --resume logs/prvr_tvr/ckpt.best.pth.tar …
    .venv/bin/python main.py --do_plot 1 --resume logs/prvr_tvr/ckpt.best.pth.tar …

The published settings of every split are in scripts/prvr_<split>.sh. This is the only reader of the
flags: everything else takes plain values or a configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path

import torch

from dataloaders.annotations import TRAIN, VAL, Split
from dataloaders.clips import ClipSource, VideoFolder
from dataloaders.datasets import LoaderConfig, TrainingLoader, check_batch_size
from dataloaders.frame_store import FrameStore
from models import ProPy, ProPyConfig
from models.clip_weights import build_clip, weights_path
from models.zero_shot import ZeroShot, events_of
from modules.pyramid import PromptPyramid
from modules.readout import ranking_name, readout_of
from utils import RunError
from utils.arguments import config_from, parse_args, plain
from utils.command import run_command
from utils.distributed import from_main, is_main, process_group, rank, world_size
from utils.evaluation.embeddings import SavedEmbeddings, load_embeddings, save_embeddings
from utils.evaluation.evaluator import CorpusEvaluator, EvalConfig, Evaluator, report
from utils.evaluation.predictions import EXPORTS, SAVED
from utils.evaluation.rows import zero_shot_name
from utils.evaluation.splits import log_cut, read_split
from utils.files import check_outputs, locked_folder, new_folder
from utils.logger import errors_in_log, setup_logging, write_args
from utils.misc import choose_device, disable_tf32, git_revision, memory_advice, set_seed
from utils.missing_videos import MissingVideos, require_videos
from utils.pictures.attention_store import ATTENTION, HITS, SCORES
from utils.pictures.plots import PlotSettings, check_request, plot_split
from utils.training.baselines import zero_shot_rows
from utils.training.checkpoint import BEST, BEST_DOT, LATEST, load_checkpoint
from utils.training.engine import TrainConfig
from utils.training.progress import run_facts
from utils.training.signals import Stopped
from utils.training.trainer import LESS_MEMORY_EVALUATING, Trainer, checkpoint_to_resume

logger = logging.getLogger("propy.main")


def main(args: argparse.Namespace) -> None:
    """One run, which has its output folder to itself: train, evaluate and plot as asked for."""
    device = choose_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(args.backend, device))
        if is_main():
            stack.enter_context(locked_folder(args.output_dir))
            if args.do_plot:
                stack.enter_context(new_folder(args.plot_dir))
        setup_logging(args.output_dir if is_main() else None)
        logger.info("propy %s, torch %s", git_revision(), torch.__version__)
        disable_tf32()
        set_seed(args.seed)
        args.precision = args.precision or ("amp" if device.type == "cuda" else "fp32")
        used = (device, world_size(), args.precision)
        logger.info("device %s, processes %d, precision %s; float32 is computed as such", *used)
        if is_main():
            check_outputs(outputs(args))
        val = read_split(args.prvr_val_annos, VAL, args.datatype)
        if args.load_embeddings:
            evaluate_saved(args, val, device)
        else:
            run(args, val, device)


def run(args: argparse.Namespace, val: Split, device: torch.device) -> None:
    """Everything that needs the model and the videos: all checks, then the work."""
    splits = [val]
    if args.do_train:
        splits.append(read_split(args.prvr_train_annos, TRAIN, args.datatype))
        check_batch_size(splits[-1], args.batch_size)
    model = build(args, splits[-1] if args.do_train else None)
    for split in splits:
        log_cut(split, args.max_words)
    clips = FrameStore(args.frame_store) if args.frame_store else VideoFolder(args.video_dir)
    size, allow = model.input_resolution, bool(args.allow_missing)
    missing = from_main(lambda: require_videos(splits, clips, size, args.output_dir, allow))
    val, *train_split = (missing.remaining(split) for split in splits)
    loading, config = config_from(LoaderConfig, args), config_from(EvalConfig, args)
    evaluator = CorpusEvaluator(val, clips, model, loading, config, missing)
    evaluator.check_times(training=bool(args.do_train))
    plots = PlotSettings(
        args.plot_dir, args.plot_layer, args.plot_head, args.plot_style, args.plot_format
    )
    if args.do_plot:
        check_request(plots, args.plot_ids, val.queries, model)

    model.to(device)
    if args.compile:
        model.compile_encoders()
    best = args.resume
    if args.do_train:
        best = train(args, model, evaluator, *train_split, clips, device)
        if summary := missing.summary(TRAIN):
            logger.warning("trained %s", summary)
    if not (args.do_eval or args.do_plot):
        return
    if args.zero_shot:
        epoch, best = 0, weights_path(args.pretrained_clip_name)
        logger.info("using %s", source := zero_shot_name(args.zero_shot, best))
        if is_main() and not (args.output_dir / "log.jsonl").exists():  # else training's stay
            write_args(args.output_dir, plain(args))
    else:
        epoch, source = load_checkpoint(best, model).epoch, str(best)
        logger.info("using %s, %d epochs trained", best, epoch)
    with memory_advice(LESS_MEMORY_EVALUATING):
        embeddings = evaluator.embed(model, device)
    if args.save_embeddings and is_main():
        saved = SavedEmbeddings.from_split(
            embeddings, val, model.pyramid.proposals,
            max_words=args.max_words, checkpoint=best, epoch=epoch,
            readout="max" if args.zero_shot else args.readout, scoring=args.zero_shot,
        )  # fmt: skip
        save_embeddings(args.save_embeddings, saved)
        logger.info("embeddings saved in %s", args.save_embeddings)
    if args.do_eval:
        report(evaluator, embeddings, args.output_dir, source, epoch, bool(args.save_predictions))
    if args.do_plot:
        plot_split(
            evaluator, embeddings, model, plots,
            ids=args.plot_ids, limit=args.plot_limit, seed=args.seed, source=source,
        )  # fmt: skip


def outputs(args: argparse.Namespace) -> list[Path]:
    """The files that a run with these flags writes, as far as they have fixed names."""
    names = ["missing_videos.jsonl"]
    if args.do_train or args.zero_shot:
        names += ["args.json"]
    if args.do_train:
        names += ["log.jsonl", LATEST, BEST]
        names += [BEST_DOT] if args.event_scores == "both" else []
    if args.do_eval:
        names += ["eval.jsonl"]
    if args.save_predictions:
        names += [SAVED, *EXPORTS]
    files = [args.output_dir / name for name in names]
    if args.save_embeddings:
        files.append(args.save_embeddings)
    if args.do_plot:
        files += [args.plot_dir / name for name in (ATTENTION, SCORES, HITS)]
    return files


def build(args: argparse.Namespace, train_split: Split | None) -> ProPy | ZeroShot:
    """The model of the flags, its CLIP read and its new parameters, if it has any, drawn."""
    pyramid = PromptPyramid.from_config(args.pyr_config_path).config
    seconds = train_split and sum(v.duration for v in train_split.videos) / len(train_split.videos)
    trust = os.environ.get("TRUST_CLIP_ARCHIVE") == "1"
    clip = build_clip(args.pretrained_clip_name, trust, args.clip_activation)
    given = clip.settings.as_fields() | {"clip_seconds": seconds}
    config = config_from(ProPyConfig, args, pyramid=pyramid, **given)
    context = clip.sizes.context_length
    if args.max_words > context:
        raise RunError(f"--max_words {args.max_words}: CLIP reads at most {context} tokens")
    if args.zero_shot:
        return ZeroShot(clip.requires_grad_(False), config, args.zero_shot)
    return ProPy(clip, config, bool(args.freeze_clip), bool(args.checkpoint_activations))


def train(
    args: argparse.Namespace, model: ProPy, evaluator: CorpusEvaluator, split: Split,
    clips: ClipSource, device: torch.device,
) -> Path:  # fmt: skip
    """All epochs, each with its evaluation and checkpoint; returns the best checkpoint's path."""
    if world_size() > args.batch_size:
        raise RunError(f"{world_size()} processes for --batch_size {args.batch_size}: use fewer")
    resume = from_main(lambda: checkpoint_to_resume(args.resume, args.output_dir))
    zero_shot = {}
    if args.log_zero_shot and not resume:  # by CLIP as it was published
        logger.info("evaluating CLIP alone, before it is trained with (--log_zero_shot)")
        with memory_advice(LESS_MEMORY_EVALUATING):
            zero_shot = zero_shot_rows(model, evaluator, device)
    if args.load_from_pretrained and not resume:
        load_checkpoint(args.load_from_pretrained, model)
        logger.info("starting from the weights of %s", args.load_from_pretrained)
    num_frames, config = model.pyramid.num_frames, config_from(TrainConfig, args)
    size, share = model.input_resolution, (rank(), world_size())
    loader = TrainingLoader(split, clips, num_frames, size, evaluator.loading, share)
    facts = run_facts(split, evaluator.split, config.precision, num_frames, clips.kind)
    trainer = Trainer(
        model, loader, evaluator, args.output_dir, config,
        device=device, flags=plain(args), facts=facts, resume=resume, zero_shot=zero_shot,
    )  # fmt: skip
    parameters = model.parameter_counts()
    counts = (f"{count / 1e6:.2f} M" for count in parameters.values())
    logger.info("%s parameters, %s trainable (%s can receive a gradient)", *counts)
    if is_main():
        write_args(args.output_dir, plain(args) | parameters)
    return trainer.run()


def evaluate_saved(args: argparse.Namespace, split: Split, device: torch.device) -> None:
    """Metrics of saved embeddings: needs no videos, no CLIP, and no checkpoint but to compare."""
    saved = load_embeddings(args.load_embeddings)
    reasons = {}
    if args.allow_missing:
        absent = {video.vid_name for video in split.videos} - set(saved.vid_names)
        reasons = dict.fromkeys(sorted(absent), f"{args.load_embeddings}: made without it")
    missing = from_main(lambda: MissingVideos(args.output_dir, [(split, reasons)]))
    split = missing.remaining(split)
    events, trained_with = PromptPyramid.from_config(args.pyr_config_path), args.readout
    ranking = ranking_name(trained_with, args.rank_readout)
    if args.zero_shot:
        events, trained_with, ranking = events_of(args.zero_shot, events), "max", "max"
    try:
        saved.check(
            split.queries, events.proposals,
            max_words=args.max_words, readout=trained_with, checkpoint=args.resume,
            scoring=args.zero_shot,
        )  # fmt: skip
    except RunError as error:
        raise RunError(f"{args.load_embeddings}: {error}") from None
    logger.info(
        "using %s: %s, epoch %d; videos ranked by their %s",
        *(args.load_embeddings, saved.checkpoint, saved.epoch, ranking),
    )
    config, readout = config_from(EvalConfig, args), readout_of(ranking, events, device)
    evaluator = Evaluator(split, events.proposals, config, missing, readout, scoring=args.zero_shot)
    evaluator.check_times(training=False)
    embeddings, made = saved.embeddings.to(device), (saved.checkpoint, saved.epoch)
    report(evaluator, embeddings, args.output_dir, *made, bool(args.save_predictions))


def command_line(argv: list[str] | None = None) -> None:
    """The program: log.txt has its errors too; a signal ends it with 128 + its number."""
    try:
        with errors_in_log():
            main(parse_args(argv))
    except Stopped as stop:
        logger.warning(
            "stopped by %s, everything is saved: the same command with --resume auto resumes "
            "(the scripts: resume=auto)",
            stop,
        )
        sys.exit(128 + stop.number)


if __name__ == "__main__":
    run_command(command_line)
