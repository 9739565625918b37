"""The prompt pyramid against its definition by sets of frames, and every file that is none."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import ModelError
from modules.pyramid import MAX_EVENTS, VISIBILITIES, PromptPyramid
from tests.golden_model import ROOT


@st.composite
def pyramids(draw) -> tuple[int, list[tuple[int, int]]]:
    """N_f and levels that fit, built from the top down; strides up to the window leave no gap."""
    nodes, levels = 1, []
    for _ in range(draw(st.integers(1, 6))):
        window = draw(st.integers(1, 4))
        stride = draw(st.integers(1, window))
        below = (nodes - 1) * stride + window
        if below > 200:
            break
        nodes = below
        levels.append((window, stride))
    return nodes, levels[::-1]


@settings(max_examples=60)
@given(pyramids())
def test_events_are_unions_of_neighbouring_children(config):
    num_frames, levels = config
    pyramid = PromptPyramid(num_frames, levels)
    below = [{frame} for frame in range(num_frames)]
    expected = []
    for number, (window, stride) in enumerate(levels, start=1):
        starts = range(0, len(below) - window + 1, stride)
        below = [set().union(*below[start : start + window]) for start in starts]
        assert pyramid.events_per_level[number - 1] == len(below)
        expected = [(number, span) for span in below] + expected
    assert pyramid.num_events == len(expected)
    assert pyramid.level_of_event.tolist() == [number for number, _ in expected]
    frames = [set(range(first, last)) for first, last in pyramid.spans.tolist()]
    assert frames == [span for _, span in expected]
    assert frames[0] == set(range(num_frames))  # the top is the whole video
    assert set().union(*frames[-pyramid.num_bottom_events :]) == frames[0]
    assert torch.equal(pyramid.proposals, pyramid.spans / num_frames)


@settings(max_examples=40)
@given(pyramids(), st.integers(1, 3), st.integers(1, 3))
def test_events_see_who_contains_them_and_whom_they_contain(config, num_prompts, tokens):
    pyramid = PromptPyramid(*config)
    frames = [set(range(first, last)) for first, last in pyramid.spans.tolist()]
    related = torch.tensor([[a <= b or b <= a for b in frames] for a in frames])
    assert torch.equal(pyramid.related, related)
    assert torch.equal(pyramid.related, pyramid.related.T)
    level = pyramid.level_of_event
    above = level.unsqueeze(0) > level.unsqueeze(1)  # the column's event is of a higher level
    own_self = torch.eye(len(frames), dtype=torch.bool)
    assert torch.equal(pyramid.sees("ancestors"), related & above | own_self)
    assert torch.equal(pyramid.sees("descendants"), related & above.T | own_self)
    assert torch.equal(pyramid.sees("self"), own_self) and pyramid.sees("all").all()
    own = torch.tensor([[f in span for f in range(pyramid.num_frames)] for span in frames])
    visible = pyramid.visibility(num_prompts, tokens)
    events, bottom = pyramid.num_events, pyramid.num_bottom_events
    assert torch.equal(visible[:, :events], related)
    prompts = visible[:, events : events + num_prompts * bottom].unflatten(1, (num_prompts, bottom))
    assert all(torch.equal(prompts[:, p], related[:, -bottom:]) for p in range(num_prompts))
    seen = visible[:, events + num_prompts * bottom :].unflatten(1, (tokens, -1))
    assert all(torch.equal(seen[:, t], own) for t in range(tokens))
    for rule in VISIBILITIES:  # which is about events only
        ruled = pyramid.visibility(num_prompts, tokens, rule)
        assert torch.equal(ruled[:, :events], pyramid.sees(rule))
        assert torch.equal(ruled[:, events:], visible[:, events:])


@settings(max_examples=40)
@given(pyramids(), st.data())
def test_levels_left_out_at_the_top(config, data) -> None:
    whole = PromptPyramid(*config)
    drop = data.draw(st.integers(0, len(config[1]) - 1))
    pyramid = PromptPyramid.from_config(whole.config | {"drop_top": drop})
    kept = whole.level_of_event <= len(config[1]) - drop
    assert torch.equal(pyramid.spans, whole.spans[kept])
    assert torch.equal(pyramid.level_of_event, whole.level_of_event[kept])
    assert pyramid.num_events == sum(pyramid.events_per_level) == int(kept.sum())
    assert torch.equal(PromptPyramid.from_config(pyramid.config).spans, pyramid.spans)


SHIPPED = {
    "cfg_8": [4, 3, 1],
    "cfg_16": [8, 7, 3, 1],
    "cfg_32": [16, 15, 7, 3, 1],
    "cfg_64": [32, 31, 15, 7, 3, 1],
    "cfg_32_no_overlap": [16, 8, 4, 2, 1],
    "cfg_32_overlap": [31, 15, 7, 3, 1],
    **{f"cfg_32_without_top_{n}": [16, 15, 7, 3, 1][:-n] for n in (1, 2, 3, 4)},
    **{f"cfg_32_without_bottom_{n}": [16, 15, 7, 3, 1][n:] for n in (1, 2, 3, 4)},
}


def test_shipped_pyramids() -> None:
    """Without a level the others are those of cfg_32."""
    paths = {path.stem: path for path in (ROOT / "scripts/pyramids").iterdir()}
    assert paths.keys() == SHIPPED.keys()
    spans = PromptPyramid.from_config(paths["cfg_32"]).spans.tolist()
    for name, counts in SHIPPED.items():
        pyramid = PromptPyramid.from_config(paths[name])
        assert pyramid.events_per_level == counts
        if "without" in name:
            first = len(spans) - pyramid.num_events if "top" in name else 0
            assert pyramid.spans.tolist() == spans[first : first + pyramid.num_events]


def test_another_rule_is_refused() -> None:
    with pytest.raises(ModelError, match="visibility 'none' is none of relatives, ancestors"):
        PromptPyramid(1, [(1, 1)]).sees("none")


@settings(max_examples=40)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=7))
def test_offsets_give_segments_of_powers_of_two(offsets):
    num_frames = 2 ** len(offsets)
    try:
        pyramid = PromptPyramid.from_config({"Nf": num_frames, "offset": offsets})
    except ModelError as error:
        assert "cannot be made of segments" in str(error)
        return
    for number, offset in enumerate(offsets, start=1):
        spans = pyramid.spans[pyramid.level_of_event == number].tolist()
        length = 2**number
        step = length // 2 if offset else length
        starts = list(range(0, num_frames - length + 1, step))
        assert spans == [[start, start + length] for start in starts]


@pytest.mark.parametrize(
    ("config", "events"),
    [
        ({"Nf": 1, "H": [[1, 1]]}, 1),
        ({"Nf": 2, "offset": [1]}, 1),
        ({"Nf": 512, "offset": [0] * 9}, 511),
        ({"Nf": 512, "offset": [0, *[1] * 8]}, 256 + 255 + 127 + 63 + 31 + 15 + 7 + 3 + 1),
        ({"Nf": 3, "H": [[3, 5]]}, 1),  # the stride of a level with one event is never used
    ],
)
def test_unusual_pyramids_work(config, events, tmp_path):
    (tmp_path / "p.json").write_text("\ufeff" + json.dumps(config))
    assert PromptPyramid.from_config(tmp_path / "p.json").num_events == events


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([[2, 2]], "a pyramid is"),
        ({"Nf": 8, "h": [[8, 1]]}, "a pyramid is"),
        ({"Nf": 8, "H": [[8, 1]], "offset": [0, 0, 0]}, "a pyramid is"),
        ({"Nf": 0, "H": [[1, 1]]}, "Nf must be"),
        ({"Nf": True, "H": [[1, 1]]}, "Nf must be"),
        ({"Nf": 10**400, "H": [[8, 1]]}, "Nf must be"),
        ({"Nf": "8" * 10**5, "H": [[8, 1]]}, "Nf must be"),
        ({"Nf": 8, "H": []}, "no level"),
        ({"Nf": 8, "H": "ab"}, "are lists"),
        ({"Nf": 8, "H": [[2, 2], [2]]}, "level 2 must be"),
        ({"Nf": 8, "H": [[2, 2], [2, 0]]}, "level 2 must be"),
        ({"Nf": 8, "H": [[2, 2], ["2", 1]]}, "level 2 must be"),
        ({"Nf": 8, "H": [[2, 2], [5, 1]]}, r"level 2 \[5, 1\] does not fit the 4 nodes"),
        ({"Nf": 8, "H": [[3, 2], [3, 1]]}, r"level 1 \[3, 2\] does not fit the 8 nodes"),
        ({"Nf": 8, "H": [[2, 2], [2, 2]]}, "level 2 .the top. has 2 events"),
        ({"Nf": 32, "H": [[1, 1]] * 1000}, f"level 313: more than {MAX_EVENTS} events"),
        ({"Nf": 8, "H": [[2, 2], [4, 1]], "drop_top": 2}, "drop_top is .* of the 2 levels"),
        ({"Nf": 8, "H": [[2, 2], [4, 1]], "drop_top": True}, "drop_top is"),
        ({"Nf": 0, "offset": []}, "power of two"),
        ({"Nf": 1, "offset": []}, "at least one"),
        ({"Nf": 8, "offset": [0, 0]}, r"log2\(Nf\) = 3 levels"),
        ({"Nf": 8, "offset": [0, 2, 0]}, "level 2: an offset is 0 or 1"),
    ],
)
def test_a_file_that_is_no_pyramid_names_the_level(config, message, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as raised:
        PromptPyramid.from_config(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 10**5, b"\xff\xfe", b"9" * 5000, b"[NaN]", None]
)
def test_a_file_that_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"p\.json"):
        PromptPyramid.from_config(path)
