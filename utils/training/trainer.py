"""All epochs of a run, each with its evaluation, so that it can end anywhere and be resumed.

A checkpoint is written after an epoch's training, after its evaluation, within the epoch if asked
for, and when a signal ends the run. What log.jsonl says of an epoch is in the checkpoint too: the
checkpoint decides what was done, and what a killed run had not finished is finished.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from dataloaders import DataError
from dataloaders.datasets import TrainingLoader
from models import ProPy, ProPyConfig
from modules import ModelError
from modules.readout import ranking_name
from utils import OutputError, RunError
from utils.arguments import AUTO
from utils.distributed import barrier, from_main, is_main, largest, world_size
from utils.evaluation.evaluator import CorpusEvaluator, EvalConfig
from utils.evaluation.rows import VCMR, Rows
from utils.logger import EpochLog, SilentEpochLog
from utils.misc import memory_advice, peak_memory_gib
from utils.training.checkpoint import (
    BESTS,
    LATEST,
    copy_checkpoint,
    epochs_of,
    load_checkpoint,
    save_checkpoint,
)
from utils.training.engine import LOG_EVERY, LossWeights, TrainConfig, train_one_epoch
from utils.training.optim import build_optimizer, learning_rate
from utils.training.progress import (
    TRAIN_ANNOTATIONS,
    VAL_ANNOTATIONS,
    EpochSums,
    Progress,
    StepResult,
)
from utils.training.signals import DeferredSignals, Stopped

logger = logging.getLogger("propy.trainer")
# Settings that leave a run's results as they are.
HARMLESS = {"precision", "save_every_steps", "datatype", "subtask_type"}
CHANGE_A_RUN = {field.name for cls in (TrainConfig, EvalConfig) for field in fields(cls)}
CHANGE_A_RUN |= {"batch_size", "freeze_clip", "max_words", "seed", "rank_readout"}
CHANGE_A_RUN -= HARMLESS
# What a run had whose checkpoint is older than these settings.
BEFORE_THERE_WERE = {field.name: field.default for field in fields(LossWeights)}
BEFORE_THERE_WERE |= {"readout": ProPyConfig.readout, "rank_readout": ProPyConfig.rank_readout}
# Zero-shot rows depend on these.
CHANGE_ZERO_SHOT = {"max_words", "event_scores", "npev", "window_rule", VAL_ANNOTATIONS}
# The order of an epoch's videos depends on these.
CHANGE_AN_EPOCH = {"batch_size", "seed", TRAIN_ANNOTATIONS}

LESS_MEMORY = (
    "use --checkpoint_activations 1 or raise --gradient_accumulation_steps (same result), or lower "
    "--batch_size (another result: fewer negatives), or use --precision amp or bf16 on a GPU"
)
LESS_MEMORY_EVALUATING = "lower --batch_size_val (same result)"


def checkpoint_to_resume(resume: Path | str | None, folder: Path) -> Path | None:
    """What ``--resume`` stands for; None starts a new run."""
    latest = folder / LATEST
    if resume == AUTO:
        resume = latest if latest.is_file() else None
        found = f"resuming {latest}" if resume else f"no {latest} yet, a new run"
        logger.info("--resume auto: %s", found)
    elif resume is None and latest.is_file():
        logger.warning("%s, of an earlier run, will be overwritten; see --resume", latest)
    return resume


def reconcile(progress: Progress, settings: Mapping, task: str = "PRVR") -> list[str]:
    """Fit a checkpoint's progress to settings that it was not made with; returns warnings.

    An epoch under way is started again if its videos come in another order now; a best score of
    another measure is forgotten, and so are zero-shot rows of another. The learning rate follows
    the new settings from here on, at the same epoch and step.

    Args:
        settings: of CHANGE_A_RUN, and facts of the run, by name; "rank_readout" is the one in use.
    """
    before = BEFORE_THERE_WERE | progress.args | progress.facts
    before["rank_readout"] = ranking_name(before["readout"], before["rank_readout"])
    changed = [name for name, now in settings.items() if before.get(name, now) != now]
    if not changed:
        return []
    named = ", ".join(f"{name} {settings[name]} (was {before[name]})" for name in changed)
    warnings = [f"resuming with other settings, so from here on it is another run: {named}"]
    if progress.sums.steps and set(changed) & CHANGE_AN_EPOCH:
        progress.sums = EpochSums()
        warnings.append(f"epoch {progress.epoch + 1} starts again, with its videos in a new order")
    if progress.zero_shot and set(changed) & CHANGE_ZERO_SHOT:
        progress.zero_shot = {}
        warnings.append("the zero-shot rows do not compare with what follows: they are left out")
    measures = (_measure({**settings, **before}, task), _measure({**before, **settings}, task))
    if progress.best_epoch is not None and measures[0] != measures[1]:
        progress.set_best("best")
        warnings.append("earlier scores do not compare: the best epoch is one from here on")
    # else it would be one of some epochs
    if {"event_scores", "rank_readout", VAL_ANNOTATIONS} & set(changed):
        progress.set_best("best_dot")
        if settings.get("event_scores") == "both":
            warnings.append('the best epoch of the row "dot" is one from here on')
    return warnings


def _measure(settings: Mapping, task: str) -> tuple:
    """The settings that the score which chooses the best epoch depends on."""
    if task == VCMR:
        return settings.get("npev"), settings.get("window_rule"), settings.get(VAL_ANNOTATIONS)
    ranking = settings.get("event_scores") == "dot", settings.get("rank_readout")
    return *ranking, settings.get(VAL_ANNOTATIONS)


class Trainer:
    """Trains a model from where `progress` stands to the end.

    Args:
        folder: for checkpoints and logs.
        flags, facts, zero_shot: of the run, see `Progress`; a resumed run keeps its zero-shot rows.
        resume: the checkpoint of a run to continue.

    Raises:
        ModelError: see `load_checkpoint`.
        RunError: training cannot be resumed from the file, or it was another task's.
    """

    def __init__(
        self, model: ProPy, loader: TrainingLoader, evaluator: CorpusEvaluator, folder: Path,
        config: TrainConfig,
        *, device: torch.device, flags: dict, facts: dict, resume: Path | None = None,
        zero_shot: Mapping[str, Rows] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.loader, self.evaluator = model, loader, evaluator
        self.latest = folder / LATEST
        self.bests = {name: folder / file for name, file in BESTS.items()}
        self.config, self.device, self.resumed_from = config, device, resume
        self._say_what_an_epoch_is()
        self.optimizer = build_optimizer(model, config.lr, config.coef_lr, config.wd)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "amp")
        self._zero_shot_was_dropped = False
        start = Progress(zero_shot=dict(zero_shot or {}))
        self.progress = self._resume(resume, flags, facts) if resume else start
        evaluator.baselines = self.progress.zero_shot
        self.progress.args, self.progress.facts = flags, facts
        total = len(loader) * config.epochs
        self.learning_rate = partial(learning_rate, total_steps=total, peak=config.lr)
        self.epoch_log = SilentEpochLog()
        if is_main():
            self.epoch_log = EpochLog(folder, self.progress.global_step if resume else None)
        agree = partial(largest, device=device) if world_size() > 1 else None
        self.signals = DeferredSignals(agree)
        self._last_good = resume

    def _say_what_an_epoch_is(self) -> None:
        loader, steps = self.loader, len(self.loader)
        text = f"an epoch is {steps} steps of {loader.batch_size} videos"
        if loader.left_out:
            text += (
                f"; its incomplete last batch is left out, {loader.left_out} of the "
                f"{len(loader.names):,} videos, other ones every time"
            )
        logger.info("%s", text)
        if steps * self.config.epochs == 1:
            logger.warning(
                "one step in all: its learning rate is the warm-up's first, %.0e, so next to "
                "nothing is trained; raise --epochs or lower --batch_size",
                learning_rate(0, 1, self.config.lr),
            )

    def _resume(self, path: Path, flags: dict, facts: dict) -> Progress:
        """Where the run stopped, with everything put back to that point."""
        progress = load_checkpoint(path, self.model, self.optimizer, self.scaler)
        if not progress.has_optimizer:
            raise RunError(
                f"{path}: training cannot be resumed from it, it holds no optimizer state of this "
                "program. To start a new training from its weights: --load_from_pretrained"
            )
        task = progress.args.get("subtask_type", flags["subtask_type"])
        if task != flags["subtask_type"]:
            raise RunError(
                f"{path}: its best epoch was chosen by {task}, which does not compare with "
                f"{flags['subtask_type']}: resume with --subtask_type {task}"
            )
        logger.info(
            "resuming %s after epoch %d, step %d", path, progress.epoch, progress.sums.steps
        )
        settings = {name: value for name, value in flags.items() if name in CHANGE_A_RUN}
        settings["rank_readout"] = self.model.config.rank_readout
        had_zero_shot = bool(progress.zero_shot)
        for warning in reconcile(progress, settings | facts, task):
            logger.warning("%s", warning)
        self._zero_shot_was_dropped = had_zero_shot and not progress.zero_shot
        return progress

    def run(self) -> Path:
        """All epochs that are left; returns the best checkpoint's path.

        DataError, ModelError, OutputError, RunError: the message ends with the last good
        checkpoint. Stopped: a signal came, and everything is saved.
        """
        progress, epochs = self.progress, self.config.epochs
        with contextlib.closing(self.epoch_log), self.signals, self._last_good_in_errors():
            if is_main():
                self._finish_interrupted_epoch()
            self._show_zero_shot()
            for name in self.bests:
                progress.set_best(name, *from_main(partial(progress.best, name)))
            while progress.epoch < epochs:
                self.signals.check()
                if progress.sums.steps < len(self.loader):
                    self._train()
                self._evaluate()
            self.signals.check()
        if progress.best_epoch is None:  # forgotten, and no epoch was left to be the best
            return self._last_good
        for name, path in self.bests.items():
            score, epoch = progress.best(name)
            if epoch is not None:
                logger.info("best epoch %s, score %.2f: %s", epoch, score, path)
        return self.bests["best"]

    def _show_zero_shot(self) -> None:
        """What is to beat: as a table, and as a record, which a log that is continued has."""
        rows = self.progress.zero_shot
        if rows:
            logger.info("CLIP alone, to beat:\n%s", self.evaluator.tables({})[0])
        if rows or self._zero_shot_was_dropped:  # readers of the log take the last record's
            counts = self.evaluator.counts()
            self.epoch_log.write({"epoch": 0, "global_step": 0} | counts | {"zero_shot": rows})

    def _train(self) -> None:
        progress = self.progress
        self.loader.set_epoch(progress.epoch, progress.sums.steps)
        with memory_advice(LESS_MEMORY), self.loader.worker_errors():
            try:
                train_one_epoch(
                    self.model, self.signals.immediate_between(self.loader), self.optimizer,
                    self.scaler, progress.sums, self.config,
                    num_steps=len(self.loader), first_step=progress.epoch * len(self.loader),
                    learning_rate=self.learning_rate, device=self.device,
                    after_step=self._after_step,
                )  # fmt: skip
            except Stopped:  # between two steps, where all that was done can be saved
                self._save_within_epoch()
                raise
        self._save()

    def _after_step(self, result: StepResult) -> None:
        progress = self.progress
        progress.global_step += 1
        steps = progress.sums.steps
        if steps % LOG_EVERY == 0:
            numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
            self.epoch_log.write_step(progress.global_step, numbers)
        self.signals.check()
        every = self.config.save_every_steps
        if every and steps % every == 0 and steps < len(self.loader):
            self._save_within_epoch()

    def _save_within_epoch(self) -> None:
        self._save()
        done = (self.progress.epoch + 1, self.progress.sums.steps, len(self.loader))
        logger.info("epoch %d, step %d of %d: saved", *done)

    def _evaluate(self) -> None:
        progress = self.progress
        with self.signals.immediate(), memory_advice(LESS_MEMORY_EVALUATING):
            rows = self.evaluator.run(self.evaluator.embed(self.model, self.device))
        scores = {"best": self.evaluator.score(rows), "best_dot": self.evaluator.dot_score(rows)}
        for name, score in scores.items():
            before = progress.best(name)[0]
            if score is not None and (before is None or score >= before):  # a tie: the later epoch
                progress.set_best(name, score, progress.epoch + 1)
        trained = progress.sums.means()
        progress.last_record = self._record(trained, rows)
        progress.epoch, progress.sums = progress.epoch + 1, EpochSums()
        self._save()
        for name, path in self.bests.items():
            if progress.best(name)[1] == progress.epoch and is_main():
                copy_checkpoint(self.latest, path)
        barrier()  # before anyone reads the best
        self.epoch_log.write(progress.last_record)
        loss = "–" if trained["loss"] is None else f"{trained['loss']:.4f}"
        seconds = trained["data_time"] + trained["step_time"], trained["data_time"]
        logger.info(
            "epoch %d/%d  loss %s  %.2f s a step, of which %.2f s waiting for data",
            *(progress.epoch, self.config.epochs, loss, *seconds),
        )
        for table in self.evaluator.tables(rows):
            logger.info("\n%s", table)

    def _record(self, trained: dict[str, float | None], rows: Rows) -> dict:
        """The line of log.jsonl: numbers of the first row of metrics under their plain names, and
        in "row" what the first row is."""
        progress, first = self.progress, next(iter(rows))
        metrics = {
            key if row == first else f"{row}/{key}": value
            for row, numbers in rows.items()
            for key, value in numbers.items()
        }
        counts = {"epoch": progress.epoch + 1, "global_step": progress.global_step}
        counts |= self.evaluator.counts()
        last_step = progress.epoch * len(self.loader) + progress.sums.steps - 1
        state = {"lr": self.learning_rate(last_step), "memory_gib": peak_memory_gib(self.device)}
        chosen = {"row": first, "best_epoch": progress.best_epoch}
        if progress.best_dot_epoch is not None:
            chosen["best_dot_epoch"] = progress.best_dot_epoch
        return counts | trained | state | metrics | chosen

    def _save(self) -> None:
        self.epoch_log.flush()  # steps before a checkpoint are not computed again
        if is_main():
            save_checkpoint(self.latest, self.model, self.optimizer, self.scaler, self.progress)
        barrier()
        self._last_good = self.latest

    def _finish_interrupted_epoch(self) -> None:
        """Do what follows the saving of a checkpoint, which a killed run may not have reached."""
        progress, source = self.progress, self.resumed_from
        if source is None:
            return
        for name, path in self.bests.items():
            self._copy_best(name, path, source)
        if progress.last_record is not None and source.resolve() == self.latest.resolve():
            self.epoch_log.write(progress.last_record)

    def _copy_best(self, name: str, path: Path, source: Path) -> None:
        """Have the best checkpoint where it belongs, or forget it if it is nowhere."""
        progress = self.progress
        epoch = progress.best(name)[1]
        if epoch == progress.epoch and not progress.sums.steps:
            copy_checkpoint(source, path)
        elif epoch is not None and epochs_of(path) != epoch:
            beside = source.with_name(path.name)
            if epochs_of(beside) == epoch:
                copy_checkpoint(beside, path)
            elif progress.epoch >= self.config.epochs:
                raise RunError(
                    f"all {self.config.epochs} epochs are trained, but the best checkpoint, of "
                    f"epoch {epoch}, is neither {path} nor {beside}: train more --epochs, or "
                    f"evaluate the last: --do_train 0 --resume {source}"
                )
            else:
                logger.warning(
                    "the best checkpoint so far, of epoch %d, is neither %s nor %s: the best is "
                    "chosen among the epochs from here on",
                    *(epoch, path, beside),
                )
                progress.set_best(name)

    @contextlib.contextmanager
    def _last_good_in_errors(self) -> Iterator[None]:
        try:
            yield
        except (DataError, ModelError, OutputError, RunError) as error:
            rest = "No checkpoint was written yet"
            if self._last_good:
                rest = f"The last good checkpoint, for --resume, is {self._last_good}"
            raise type(error)(f"{error}. {rest}") from error
