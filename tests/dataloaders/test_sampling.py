"""Frame sampling against the authors' arrays and against the rule written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataloaders.sampling import eval_indices, train_indices


@pytest.mark.parametrize("num_frames", [8, 32])
def test_frames_are_the_authors(golden, num_frames):
    data = np.load(golden / "data.npz")
    trained, evaluated = (data[f"sample_{kind}_{num_frames}"] for kind in ("train", "val"))
    for row, n in enumerate(data["sample_lengths"].tolist()):
        indices = eval_indices(n, num_frames)
        assert indices.dtype == np.int64 and indices.tolist() == evaluated[row].tolist()
        for column, seed in enumerate(data["sample_seeds"]):
            indices = train_indices(n, num_frames, np.random.RandomState(seed))
            assert indices.dtype == np.int64
            assert indices.tolist() == trained[row, column].tolist()


@given(n=st.integers(1, 2000), num_frames=st.integers(1, 64), seed=st.integers(0, 2**32 - 1))
def test_training_frames_come_one_from_each_segment(n, num_frames, seed):
    indices = train_indices(n, num_frames, np.random.RandomState(seed))
    q = n // num_frames
    if q == 0:
        assert indices.tolist() == [min(i, n - 1) for i in range(num_frames)]
    else:
        assert [index // q for index in indices.tolist()] == list(range(num_frames))


@given(n=st.integers(1, 2000), num_frames=st.integers(1, 64))
def test_evaluation_frames_follow_the_rule(n, num_frames):
    if n > num_frames:
        t = n / num_frames
        expected = [int(t / 2 + t * i) for i in range(num_frames)]
    else:
        expected = [min(i, n - 1) for i in range(num_frames)]
    assert eval_indices(n, num_frames).tolist() == expected


def test_every_frame_of_a_segment_can_be_drawn():
    generator = np.random.RandomState(0)
    drawn = np.stack([train_indices(30, 4, generator) for _ in range(300)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [
        list(range(7 * i, 7 * i + 7)) for i in range(4)
    ]


@pytest.mark.parametrize(("n", "num_frames"), [(0, 8), (-1, 8), (8, 0)])
def test_nothing_to_sample_is_an_error(n, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        eval_indices(n, num_frames)
    with pytest.raises(ValueError, match="at least 1"):
        train_indices(n, num_frames, np.random.RandomState(0))
