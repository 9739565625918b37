"""The events of an index in memory: every search is one product, exact, over all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from modules.readout import Readout
from utils import SearchError
from utils.search.index import Entry, Events, Storage

BLOCK_ROWS = 2**14  # events of one product
HALF_ROWS = 2**11  # of float16, widened while they are in a cache
FEW = 1000  # new videos that are read by their ids rather than with all others
MOST_DEAD = 0.25  # share of windows of removed videos from which on all are read again
CHUNK = 2**26  # cosines held at once: 256 MiB


class Matrix:
    """All events of an index: W windows of N_e events each.

    Args:
        storage: where they are.
        dtype: float32, or float16 for half the memory.
        readout: of a window's score.
        levels: int [N_e] of the events in the pyramid.
    """

    def __init__(
        self, storage: Storage, dtype: torch.dtype, readout: Readout, levels: np.ndarray
    ) -> None:
        self.storage, self.dtype, self.readout, self.levels = storage, dtype, readout, levels
        self.num_events = len(levels)
        self._clear()

    def _clear(self) -> None:
        self.ids: list[str] = []
        self.code_of: dict[str, int] = {}
        self.blocks: list[Tensor] = []  # [n, D], unit vectors
        self.codes = torch.empty(0, dtype=torch.int64)  # [W], the windows' places in `ids`
        self.windows = np.empty(0, np.int32)  # [W], their numbers in the video
        self.times = np.empty((0, self.num_events, 2), np.float32)  # [W, N_e, 2] seconds

    def update(self, entries: Iterable[Entry]) -> bool:
        """Hold the events of these videos and no others.

        False: those of some are not in the storage, as when they were replaced in the meantime.
        """
        wanted = {entry.id: entry.windows for entry in entries if entry.windows}
        gone = [code for code, token in enumerate(self.ids) if token not in wanted]
        if gone and torch.isin(self.codes, torch.tensor(gone)).float().mean() > MOST_DEAD:
            self._clear()
        new = wanted.keys() - self.code_of.keys()
        if new:
            few = len(new) <= FEW and len(new) < len(wanted)
            self._read(new, self.storage.vectors(new if few else None))
        for token in self.code_of.keys() - wanted.keys():  # its rows are scored for no one
            self.code_of.pop(token)
        found = torch.bincount(self.codes, minlength=len(self.ids)).tolist()
        lacking = [token for token, code in self.code_of.items() if found[code] != wanted[token]]
        for token in lacking:
            self.code_of.pop(token)
        return not lacking

    def _read(self, new: Collection[str], pieces: Iterator[Events]) -> None:
        for token in sorted(new):
            self.code_of[token] = len(self.ids)
            self.ids.append(token)
        codes, windows, times = [self.codes], [self.windows], [self.times]
        for piece in whole_windows(pieces, self.num_events):
            own = np.array([token in new for token in piece.video[:: self.num_events]], dtype=bool)
            piece = piece.take(np.repeat(own, self.num_events))
            if not len(piece):
                continue
            self._append(torch.from_numpy(np.array(piece.vectors)).to(self.dtype))
            tokens = piece.video[:: self.num_events]
            codes.append(torch.tensor([self.code_of[token] for token in tokens]))
            windows.append(piece.window[:: self.num_events])
            pairs = np.stack([piece.start, piece.end], axis=-1)
            times.append(pairs.reshape(-1, self.num_events, 2))
        self.codes = torch.cat(codes)
        self.windows, self.times = np.concatenate(windows), np.concatenate(times)

    def _append(self, rows: Tensor) -> None:
        if self.blocks and len(self.blocks[-1]) + len(rows) <= BLOCK_ROWS:
            self.blocks[-1] = torch.cat([self.blocks[-1], rows])
        else:
            self.blocks.append(rows)

    def scores(self, queries: Tensor, only: Collection[str] | None) -> Iterator[MatrixScores]:
        """What every one of some queries [Q, D] finds, of all videos or of some."""
        allowed = torch.zeros(len(self.ids), dtype=torch.bool)
        tokens = self.code_of if only is None else self.code_of.keys() & set(only)
        allowed[[self.code_of[token] for token in tokens]] = True
        hidden = ~allowed[self.codes]
        rows = max(1, len(self.codes) * self.num_events)
        for some in queries.split(max(1, CHUNK // rows)):
            for row in self._cosines(some).view(len(some), -1, self.num_events):
                if hidden.any():
                    row[hidden] = -torch.inf
                yield MatrixScores(self, row)

    def _cosines(self, queries: Tensor) -> Tensor:
        """float32 [q, W·N_e]."""
        cosines, first = torch.empty(len(queries), len(self.codes) * self.num_events), 0
        for block in self.blocks:
            for piece in block.split(HALF_ROWS) if block.dtype == torch.float16 else (block,):
                _product(piece.float(), queries, cosines[:, first : first + len(piece)])
                first += len(piece)
        return cosines

    def events(self, windows: Tensor, events: Tensor, scores: Tensor) -> Events:
        """Events [n] by their windows among all and their numbers in them."""
        window, event = windows.numpy(), events.numpy()
        start, end = self.times[window, event].T
        tokens = np.array([self.ids[code] for code in self.codes[windows].tolist()], dtype=object)
        levels, scores = self.levels[event], scores.numpy()
        return Events(tokens, self.windows[window], event, levels, start, end, scores=scores)


@dataclass(frozen=True)
class MatrixScores:
    """What one query finds in a `Matrix`; cosines [W, N_e], -inf of what it may not find."""

    matrix: Matrix
    cosines: Tensor

    def best_videos(self, k: int) -> list[tuple[str, float]]:
        """The best ids with their scores: the best window's read-out."""
        windows = self.matrix.readout(self.cosines[None])[0]  # [W]
        windows[self.cosines[:, 0].isneginf()] = -torch.inf  # whatever the read-out makes of them
        scores = windows.new_full((len(self.matrix.ids),), -torch.inf)
        best = scores.scatter_reduce_(0, self.matrix.codes, windows, "amax").topk(
            min(k, len(scores))
        )
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.matrix.ids[code], score) for code, score in pairs if score > -np.inf]

    def best_events(
        self, limit: int, token: str | None = None, without: Collection[str] = ()
    ) -> tuple[Events, bool]:
        """The best events of all videos but some, best first, or of one; and whether these are
        all."""
        windows = torch.arange(len(self.cosines)) if token is None else self._windows(token)
        cosines = self.cosines if token is None else self.cosines[windows]
        if without:
            hidden = torch.tensor([self.matrix.code_of[token] for token in without])
            cosines = cosines.clone()
            cosines[torch.isin(self.matrix.codes, hidden)] = -torch.inf
        best = cosines.flatten().topk(min(limit, cosines.numel()))
        found = best.values > -torch.inf
        window, event = self._split(best.indices[found])
        rows = self.matrix.events(windows[window], event, best.values[found])
        return rows, len(rows) < limit

    def events_of(self, token: str) -> Events:
        """All events of a video."""
        windows = self._windows(token)
        window, event = self._split(torch.arange(len(windows) * self.matrix.num_events))
        return self.matrix.events(windows[window], event, self.cosines[windows].flatten())

    def _windows(self, token: str) -> Tensor:
        return (self.matrix.codes == self.matrix.code_of[token]).nonzero()[:, 0]

    def _split(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Window and event of places among all events."""
        return places // self.matrix.num_events, places % self.matrix.num_events


def _product(block: Tensor, queries: Tensor, out: Tensor) -> None:
    """Into [q, n]. By numpy: its BLAS is quicker on AMD's processors than torch's, and as quick on
    others."""
    if len(queries) == 1:
        np.matmul(block.numpy(), queries[0].numpy(), out=out[0].numpy())
    else:
        np.matmul(queries.numpy(), block.numpy().T, out=out.numpy())


def whole_windows(pieces: Iterator[Events], num_events: int) -> Iterator[Events]:
    """The same rows in larger pieces that hold whole windows.

    SearchError: the events of a window are not all there, or not together.
    """
    waiting: list[Events] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(map(len, waiting)) >= BLOCK_ROWS:
            rows = joined(waiting)
            cut = len(rows) // num_events * num_events
            yield _checked(rows.take(slice(cut)), num_events)
            waiting = [rows.take(slice(cut, None))]
    if any(map(len, waiting)):
        yield _checked(joined(waiting), num_events)


def joined(pieces: list[Events]) -> Events:
    columns = {f.name: [getattr(piece, f.name) for piece in pieces] for f in fields(Events)}
    return Events(**{
        name: None if parts[0] is None else np.concatenate(parts)
        for name, parts in columns.items()
    })  # fmt: skip


def _checked(rows: Events, num_events: int) -> Events:
    if (
        len(rows) % num_events
        or (rows.event.reshape(-1, num_events) != np.arange(num_events)).any()
    ):
        raise SearchError("the index is damaged: the events of a window are not all there")
    return rows
