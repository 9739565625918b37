"""One split from its annotations to metrics and tables.

Both tasks are readings of the same embeddings: videos and texts are embedded once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dataloaders.annotations import VAL, Query, Split, Video
from dataloaders.clips import ClipSource
from dataloaders.datasets import EvaluationLoader, LoaderConfig, batches_of, evaluation_text_batches
from modules.readout import Readout, best_event
from utils import RunError
from utils.distributed import is_main, rank, world_size
from utils.evaluation.embed import Embeddings, embed_texts, embed_videos, gather_batches
from utils.evaluation.moment_metrics import RECALL_RANKS, selection_score
from utils.evaluation.moment_tables import moment_report, moment_tables, times_missing
from utils.evaluation.predictions import SAVED, MomentPredictions, export_all, save_predictions
from utils.evaluation.ranking import predict_moments, rank_videos
from utils.evaluation.retrieval_metrics import recall_metrics
from utils.evaluation.rows import (
    COSINE,
    DOT,
    PROPY,
    VCMR,
    VR,
    ZERO_SHOT,
    Rows,
    rows_to_compare,
    video_rows,
)
from utils.evaluation.tables import PRVR_COLUMNS, metrics_table
from utils.logger import append_json
from utils.misc import git_revision
from utils.missing_videos import MissingVideos

logger = logging.getLogger("propy.evaluator")

TEXT_BATCH = 256  # texts are short: encoding them takes seconds at any batch size
EXPORTED_MOMENTS = 1000  # of a text, the best, in saved predictions (`max_event_per_text`, §4.1)
# The rows of PRVR, the first of which chooses the best epoch.
SCORINGS = {"cosine": (COSINE,), "dot": (DOT,), "both": (COSINE, DOT)}


@dataclass(frozen=True)
class EvalConfig:
    """How a split is evaluated; the fields are main.py's flags of the same names."""

    subtask_type: str = "PRVR"
    datatype: str = "custom"
    event_scores: str = "cosine"
    npev: int = 10
    window_rule: str = "half"


class Evaluator:
    """Metrics of one split, read off embeddings, wherever those come from.

    Args:
        split: what the embeddings are of.
        proposals: [N_e, 2] start and end of each event as a share of its video.
        config: what is evaluated, and how.
        missing: what the split is without, for tables and records.
        readout: of a video's score, the model's.
        scoring: of `ZERO_SHOT`, where the model is CLIP alone.

    Raises:
        RunError: there are more processes than queries.
    """

    def __init__(
        self, split: Split, proposals: Tensor, config: EvalConfig,
        missing: MissingVideos | None = None, readout: Readout = best_event,
        scoring: str | None = None,
    ) -> None:  # fmt: skip
        if world_size() > len(split.queries):
            raise RunError(f"{world_size()} processes for {len(split.queries)} queries: use fewer")
        self.split, self.proposals, self.config = split, proposals, config
        self.missing, self.readout, self.scoring = missing, readout, scoring
        self.baselines: dict[str, Rows] = {}  # of zero-shot CLIP by scoring, for tables
        self.evaluate_vcmr = config.subtask_type == VCMR

    @property
    def normalize_events(self) -> bool:
        """Of the first row, which chooses the best epoch and ranks what is plotted."""
        return SCORINGS[self.config.event_scores][0] == COSINE

    def ranks(self, embeddings: Embeddings, normalize_events: bool) -> Tensor:
        """The rank of every query's video, from 1: int64 [T]."""
        return rank_videos(embeddings, self.split.target, normalize_events, readout=self.readout)

    def run(self, embeddings: Embeddings, predictions_dir: Path | None = None) -> Rows:
        """Metrics by row: PRVR's "cosine" and "dot", and for VCMR those of `vcmr_rows`; the
        predicted moments go into the folder, if there is one."""
        rows: Rows = {}
        if self.evaluate_vcmr or predictions_dir:
            # The metrics read no more than the first 100.
            limit = EXPORTED_MOMENTS if predictions_dir else max(RECALL_RANKS)
            predictions = predict_moments(
                embeddings, self.split, self.proposals,
                per_video=self.config.npev, limit=limit, readout=self.readout,
            )  # fmt: skip
            if self.evaluate_vcmr:
                rows = vcmr_rows(predictions, self.split.queries, self.config.window_rule)
            if predictions_dir and is_main():
                save_predictions(predictions_dir / SAVED, predictions)
                export_all(predictions_dir, predictions, self.split.queries)
        for row in SCORINGS[self.config.event_scores]:
            if row not in rows:
                rows[row] = recall_metrics(self.ranks(embeddings, row == COSINE))
        return rows

    def score(self, rows: Rows) -> float:
        """What chooses the best epoch: SumR, or for moments the sum of R@{1,10,100} at IoU 0.5
        and 0.7 (SPEC §8). Equal sums of recalls tie, however they were rounded."""
        first = next(iter(rows.values()))
        return round(selection_score(rows[VCMR]) if self.evaluate_vcmr else first["SumR"], 6)

    def dot_score(self, rows: Rows) -> float | None:
        """What chooses a best epoch of its own for PRVR's row "dot", where it is the second one."""
        if self.evaluate_vcmr or self.config.event_scores != "both":
            return None
        return round(rows[DOT]["SumR"], 6)

    def check_times(self, training: bool) -> None:
        """A warning if moments are to be scored, but not all queries have times, or videos no other
        moment than their whole. RunError: none has, so no best epoch could be chosen by them."""
        queries, path = self.split.queries, self.split.path
        missing = times_missing(queries) if self.evaluate_vcmr else None
        if missing and training and not any(query.windows for query in queries):
            raise RunError(
                f"{path}: {missing}, so no best epoch can be chosen: train with --subtask_type "
                "PRVR, or give validation annotations with times"
            )
        if missing:
            logger.warning("%s: %s", path, missing)
        if self.evaluate_vcmr and self.scoring == "mean":
            logger.warning("--zero_shot mean: the only moment of a video is the whole of it")

    def counts(self) -> dict[str, int]:
        """For the records of a run: numbers of videos and queries, where some are missing."""
        return self.missing.counts(VAL) if self.missing else {}

    def tables(self, rows: Rows) -> list[str]:
        """The metrics of `run` as tables, over those of zero-shot CLIP and the data set's published
        ones where there are any; each names what is missing."""
        datatype, zero_shot = self.config.datatype, bool(self.scoring)
        compared, moments = rows_to_compare(datatype, self.baselines, zero_shot)
        videos = video_rows(ZERO_SHOT.get(self.scoring, PROPY), rows)
        shown = [metrics_table(videos | compared, PRVR_COLUMNS)]
        if VR in rows:
            shown += moment_tables(rows, moments)
        size = self.missing.summary(VAL) if self.missing else None
        return [f"{table}\n{size}" for table in shown] if size else shown


