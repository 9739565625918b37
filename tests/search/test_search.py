"""Search over a split's clips against main.py's evaluation of the same split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dataloaders.annotations import VAL, Split
from tests.corpus import TinyRun
from utils.evaluation.predictions import load_predictions
from utils.search import VideoIndex


@pytest.fixture(scope="module")
def index(trained: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    index = VideoIndex(
        tmp_path_factory.mktemp("search") / "videos.index",
        trained.logs / "ckpt.best.pth.tar", trained.corpus / "clip.pt",
    )  # fmt: skip
    assert index.add(trained.corpus / "videos", quiet=True).added == 4
    return index


@pytest.fixture(scope="module")
def split(trained: TinyRun) -> Split:
    return Split.read(trained.corpus / "annos.jsonl", VAL)


def test_videos_rank_as_in_the_evaluation(
    index: VideoIndex, trained: TinyRun, split: Split
) -> None:
    checkpoint = str(trained.logs / "ckpt.best.pth.tar")
    trained.works("--do_eval", "1", "--resume", checkpoint, "--save_predictions", "1")
    predictions = load_predictions(trained.logs / "predictions.h5").align(split.queries)
    for number, query in enumerate(split.queries):
        hits = index.search(query.desc, k=100).hits
        names = [Path(hit.video.name).stem for hit in hits]
        assert names.index(query.vid_name) + 1 == predictions.target_rank[number]
        expected = predictions.target_scores[number].max()
        assert hits[names.index(query.vid_name)].score == pytest.approx(float(expected), abs=1e-5)


def test_moments_are_those_of_vcmr(index, trained, split) -> None:
    """Before near duplicates are dropped: every event of every video with its cosine and times."""
    predictions = load_predictions(trained.logs / "predictions.h5").align(split.queries)
    ids = {Path(video.name).stem: video for video in index.videos()}
    for number, query in enumerate(split.queries):
        ours = []
        for name in predictions.vid_names:
            best = index.timeline(query.desc, ids[name].id)
            best = sorted(best, key=lambda moment: -moment.score)[: predictions.per_video]
            ours += [(m.score, name, m.start, m.end) for m in best]
        ours.sort(reverse=True)
        seconds = predictions.seconds(predictions.videos[number], predictions.events[number])
        theirs = [
            (score, predictions.vid_names[video], start, end)
            for score, video, (start, end) in zip(
                predictions.scores[number].tolist(), predictions.videos[number].tolist(),
                seconds.tolist(), strict=True,
            )
        ]  # fmt: skip
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, sorted(theirs, reverse=True), strict=True):
            assert mine[0] == pytest.approx(other[0], abs=1e-5)
        near = lambda rows: sorted((n, round(s, 1), round(e, 1)) for _, n, s, e in rows)  # noqa: E731
        assert near(ours) == near(theirs)


def test_queries_at_once_are_those_one_by_one(index: VideoIndex, split: Split) -> None:
    texts = [query.desc for query in split.queries]
    together = index.search_many(texts, k=3, by="moments")
    for text, results in zip(texts, together, strict=True):
        alone = index.search(text, k=3, by="moments")
        assert results.query == text and results.version == alone.version
        assert [hit.video for hit in results] == [hit.video for hit in alone]
        assert [hit.score for hit in results] == pytest.approx(
            [hit.score for hit in alone], abs=1e-5
        )


def test_results_show_themselves(index: VideoIndex) -> None:
    results = index.search("a <b>red</b> wall", k=2)
    assert len(results) == 2 and results[0] in list(results)
    assert "clip" in repr(results) and "from" in repr(results)
    assert "<b>" not in results._repr_html_() and "&lt;b&gt;" in results._repr_html_()
    assert "4 videos" in repr(index)
    empty = index.search("nothing", within="nowhere/*")
    assert empty.hits == [] and "nothing found" in repr(empty)


def test_an_index_takes_what_its_model_took(index: VideoIndex, trained: TinyRun) -> None:
    seconds = torch.load(trained.logs / "ckpt.best.pth.tar", weights_only=False)["config"][
        "clip_seconds"
    ]
    assert index.info()["window_seconds"] == pytest.approx(seconds) == pytest.approx(20 / 3)
