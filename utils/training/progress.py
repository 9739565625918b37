"""Where a run stands besides its weights: what a checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataloaders.annotations import Split

# What is known of a run besides its flags, by name.
TRAIN_ANNOTATIONS = "training annotations"
VAL_ANNOTATIONS = "validation annotations"


def run_facts(
    train: Split, val: Split, precision: str, num_frames: int, source: str
) -> dict[str, str]:
    """What resuming compares besides the flags; `source` is the kind of the frames' source."""
    return {
        TRAIN_ANNOTATIONS: train.summary(),
        VAL_ANNOTATIONS: val.summary(),
        "precision in use": precision,
        "frames of a video": str(num_frames),
        "source of the frames": source,
    }


@dataclass
class StepResult:
    """What one optimizer step did."""

    loss: float
    grad_norm: float  # before clipping
    skipped: bool  # by the loss scaler, because a gradient was not finite
    level_shares: list[float]  # of the gradient, see `engine.level_shares`


@dataclass
class EpochSums:
    """Running sums over the steps of an epoch so far, from which its means are logged."""

    steps: int = 0
    skipped_steps: int = 0  # by the loss scaler, whose loss and gradient norm are left out
    loss: float = 0.0
    grad_norm: float = 0.0
    data_time: float = 0.0  # seconds waiting for batches
    step_time: float = 0.0  # seconds working on them
    level_shares: list[float] = field(default_factory=list)  # bottom level first

    def add(self, result: StepResult, data_time: float, step_time: float) -> None:
        """One more step."""
        self.steps += 1
        self.data_time += data_time
        self.step_time += step_time
        if result.skipped:
            self.skipped_steps += 1
            return
        self.loss += result.loss
        self.grad_norm += result.grad_norm
        before = self.level_shares or [0.0] * len(result.level_shares)
        self.level_shares = [a + b for a, b in zip(before, result.level_shares, strict=True)]

    def means(self) -> dict[str, float | None]:
        """Means a step, and numbers of steps; None for loss and gradient if all were skipped. The
        levels' shares of the gradient in %."""
        taken, whole = self.steps - self.skipped_steps, sum(self.level_shares)
        shares = {
            f"gradient/level_{level}": 100 * share / whole if whole else None
            for level, share in enumerate(self.level_shares, start=1)
        }
        return shares | {
            "loss": self.loss / taken if taken else None,
            "grad_norm": self.grad_norm / taken if taken else None,
            "data_time": self.data_time / self.steps,
            "step_time": self.step_time / self.steps,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }


@dataclass
class Progress:
    """What a checkpoint says of the run besides the weights, which are in the model by then."""

    epoch: int = 0  # epochs done
    global_step: int = 0  # optimizer steps done, those skipped by the loss scaler included
    best_score: float | None = None
    best_epoch: int | None = None
    args: dict = field(default_factory=dict)
    sums: EpochSums = field(default_factory=EpochSums)  # of the epoch under way
    last_record: dict | None = None  # of log.jsonl, for the last epoch done
    facts: dict = field(default_factory=dict)  # of the run besides its flags
    best_dot_score: float | None = None  # best of the row "dot", where it is the second
    best_dot_epoch: int | None = None
    zero_shot: dict = field(default_factory=dict)  # rows of CLIP alone by scoring, if computed
    has_optimizer: bool = False  # whether training can be resumed from it

    def best(self, name: str) -> tuple[float | None, int | None]:
        """Score and epoch of "best" or "best_dot"."""
        return getattr(self, f"{name}_score"), getattr(self, f"{name}_epoch")

    def set_best(self, name: str, score: float | None = None, epoch: int | None = None) -> None:
        """Without a score: forget it."""
        setattr(self, f"{name}_score", score)
        setattr(self, f"{name}_epoch", epoch)
