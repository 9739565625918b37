"""The demo corpus: the same for a seed, true to its captions, and told apart by time alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

import decord
import numpy as np
import pytest

from dataloaders.annotations import read_annotations
from scripts.demo.world import (
    BACKGROUNDS,
    COLOURS,
    LARGE,
    OPPOSITE,
    Meaning,
    Shot,
    annotation_lines,
    draw_clips,
    draw_pictures,
    render_clip,
    render_shot,
    write_annotations,
    write_clips,
)

SIZE = 64


def is_true_of(meaning: Meaning, shots: Sequence[Shot]) -> bool:
    """Whether one of the shots is a moment that the caption can mean."""
    return any(
        (meaning.thing.colour, meaning.thing.shape) == (shot.thing.colour, shot.thing.shape)
        and (meaning.thing.size == shot.thing.size or None in (meaning.thing.size, shot.thing.size))
        and meaning.action in (None, shot.action)
        and meaning.background in (None, shot.background)
        for shot in shots
    )


@pytest.fixture(scope="module")
def clips():
    return draw_clips("test", 24, seed=3)


def test_a_seed_gives_one_corpus(clips) -> None:
    assert draw_clips("test", 24, seed=4) != clips
    assert draw_clips("test", 6, seed=3) == clips[:6], "a longer split starts alike"
    pictures, captions = draw_pictures(20, SIZE, seed=1)
    again, same = draw_pictures(20, SIZE, seed=1)
    assert (pictures == again).all() and captions == same


def test_captions_are_true_of_their_moment_alone(clips) -> None:
    """In the order of time, a motion with its place and without."""
    for clip in clips:
        assert 20 <= clip.duration <= 60 and len(render_clip(clip, 16)) == clip.duration * 3
        assert [c.shot for c in clip.captions] == sorted(c.shot for c in clip.captions)
        windows = list(dict.fromkeys(clip.window(caption) for caption in clip.captions))
        ends = [0.0, *(end for _, end in windows)]
        assert [start for start, _ in windows] == pytest.approx(ends[:-1])
        assert ends[-1] == pytest.approx(clip.duration) and ends == sorted(set(ends))
        for i, shot in enumerate(clip.shots):
            others = [other for other in clip.shots if other is not shot]
            meanings = [c.meaning for c in clip.captions if c.shot == i]
            assert all(is_true_of(meaning, [shot]) for meaning in meanings)
            assert not any(is_true_of(meaning, others) for meaning in meanings)
            kind, places = "appearance", [shot.background]
            if shot.action in OPPOSITE:
                kind, places = "motion", [None, shot.background]
            assert [(m.query_type, m.background) for m in meanings] == [(kind, p) for p in places]


def test_twins_differ_in_time_only(clips) -> None:
    """A moving shot's frames, in the opposite order, are its twin's, to the pixel."""
    by_name = {clip.vid_name: clip for clip in clips}
    for clip in clips:
        twin = by_name[clip.twin]
        assert twin.twin == clip.vid_name
        for caption in clip.captions:
            shot = clip.shots[caption.shot]
            if caption.meaning.query_type != "motion":
                continue
            assert not is_true_of(caption.meaning, twin.shots)
            (back,) = [s for s in twin.shots if s == shot.backwards()]
            assert back.action == OPPOSITE[shot.action]
            assert (render_shot(shot, SIZE)[::-1] == render_shot(back, SIZE)).all()


def test_order_captions_are_true_of_a_clip_and_false_of_its_twin() -> None:
    """Both things are in both clips, the first before the later one in one of them alone; together
    the captions' moments are of all lengths."""
    clips = draw_clips("test", 60, seed=3, scale=LARGE)
    by_name, shares = {clip.vid_name: clip for clip in clips}, []
    for clip in clips:
        assert 40 <= clip.duration <= 120
        for caption in clip.captions:
            (start, end), meaning = clip.window(caption), caption.meaning
            shares.append((end - start) / clip.duration)
            if meaning.query_type != "order":
                continue
            for one in (clip, by_name[clip.twin]):
                things = [shot.thing for shot in one.shots]
                first, later = things.index(meaning.thing), things.index(meaning.later.thing)
                assert (first < later) == (one is clip)
            first, later = clip.shots[caption.shot], clip.shots[caption.last_shot]
            assert (first.thing, first.background) == (meaning.thing, meaning.background)
            assert later.background == meaning.later.background
            things = (first.thing, later.thing)
            said = [caption.text.index(f"{thing.colour} {thing.shape}") for thing in things]
            assert (said[0] < said[1]) == (" before " in caption.text)
            assert (said[0] > said[1]) == (" after " in caption.text)
    assert len(np.histogram(shares, [0, 1 / 11, 1 / 6, 1 / 3, 2 / 3, 1.01])[0].nonzero()[0]) == 5


