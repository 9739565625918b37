"""Scores and moment selection against brute force, the authors' numbers, and their own promises."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.similarity import event_scores
from utils.evaluation.ranking import paired_event_scores, top_moments, video_scores

P32_SPANS = [
    (start, start + length)
    for length, stride in ((32, 32), (16, 8), (8, 4), (4, 2), (2, 2))
    for start in range(0, 32 - length + 1, stride)
]


def random_features(seed, num_texts, num_videos, num_events, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(num_texts, width, generator=generator, dtype=dtype)
    events = torch.randn(num_videos, num_events, width, generator=generator, dtype=dtype)
    return texts, events


def lattice_features(seed, num_texts, num_videos, num_events):
    """Unit vectors along the axes, NaN and inf: every cosine is -1, 0, 1 or NaN, so ties abound."""
    rng = np.random.default_rng(seed)
    axes = np.concatenate([np.eye(3), -np.eye(3), np.full((1, 3), np.nan), [[np.inf, 1, 0]]])
    chance = [0.16] * 6 + [0.02] * 2
    texts = axes[rng.choice(6, num_texts)]
    events = axes[rng.choice(8, (num_videos, num_events), p=chance)]
    return torch.from_numpy(texts).float(), torch.from_numpy(events).float()


def brute_force_moments(scores, per_video, limit):
    """Python lists and sorted(): [T][K] of (score, video, event) for scores [T, V, N_e]."""
    result = []
    for text in torch.where(scores.isnan(), -torch.inf, scores).tolist():
        moments = []
        for video, row in enumerate(text):
            ranked = sorted((-score, video, event) for event, score in enumerate(row))
            moments += ranked[:per_video]
        result.append([(-score, v, e) for score, v, e in sorted(moments)[:limit]])
    return result


def as_lists(top):
    columns = (top.scores.tolist(), top.videos.tolist(), top.events.tolist())
    return [list(zip(*rows, strict=True)) for rows in zip(*columns, strict=True)]


@pytest.fixture(scope="module")
def tail(golden):
    """Texts and events of the authors' evaluation tails, regenerated from their seed."""
    sys.path.insert(0, str(golden))
    try:
        from inputs import features
    finally:
        sys.path.remove(str(golden))
    return tuple(torch.from_numpy(x) for x in features(41, 30, 14, 42, 64))


def test_moments_equal_the_authors_tail(golden, tail):
    arrays = np.load(golden / "metrics.npz")
    scores = video_scores(*tail) * np.exp(4.6052)
    torch.testing.assert_close(scores, torch.from_numpy(arrays["tail_sim"]), rtol=0, atol=1e-4)
    annotations = json.loads((golden / "metrics.json").read_text())["tail_annotations"]
    durations = {int(a["vid_name"][1:]): a["duration"] for a in annotations}
    top = top_moments(*tail, per_video=10, limit=1000)
    assert top.scores.shape == (30, 140)  # 14 videos × 10 events are fewer than 1000
    for text, moments in enumerate(arrays["tail_vcmr"]):  # [30, 120, (video, start, end, score)]
        for rank, (video, start, end, score) in enumerate(moments):
            span = P32_SPANS[top.events[text, rank]]
            assert top.videos[text, rank] == video
            assert [x / 32 * durations[video] for x in span] == [start, end]
            assert abs(top.scores[text, rank] - score) < 1e-6


def test_lengths_do_not_matter_unless_asked():
    texts, events = random_features(0, 4, 3, 5, 8)
    longer = events * torch.linspace(0.5, 9, 15).view(3, 5, 1)
    torch.testing.assert_close(event_scores(texts * 7, longer), event_scores(texts, events))
    raw = event_scores(texts, longer, normalize_events=False)
    norms = longer.norm(dim=-1)
    torch.testing.assert_close(raw, event_scores(texts, events) * norms)
    assert not raw.allclose(event_scores(texts, events))


def test_half_precision_and_autocast_give_float32_cosines():
    texts, events = random_features(1, 6, 5, 7, 64)
    exact = event_scores(texts.double(), events.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = event_scores(texts, events)
        best = video_scores(texts, events)
        top = top_moments(texts, events)
        paired = paired_event_scores(texts, events, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(scores, exact.float())
    torch.testing.assert_close(best, exact.amax(-1).float())
    torch.testing.assert_close(top.video_scores, exact.amax(-1).float())
    torch.testing.assert_close(paired, exact[:, 0].float())
    assert event_scores(texts.half(), events.half()).dtype == torch.float32
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("chunk", [1, 17, 300, 10**9])
@pytest.mark.parametrize("normalize_events", [True, False])
def test_scores_are_the_same_at_every_chunk(chunk, normalize_events):
    texts, events = random_features(3, 37, 23, 6, 16, torch.float64)
    expected = event_scores(texts, events, normalize_events)
    best = video_scores(texts, events, normalize_events, chunk=chunk)
    torch.testing.assert_close(best, expected.amax(-1))
    if normalize_events:
        videos = torch.randint(23, (37,))
        paired = paired_event_scores(texts, events, videos, chunk=chunk)
        torch.testing.assert_close(paired, expected[torch.arange(37), videos])


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    num_texts=st.integers(1, 5),
    num_videos=st.integers(1, 9),
    num_events=st.integers(1, 7),
    per_video=st.integers(1, 8),
    limit=st.integers(1, 40),
    chunk=st.sampled_from([1, 30, 10**6]),
)
def test_moments_with_ties_and_nan_equal_brute_force(
    seed, num_texts, num_videos, num_events, per_video, limit, chunk
):
    texts, events = lattice_features(seed, num_texts, num_videos, num_events)
    top = top_moments(texts, events, per_video, limit, chunk=chunk)
    scores = event_scores(texts, events)
    assert as_lists(top) == brute_force_moments(scores, per_video, limit)
    torch.testing.assert_close(top.video_scores, scores.amax(-1), equal_nan=True)
