"""Ranks against the authors' numbers, a stable sort, and cases counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from utils.evaluation.retrieval_metrics import ranks_of, recall_metrics


@pytest.fixture(scope="module")
def cases(golden):
    return np.load(golden / "metrics.npz"), json.loads((golden / "metrics.json").read_text())


@pytest.mark.parametrize("case", ["random", "constant", "float64", "ties", "nan"])
def test_golden_cases(cases, case):
    arrays, answers = cases
    scores = torch.from_numpy(arrays[f"prvr_sim_{case}"])
    metrics = recall_metrics(ranks_of(scores, torch.from_numpy(arrays["prvr_gt"])))
    expected = dict(answers[f"prvr_{case}"])
    expected["MedR"] = expected.pop("MR")
    # The authors' argsort leaves the order of ties open; these are the values of a stable one.
    stable_mean = {"ties": 33.13, "nan": 33.17}.get(case)
    if stable_mean is None:
        assert metrics == pytest.approx(expected, abs=1e-12)
    else:
        assert round(metrics["MeanR"], 2) == stable_mean
        ranks = ranks_by_sorting(arrays[f"prvr_sim_{case}"], arrays["prvr_gt"])
        assert metrics["R100"] == 100 * np.mean(ranks <= 100)
        assert all(metrics[k] == expected[k] for k in ("R1", "R5", "R10"))


def test_golden_tail(cases):
    arrays, answers = cases
    column = {a["desc_id"]: int(a["vid_name"][1:]) for a in answers["tail_annotations"]}
    target = torch.tensor(list(column.values()))
    metrics = recall_metrics(ranks_of(torch.from_numpy(arrays["tail_sim"]), target))
    expected = dict(answers["tail_prvr"])
    expected["MedR"] = expected.pop("MR")
    assert metrics == pytest.approx(expected, abs=1e-12)


def ranks_by_sorting(scores, target):
    """1 + position of the target under a stable descending sort (numpy puts NaN last)."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return 1 + np.argmax(order == target[:, None], axis=1)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), num_texts=st.integers(1, 6), num_videos=st.integers(1, 9))
def test_ranks_are_those_of_a_stable_sort(data, num_texts, num_videos):
    values = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1e-45, 1.0, np.inf, np.nan])
    scores = data.draw(hnp.arrays(np.float32, (num_texts, num_videos), elements=values))
    target = data.draw(hnp.arrays(np.int64, num_texts, elements=st.integers(0, num_videos - 1)))
    ranks = ranks_of(torch.from_numpy(scores), torch.from_numpy(target))
    assert ranks.tolist() == ranks_by_sorting(scores, target).tolist()


def test_blocks_of_rows_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (50, 20), generator=generator).float()
    target = torch.randint(20, (50,), generator=generator)
    whole = ranks_of(scores, target)
    monkeypatch.setattr("utils.evaluation.retrieval_metrics.ROW_BLOCK", 61)
    assert torch.equal(ranks_of(scores, target), whole)


def test_metrics_of_known_ranks():
    metrics = recall_metrics(torch.tensor([1, 1, 5, 6, 10, 11, 100, 101]))
    assert metrics == {
        "R1": 25.0, "R5": 37.5, "R10": 62.5, "R100": 87.5,
        "SumR": 212.5, "MedR": 8.0, "MeanR": 235 / 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "target"), [((2, 3), [0]), ((2, 3), [0, 3]), ((2, 3), [-1, 0]), ((0, 3), [])]
)
def test_impossible_targets_are_refused(shape, target):
    with pytest.raises(ValueError, match="target"):
        ranks_of(torch.zeros(shape), torch.tensor(target, dtype=torch.int64))
