"""One split from its annotations to metrics, tables and pictures.

Both tasks are readings of the same embeddings: videos and texts are embedded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataloaders import DataError
from dataloaders.annotations import Query, Video, corpus_videos
from dataloaders.clips import ClipSource
from dataloaders.datasets import evaluation_text_batches, evaluation_video_loader
from dataloaders.loader import ClipLoader
from utils.evaluation.embed import Embeddings, embed_corpus
from utils.evaluation.moment_metrics import RECALL_RANKS, selection_score
from utils.evaluation.moment_tables import level_report, level_table, moment_report, report_tables
from utils.evaluation.predictions import SAVED, MomentPredictions, export_all, save_predictions
from utils.evaluation.published import PRVR_RESULTS, VCMR_RESULTS
from utils.evaluation.ranking import CHUNK, best_event_scores, paired_event_scores, top_moments
from utils.evaluation.retrieval_metrics import ranks_of, recall_metrics
from utils.evaluation.rows import COSINE, DOT, LEVELS, VCMR, VR, Rows, breakdown, task_rows
from utils.evaluation.tables import PRVR_COLUMNS, metrics_table
from utils.missing_videos import LeftOut
from utils.pictures.plots import PlotSettings, choose_queries, plot_queries, score_queries

VAL = "val"  # what records and lists call the split
TEXT_BATCH = 256  # texts are short: encoding them takes seconds at any batch size


class Reading:
    """Metrics of one split, read off embeddings, wherever those come from.

    Args:
        queries: the annotations.
        proposals: [N_e, 2] start and end of each event as a share of its video.
        moments: evaluate VCMR too, by which the best epoch is chosen then.
        event_scores: "cosine", "dot" or "both": how texts and events are compared for PRVR.
        per_video, limit, window_rule: see `predict_moments` and `evaluate_vcmr`.
        memory_gib: for the scores of texts and videos, see `predict_moments`.
        left_out: what the split is without, for tables and records.
    """

    def __init__(
        self,
        queries: list[Query],
        proposals: Tensor,
        *,
        moments: bool,
        event_scores: str = "cosine",
        per_video: int = 10,
        limit: int = 1000,
        window_rule: str = "half",
        memory_gib: float = 1.0,
        left_out: LeftOut | None = None,
    ) -> None:
        self.scoring = {"cosine": [True], "dot": [False], "both": [True, False]}[event_scores]
        self.moments = moments
        self.per_video, self.limit, self.window_rule = per_video, limit, window_rule
        self.chunk = int(memory_gib * 2**28)  # of float32
        self.proposals = proposals
        self.left_out = left_out
        self._set_queries(queries)

    def _set_queries(self, queries: list[Query]) -> None:
        self.queries = queries
        self.videos: list[Video] = corpus_videos(queries)
        column = {video.vid_name: index for index, video in enumerate(self.videos)}
        self.target: Tensor = torch.tensor([column[query.vid_name] for query in queries])

    def run(
        self, embeddings: Embeddings, predictions_dir: Path | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics by row: PRVR's "cosine" and "dot", and for VCMR those of `evaluate_vcmr`.

        Args:
            predictions_dir: a folder to save the predicted moments in.
        """
        rows = {}
        if self.moments or predictions_dir:
            predictions = predict_moments(
                embeddings,
                self.queries,
                self.videos,
                self.proposals,
                per_video=self.per_video,
                # The metrics read no more than the first 100.
                limit=self.limit if predictions_dir else min(self.limit, max(RECALL_RANKS)),
                chunk=self.chunk,
            )
            if self.moments:
                rows = evaluate_vcmr(predictions, self.queries, self.window_rule)
            if predictions_dir:
                save_predictions(predictions_dir / SAVED, predictions)
                export_all(predictions_dir, predictions, self.queries)
        for normalize in self.scoring:
            name = COSINE if normalize else DOT
            if name not in rows:
                rows[name] = evaluate_prvr(embeddings, self.target, normalize, self.chunk)
        return rows

    def score(self, rows: dict[str, dict[str, float]]) -> float:
        """What chooses the best epoch.

        Raises:
            DataError: it is moments, and no video of a query with times could be read.
        """
        if not self.moments:
            score = next(iter(rows.values()))["SumR"]
        elif VCMR in rows:
            score = selection_score(rows[VCMR])
        else:
            raise DataError(
                "of the queries with times (ts) no video can be read, so no best epoch can be "
                "chosen: mend the videos, or train with --subtask_type PRVR"
            )
        return round(score, 6)  # equal sums of recalls are to tie, however they were rounded

    def numbers(self) -> dict[str, int]:
        """For the records of a run: `LeftOut.numbers`, nothing where no video is left out."""
        return self.left_out.numbers(VAL) if self.left_out else {}

    def tables(self, rows: dict[str, dict[str, float]], datatype: str) -> list[str]:
        """The metrics of `run` as tables; each names what the split lacks, if it does."""
        note = self.left_out.note(VAL) if self.left_out else None
        shown = tables(rows, datatype)
        return [f"{table}\n{note}" for table in shown] if note else shown


