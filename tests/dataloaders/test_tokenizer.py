"""Token ids against the authors' arrays and against open_clip's own rows."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest

from dataloaders.tokenizer import count_cut, tokenize


@pytest.mark.parametrize("max_words", [20, 32, 64, 77])
def test_tokens_are_the_authors(golden, max_words):
    data = np.load(golden / "data.npz")
    sentences = json.loads(str(data["sentences"]))
    ids = tokenize(sentences, max_words)
    lengths = data[f"tokens_{max_words}_len"]
    assert ids.shape == (len(sentences), lengths.max())
    expected = data[f"tokens_{max_words}"]
    assert ids.tolist() == expected[:, : lengths.max()].tolist()
    assert not expected[:, lengths.max() :].any()


def test_padded_to_the_longest_of_the_batch():
    alone = [tokenize([text], 32)[0].tolist() for text in ("a dog", "", "two dogs run")]
    width = max(map(len, alone))
    together = tokenize(["a dog", "", "two dogs run"], 32)
    assert together.tolist() == [row + [0] * (width - len(row)) for row in alone]
    assert alone[1] == [49406, 49407]


def test_special_tokens_written_in_a_caption_count_as_such():
    assert tokenize(["<|endoftext|> <|startoftext|>"], 8).tolist() == [[49406, 49407, 49406, 49407]]
    others = tokenize(["<end_of_text> <start_of_text>"], 77)[0].tolist()
    assert set(others[1:-1]).isdisjoint({49406, 49407})


def test_plain_captions_are_open_clips():
    captions = ["A man opens the door.", "it's 10:30 & she'll leave", "naïve café"]
    ids = tokenize(captions, 77)
    assert ids.tolist() == open_clip.tokenize(captions)[:, : ids.shape[1]].tolist()


def test_no_room_or_no_captions_is_an_error():
    assert tokenize(["a dog"], 2).tolist() == [[49406, 49407]]
    with pytest.raises(ValueError, match="max_words"):
        tokenize(["a dog"], 1)
    with pytest.raises(ValueError, match="no captions"):
        tokenize([], 32)


@pytest.mark.timeout(20)
def test_the_longest_caption_an_annotation_may_have_is_quick():
    assert tokenize(["a" * 10_000], 32).shape == (1, 32)


def test_captions_that_are_cut_are_counted():
    captions = ["a dog", "a " * 29 + "b", "a " * 30, "a " * 31, "x" * 400, "&amp;" * 30]
    lengths = [int((tokenize([text], 1000) != 0).sum()) for text in captions]
    for max_words in (3, 4, 32, 33, 100):
        assert count_cut(captions, max_words) == sum(length > max_words for length in lengths)
