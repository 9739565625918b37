"""Settings that a run is resumed with, against those that its checkpoint was made with."""

from __future__ import annotations

import pytest

from utils.training.progress import Progress
from utils.training.trainer import reconcile

OLD = {"lr": 1e-3, "event_scores": "both"}  # of a checkpoint from before the settings below


def resumed(args: dict, **settings: object) -> tuple[Progress, list[str]]:
    """A run with two best epochs, resumed with these settings besides its own."""
    progress = Progress(epoch=3, args=args)
    progress.set_best("best", 10.0, 2)
    progress.set_best("best_dot", 9.0, 3)
    return progress, reconcile(progress, args | settings)


@pytest.mark.parametrize(
    ("name", "default", "other"),
    [
        ("hard_negatives", 0.0, 0.5),
        ("text_relations", 0.0, 1.0),
        ("reversed_negatives", 0.0, 0.3),
        ("rank_readout", "max", "half"),
    ],
)
def test_what_an_early_checkpoint_does_not_name_was_the_published_setting(
    name: str, default: object, other: object
) -> None:
    assert not resumed(OLD, **{name: default})[1]
    (said, *_) = resumed(OLD, **{name: other})[1]
    assert f"{name} {other} (was {default})" in said


def test_both_best_epochs_are_forgotten_when_videos_are_ranked_otherwise() -> None:
    progress, _ = resumed(OLD, rank_readout="half")
    assert (progress.best_epoch, progress.best_dot_epoch) == (None, None)


def test_naming_the_read_out_that_is_in_use_changes_nothing() -> None:
    args = OLD | {"readout": "consensus", "rank_readout": None}
    progress, warnings = resumed(args, rank_readout="half")
    assert not warnings and (progress.best_epoch, progress.best_dot_epoch) == (2, 3)


def test_the_second_best_epoch_is_that_of_all_epochs_or_forgotten() -> None:
    progress, warnings = resumed(OLD, event_scores="cosine")
    assert (progress.best_epoch, progress.best_dot_epoch) == (2, None)
    progress, warnings = resumed(OLD | {"event_scores": "cosine"}, event_scores="both")
    assert (progress.best_epoch, progress.best_dot_epoch) == (2, None)
    assert any('row "dot" is one from here on' in warning for warning in warnings)
    assert resumed(OLD, lr=1e-4)[0].best_dot_epoch == 3
