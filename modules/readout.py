"""Read-outs: from the cosines of a video's events to the video's one score.

Training, evaluation and search ask the model for its read-out; nothing else decides what the score
of a video is. Moments are ranked by event, whatever the read-out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from modules import ModelError

Readout = Callable[[Tensor], Tensor]  # cosines [T, B, N_e] -> scores [T, B]


def best_event(cosines: Tensor) -> Tensor:
    """The largest cosine over the events (ProPy, §3.5): [..., N_e] to [...]."""
    return cosines.amax(dim=-1)


READOUTS: dict[str, Readout] = {"max": best_event}


def readout_of(name: str) -> Readout:
    """The read-out of that name. ModelError: there is none."""
    if name not in READOUTS:
        raise ModelError(f"read-out {name!r} is none of {', '.join(READOUTS)}")
    return READOUTS[name]
