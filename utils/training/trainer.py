"""All epochs of a run, each with its evaluation, so that it can end anywhere and go on.

A checkpoint is written after an epoch's training, after its evaluation, within the epoch if asked
for, and when a signal ends the run. What log.jsonl says of an epoch is in the checkpoint too: it is
the checkpoint that decides what was done, and what a killed run left undone is made up for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from dataloaders import DataError
from dataloaders.loader import TrainingLoader
from utils import OutputError, RunError
from utils.evaluation.evaluator import Evaluation
from utils.logger import EpochLog
from utils.misc import memory_advice, peak_memory_gib
from utils.training.checkpoint import BEST, LATEST, copy_checkpoint, epochs_of, save_checkpoint
from utils.training.engine import StepResult, train_one_epoch
from utils.training.progress import Checkpoint, EpochSums
from utils.training.signals import DeferredSignals, Stopped

# Settings with which another run would come out. The model's own are compared with its weights.
CHANGE_A_RUN = (
    "epochs", "batch_size", "lr", "coef_lr", "wd", "warmup_proportion", "clip_grad_norm",
    "gradient_accumulation_steps", "max_words", "seed",
    "event_scores", "npev", "max_event_per_text", "window_rule",
)  # fmt: skip
# Of them, and of what else is known of a run, those that the order of an epoch's videos depends on.
CHANGE_AN_EPOCH = ("batch_size", "seed", "training annotations")

EXPECTED_ERRORS = (RunError, RunError, OutputError, RunError, DataError)

LESS_MEMORY = (
    "use --checkpoint_activations 1 or raise --gradient_accumulation_steps (same result), or lower "
    "--batch_size (another result: fewer negatives), or use --precision amp or bf16 on a GPU"
)
LESS_MEMORY_EVALUATING = "lower --batch_size_val (same result)"


def adapt(progress: Checkpoint, settings: dict) -> list[str]:
    """Fit a checkpoint's progress to settings that it was not made with.

    An epoch under way is started again if its videos come in another order now. The learning rate
    follows the new settings from here on, at the same epoch and step.

    Args:
        settings: of CHANGE_A_RUN, and other facts of the run, by name.

    Returns:
        Warnings that name every difference.
    """
    before = progress.args | progress.facts
    changed = [name for name, now in settings.items() if before.get(name, now) != now]
    if not changed:
        return []
    named = ", ".join(f"{name} {settings[name]} (was {before[name]})" for name in changed)
    warnings = [f"going on with other settings, so from here on it is another run: {named}"]
    if progress.sums.steps and set(changed) & set(CHANGE_AN_EPOCH):
        progress.sums = EpochSums()
        warnings.append(f"epoch {progress.epoch + 1} starts again, with its videos in a new order")
    return warnings


class Trainer:
    """Trains a model from where `progress` stands to the end.

    Args:
        progress: as `load_checkpoint` gave it, or a new one; kept up to date.
        folder: for checkpoints and logs.
        resumed_from: the checkpoint that `progress` is of; None for a new run.
        learning_rate: the rate before a step, counted from 0 in steps of this run's epochs.
        precision, parts, clip_grad_norm: see `train_step`.
        display_every, save_every: log, or save, every so many steps of an epoch; 0 never saves.
        datatype: the data set whose published results are shown.
        on_step: called after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: TrainingLoader,
        evaluation: Evaluation,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: Checkpoint,
        folder: Path,
        *,
        resumed_from: Path | None,
        epochs: int,
        learning_rate: Callable[[int], float],
        device: torch.device,
        log: logging.Logger,
        precision: str,
        parts: int,
        clip_grad_norm: float,
        display_every: int,
        save_every: int,
        datatype: str,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.loader, self.evaluation = model, loader, evaluation
        self.optimizer, self.scaler, self.progress = optimizer, scaler, progress
        self.latest, self.best = folder / LATEST, folder / BEST
        self.resumed_from = resumed_from
        self.epochs, self.learning_rate = epochs, learning_rate
        self.device, self.log = device, log
        self.precision, self.parts, self.clip_grad_norm = precision, parts, clip_grad_norm
        self.display_every, self.save_every = display_every, save_every
        self.datatype, self.on_step = datatype, on_step
        self.epoch_log = EpochLog(folder, progress.global_step if resumed_from else None)
        self.signals = DeferredSignals()
        self._last_good = resumed_from

    def run(self) -> Path:
        """All epochs that are left; returns the best checkpoint's path.

        Raises:
            RunError, RunError, OutputError, RunError, DataError: the message
                ends with the last good checkpoint.
            Stopped: a signal came, and everything is saved.
        """
        with contextlib.closing(self.epoch_log), self.signals, self._last_good_in_errors():
            self._make_up_for_what_was_undone()
            while self.progress.epoch < self.epochs:
                self.signals.check()
                if self.progress.sums.steps < len(self.loader):
                    self._train()
                self._evaluate()
            self.signals.check()
        progress = self.progress
        self.log.info(
            "best epoch %s, score %.2f: %s", progress.best_epoch, progress.best_score, self.best
        )
        return self.best

    def _train(self) -> None:
        progress = self.progress
        self.loader.set_epoch(progress.epoch, progress.sums.steps)
        with memory_advice(LESS_MEMORY), self.loader.worker_errors(), self._saved_if_stopped():
            train_one_epoch(
                self.model,
                self.signals.immediate_between(self.loader),
                self.optimizer,
                self.scaler,
                progress.sums,
                num_steps=len(self.loader),
                learning_rate=self.learning_rate,
                first_step=progress.epoch * len(self.loader),
                device=self.device,
                log=self.log,
                precision=self.precision,
                parts=self.parts,
                clip_grad_norm=self.clip_grad_norm,
                display_every=self.display_every,
                after_step=self._after_step,
            )
        self._save()

    def _after_step(self, result: StepResult) -> None:
        self.on_step()
        progress = self.progress
        progress.global_step += 1
        steps = progress.sums.steps
        if steps % self.display_every == 0:
            numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
            self.epoch_log.write_step(progress.global_step, numbers)
        self.signals.check()
        if self.save_every and steps % self.save_every == 0 and steps < len(self.loader):
            self._save_within_epoch()

    @contextlib.contextmanager
    def _saved_if_stopped(self) -> Iterator[None]:
        """A signal ends training between two steps only, where all that was done can be saved."""
        try:
            yield
        except Stopped:
            self._save_within_epoch()
            raise

    def _save_within_epoch(self) -> None:
        self._save()
        epoch, steps = self.progress.epoch + 1, self.progress.sums.steps
        self.log.info("epoch %d, step %d of %d: saved", epoch, steps, len(self.loader))

    def _evaluate(self) -> None:
        progress = self.progress
        with self.signals.immediate(), memory_advice(LESS_MEMORY_EVALUATING):
            rows = self.evaluation.run(self.evaluation.embed(self.model, self.device))
        score = self.evaluation.score(rows)
        if progress.best_score is None or score >= progress.best_score:  # a tie: the later epoch
            progress.best_score, progress.best_epoch = score, progress.epoch + 1
        trained = progress.sums.means()
        progress.last_record = self._record(trained, rows)
        progress.epoch, progress.sums = progress.epoch + 1, EpochSums()
        self._save()
        if progress.best_epoch == progress.epoch:
            copy_checkpoint(self.latest, self.best)
        self.epoch_log.write(progress.last_record)
        self.log.info(
            "epoch %d/%d  loss %.4f  %.2f s a step, of which %.2f s waiting for data",
            progress.epoch,
            self.epochs,
            trained["loss"],
            trained["data_time"] + trained["step_time"],
            trained["data_time"],
        )
        for table in self.evaluation.tables(rows, self.datatype):
            self.log.info("\n%s", table)

    def _record(self, trained: dict[str, float], rows: dict[str, dict[str, float]]) -> dict:
        """The line of log.jsonl: numbers of the first row of metrics under their plain names."""
        progress = self.progress
        metrics = {
            key if row == next(iter(rows)) else f"{row}/{key}": value
            for row, numbers in rows.items()
            for key, value in numbers.items()
        }
        counts = {"epoch": progress.epoch + 1, "global_step": progress.global_step}
        counts |= self.evaluation.numbers()
        last_step = progress.epoch * len(self.loader) + progress.sums.steps - 1
        state = {"lr": self.learning_rate(last_step), "memory_gib": peak_memory_gib(self.device)}
        return counts | trained | state | metrics | {"best_epoch": progress.best_epoch}

    def _save(self) -> None:
        self.epoch_log.flush()  # steps before a checkpoint are not computed again
        save_checkpoint(self.latest, self.model, self.optimizer, self.scaler, self.progress)
        self._last_good = self.latest

    def _make_up_for_what_was_undone(self) -> None:
        """What follows a checkpoint's saving and may not have come to pass any more."""
        progress, source = self.progress, self.resumed_from
        if source is None:
            return
        if progress.best_epoch == progress.epoch and not progress.sums.steps:
            copy_checkpoint(source, self.best)
        elif progress.best_epoch is not None and epochs_of(self.best) != progress.best_epoch:
            beside = source.with_name(BEST)
            if epochs_of(beside) == progress.best_epoch:
                copy_checkpoint(beside, self.best)
            elif progress.epoch >= self.epochs:
                raise RunError(
                    f"all {self.epochs} epochs are trained, but the best checkpoint, of epoch "
                    f"{progress.best_epoch}, is neither {self.best} nor {beside}: train on with "
                    f"more --epochs, or evaluate the last epoch: --do_train 0 --resume {source}"
                )
            else:
                self.log.warning(
                    "the best checkpoint so far, of epoch %d, is neither %s nor %s: the best is "
                    "chosen among the epochs from here on",
                    progress.best_epoch,
                    self.best,
                    beside,
                )
                progress.best_score = progress.best_epoch = None
        if progress.last_record is not None and source.resolve() == self.latest.resolve():
            self.epoch_log.write(progress.last_record)

    @contextlib.contextmanager
    def _last_good_in_errors(self) -> Iterator[None]:
        try:
            yield
        except EXPECTED_ERRORS as error:
            if self._last_good is None:
                rest = "No checkpoint was written yet"
            else:
                rest = f"The last good checkpoint, for --resume, is {self._last_good}"
            raise type(error)(f"{error}. {rest}") from error
