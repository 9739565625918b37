"""Read-outs against their definitions written with Python's loops, and their promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import reference
from modules import ModelError
from modules.pyramid import PUBLISHED_PYRAMID, PromptPyramid
from modules.readout import READOUTS, best_event, ranking_name, readout_of
from tests.modules.test_pyramid import pyramids
from utils.evaluation.ranking import top_moments, video_scores

GAPS = {"Nf": 14, "H": [[2, 3], [2, 3], [2, 1]]}  # strides longer than the windows


@settings(max_examples=60)
@given(pyramids() | st.just((14, GAPS["H"])), st.integers(0, 10**6))
def test_every_readout_is_its_definition(config, seed: int) -> None:
    pyramid = PromptPyramid(*config)
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(2, 3, pyramid.num_events, generator=generator, dtype=torch.float64)
    for name in READOUTS:
        found = readout_of(name, pyramid)(cosines)
        expected = reference.readout(name, cosines, pyramid)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert torch.equal(readout_of(name, pyramid)(cosines[0, 0]), found[0, 0])


@pytest.mark.parametrize(("share", "temperature"), [(0, 0.5), (0.5, 0.05), (1, 0.005)])
def test_the_annealed_maximum_ends_as_one(share: float, temperature: float) -> None:
    pyramid = PromptPyramid.from_config(PUBLISHED_PYRAMID)
    readout, cosines = readout_of("annealed", pyramid), torch.rand(4, 5, 42).double()
    if share < 1:  # else as a model that is loaded has it
        readout.anneal(share)
    weights = torch.exp(cosines / temperature)
    expected = (weights * cosines).sum(-1) / weights.sum(-1)
    torch.testing.assert_close(readout(cosines), expected, rtol=1e-6, atol=0)
    if share == 1:
        assert (readout(cosines) - best_event(cosines)).abs().max() < 0.02


def test_gaps_in_the_upper_levels_are_gaps() -> None:
    pyramid = PromptPyramid.from_config(GAPS)
    covered = pyramid.frames_of_event[pyramid.level_of_event == 1].any(dim=0)
    assert not covered.all()
    only_bottom = torch.zeros(pyramid.num_events)
    only_bottom[-1] = 1.0
    scores = readout_of("consensus", pyramid)(only_bottom)
    levels = pyramid.contains[:, -1].sum()  # what contains the last slot: one a level
    assert scores == pytest.approx(1 / levels.item())


@pytest.mark.parametrize("name", READOUTS)
def test_a_score_is_a_mean_of_cosines(name: str) -> None:
    """Of equal ones it is their value, and its gradient adds up to one."""
    pyramid = PromptPyramid.from_config(PUBLISHED_PYRAMID)
    cosines = torch.rand(2, 3, 42, dtype=torch.float64).requires_grad_()
    score = readout_of(name, pyramid)
    flat = torch.full((42,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(score(flat), flat[0])
    assert torch.autograd.gradcheck(score, cosines)
    (gradient,) = torch.autograd.grad(score(cosines).sum(), cosines)
    torch.testing.assert_close(gradient.sum(-1), torch.ones(2, 3).double())
    if name in ("consensus", "half", "levels"):  # every level has a share
        for number in range(1, 6):
            assert (gradient[..., pyramid.level_of_event == number].sum(-1) > 0.09).all()


@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize("chunk", [1, 500, 10**6])
def test_corpus_scores_are_the_readout_at_every_chunk(name: str, chunk: int) -> None:
    pyramid = PromptPyramid.from_config({"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]})
    texts, events = torch.randn(11, 16), torch.randn(13, 8, 16)
    readout = readout_of(name, pyramid)
    unit_texts, unit_events = (x / x.norm(dim=-1, keepdim=True) for x in (texts, events))
    cosines = torch.einsum("td,vnd->tvn", unit_texts, unit_events)
    scores = video_scores(texts, events, chunk=chunk, readout=readout)
    torch.testing.assert_close(scores, readout(cosines))
    top = top_moments(texts, events, chunk=chunk, readout=readout)
    torch.testing.assert_close(top.video_scores, readout(cosines))
    plain = top_moments(texts, events, chunk=chunk)
    assert torch.equal(top.events, plain.events), "moments are ranked by event"


def test_names() -> None:
    pyramid = PromptPyramid.from_config(PUBLISHED_PYRAMID)
    assert readout_of("max", pyramid) is best_event
    assert [ranking_name(name) for name in ("max", "consensus", "half")] == ["max", "half", "half"]
    assert ranking_name("max", "consensus") == "consensus"
    with pytest.raises(ModelError, match="read-out 'mean' is none of max, consensus"):
        readout_of("mean", pyramid)
