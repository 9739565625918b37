"""Ranking against brute force: in memory and by the store, of every read-out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modules.readout import best_event
from tests.search.stores import LEVELS, MODEL, N_E, Corpus, queries
from utils import SearchError
from utils.search.engine import (
    MAX_IOU,
    Filter,
    StoredEvents,
    by_score,
    iou,
    rank_moments,
    rank_videos,
    spread,
)
from utils.search.hits import Moment
from utils.search.index import Events
from utils.search.lance import LanceIndex
from utils.search.matrix import Matrix


def mean_and_best(cosines: torch.Tensor) -> torch.Tensor:
    """A read-out that is below the best event, as consensus is."""
    return (cosines.amax(-1) + cosines.mean(-1)) / 2


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def storage(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> LanceIndex:
    storage = LanceIndex(str(tmp_path_factory.mktemp("engine") / "i"))
    storage.create(MODEL)
    corpus.fill(storage)
    return storage


def source(kind: str, storage: LanceIndex, readout):
    entries = storage.videos()
    if kind == "store":
        return StoredEvents(storage, {entry.id for entry in entries}, readout, N_E)
    dtype = torch.float16 if kind == "float16" else torch.float32
    matrix = Matrix(storage, dtype, readout, np.array(LEVELS))
    assert matrix.update(entries)
    return matrix


@pytest.mark.parametrize("readout", [best_event, mean_and_best])
@pytest.mark.parametrize("kind", ["memory", "store"])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_videos_are_ranked_exactly(corpus, storage, kind, readout, k) -> None:
    entries = {entry.id: entry for entry in storage.videos()}
    texts = queries()
    for query, scores in zip(
        texts, source(kind, storage, readout).scores(torch.from_numpy(texts), None), strict=True
    ):
        expected = {
            token: float(readout(torch.from_numpy(cosines)).max())
            for token, cosines in corpus.cosines(query).items()
        }
        order = sorted(expected, key=lambda token: -expected[token])[:k]
        hits = rank_videos(scores, k, entries)
        assert [hit.video.id for hit in hits] == order
        assert [hit.score for hit in hits] == pytest.approx([expected[x] for x in order], abs=1e-5)
        assert all(1 <= len(hit.moments) <= 5 for hit in hits)


def test_a_store_that_gives_few_events_at_once(corpus, storage, monkeypatch) -> None:
    """As Milvus: videos are ranked exactly all the same, moments as far as its events go."""
    entries = {entry.id: entry for entry in storage.videos()}
    texts = torch.from_numpy(queries(1))
    (whole,) = source("store", storage, best_event).scores(texts, None)
    videos, moments = rank_videos(whole, 25, entries), rank_moments(whole, 1000, entries)
    monkeypatch.setattr(storage, "most_nearest", 50)
    assert rank_videos(whole, 25, entries) == videos
    some = rank_moments(whole, 1000, entries)
    assert some and some == moments[: len(some)]


def brute_force_moments(corpus: Corpus, query: np.ndarray, k: int) -> list[tuple[str, float]]:
    """Every event in the order of its score; kept unless one kept before is too near."""
    every = [
        (float(score), token, float(rows.start[i]), float(rows.end[i]))
        for token, rows in corpus.events.items()
        if token in corpus.cosines(query)
        for i, score in enumerate(rows.vectors @ query)
    ]
    kept: list[tuple[float, str, float, float]] = []
    for score, token, start, end in sorted(every, reverse=True):
        own = [x for x in kept if x[1] == token]
        shared = [min(end, e) - max(start, s) for _, _, s, e in own]
        union = [max(end, e) - min(start, s) for _, _, s, e in own]
        if len(own) < 5 and all(a / b < 0.5 for a, b in zip(shared, union, strict=True)):
            kept.append((score, token, start, end))
    return [(token, score) for score, token, *_ in kept[:k]]


@pytest.mark.parametrize("kind", ["memory", "store"])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_moments_are_ranked_exactly(corpus, storage, kind, k) -> None:
    entries = {entry.id: entry for entry in storage.videos()}
    texts = queries(3)
    for query, scores in zip(
        texts, source(kind, storage, best_event).scores(torch.from_numpy(texts), None), strict=True
    ):
        hits = rank_moments(scores, k, entries)
        expected = brute_force_moments(corpus, query, k)
        assert [hit.video.id for hit in hits] == [token for token, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([x for _, x in expected], abs=1e-5)


@pytest.mark.parametrize("kind", ["memory", "store"])
def test_long_videos_do_not_hide_the_moments_of_others(tmp_path, monkeypatch, kind) -> None:
    storage, corpus = LanceIndex(str(tmp_path / "i")), Corpus()
    storage.create(MODEL)
    for number, windows in enumerate((60, 40, 1, 1, 2)):
        entry = corpus.draw(f"{number}.mp4", windows)
        if windows > 2:  # each of their events is above all of the others'
            corpus.events[entry.id].vectors[:, 0] += 10
        storage.add(entry, corpus.events[entry.id])
    monkeypatch.setattr(LanceIndex, "most_nearest", 100)  # as Milvus gives no more at once
    entries = {entry.id: entry for entry in storage.videos()}
    query = np.eye(1, 16, dtype=np.float32)
    (scores,) = source(kind, storage, best_event).scores(torch.from_numpy(query), None)
    for k in (3, 12, 500):
        expected = [token for token, _ in brute_force_moments(corpus, query[0], k)]
        assert [hit.video.id for hit in rank_moments(scores, k, entries)] == expected
    assert len(expected) > 12


def test_an_event_and_the_one_around_it_are_not_both_shown() -> None:
    """Whatever the rounding of their times."""
    length, count = 33.30223666666667, 32
    for start in (0.0, length, 3600.1, 36000.3):
        for i in range(0, count, 2):
            spans = np.float32([
                [start + i * length / count, start + (i + size) * length / count] for size in (1, 2)
            ])  # fmt: skip
            rows = Events(np.full(2, "v", object), np.zeros(2), np.arange(2), np.arange(2),
                          *spans.T, scores=np.array([0.3, 0.2]))  # fmt: skip
            assert len(spread(rows, 5)) == 1


def test_half_precision_is_near(corpus, storage) -> None:
    texts = torch.from_numpy(queries())
    halves = source("float16", storage, best_event).scores(texts, None)
    for half, full in zip(halves, source("memory", storage, best_event).scores(texts, None),
                          strict=True):  # fmt: skip
        assert half.cosines.dtype == torch.float32
        torch.testing.assert_close(half.cosines, full.cosines, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["memory", "store"])
def test_only_what_is_allowed_is_found(corpus, storage, kind) -> None:
    entries = {entry.id: entry for entry in storage.videos()}
    only = {entry.id for entry in Filter(within="a").select(entries.values())}
    (scores,) = source(kind, storage, best_event).scores(torch.from_numpy(queries(1)), only)
    for hits in (rank_videos(scores, 100, entries), rank_moments(scores, 20, entries)):
        assert hits and all(hit.video.name.startswith("a/") for hit in hits)
    assert len(rank_videos(scores, 100, entries)) == 15
    (nothing,) = source(kind, storage, best_event).scores(torch.from_numpy(queries(1)), set())
    assert rank_videos(nothing, 5, entries) == rank_moments(nothing, 5, entries) == []


def test_many_queries_at_once_are_those_one_by_one(storage, monkeypatch) -> None:
    monkeypatch.setattr("utils.search.matrix.CHUNK", 2000)  # some of them at once
    texts = torch.from_numpy(queries(9))
    entries = {entry.id: entry for entry in storage.videos()}
    matrix = source("memory", storage, best_event)
    together = [rank_videos(scores, 5, entries) for scores in matrix.scores(texts, None)]
    for row, hits in zip(texts, together, strict=True):
        (alone,) = matrix.scores(row[None], None)
        assert [hit.video.id for hit in rank_videos(alone, 5, entries)] == [
            hit.video.id for hit in hits
        ]


def test_the_events_of_a_video_come_whole(corpus, storage) -> None:
    entry = next(entry for entry in storage.videos() if entry.windows == 3)
    query = queries(1)
    for kind in ("memory", "store"):
        (scores,) = source(kind, storage, best_event).scores(torch.from_numpy(query), None)
        rows = by_score(scores.events_of(entry.id))
        assert len(rows) == 3 * N_E
        expected = np.sort(corpus.cosines(query[0])[entry.id].ravel())[::-1]
        np.testing.assert_allclose(rows.scores, expected, atol=1e-5)


def test_memory_follows_what_is_added_replaced_and_removed(tmp_path: Path) -> None:
    storage, corpus = LanceIndex(str(tmp_path / "i")), Corpus()
    storage.create(MODEL)
    matrix = Matrix(storage, torch.float32, best_event, np.array(LEVELS))
    assert matrix.update([])
    (nothing,) = matrix.scores(torch.from_numpy(queries(1)), None)
    assert nothing.best_events(5)[1] and rank_videos(nothing, 5, {}) == []
    random = np.random.default_rng(0)
    there: list = []
    for step in range(40):
        if len(there) > 3 and random.random() < 0.5:
            old = there.pop(random.integers(len(there)))
            storage.remove([old])
            corpus.entries.remove(old)
        else:
            entry = corpus.draw(f"{step}.mp4", int(random.integers(1, 4)))
            storage.add(entry, corpus.events[entry.id])
            there.append(entry)
        assert matrix.update(storage.videos())
        query = queries(1)
        (scores,) = matrix.scores(torch.from_numpy(query), None)
        found = dict(scores.best_videos(1000))
        expected = {token: x.max() for token, x in corpus.cosines(query[0]).items()}
        assert found == pytest.approx(expected, abs=1e-5)


def test_events_that_are_not_all_there_are_not_searched(tmp_path: Path) -> None:
    storage, corpus = LanceIndex(str(tmp_path / "i")), Corpus()
    storage.create(MODEL)
    entry = corpus.draw("a.mp4", 2)
    storage.add(entry, corpus.events[entry.id].take(slice(N_E)))
    matrix = Matrix(storage, torch.float32, best_event, np.array(LEVELS))
    assert not matrix.update(storage.videos())
    part = corpus.draw("b.mp4", 1)
    storage.add(part, corpus.events[part.id].take(slice(N_E - 1)))
    with pytest.raises(SearchError, match="damaged"):
        Matrix(storage, torch.float32, best_event, np.array(LEVELS)).update(storage.videos())


MOMENTS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(0, 3), st.floats(-1, 1)),
    max_size=30,
)


@given(MOMENTS, st.integers(1, 6))
def test_moments_that_are_shown_do_not_overlap_by_half(rows, k) -> None:
    start, length, level, score = (np.array(column, dtype=float) for column in
                                   (zip(*rows, strict=True) if rows else [[]] * 4))  # fmt: skip
    count = len(start)
    events = by_score(Events(
        np.full(count, "v", dtype=object), np.zeros(count), np.arange(count), level.astype(int),
        start, start + length, scores=score,
    ))  # fmt: skip
    shown = spread(events, k)
    assert bool(shown) == bool(rows) and len(shown) <= k
    assert [m.score for m in shown] == sorted((m.score for m in shown), reverse=True)
    for i, moment in enumerate(shown):
        assert all(iou(moment, other) < MAX_IOU for other in shown[:i])
    if len(shown) < k:  # whatever is not shown is too near to one that is
        for row in zip(start, start + length, score, level, strict=True):
            assert any(iou(Moment(*row), other) >= MAX_IOU for other in shown)


def test_filters(corpus, storage) -> None:
    entries = storage.videos()
    names = lambda **which: {e.name for e in Filter(**which).select(entries)}  # noqa: E731
    assert names(within="b/*") == names(within="b/") == names(within="/videos/b/*")
    assert names(within="*/1?.mp4") == {f"{'ab'[n % 2]}/{n}.mp4" for n in range(10, 20)}
    assert names(min_seconds=20, max_seconds=20) == {e.name for e in entries if e.windows == 3}
    assert names(since="1990-01-01") == names() and names(until="1990-01-01") == set()
    assert names(since="2001-09-08", until="2001-09-09") == names()
    for day in ("yesterday", "0001-01-01", "9999-12-31"):
        with pytest.raises(SearchError, match="no date"):
            names(since=day, until=day)
