"""Moment metrics against the authors' numbers, plain loops, and cases worked out by hand."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation import moment_metrics as mm


@pytest.fixture(scope="module")
def cases(golden):
    return np.load(golden / "metrics.npz"), json.loads((golden / "metrics.json").read_text())


def metrics_of(*arguments):
    return mm.moment_recalls(mm.first_hits(*arguments))


def unpack(predictions, annotations):
    """Arguments of first_hits from an authors' array [T, P, 4] and their annotations."""
    predictions = torch.from_numpy(predictions)
    target = torch.tensor([int(a["vid_name"][1:]) for a in annotations])
    windows = [a["ts"] if isinstance(a["ts"][0], list) else [a["ts"]] for a in annotations]
    return [predictions[..., 0].long(), predictions[..., 1:3], target, mm.pad_windows(windows)]


def test_golden(cases):
    """All queries, each alone, by the form and number of their windows, with fewer predictions, and
    of the whole tail."""
    arrays, answers = cases
    predictions, annotations = arrays["vcmr_preds"], answers["vcmr_gt"]
    arguments = unpack(predictions, annotations)
    assert metrics_of(*arguments) == answers["vcmr"]
    kinds: dict[str, list[int]] = {}
    for row, annotation in enumerate(annotations):
        alone = unpack(predictions[row : row + 1], [annotation])
        assert metrics_of(*alone) == answers["vcmr_each"][row], annotation
        ts = annotation["ts"]
        kinds.setdefault(str(len(ts)) if isinstance(ts[0], list) else "flat", []).append(row)
    assert kinds.keys() == {"flat", *"12345"}
    for kind, rows in kinds.items():
        some = unpack(predictions[rows], [annotations[row] for row in rows])
        assert metrics_of(*some) == answers[f"vcmr_windows_{kind}"], kind
    for row, length in enumerate(answers["vcmr_short_lengths"]):
        arguments[0][row, length:] = -1
    assert metrics_of(*arguments) == answers["vcmr_short"]
    tail = unpack(arrays["tail_vcmr"], answers["tail_annotations"])
    assert metrics_of(*tail) == answers["tail_vcmr"]


def plain_loop(predictions, target, windows, rule):
    """The metric as a sentence says it, in numpy scalars: {"0.5-r10": %}."""
    result = {}
    for threshold in mm.THRESHOLDS:
        first = []
        for own, video, true in zip(predictions, target, windows, strict=True):
            needed = max(1, len(true) // 2) if rule == "half" else 1
            rank = None
            for number, (candidate, start, end) in enumerate(own[:100], start=1):
                reached = 0
                for true_start, true_end in np.float32(true):
                    start, end = np.float32(start), np.float32(end)
                    overlap = max(np.float32(0), min(end, true_end) - max(start, true_start))
                    union = max(end, true_end) - min(start, true_start)
                    reached += union > 0 and overlap / union >= np.float32(threshold)
                if candidate == video and reached >= needed:
                    rank = number
                    break
            first.append(rank)
        for k in (1, 10, 100):
            hits = [rank is not None and rank <= k for rank in first]
            result[f"{threshold}-r{k}"] = round(100 * sum(hits) / len(hits), 2)
    return result


seconds = st.integers(0, 20).map(lambda tenths: tenths / 10)
moment = st.tuples(seconds, seconds).map(sorted)
query = st.tuples(
    st.integers(0, 2),
    st.lists(moment, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 2), moment), max_size=14),
)


@settings(deadline=None, max_examples=200)
@given(queries=st.lists(query, min_size=1, max_size=4), rule=st.sampled_from(["half", "any"]))
def test_metrics_equal_a_plain_loop(queries, rule):
    target = [video for video, _, _ in queries]
    windows = [true for _, true, _ in queries]
    predictions = [[(video, *times) for video, times in own] for _, _, own in queries]
    longest = max(map(len, predictions))
    padded = [own + [(-1, 0.0, 1.0)] * (longest - len(own)) for own in predictions]
    table = torch.tensor(padded, dtype=torch.float64).view(len(queries), longest, 3)
    arguments = (torch.tensor(target), mm.pad_windows(windows), rule)
    metrics = metrics_of(table[..., 0].long(), table[..., 1:], *arguments)
    assert metrics == plain_loop(predictions, target, windows, rule)


def test_thresholds_are_inclusive_and_in_float32():
    # 7 of 10 seconds and 3 of 10: exactly the float32 thresholds, below the float64 ones or not
    moments = torch.tensor([[[0.0, 7.0], [0.0, 3.0], [0.0, 1.0]]])
    right = mm.right_moments(moments, torch.tensor([[[0.0, 10.0]]]))[0]
    assert right.tolist() == [
        [True, True, True, True],
        [True, True, False, False],
        [True, False, False, False],
    ]


def test_iou_of_empty_touching_and_reversed_windows():
    moments = torch.tensor([[0.0, 10.0], [5.0, 5.0], [5.0, 5.0], [0.0, 5.0], [0.0, 10.0]])
    windows = torch.tensor([[5.0, 15.0], [5.0, 5.0], [0.0, 10.0], [5.0, 10.0], [8.0, 5.0]])
    assert mm.temporal_iou(moments, windows).tolist() == pytest.approx([1 / 3, 0, 0, 0, 0])


def test_predictions_after_the_hundredth_do_not_count():
    moments, target = torch.tensor([0.0, 1.0]).expand(1, 101, 2), torch.tensor([0])
    windows = torch.tensor([[[0.0, 1.0]]])
    for place, found in ((100, set()), (99, {f"{t}-r100" for t in mm.THRESHOLDS})):
        videos = torch.ones(1, 101, dtype=torch.int64)
        videos[0, place] = 0
        metrics = metrics_of(videos, moments, target, windows)
        assert {name for name, value in metrics.items() if value} == found


def test_video_recalls_of_known_ranks():
    ranks = torch.tensor([1, 5, 6, 100, 101, mm.NEVER])
    expected = {"r1": 16.67, "r5": 33.33, "r10": 50.0, "r100": 66.67}
    assert mm.video_recalls(ranks) == expected


@pytest.mark.parametrize(("num_right", "num_candidates"), [(0, 30), (2, 30), (5, 5), (3, 3000)])
def test_random_events_have_the_hypergeometric_chance(num_right, num_candidates):
    right = torch.zeros(1, 5, 4, dtype=torch.bool)
    right[0, :num_right] = True
    recalls = mm.random_event_recalls(right, num_candidates)
    for k in (1, 10, 100):
        drawn = min(k, num_candidates)
        missed = comb(num_candidates - num_right, drawn) / comb(num_candidates, drawn)
        assert recalls[f"0.5-r{k}"] == round(100 * (1 - missed), 2)


def test_selection_score_sums_the_two_strict_thresholds():
    metrics = {f"{t}-r{k}": 1000 * t + k for t in mm.THRESHOLDS for k in mm.RECALL_RANKS}
    assert mm.selection_score(metrics) == 3 * (500 + 700) + 2 * (1 + 10 + 100)
