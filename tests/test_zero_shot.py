"""CLIP alone through the program: evaluated on a split, and logged by training as what to beat."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest
import torch

from dataloaders.annotations import VAL, Split
from dataloaders.clips import VideoFolder
from dataloaders.tokenizer import tokenize
from models.zero_shot import SCORINGS, load_zero_shot
from scripts import report
from scripts.plot import plot_curves
from tests.corpus import TRAIN, TinyRun
from tests.test_resume import assert_equal
from utils.evaluation.predictions import load_predictions
from utils.evaluation.published import ZERO_SHOT_NAME
from utils.evaluation.rows import ZERO_SHOT
from utils.report.run_log import read_epochs, read_zero_shot, to_beat
from utils.training.progress import VAL_ANNOTATIONS, Progress
from utils.training.trainer import reconcile

EVALUATE = ("--do_eval", "1", "--subtask_type", "VCMR", "--datatype", "tvr")
LOGGED = (*TRAIN, "--epochs", "1", "--log_zero_shot", "1")


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> dict[str, TinyRun]:
    """By scoring, with everything that an evaluation can leave."""
    base, runs = tmp_path_factory.mktemp("zero_shot"), {}
    for scoring in SCORINGS:
        runs[scoring] = run = TinyRun(trained.corpus, base / scoring)
        run.works(
            *EVALUATE, "--zero_shot", scoring, "--save_predictions", "1", "--save_embeddings",
            str(base / f"{scoring}.h5"), "--do_plot", "1", "--plot_ids", "v/0#1", "--plot_dir",
            str(base / f"plots_{scoring}"),
        )  # fmt: skip
    return runs


@pytest.fixture(scope="module")
def logged(trained, tmp_path_factory) -> TinyRun:
    """A training that logs the rows."""
    run = TinyRun(trained.corpus, tmp_path_factory.mktemp("logged"))
    run.works(*LOGGED, *EVALUATE[2:])
    return run


def metrics(run: TinyRun) -> dict:
    (record,) = run.lines("eval.jsonl")
    return record["metrics"]


def test_names_of_all_scorings() -> None:
    assert tuple(ZERO_SHOT) == SCORINGS


@pytest.mark.parametrize("scoring", SCORINGS)
def test_videos_are_ranked_by_the_scores_of_the_model(evaluated, scoring) -> None:
    run = evaluated[scoring]
    split = Split.read(run.corpus / "annos.jsonl", VAL)
    model = load_zero_shot(
        run.corpus / "clip.pt", scoring, run.corpus / "pyramid.json", "quick_gelu"
    )
    clips = VideoFolder(run.corpus / "videos")
    frames = torch.stack([clips.load(video.vid_name, 8, 64, None) for video in split.videos])
    with torch.no_grad():
        scores = model(frames, tokenize([query.desc for query in split.queries], 32))
    order = scores.argsort(dim=1, descending=True).tolist()
    ranks = [row.index(right) + 1 for row, right in zip(order, split.target.tolist(), strict=True)]
    row = metrics(run)["cosine"]
    assert row["MeanR"] == pytest.approx(sum(ranks) / len(ranks))
    assert row["R1"] == 100 * ranks.count(1) / len(ranks)
    predictions = load_predictions(run.logs / "predictions.h5")
    assert torch.equal(predictions.proposals, model.pyramid.proposals)
    assert predictions.target_rank.tolist() == ranks


def test_moments_of_the_mean_are_whole_videos(evaluated) -> None:
    rows = metrics(evaluated["mean"])
    assert rows["VCMR"] == rows["VCMR/whole_video"] and rows["SVMR"] == rows["SVMR/whole_video"]
    assert "the only moment of a video is the whole of it" in log_of(evaluated["mean"])
    assert rows["VCMR"] != metrics(evaluated["events"])["VCMR"]


def log_of(run: TinyRun) -> str:
    return (run.logs / "log.txt").read_text()


def test_tables_name_the_row_and_what_is_known(evaluated) -> None:
    for scoring, run in evaluated.items():
        table = log_of(run)
        own, known = (table.index(name) for name in (f"\n{ZERO_SHOT[scoring]}", ZERO_SHOT_NAME))
        assert own < known < table.index("\npublished")
        assert "ProPy  " not in table and "16.20   33.50   41.80   75.70" in table


def test_saved_embeddings(evaluated, run) -> None:
    file = str(evaluated["best"].logs.parent / "best.h5")
    run.works(*EVALUATE, "--load_embeddings", file, "--zero_shot", "best")
    assert metrics(run) == metrics(evaluated["best"])
    (record,) = run.lines("eval.jsonl")
    assert record["checkpoint"] == "zero-shot CLIP, best frame: clip.pt" and record["epoch"] == 0
    for other in ((), ("--zero_shot", "events")):
        told = run.stops(*EVALUATE, "--load_embeddings", file, *other)
        assert "made with zero-shot CLIP, best frame: clip.pt: evaluate it with --zero_shot" in told


def test_saved_embeddings_of_a_trained_model_are_not_zero_shot(trained, run, tmp_path) -> None:
    file, best = str(tmp_path / "e.h5"), str(trained.logs / "ckpt.best.pth.tar")
    run.works("--do_eval", "1", "--resume", best, "--save_embeddings", file)
    told = run.stops(*EVALUATE, "--load_embeddings", file, "--zero_shot", "events")
    assert "evaluate it without --zero_shot" in told


def test_pictures_show_what_there_is(evaluated, run) -> None:
    for scoring, evaluation in evaluated.items():
        folder = evaluation.logs.parent / f"plots_{scoring}"
        (drawn,) = (folder / "attention").iterdir()
        assert {path.name for path in drawn.iterdir()} == {"overview.png", "meta.json"}
        assert [path.name for path in folder.iterdir() if path.is_file()] == []
        meta = json.loads((drawn / "meta.json").read_text())
        assert meta["model"].startswith(ZERO_SHOT[scoring]) and "strongest_event" not in meta
        assert "has no events that attend" in log_of(evaluation)
    told = run.stops("--do_plot", "1", "--zero_shot", "best", "--plot_layer", "1")
    assert "CLIP alone has no attention to draw" in told


def page_of(run: TinyRun, *flags: str) -> str:
    report.main([str(run.logs), "--video_dir", str(run.corpus / "videos"), *flags])
    return html.unescape((run.logs / "report.html").read_text())


def heads(page: str) -> list[str]:
    """Of all rows of the tables of results."""
    return re.findall(r'<th scope="row">([^<]*)</th>', page)


def test_the_report_of_an_evaluation(evaluated) -> None:
    run = evaluated["events"]
    annotations = ("--annotations", str(run.corpus / "annos.jsonl"))
    page = page_of(run, *annotations)
    assert heads(page)[:3] == [ZERO_SHOT["events"], ZERO_SHOT_NAME, "published"]
    assert page.count('<article class="card query"') > 0
    assert "drawn with zero-shot CLIP, best event: clip.pt" in page


def test_training_logs_the_rows_of_every_scoring(logged, evaluated) -> None:
    first, *epochs = logged.lines()
    assert [record["epoch"] for record in epochs] == [1] and first["epoch"] == 0
    assert first["zero_shot"] == {name: metrics(run) for name, run in evaluated.items()}
    table = log_of(logged)
    assert all(table.count(name) == 1 + 2 for name in ZERO_SHOT.values()), "PRVR twice, VCMR"
    assert ZERO_SHOT_NAME in table


def test_training_does_not_notice(run, tmp_path) -> None:
    """Weights, optimizer and random numbers are the same to the bit."""
    found = []
    for flag in "01":
        other = TinyRun(run.corpus, tmp_path / flag)
        other.works(*LOGGED[:-1], flag)
        content = torch.load(other.logs / "ckpt.pth.tar", weights_only=True)
        found.append((content, other.lines()[-1]))
    (without, epoch), (with_rows, same_epoch) = found
    assert with_rows.pop("zero_shot") and not without.pop("zero_shot")
    assert without["global_step"] == 2
    for name in ("state_dict", "optimizer", "scaler", "rng"):
        assert_equal(without[name], with_rows[name], name)
    for name in ("loss", "grad_norm", "SumR", "MeanR"):
        assert epoch[name] == same_epoch[name]


def test_resuming_keeps_the_rows(logged, run) -> None:
    shutil.copytree(logged.logs, run.logs, dirs_exist_ok=True)
    resumed = ("--resume", "auto", "--epochs", "2", "--log_zero_shot", "1")
    told = run.works(*TRAIN, *EVALUATE[2:], *resumed)
    assert "evaluating CLIP alone" not in told and ZERO_SHOT["best"] in told
    assert [record["epoch"] for record in run.lines()] == [0, 1, 2]


def test_resuming_elsewhere_writes_the_rows_there(logged, run) -> None:
    resumed = ("--resume", str(logged.logs / "ckpt.pth.tar"), "--epochs", "2")
    run.works(*TRAIN, *EVALUATE[2:], *resumed)
    assert read_zero_shot(run.logs) == read_zero_shot(logged.logs)


def test_rows_that_do_not_compare_any_more_are_not_read_from_the_log(logged, run) -> None:
    shutil.copytree(logged.logs, run.logs, dirs_exist_ok=True)
    told = run.works(
        *TRAIN, *EVALUATE[2:], "--resume", "auto", "--epochs", "2", "--max_words", "9"
    )  # fmt: skip
    assert "the zero-shot rows do not compare" in told
    assert read_zero_shot(logged.logs) and not read_zero_shot(run.logs)
    assert [record["epoch"] for record in read_epochs(run.logs)] == [1, 2]


def test_rows_of_another_split_are_left_out() -> None:
    rows = {"best": {"cosine": {"R1": 1.0}}}
    for name, kept in ((VAL_ANNOTATIONS, {}), ("window_rule", {}), ("lr", rows)):
        progress = Progress(zero_shot=rows, args={name: "before"})
        warnings = reconcile(progress, {name: "now"})
        assert progress.zero_shot == kept
        assert any("zero-shot" in warning for warning in warnings) == (not kept)


def test_fine_tuned_weights_are_not_called_zero_shot(run, tmp_path) -> None:
    """The rows are those of the published CLIP, whatever training starts from."""
    tuned = TinyRun(run.corpus, tmp_path / "tuned")
    tuned.works(*LOGGED, "--freeze_clip", "0", "--lr", "1e2", "--coef_lr", "1")
    best = str(tuned.logs / "ckpt.pth.tar")
    run.works(*LOGGED, "--freeze_clip", "0", "--load_from_pretrained", best)
    assert read_zero_shot(run.logs) == read_zero_shot(tuned.logs)


def test_the_report_of_a_training(logged) -> None:
    names = heads(page_of(logged))
    assert names[:5] == ["epoch 1", *ZERO_SHOT.values(), ZERO_SHOT_NAME]
    moments = names[names.index("random_event") :]
    assert moments[1:5] == [*ZERO_SHOT.values(), "published"]


def test_curves_have_a_line_to_beat(logged, trained, tmp_path, monkeypatch) -> None:
    drawn = []
    draw = plot_curves.draw_curves
    monkeypatch.setattr(plot_curves, "draw_curves", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    rows = read_zero_shot(logged.logs)
    best = max(own["cosine"]["SumR"] for own in rows.values())
    for folders, there in (([logged], True), ([logged, trained], False), ([trained], False)):
        output = ("--output", str(tmp_path / "c.png"))
        plot_curves.main([*(str(run.logs) for run in folders), *output])
        panels = {axes.get_title(): axes for axes in drawn[-1].axes}
        heights = [line.get_ydata() for line in panels["SumR"].lines]
        assert any(list(y) == [best, best] for y in heights) == there
    assert to_beat(rows)["VCMR/0.5-r10"] == max(own["VCMR"]["0.5-r10"] for own in rows.values())
    assert to_beat(rows)["MeanR"] == min(own["cosine"]["MeanR"] for own in rows.values())


def test_logs_without_rows_or_with_damaged_ones(trained, tmp_path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(trained.logs, folder)
    path = folder / "log.jsonl"
    old = path.read_text()
    for found in (
        None, [], {}, {"best": 3, "worst": {"cosine": {"R1": 1.0}}},
        {"best": {"cosine": {"R1": None}, "VCMR": [1]}},
    ):  # fmt: skip
        assert not read_zero_shot(folder), path.read_text()
        assert len(read_epochs(folder)) == 2
        path.write_text(json.dumps({"epoch": 0, "zero_shot": found}) + "\n" + old)
    page = page_of(TinyRun(trained.corpus, folder))
    assert ZERO_SHOT_NAME not in page and "zero-shot" not in " ".join(heads(page))
    plot_curves.main([str(folder)])
