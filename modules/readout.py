"""Read-outs: from the cosines of a video's events to the video's one score.

Training, evaluation and search ask the model for its read-outs; nothing else decides what the score
of a video is. Moments are ranked by event, whatever the read-out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules import ModelError
from modules.pyramid import PromptPyramid

Readout = Callable[[Tensor], Tensor]  # cosines [T, B, N_e] -> scores [T, B]

TOP_TEMPERATURE = 0.05  # of the four best; ITA's
WARMEST, COLDEST = 0.5, 0.005  # of the annealed maximum: nearly the mean, nearly the largest


def best_event(cosines: Tensor) -> Tensor:
    """The largest cosine over the events (ProPy, §3.5): [..., N_e] to [...]."""
    return cosines.amax(dim=-1)


class Consensus(nn.Module):
    """max_τ C(τ), where C(τ) is the mean over levels of the largest cosine of that level's events
    which cover bottom slot τ; levels without an event there do not count.

    After TF-PRVR's moment-aware scoring. The sums walk up the pyramid: slots that no higher level
    tells apart are one from there on, represented by the best of them, which changes no number.

    Args:
        with_best: ½ (max_e c(e) + max_τ C(τ)) instead.
    """

    def __init__(self, pyramid: PromptPyramid, with_best: bool = False) -> None:
        super().__init__()
        self.with_best = with_best
        covers = _covering_events(pyramid)  # per level, per slot
        slots = list(range(pyramid.num_bottom_events))
        levels = [sum(bool(cover[slot]) for cover in covers) for slot in slots]
        self.has_gaps = min(levels) < len(covers)
        self.steps = []
        for number, cover in enumerate(covers):
            alike: dict[tuple, list[int]] = {}  # positions of slots that are one from here on
            for position, slot in enumerate(slots):
                key = (levels[slot], *(here[slot] for here in covers[number:]))
                alike.setdefault(key, []).append(position)
            merged = self._keep(f"merge_{number}", alike.values())
            slots = [slots[first] for first, *_ in alike.values()]
            # a level without an event there adds the zero that stands after the events
            seen = [cover[slot] or [pyramid.num_events] for slot in slots]
            self.steps.append((self._keep(f"cover_{number}", seen), merged))
        counts = torch.tensor([[float(levels[slot])] for slot in slots])
        self.register_buffer("counts", counts, persistent=False)

    def _keep(self, name: str, rows: Collection[Sequence[int]]) -> list[slice | str]:
        """The columns of ragged rows, short ones ending in their first: slices, where they are
        regular, which need no copy, else names of buffers [n]."""
        width = max(map(len, rows))
        kept: list[slice | str] = []
        for i in range(width):
            column = [row[i] if i < len(row) else row[0] for row in rows]
            step = column[1] - column[0] if len(column) > 1 else 1
            regular = slice(column[0], column[-1] + 1, max(step, 1))
            if column == list(range(regular.start, regular.stop, regular.step)):
                kept.append(regular)
            else:
                kept.append(f"{name}_{i}")
                self.register_buffer(kept[-1], torch.tensor(column), persistent=False)
        return kept

    def _largest(self, rows: Tensor, columns: Sequence[slice | str]) -> Tensor:
        # Search keeps its cosines on the CPU, wherever the model is.
        columns = (c if isinstance(c, slice) else getattr(self, c).to(rows.device) for c in columns)
        chosen = (rows[column] for column in columns)
        return reduce(torch.maximum, chosen)

    def forward(self, cosines: Tensor) -> Tensor:
        # Events first: every operation runs over whole rows of memory.
        events = cosines.reshape(-1, cosines.shape[-1]).T.contiguous()  # [N_e, T·B]
        rows = F.pad(events, (0, 0, 0, 1)) if self.has_gaps else events
        (cover, _), *steps = self.steps
        total = self._largest(rows, cover)  # [n_1, T·B]
        for cover, merged in steps:
            if len(merged) > 1:
                total = self._largest(total, merged)
            total = total + self._largest(rows, cover)
        scores = (total / self.counts.to(total.device)).amax(dim=0)
        if self.with_best:
            scores = (scores + events.amax(dim=0)) / 2
        return scores.reshape(cosines.shape[:-1])


def mean_of_levels(cosines: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mean over levels of their largest cosine; sizes are the levels' numbers of events."""
    levels = [level.amax(dim=-1) for level in cosines.split(list(sizes), dim=-1)]
    return torch.stack(levels).mean(dim=0)


class AnnealedMaximum(nn.Module):
    """Σ w c with w = softmax(c / T) over all events, where T falls with training; without training
    it is what it ends as."""

    def __init__(self) -> None:
        super().__init__()
        coldest = torch.tensor(COLDEST, dtype=torch.float64)
        self.register_buffer("temperature", coldest, persistent=False)

    def anneal(self, share: float) -> None:
        """Args: share: of training that is done, from 0 to 1."""
        self.temperature.fill_(WARMEST * (COLDEST / WARMEST) ** share)

    def forward(self, cosines: Tensor) -> Tensor:
        return _weighted(cosines, self.temperature.to(cosines.device))


def top_four(cosines: Tensor, last: int | None = None) -> Tensor:
    """Σ w c with w = softmax(c / 0.05), over the four largest of the `last` events: ITA's
    aggregation without the sum's normalisation, which would need the embeddings."""
    chosen = cosines if last is None else cosines[..., -last:]
    return _weighted(chosen.topk(min(4, chosen.shape[-1])).values, TOP_TEMPERATURE)


def _weighted(cosines: Tensor, temperature: float | Tensor) -> Tensor:
    return ((cosines / temperature).softmax(dim=-1) * cosines).sum(dim=-1)


READOUTS: dict[str, Callable[[PromptPyramid], Readout]] = {
    "max": lambda pyramid: best_event,
    "consensus": Consensus,
    "half": partial(Consensus, with_best=True),
    "levels": lambda pyramid: partial(mean_of_levels, sizes=pyramid.events_per_level[::-1]),
    "annealed": lambda pyramid: AnnealedMaximum(),
    "top4": lambda pyramid: top_four,
    "top4_bottom": lambda pyramid: partial(top_four, last=pyramid.num_bottom_events),
}
# After such a training; others rank as they train.
RANKED_BY = {"consensus": "half", "annealed": "max"}


def readout_of(name: str, pyramid: PromptPyramid, device: torch.device | None = None) -> Readout:
    """The read-out of that name, for cosines on a device; a model takes its own along when it is
    moved. ModelError: there is none."""
    if name not in READOUTS:
        raise ModelError(f"read-out {name!r} is none of {', '.join(READOUTS)}")
    readout = READOUTS[name](pyramid)
    return readout.to(device) if isinstance(readout, nn.Module) else readout


def ranking_name(training: str, ranking: str | None = None) -> str:
    """The read-out that ranks videos: the one named, or what suits the one of training."""
    return ranking or RANKED_BY.get(training, training)


def _covering_events(pyramid: PromptPyramid) -> list[list[tuple[int, ...]]]:
    """Per level, bottom first, and bottom slot: the level's events whose spans contain it."""
    level = pyramid.level_of_event
    contains = pyramid.contains[:, -pyramid.num_bottom_events :].T  # [n_1, N_e]
    return [
        [tuple((row & (level == number)).nonzero().flatten().tolist()) for row in contains]
        for number in range(1, len(pyramid.events_per_level) + 1)
    ]
