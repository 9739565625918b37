"""From a sentence's embedding to hits: videos by their score, moments without near duplicates."""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modules.readout import Readout, best_event
from utils import SearchError
from utils.search.hits import Hit, Moment, Video
from utils.search.index import Entry, Events, Storage
from utils.search.matrix import MatrixScores, joined

# Of two moments of a video that are both shown. An event and one of twice its length around it have
# exactly 0.5, but for the rounding of times (10 hours from the start: 4 ms).
MAX_IOU = 0.5 - 5e-3
PER_VIDEO = 5  # moments
FIRST_EVENTS = 20  # looked at for a moment, or for a video's; twice as many until they suffice


@dataclass(frozen=True)
class Filter:
    """Which videos may be found.

    Attributes:
        within: a pattern of the path below the indexed folder, or of the whole path: ``trip/*``.
        since, until: days, ``2026-05-31``, by when the file was last changed, both included.
        min_seconds, max_seconds: of the video's length.
    """

    within: str | None = None
    since: str | None = None
    until: str | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None

    def select(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those of the videos that pass. SearchError: a date is none."""
        first = _day(self.since) if self.since else -np.inf
        last = _day(self.until, after=1) if self.until else np.inf
        shortest = -np.inf if self.min_seconds is None else self.min_seconds
        longest = np.inf if self.max_seconds is None else self.max_seconds
        return [
            entry
            for entry in entries
            if first <= entry.mtime < last
            and shortest <= entry.duration <= longest
            and (self.within is None or matches(entry, self.within))
        ]


def matches(video: Video, pattern: str) -> bool:
    """Whether its name or path fits a pattern of the shell's kind; a folder's name means all in
    it."""
    patterns = [pattern, f"{pattern.rstrip('/')}/*"]
    return any(fnmatch.fnmatchcase(x, p) for x in (video.name, video.path) for p in patterns)


def _day(text: str, after: int = 0) -> float:
    """When a day begins, or the one so many days after it, in seconds since 1970."""
    try:
        day = datetime.date.fromisoformat(text) + datetime.timedelta(days=after)
        return datetime.datetime.combine(day, datetime.time()).timestamp()
    except (ValueError, OverflowError):  # the years 1 and 9999 have days that no clock has
        raise SearchError(f"{text!r} is no date: write 2026-05-31") from None


@dataclass(frozen=True)
class StoredEvents:
    """Search by the store's own product, for more events than fit into memory."""

    storage: Storage
    known: Collection[str]  # ids of the videos that count
    readout: Readout
    num_events: int
    approximate: bool = False

    def scores(self, queries: Tensor, only: Collection[str] | None) -> Iterator[StoredScores]:
        """As `Matrix.scores`."""
        return (StoredScores(self, query.numpy(), only) for query in queries)


@dataclass(frozen=True)
class StoredScores:
    """What one query [D] finds; as `MatrixScores`.

    Exact for every read-out that is not above the best event's cosine, as none is: videos come in
    the order of their best event, and the search continues until that is below the k-th best score.
    """

    source: StoredEvents
    query: np.ndarray
    only: Collection[str] | None

    def best_videos(self, k: int) -> list[tuple[str, float]]:
        found: dict[str, float] = {}
        # So many events of k - 1 windows can come before the best one of the k-th.
        limit, seen = self.source.num_events * (k - 1) + 1, set()
        while True:
            rows, complete = self._nearest(limit, seen)
            for token, score in zip(rows.video, rows.scores.tolist(), strict=True):
                if token not in seen and token in self.source.known:
                    found[token] = self._score(token, score)
                seen.add(token)
            best = sorted(found.items(), key=lambda item: -item[1])[:k]
            if complete or (len(best) == k and best[-1][1] >= rows.scores[-1]):
                return best
            limit *= 2

    def best_events(
        self, limit: int, token: str | None = None, without: Collection[str] = ()
    ) -> tuple[Events, bool]:
        if token is not None:
            return self.events_of(token), True
        rows, complete = self._nearest(limit, without)
        most = self.source.storage.most_nearest
        known = rows.take([token in self.source.known for token in rows.video])
        return known, complete or (most is not None and limit >= most)

    def events_of(self, token: str) -> Events:
        rows = joined([*self.source.storage.vectors({token})])
        rows = rows.take(np.lexsort((rows.event, rows.window)))
        return replace(rows, vectors=None, scores=rows.vectors @ self.query)

    def _score(self, token: str, best: float) -> float:
        """Of a video whose best event has that cosine."""
        if self.source.readout is best_event:
            return best
        cosines = torch.from_numpy(self.events_of(token).scores)
        return float(self.source.readout(cosines.view(1, -1, self.source.num_events)).max())

    def _nearest(self, limit: int, without: Collection[str] = ()) -> tuple[Events, bool]:
        """The best events, and whether there are no more."""
        limit = min(limit, self.source.storage.most_nearest or limit)
        rows = self.source.storage.nearest(
            self.query, limit, self.only, without, self.source.approximate
        )
        return rows, len(rows) < limit


def rank_videos(
    scores: MatrixScores | StoredScores, k: int, entries: Mapping[str, Entry]
) -> list[Hit]:
    """The best k videos, each with its best moments."""
    return [
        Hit(entries[token], score, _best_moments(scores, token))
        for token, score in scores.best_videos(k)
    ]


def _best_moments(scores: MatrixScores | StoredScores, token: str) -> list[Moment]:
    """Of one video."""
    limit = FIRST_EVENTS
    while True:
        rows, complete = scores.best_events(limit, token)
        moments = spread(by_score(rows), PER_VIDEO)  # equal ones in one order, of any source
        if len(moments) == PER_VIDEO or complete:
            return moments
        limit *= 2


def rank_moments(
    scores: MatrixScores | StoredScores, k: int, entries: Mapping[str, Entry]
) -> list[Hit]:
    """The best k moments, of a video at most PER_VIDEO."""
    limit, settled = FIRST_EVENTS * k, {}
    while True:
        rows, complete = scores.best_events(limit, without=settled)
        found = _spread(rows, k, PER_VIDEO)
        earlier = [(token, moment) for token, own in settled.items() for moment in own]
        best = sorted(earlier + found, key=lambda pair: -pair[1].score)[:k]
        own: dict[str, list[Moment]] = {}
        for token, moment in found:
            own.setdefault(token, []).append(moment)
        # A video that has all its moments is not looked at again.
        new = {token: moments for token, moments in own.items() if len(moments) == PER_VIDEO}
        if len(best) == k or (complete and not new):
            return [Hit(entries[token], moment.score, [moment]) for token, moment in best]
        settled |= new
        limit *= 2


def by_score(rows: Events) -> Events:
    """Best first; equal ones in the order of their windows and events."""
    return rows.take(np.lexsort((rows.event, rows.window, -rows.scores)))


def spread(rows: Events, k: int) -> list[Moment]:
    """Of one video's events, best first, the best k of which no two overlap by more than half."""
    return [moment for _, moment in _spread(rows, k, k)]


def _spread(rows: Events, k: int, per_video: int) -> list[tuple[str, Moment]]:
    """Non-maximum suppression within each video, in the order of the scores."""
    kept: dict[str, list[Moment]] = {}
    found: list[tuple[str, Moment]] = []
    columns = (rows.start, rows.end, rows.scores, rows.level)
    for token, *values in zip(rows.video, *(x.tolist() for x in columns), strict=True):
        moment, own = Moment(*values), kept.setdefault(token, [])
        if len(own) < per_video and all(iou(moment, other) < MAX_IOU for other in own):
            own.append(moment)
            found.append((token, moment))
            if len(found) == k:
                break
    return found


def iou(one: Moment, other: Moment) -> float:
    """Length of what two moments share over that of what either covers."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    covered = max(one.end, other.end) - min(one.start, other.start)
    return max(shared, 0.0) / covered if covered > 0 else 1.0