class CorpusEvaluator(Evaluator):
    """One split, read and checked before training starts, evaluated after every epoch.

    Args:
        clips: where the split's videos are.
        model: a ProPy or a ZeroShot: gives the pyramid, the size of frames and the read-out.
        loading: of texts and videos.
        split, config, missing: see `Evaluator`.
    """

    def __init__(
        self, split: Split, clips: ClipSource, model: nn.Module, loading: LoaderConfig,
        config: EvalConfig, missing: MissingVideos | None = None,
    ) -> None:  # fmt: skip
        scoring = getattr(model, "scoring", None)
        super().__init__(split, model.pyramid.proposals, config, missing, model.readout, scoring)
        self.clips, self.loading = clips, loading
        self.num_frames, self.size = model.pyramid.num_frames, model.input_resolution
        self.texts = evaluation_text_batches(split.queries, loading.max_words, TEXT_BATCH)
        self.loader = self.load_videos(split.videos, (rank(), world_size()))

    def load_videos(
        self, videos: Sequence[Video], part: tuple[int, int] = (0, 1)
    ) -> EvaluationLoader:
        """Batches of some of the videos; of them a part, cut between batches."""
        return EvaluationLoader(videos, self.clips, self.num_frames, self.size, self.loading, part)

    def embed(self, model: nn.Module, device: torch.device) -> Embeddings:
        """All videos and texts of the split. The loader's workers decode the first videos while
        texts are encoded, and the next ones while videos are. DataError: one cannot be read."""
        with self.loader.worker_errors():
            batches = iter(self.loader)
            texts = embed_texts(model, self.texts, device)
            events = embed_videos(model, batches, device, len(self.loader))
            sizes = [len(some) for some in batches_of(len(self.split.videos), self.loading)]
            shape = (model.pyramid.num_events, texts.shape[-1])
            return Embeddings(gather_batches(events, sizes, shape, device), texts)


def report(
    evaluator: Evaluator, embeddings: Embeddings, folder: Path, checkpoint: str, epoch: int,
    save_predictions: bool = False,
) -> None:  # fmt: skip
    """Compute the metrics of an evaluation, show them, and add them to the folder's eval.jsonl with
    checkpoint and epoch, which the embeddings are of; on request save the predicted moments."""
    rows = evaluator.run(embeddings, folder if save_predictions else None)
    for table in evaluator.tables(rows):
        logger.info("\n%s", table)
    record = {"checkpoint": checkpoint, "epoch": epoch, "git": git_revision()}
    record |= evaluator.counts() | {"metrics": rows}
    if is_main():
        append_json(folder / "eval.jsonl", record)


def vcmr_rows(
    predictions: MomentPredictions, queries: Sequence[Query], window_rule: str = "half"
) -> Rows:
    """PRVR's row "cosine", and those of `moment_report`."""
    cosine = {COSINE: recall_metrics(predictions.target_rank)}
    return cosine | moment_report(predictions, queries, window_rule)