def test_the_published_demo_has_the_videos_it_had() -> None:
    """The README's table is of these: of the two splits' annotations and of the pictures."""
    splits = [draw_clips(name, count, 42) for name, count in (("train", 600), ("test", 100))]
    content = [annotation_lines(clips) for clips in splits]
    content += [repr([clip.shots for clips in splits for clip in clips])]
    content += [draw_pictures(50, SIZE, 42)[1]]
    assert zlib.crc32(json.dumps(content).encode()) == 4273242042


def test_things_move_as_the_captions_say(clips) -> None:
    """Position and area are measured in the frames, by the thing's colour."""
    seen = set()
    for shot in (s for clip in clips for s in clip.shots if s.action in OPPOSITE):
        frames = render_shot(shot, SIZE, [0, shot.num_frames - 1]).astype(int)
        coloured = np.abs(frames - COLOURS[shot.thing.colour]).sum(-1) < 60
        area = coloured.sum((1, 2))
        seen.add(shot.action)
        if shot.action == "grow":
            assert area[1] > area[0]
        elif shot.action == "shrink":
            assert area[1] < area[0]
        else:
            (y0, x0), (y1, x1) = (np.argwhere(mask).mean(0) for mask in coloured)
            step = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
            assert step[shot.action] > SIZE / 4
    assert seen == set(OPPOSITE), "some action was never drawn"


def test_files_are_what_the_loaders_read(clips, tmp_path) -> None:
    few = clips[:2]
    write_annotations(tmp_path / "test.jsonl", few)
    assert len(list(write_clips(tmp_path / "videos", few, SIZE))) == 2
    queries = read_annotations(tmp_path / "test.jsonl")
    assert [q.desc for q in queries] == [c.text for clip in few for c in clip.captions]
    assert {q.query_type for q in queries} == {"appearance", "motion"}
    assert len({line["desc_id"] for line in annotation_lines(few)}) == len(queries)
    for clip in few:
        reader = decord.VideoReader(str(tmp_path / "videos" / f"{clip.vid_name}.mp4"))
        decoded = reader.get_batch(range(len(reader))).asnumpy().astype(int)
        rendered = render_clip(clip, SIZE).astype(int)
        assert decoded.shape == rendered.shape
        assert np.abs(decoded - rendered).mean() < 8, "more than the codec's loss"


def test_pictures_show_what_their_captions_name() -> None:
    """A thing's colour is seen exactly where a caption names one, the others' colours never; of
    motion the captions say nothing."""
    pictures, captions = draw_pictures(300, SIZE, seed=0)
    words = {word for caption in captions for word in caption.split()}
    assert not words & {"moves", "slides", "rises", "sinks", "becomes", "gets"}
    assert {"left", "right", "top", "bottom", "small", "large"} <= words
    places = {name for names, _, _ in BACKGROUNDS.values() for name in names}
    hidden = 0
    for picture, caption in zip(pictures.astype(int), captions, strict=True):
        far = {name: np.abs(picture - tone).sum(-1).min() for name, tone in COLOURS.items()}
        seen = {name for name, distance in far.items() if distance < 40}
        assert seen == set(caption.split()) & set(COLOURS), caption
        hidden += not seen
        assert seen or caption in places, "where nothing is seen, only the place is named"
    assert hidden, "a blinking thing is hidden now and then"
