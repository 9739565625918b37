"""What training is to beat: CLIP alone on the validation split."""

from __future__ import annotations

import torch

from models import ProPy
from models.zero_shot import SCORINGS, ZeroShot, events_of, span_means
from utils.evaluation.embed import Embeddings
from utils.evaluation.evaluator import CorpusEvaluator, Evaluator
from utils.evaluation.rows import Rows


def zero_shot_rows(
    model: ProPy, evaluator: CorpusEvaluator, device: torch.device
) -> dict[str, Rows]:
    """The rows of metrics of every zero-shot scoring, of a model's CLIP on the evaluator's split.

    Videos are decoded and their frames encoded once for all scorings. Nothing of the model, nor a
    random number generator, is another afterwards.

    DataError: a video cannot be read.
    """
    split, config, missing = evaluator.split, evaluator.config, evaluator.missing
    frames = evaluator.embed(ZeroShot(model.clip, model.config, "best").to(device), device)
    rows = {}
    for scoring in SCORINGS:
        events = events_of(scoring, model.pyramid)
        embeddings = Embeddings(span_means(frames.events, events), frames.texts)
        rows[scoring] = Evaluator(split, events.proposals, config, missing).run(embeddings)
    return rows
