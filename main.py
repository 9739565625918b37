#!/usr/bin/env python3
"""Train and evaluate ProPy. The only reader of the command line: everything else takes values.

    python main.py --do_train 1 --prvr_train_annos … --prvr_val_annos … --video_dir …
    python main.py --do_eval 1 --resume logs/prvr_tvr/ckpt.best.pth.tar --prvr_val_annos … …
    python main.py --do_plot 1 --resume logs/prvr_tvr/ckpt.best.pth.tar --prvr_val_annos … …

The published settings of every split are in scripts/prvr_<split>.sh.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.annotations import (
    AnnotationError,
    Query,
    Video,
    corpus_videos,
    read_annotations,
)
from dataloaders.datasets import (
    ClipLoader,
    TrainingLoader,
    evaluation_text_batches,
    evaluation_video_loader,
    training_loader,
)
from dataloaders.video import VideoError
from models import ProPy, build_model
from models.clip import WEIGHTS_FILES, WeightsError, weights_path
from modules.pyramid import PyramidError
from modules.similarity import best_event_scores
from utils.checkpoint import (
    Checkpoint,
    CheckpointError,
    copy_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from utils.engine import (
    Embeddings,
    TrainingError,
    embed_corpus,
    evaluate_prvr,
    evaluate_vcmr,
    predict_moments,
    train_one_epoch,
)
from utils.logger import EpochLog, append_json, setup_logging
from utils.misc import git_revision, parameter_report, pick_device, set_seed
from utils.moment_metrics import RECALL_RANKS, WINDOW_RULES, selection_score
from utils.moment_report import level_table, report_tables, times_missing
from utils.optim import build_optimizer, learning_rate
from utils.plots import (
    PlotError,
    PlotSettings,
    check_request,
    choose_queries,
    plot_queries,
    score_queries,
)
from utils.predictions import export_all, save_predictions
from utils.published import DATATYPES, PRVR_RESULTS, VCMR_RESULTS, split_size_warning
from utils.retrieval_metrics import ranks_of
from utils.tables import PRVR_COLUMNS, metrics_table
from utils.visualize import STYLES

ROOT = Path(__file__).resolve().parent
TEXT_BATCH = 256  # texts are short: encoding them takes seconds at any batch size


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


class Evaluation:
    """One split, read and checked before training starts, evaluated after every epoch.

    Args:
        queries: the annotations.
        event_scores: cosine, dot or both, see ``--event_scores``.
    """

    def __init__(self, queries: list[Query], args: argparse.Namespace, model: ProPy) -> None:
        self.queries = queries
        self.videos: list[Video] = corpus_videos(queries)
        column = {video.vid_name: index for index, video in enumerate(self.videos)}
        self.target: Tensor = torch.tensor([column[query.vid_name] for query in queries])
        self.scoring = {"cosine": [True], "dot": [False], "both": [True, False]}[args.event_scores]
        self.moments = args.subtask_type == "VCMR"
        self.per_video, self.limit = args.npev, args.max_event_per_text
        self.window_rule = args.window_rule
        self.proposals = model.pyramid.proposals
        self.texts = evaluation_text_batches(queries, args.max_words, TEXT_BATCH)
        self.load_videos: Callable[[Sequence[Video]], ClipLoader] = partial(
            evaluation_video_loader,
            video_dir=args.video_dir,
            num_frames=model.pyramid.num_frames,
            size=model.input_resolution,
            batch_size=args.batch_size_val,
            num_workers=args.num_thread_reader,
            pin_memory=torch.cuda.is_available(),
        )
        self.loader = self.load_videos(self.videos)

    def embed(self, model: ProPy, device: torch.device) -> Embeddings:
        """All videos and texts of the split."""
        return embed_corpus(model, self.loader, self.texts, device)

    def run(
        self, embeddings: Embeddings, predictions_dir: Path | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics by row: PRVR's "cosine" and "dot", and for VCMR those of `evaluate_vcmr`.

        Args:
            predictions_dir: a folder to save the predicted moments in.
        """
        rows = {}
        if self.moments or predictions_dir:
            predictions = predict_moments(
                embeddings,
                self.queries,
                self.videos,
                self.proposals,
                per_video=self.per_video,
                # The metrics read no more than the first 100.
                limit=self.limit if predictions_dir else min(self.limit, max(RECALL_RANKS)),
            )
            if self.moments:
                rows = evaluate_vcmr(predictions, self.queries, self.window_rule)
            if predictions_dir:
                save_predictions(predictions_dir / "predictions.h5", predictions)
                export_all(predictions_dir, predictions, self.queries)
        for normalize in self.scoring:
            name = "cosine" if normalize else "dot"
            if name not in rows:
                rows[name] = evaluate_prvr(embeddings, self.target, normalize)
        return rows

    def plot(
        self,
        embeddings: Embeddings,
        model: ProPy,
        settings: PlotSettings,
        *,
        ids: Sequence[str],
        limit: int,
        seed: int,
        source: str,
    ) -> tuple[int, int]:
        """Draw the queries with these ids, or `limit` of those with their video at rank 1.

        Returns:
            How many were drawn, and how many there are at rank 1.
        """
        normalize = self.scoring[0]
        scores = best_event_scores(embeddings.texts, embeddings.events, normalize)
        ranks = ranks_of(scores, self.target.to(scores.device)).cpu()
        chosen = choose_queries(ranks, self.queries, ids, limit, seed)
        videos = [self.videos[i] for i in self.target[chosen].unique().tolist()]
        plot_queries(
            model,
            self.load_videos(videos),
            [video.vid_name for video in videos],
            score_queries(embeddings, chosen, self.target, ranks, normalize),
            self.queries,
            settings,
            score_name="cosine" if normalize else "product",
            source=source,
        )
        return len(chosen), int((ranks == 1).sum())

    def score(self, rows: dict[str, dict[str, float]]) -> float:
        """What chooses the best epoch."""
        if self.moments:
            return selection_score(rows["VCMR"])
        return next(iter(rows.values()))["SumR"]


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
    evaluation = Evaluation(val_queries, args, model)
    if args.subtask_type == "VCMR":
        check_times(args, val_queries, log)
    plots = PlotSettings(
        args.plot_dir, args.plot_layer, args.plot_head, args.plot_style, args.plot_format
    )
    if args.do_plot:
        check_request(plots, args.plot_ids, val_queries, model)

    best = args.resume
    if args.do_train:
        best = train(args, model, evaluation, train_queries, device, precision, log)
    if args.do_eval or args.do_plot:
        checkpoint = load_checkpoint(best, model)
        log.info("using %s, %d epochs trained", best, checkpoint.epoch)
        embeddings = evaluation.embed(model, device)
    if args.do_eval:
        rows = evaluation.run(embeddings, args.output_dir if args.save_predictions else None)
        show(rows, args.datatype, log)
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
    device: torch.device,
    precision: str,
    log: logging.Logger,
) -> Path:
    """All epochs, each with its evaluation and checkpoint; returns the best checkpoint's path."""
    loader: TrainingLoader = training_loader(
        queries,
        args.video_dir,
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
        show(rows, args.datatype, log)
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


def show(rows: dict[str, dict[str, float]], datatype: str, log: logging.Logger) -> None:
    """The metrics as tables, over the published row where there is one."""
    names = {"cosine": "ProPy", "dot": "ProPy, events not normalised"}
    table = {names[row]: numbers for row, numbers in rows.items() if row in names}
    if datatype in PRVR_RESULTS:
        table["published"] = PRVR_RESULTS[datatype]
    log.info("\n%s", metrics_table(table, PRVR_COLUMNS))
    if "VR" in rows:
        log.info("\n%s", report_tables(rows, VCMR_RESULTS.get(datatype)))
    levels = {row.split("/")[1]: rows[row] for row in rows if row.startswith("levels/")}
    if levels:
        log.info("\n%s", level_table(levels))


def plain(value: object) -> object:
    """A flag's value as JSON and checkpoints can hold it."""
    return str(value) if isinstance(value, Path) else value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; an impossible combination ends the program with a message."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate ProPy for partially relevant video retrieval, and for "
        "weakly supervised moment retrieval from a corpus of videos.",
        epilog="[published: …] is the setting behind the paper's numbers. "
        "scripts/prvr_<split>.sh and vcmr_<split>.sh hold them for each data set.",
    )
    # fmt: off
    add = parser.add_argument_group("what to do").add_argument
    add("--do_train", type=int, choices=[0, 1], default=0,
        help="train, evaluating after every epoch (default 0)")
    add("--do_eval", type=int, choices=[0, 1], default=0,
        help="evaluate the checkpoint --resume; after training, its best checkpoint (default 0)")
    add("--do_plot", type=int, choices=[0, 1], default=0,
        help="draw what the checkpoint --resume attends to; after training, its best checkpoint "
        "(default 0)")
    add("--subtask_type", choices=["PRVR", "VCMR"], default="PRVR",
        help="what is evaluated and chooses the best epoch: PRVR, videos, by SumR; VCMR, moments "
        "(and videos), by the sum of R@1, 10 and 100 at IoU 0.5 and 0.7 (default PRVR)")
    add("--datatype", choices=DATATYPES, default="custom",
        help="the data set: adds its published row to the results and checks the split's size "
        "(default custom: neither)")
    add("--resume", type=Path, metavar="CKPT",
        help="checkpoint to evaluate, or whose training is to go on; may be one of the authors' "
        "for evaluation")
    add("--load_from_pretrained", type=Path, metavar="CKPT",
        help="start a new training from this checkpoint's weights, with a fresh optimizer")
    add("--output_dir", type=Path,
        help="folder for log.txt, log.jsonl, args.json, TensorBoard events and checkpoints "
        "(default logs/<subtask>_<datatype>)")

    add = parser.add_argument_group("data").add_argument
    add("--prvr_train_annos", type=Path, metavar="JSONL", help="training annotations")
    add("--prvr_val_annos", type=Path, metavar="JSONL", required=True,
        help="annotations of the split to evaluate")
    add("--video_dir", type=Path, required=True,
        help="folder of <vid_name>.mp4, prepared by scripts/prepare.sh (3 fps, short side 224)")
    add("--max_words", type=int, default=32,
        help="tokens of a caption, start and end included [published: 32; ActivityNet and "
        "QVHighlights 64] (default 32)")
    add("--num_thread_reader", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes that decode videos (default: one a CPU core, at most 8); results do not "
        "depend on it")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_clip_name", default="ViT-B/32", metavar="NAME|FILE",
        help=f"{', '.join(WEIGHTS_FILES)}, or a weights file in OpenAI's format "
        "[published: ViT-B/32] (default ViT-B/32)")
    add("--pretrained_dir", type=Path, default=ROOT / "CLIP_weights",
        help="folder of OpenAI's weights, fetched by scripts/download_clip.sh "
        "(default CLIP_weights)")
    add("--freeze_clip", type=int, choices=[0, 1], default=1,
        help="0 fine-tunes CLIP too, with lr·coef_lr [published: 1] (default 1)")
    add("--pyr_config_path", type=Path, default=ROOT / "scripts/pyramids/cfg_32.json",
        help="the prompt pyramid [published: scripts/pyramids/cfg_32.json, 32 frames, 42 events] "
        "(default that)")
    add("--Nvp", type=int, default=4, help="visual prompts per layer [published: 4] (default 4)")
    add("--num_adapter_layers", type=int, default=12,
        help="first so many layers with a temporal adapter [published: 12, all] (default 12)")
    add("--adapter_channels", type=int, default=384,
        help="width of an adapter [published: 384] (default 384)")
    add("--temp_kernel_sz", type=int, default=5,
        help="frames an adapter's convolution spans, odd [published: 5; Charades 3] (default 5)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="[published: 10] (default 10)")
    add("--batch_size", type=int, default=24,
        help="videos in a batch, each with all its captions [published: 24] (default 24)")
    add("--lr", type=float, default=8e-4,
        help="peak learning rate of the new parameters [published: TVR and Charades 8e-4, "
        "ActivityNet 1e-3, QVHighlights 9e-4] (default 8e-4)")
    add("--coef_lr", type=float, default=1e-3,
        help="factor on lr for CLIP's own parameters, only with --freeze_clip 0 (default 1e-3)")
    add("--wd", type=float, default=0.2,
        help="weight decay of everything but biases [published: 0.2] (default 0.2)")
    add("--warmup_proportion", type=float, default=0.1,
        help="share of the steps in the linear warm-up [published: 0.1] (default 0.1)")
    add("--clip_grad_norm", type=float, default=1.0,
        help="largest norm of the gradient [published: 1.0] (default 1.0)")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="K",
        help="compute each batch in K parts, to need less memory. For a contrastive loss adding "
        "up small batches would be another loss, with fewer negatives; here every text still "
        "meets all videos of the batch, so loss and gradient are those of K=1, for a third more "
        "work [published: 1] (default 1)")
    add("--precision", choices=["amp", "bf16", "fp32"],
        help="of the training forward: amp (float16 autocast with loss scaling), bf16 (bfloat16 "
        "autocast) or fp32; loss and evaluation are float32 always [published: amp] "
        "(default: amp on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=42,
        help="of initial values, shuffling and frame sampling [published: 42] (default 42)")
    add("--n_display", type=int, default=50, help="log a line every so many steps (default 50)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--batch_size_val", type=int, default=16,
        help="videos encoded at a time [published: 16] (default 16)")
    add("--event_scores", choices=["cosine", "dot", "both"], default="cosine",
        help="how texts and events are compared: cosine, as the paper says; dot leaves the "
        "events' lengths in, as the authors' program does when it evaluates PRVR on ActivityNet; "
        "both reports both rows, cosine choosing the best epoch; moments are always ranked by "
        "cosine (default cosine)")
    add("--npev", type=int, default=10, metavar="N",
        help="VCMR: moments of one video that count, the best [published: 10] (default 10)")
    add("--max_event_per_text", type=int, default=1000, metavar="N",
        help="VCMR: moments of a text that count, the best; the metrics read the first 100 "
        "[published: 1000] (default 1000)")
    add("--window_rule", choices=WINDOW_RULES, default="half",
        help="VCMR: of a query with several windows a prediction must reach half, rounded down "
        "but at least one, or any; the other rule is reported beside [published: half] "
        "(default half)")
    add("--save_predictions", type=int, choices=[0, 1], default=0,
        help="--do_eval leaves the predicted moments in the output folder: predictions.h5, "
        "for scripts/report.py and python -m utils.moment_metrics, and in TVR's and "
        "QVHighlights' submission formats (default 0)")

    add = parser.add_argument_group("plotting").add_argument
    add("--plot_dir", type=Path, metavar="DIR",
        help="folder for the pictures and what they are drawn from (default VIS/<datatype>)")
    add("--plot_ids", nargs="+", default=[], metavar="DESC_ID",
        help="draw these queries (default: those whose right video is ranked first)")
    add("--plot_limit", type=int, default=20, metavar="N",
        help="of the queries ranked first draw N, chosen by --seed; 0 draws all (default 20)")
    add("--plot_layer", type=int, default=0, metavar="L",
        help="draw the attention of this layer, counted from 1; 0 is the last (default 0)")
    add("--plot_head", type=int, default=0, metavar="H",
        help="save and draw the attention of this head, counted from 1; 0 is the mean of all "
        "(default 0)")
    add("--plot_style", choices=list(STYLES), default="readable",
        help="colours: readable for all eyes, or those of the authors' figures, jet, red and "
        "orange (default readable)")
    add("--plot_format", choices=["png", "svg", "pdf"], default="png",
        help="of the overview; svg and pdf draw the pyramid's picture in that format too "
        "(default png)")
    # fmt: on
    args = parser.parse_args(argv)

    if not (args.do_train or args.do_eval or args.do_plot):
        parser.error("nothing to do: give --do_train 1, --do_eval 1, --do_plot 1 or several")
    if args.do_train and not args.prvr_train_annos:
        parser.error("--do_train 1 needs --prvr_train_annos")
    for task in ("do_eval", "do_plot"):
        if getattr(args, task) and not args.do_train and not args.resume:
            parser.error(f"--{task} 1 needs --resume with the checkpoint to use")
    if args.resume and args.load_from_pretrained:
        parser.error("--resume goes on with a run, --load_from_pretrained starts one: not both")
    for checkpoint in filter(None, (args.resume, args.load_from_pretrained)):
        if not checkpoint.is_file():
            parser.error(f"no such checkpoint: {checkpoint}")
    if args.save_predictions and not args.do_eval:
        parser.error("--save_predictions 1 needs --do_eval 1")
    positive = ("epochs", "batch_size", "batch_size_val", "max_words", "adapter_channels",
                "gradient_accumulation_steps", "n_display", "npev",
                "max_event_per_text")  # fmt: skip
    for name in positive:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1: {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2^32 - 1: {args.seed}")
    if args.temp_kernel_sz < 1 or args.temp_kernel_sz % 2 == 0:
        parser.error(f"--temp_kernel_sz must be odd and positive: {args.temp_kernel_sz}")
    if args.output_dir is None:
        args.output_dir = ROOT / "logs" / f"{args.subtask_type.lower()}_{args.datatype}"
    if args.plot_dir is None:
        args.plot_dir = ROOT / "VIS" / args.datatype
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