class Evaluation(Reading):
    """One split, read and checked before training starts, evaluated after every epoch.

    Args:
        clips: where the queries' videos are.
        num_frames, size: of a clip, and the side of its square frames in pixels.
        max_words: tokens of a text that are read.
        batch_size, num_workers: of the loader of videos.
        left_out: what the run goes without; gets the videos that turn out not to decode, which are
            an error otherwise.
        queries, proposals, reading: see `Reading`.

    Raises:
        DataError: clips are missing.
    """

    def __init__(
        self,
        queries: list[Query],
        clips: ClipSource,
        proposals: Tensor,
        *,
        num_frames: int,
        size: int,
        max_words: int,
        batch_size: int,
        num_workers: int,
        left_out: LeftOut | None = None,
        **reading: Any,
    ) -> None:
        super().__init__(queries, proposals, left_out=left_out, **reading)
        self._unreadable: set[str] = set()
        self.max_words = max_words
        self.load_videos: Callable[..., ClipLoader] = partial(
            evaluation_video_loader,
            clips=clips,
            num_frames=num_frames,
            size=size,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        self._prepare()

    def _prepare(self) -> None:
        self.texts = evaluation_text_batches(self.queries, self.max_words, TEXT_BATCH)
        self.loader = self.load_videos(
            self.videos, leave_out=self._note_unreadable if self.left_out else None
        )

    def embed(self, model: nn.Module, device: torch.device) -> Embeddings:
        """All videos and texts of the split; from then on it is without videos that do not decode.

        Raises:
            DataError: a video cannot be read, and nobody said that it may be left out.
        """
        with self.loader.worker_errors():
            embeddings = embed_corpus(model, self.loader, self.texts, device)
        if not self._unreadable:
            return embeddings
        kept = [i for i, q in enumerate(self.queries) if q.vid_name not in self._unreadable]
        self._unreadable.clear()
        self._set_queries([self.queries[i] for i in kept])
        self._prepare()
        return replace(embeddings, texts=embeddings.texts[kept])

    def _note_unreadable(self, vid_name: str, reason: str) -> None:
        self._unreadable.add(vid_name)
        self.left_out.leave_out(VAL, vid_name, reason)
        if len(self._unreadable) == len(self.videos):
            raise DataError(f"no video of the split can be read; the last: {reason}")

    def plot(
        self,
        embeddings: Embeddings,
        model: nn.Module,
        settings: PlotSettings,
        *,
        ids: Sequence[str],
        limit: int,
        seed: int,
        source: str,
    ) -> tuple[int, int]:
        """Draw the queries with these ids, or `limit` of those with their video at rank 1.

        Returns:
            How many were drawn, and how many there are at rank 1.
        """
        normalize = self.scoring[0]
        ranks = rank_videos(embeddings, self.target, normalize, self.chunk)
        chosen = choose_queries(ranks, self.queries, ids, limit, seed)
        videos = [self.videos[i] for i in self.target[chosen].unique().tolist()]
        plot_queries(
            model,
            self.load_videos(videos),
            [video.vid_name for video in videos],
            score_queries(embeddings, chosen, self.target, ranks, normalize),
            self.queries,
            settings,
            score_name="cosine" if normalize else "product",
            source=source,
        )
        return len(chosen), int((ranks == 1).sum())


def tables(rows: dict[str, dict[str, float]], datatype: str) -> list[str]:
    """The metrics of `Evaluation.run`, over the data set's published row where there is one."""
    names = {COSINE: "ProPy", DOT: "ProPy, events not normalised"}
    table = {names[row]: numbers for row, numbers in rows.items() if row in names}
    if datatype in PRVR_RESULTS:
        table["published"] = PRVR_RESULTS[datatype]
    shown = [metrics_table(table, PRVR_COLUMNS)]
    if VR in rows:
        shown.append(report_tables(rows, VCMR_RESULTS.get(datatype)))
    levels = {breakdown(name): row for name, row in task_rows(rows, LEVELS).items()}
    if levels:
        shown.append(level_table(levels))
    return shown


def rank_videos(
    embeddings: Embeddings, target: Tensor, normalize_events: bool = True, chunk: int = CHUNK
) -> Tensor:
    """The rank of every text's video among all of the split, from 1: int64 [T] on the CPU.

    Args:
        target: int64 [T], the right video of each text.
        normalize_events: False is the authors' evaluation of ActivityNet, where longer vectors win.
        chunk: cosines there is memory for, beside the embeddings and normalised texts.
    """
    texts, events = embeddings.texts, embeddings.events
    # Half of the memory for a block's scores and the masks that they are ranked with.
    step = max(1, chunk // (4 * len(events)))
    blocks = zip(texts.split(step), target.to(texts.device).split(step), strict=True)
    return torch.cat([
        ranks_of(best_event_scores(some, events, normalize_events, chunk // 2), own)
        for some, own in blocks
    ]).cpu()  # fmt: skip


def evaluate_prvr(
    embeddings: Embeddings, target: Tensor, normalize_events: bool = True, chunk: int = CHUNK
) -> dict[str, float]:
    """Partially relevant video retrieval: recalls of `rank_videos`, whose arguments these are."""
    return recall_metrics(rank_videos(embeddings, target, normalize_events, chunk))


def predict_moments(
    embeddings: Embeddings,
    queries: Sequence[Query],
    videos: Sequence[Video],
    proposals: Tensor,
    *,
    per_video: int = 10,
    limit: int = 1000,
    chunk: int = CHUNK,
) -> MomentPredictions:
    """Weakly supervised moment retrieval: every event of the corpus is a proposed moment.

    Args:
        queries: what `embeddings.texts` are.
        videos: what `embeddings.events` are of.
        proposals: [N_e, 2] start and end of each event as a share of its video.
        per_video: moments of one video that count, the best.
        limit: moments kept of a query, the best.
        chunk: cosines there is memory for, beside the embeddings, their normalised copy and the
            result.
    """
    device = embeddings.texts.device
    column = {video.vid_name: index for index, video in enumerate(videos)}
    target = torch.tensor([column[query.vid_name] for query in queries], device=device)
    step = max(1, chunk // (4 * len(videos)))  # as in `rank_videos`
    ranked, ranks = [], []
    for texts, own in zip(embeddings.texts.split(step), target.split(step), strict=True):
        top = top_moments(texts, embeddings.events, per_video, limit, chunk // 2)
        ranks.append(ranks_of(top.video_scores, own))
        ranked.append((top.videos, top.events, top.scores))
    top_videos, top_events, top_scores = map(torch.cat, zip(*ranked, strict=True))
    return MomentPredictions(
        desc_ids=[str(query.desc_id) for query in queries],
        vid_names=list(column),
        durations=torch.tensor([video.duration for video in videos], device=device),
        proposals=proposals.to(device),
        per_video=per_video,
        videos=top_videos,
        events=top_events,
        scores=top_scores,
        target=target,
        target_rank=torch.cat(ranks),
        target_scores=paired_event_scores(embeddings.texts, embeddings.events, target, chunk),
    )


def evaluate_vcmr(
    predictions: MomentPredictions, queries: Sequence[Query], window_rule: str = "half"
) -> Rows:
    """Video corpus moment retrieval, and with it PRVR, as rows of metrics.

    Returns:
        "cosine": what `evaluate_prvr` gives; the rows of `moment_report`; "levels/…": those of
        `level_report`, if there are times.
    """
    rows = {COSINE: recall_metrics(predictions.target_rank)}
    rows |= moment_report(predictions, queries, window_rule)
    if any(query.windows for query in queries):
        levels = level_report(predictions, queries)
        rows |= {f"{LEVELS}/{name}": row for name, row in levels.items()}
    return rows
