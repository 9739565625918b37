"""Imported by the server of `tests.search.programs`: what its forks need sooner or later."""

import open_clip.tokenizer  # noqa: F401

import models.zero_shot  # noqa: F401
import utils.search.indexer  # noqa: F401
from dataloaders.tokenizer import tokenize

tokenize(["a"], 4)
