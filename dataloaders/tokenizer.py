"""Captions to token ids. The byte-pair encoding and the text cleaning are open_clip's.

Only the two special tokens are spelled as in OpenAI's vocabulary and in the authors' program, so a
caption that contains them literally gives the ids 49406 and 49407.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import regex
import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
# OpenAI's word pattern, with its own special tokens in front.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def tokenize(captions: Sequence[str], max_words: int) -> torch.Tensor:
    """Start token, the caption's tokens, end token, of which at most ``max_words`` in all.

    A longer caption loses its last tokens, never the end token.

    Args:
        captions: T texts; an empty one gives the two special tokens.
        max_words: W at most, the special tokens included; CLIP's own limit is 77.

    Returns:
        int64 [T, W], padded with 0 to the longest of these captions.

    Raises:
        ValueError: there are no captions, or ``max_words`` leaves no room for the special tokens.
    """
    if max_words < 2:
        raise ValueError(f"max_words is {max_words}, but start and end token alone are 2")
    if not captions:
        raise ValueError("no captions to tokenize")
    encode = _bpe().encode
    rows = [[START_ID, *encode(caption)[: max_words - 2], END_ID] for caption in captions]
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def count_cut(captions: Iterable[str], max_words: int) -> int:
    """How many captions lose tokens in `tokenize`."""
    room, encode = max_words - 2, _bpe().encode
    long = (text for text in captions if len(text.encode()) > room)  # a token is a byte or more
    return sum(len(encode(text)) > room for text in long)


@cache
def _bpe() -> SimpleTokenizer:
    # Imported here because it takes seconds (timm, torchvision) that reading data does not need.
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer()
    bpe.pat = WORDS
    bpe.encoder |= {START: START_ID, END: END_ID}
    bpe.cache = {START: START, END: END}
    return bpe
