"""Predictions files, exports, reports and the command line, on small corpora."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dataloaders import DataError
from dataloaders.annotations import Query, Video
from scripts import score_predictions
from utils import OutputError, RunError
from utils.evaluation.embed import Embeddings
from utils.evaluation.evaluator import vcmr_rows
from utils.evaluation.moment_metrics import first_hits, moment_recalls, pad_windows
from utils.evaluation.moment_tables import level_report, moment_report, times_missing
from utils.evaluation.predictions import export_all, load_predictions, save_predictions
from utils.evaluation.ranking import predict_moments, rank_videos, top_moments
from utils.evaluation.retrieval_metrics import recall_metrics

# The whole video, its halves, its quarters.
PROPOSALS = [[0, 1], [0, 0.5], [0.5, 1], [0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1]]
DURATIONS = [61.46, 40.0, 8.0, 33.3]


def predict(texts, events, queries, durations=DURATIONS):
    videos = [Video(f"video {i}", durations[i]) for i in range(len(events))]
    target = torch.tensor([int(query.vid_name.split()[1]) for query in queries])
    split = SimpleNamespace(queries=queries, videos=videos, target=target)  # videos of no query too
    embeddings = Embeddings(events, texts)
    return predict_moments(embeddings, split, torch.tensor(PROPOSALS), per_video=3)


@pytest.fixture
def queries():
    rows = [
        (0, "v", ((30.73, 46.0),)),
        (1, "vt", ((0.0, 20.0), (21.0, 40.0))),
        (2, "v", ((2.0, 4.0),)),
        (3, "t", ((0.0, 33.3),)),
        (1, "vt", ((1.0, 2.0), (3.0, 4.0), (9.0, 9.5), (20.0, 40.0))),
        (0, "v", ((40.0, 50.0),)),
    ]
    return [
        Query(10 + i, f"text {i} é", f"video {v}", DURATIONS[v], windows, query_type)
        for i, (v, query_type, windows) in enumerate(rows)
    ]


def random_embeddings():
    generator = torch.Generator().manual_seed(3)
    texts = torch.randn(6, 16, generator=generator)
    return Embeddings(torch.randn(4, 7, 16, generator=generator), texts)


@pytest.fixture
def predictions(queries):
    embeddings = random_embeddings()
    return predict(embeddings.texts, embeddings.events, queries)


@pytest.fixture
def annotations(tmp_path, queries):
    return write_annotations(tmp_path / "val.jsonl", queries)


def write_annotations(path, queries):
    names = {"windows": "ts", "query_type": "type"}
    records = ({names.get(k, k): v for k, v in vars(query).items()} for query in queries)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_saved_file_comes_back(tmp_path, predictions, queries):
    save_predictions(tmp_path / "p.h5", predictions)
    loaded = load_predictions(tmp_path / "p.h5")
    for name, value in vars(predictions).items():
        same = getattr(loaded, name) == value
        assert same.all() if torch.is_tensor(value) else same, name
    assert moment_report(loaded, queries) == moment_report(predictions, queries)
    assert level_report(loaded, queries) == level_report(predictions, queries)


def test_the_order_of_the_annotations_does_not_matter(predictions, queries):
    """Videos are retrieved in the order of their first moments, and as for PRVR."""
    rows = vcmr_rows(predictions, queries)
    assert rows["cosine"] == recall_metrics(rank_videos(random_embeddings(), predictions.target))
    columns = (predictions.videos, predictions.target, predictions.target_rank)
    for videos, target, rank in zip(*(column.tolist() for column in columns), strict=True):
        assert list(dict.fromkeys(videos)).index(target) + 1 == rank
    report = moment_report(predictions, queries)
    assert rows["VCMR"] == report["VCMR"] and rows["levels/all"]["queries"] == 6
    shuffled = [queries[i] for i in (3, 0, 5, 4, 2, 1)]
    reordered = predictions.align(shuffled)
    assert reordered.desc_ids == [str(q.desc_id) for q in shuffled]
    assert torch.equal(reordered.videos[0], predictions.videos[3])
    again = moment_report(predictions, shuffled)
    assert {k: again[k] for k in report} == report


def test_single_video_retrieval_is_corpus_retrieval_on_a_corpus_of_one(queries):
    embeddings = random_embeddings()
    texts, events = embeddings.texts, embeddings.events.round()  # equal cosines among them
    predictions = predict(texts, events, queries)
    within = predictions.within_target()
    for row, video in enumerate(predictions.target.tolist()):
        alone = top_moments(texts[row : row + 1], events[video : video + 1], per_video=3)
        assert torch.equal(within.events[row : row + 1].int(), alone.events)
        assert within.videos[row].tolist() == [video] * 3
        query = queries[row]
        renamed = Query(query.desc_id, "", "video 0", query.duration, query.windows)
        one = predict(texts[row : row + 1], events[video : video + 1], [renamed], [query.duration])
        report = moment_report(one, [renamed])
        same = predictions.select(torch.tensor([row]))
        assert report["VCMR"] == report["SVMR"] == moment_report(same, [query])["SVMR"]
        assert report["VR"]["r1"] == 100


def test_baselines_worked_out_by_hand():
    # One query; the true window is the first half of the second video.
    query = Query("a", "text", "video 1", 40.0, ((0.0, 20.0),))
    texts = torch.tensor([[1.0, 0.0]])
    events = torch.tensor([[0.1, 1.0]]).repeat(14, 1).view(2, 7, 2)
    events[0, 0] = torch.tensor([1.0, 0.0])  # the first video is first
    events[1, 3] = torch.tensor([1.0, 1.0])  # a quarter: IoU 0.5
    report = moment_report(predict(texts, events, [query]), [query])
    assert report["VR"] == {"r1": 0.0, "r5": 100.0, "r10": 100.0, "r100": 100.0}
    assert report["VCMR"]["0.5-r1"] == 0
    assert report["VCMR"]["0.5-r10"] == report["SVMR"]["0.5-r1"] == 100
    whole = report["VCMR/whole_video"]  # IoU 0.5, the second video
    assert (whole["0.5-r1"], whole["0.5-r10"], whole["0.7-r100"]) == (0, 100, 0)
    assert report["SVMR/whole_video"]["0.5-r1"] == 100
    # Right at 0.5: the whole, the first half, the first two quarters; at 0.7 the half alone.
    assert report["SVMR/random_event"]["0.5-r1"] == round(100 * 4 / 7, 2)
    assert report["VCMR/random_event"]["0.7-r1"] == round(100 / 14, 2)
    assert report["VCMR/random_event"]["0.7-r10"] == round(100 * 10 / 14, 2)
    assert report["VCMR/random_event"]["0.7-r100"] == 100


def test_reports_of_some_queries_are_those_of_these_alone(predictions, queries):
    """By type, by the window rule where it differs, and of queries with times."""
    report = moment_report(predictions, queries)
    any_rule = moment_report(predictions, queries, "any")
    assert (any_rule["VCMR"], any_rule["SVMR/half"]) == (report["VCMR/any"], report["SVMR"])

    def alone(keep):
        members = torch.tensor([keep(query) for query in queries])
        return moment_report(predictions.select(members), list(filter(keep, queries)))

    for name in ("v", "vt", "t"):
        some = alone(lambda query, name=name: query.query_type == name)
        assert all(report[f"{task}/{name}"] == some[task] for task in ("VCMR", "SVMR", "VR"))
    assert "VCMR/any" not in alone(lambda query: len(query.windows) == 1)
    untimed = [replace(query, windows=None, query_type=None) for query in queries]
    assert moment_report(predictions, untimed) == {"VR": report["VR"]}
    assert times_missing(untimed).startswith("6 of 6 queries have no times (ts): VCMR and SVMR can")
    assert "2 of 6" in times_missing(some := [*queries[:4], *untimed[4:]])
    assert times_missing(queries) is None
    first = alone(lambda query: query in queries[:4])
    assert moment_report(predictions, some)["VCMR"] == first["VCMR"]


def test_levels_that_win():
    # Events along the axes: a text picks its event. Two short moments, one found; one long, found.
    texts = torch.eye(7)[[3, 1, 0]]
    queries = [
        Query(0, "short, found", "video 0", 40.0, ((0.0, 10.0),)),
        Query(1, "short, too long", "video 0", 40.0, ((0.0, 10.0),)),
        Query(2, "long, found", "video 0", 40.0, ((1.0, 1.5), (0.0, 36.0))),
    ]
    rows = level_report(predict(texts, torch.eye(7)[None], queries, [40.0]), queries)
    assert list(rows) == ["25%", "100%", "all"]
    assert rows["25%"]["queries"] == 2
    assert [rows["25%"][f"won by {x}%"] for x in (25, 50, 100)] == [50, 50, 0]
    assert rows["25%"]["best event"] == 75  # IoU 1 and 0.5
    assert rows["25%"]["whole video"] == 25
    assert rows["25%"]["random event"] == 25  # (0.25 + 0.5 + 1) / 7
    assert rows["25%"]["closest event"] == 100
    assert rows["100%"]["won by 100%"] == 100
    assert rows["100%"]["best event"] == rows["100%"]["whole video"] == 90
    assert rows["all"]["queries"] == 3


def test_tvr_export(tmp_path, predictions, queries):
    path, _ = export_all(tmp_path / "out", predictions, queries)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["video2idx"] == {f"video {i}": i for i in range(4)}
    for task, width in (("VCMR", 12), ("SVMR", 3), ("VR", 4)):
        assert [q["desc_id"] for q in content[task]] == [10, 11, 12, 13, 14, 15]
        assert content[task][0]["desc"] == "text 0 é"
        assert {len(q["predictions"]) for q in content[task]} == {width}
    table = torch.tensor([q["predictions"] for q in content["VCMR"]], dtype=torch.float64)
    windows = pad_windows([q.windows for q in queries])
    arguments = (table[..., 0].long(), table[..., 1:3], predictions.target, windows)
    report = moment_report(predictions, queries)
    assert moment_recalls(first_hits(*arguments)) == report["VCMR"]
    assert torch.equal(table[..., 3].float(), predictions.scores)
    video, event = predictions.videos[0, 0].item(), predictions.events[0, 0].item()
    start, end = (share * DURATIONS[video] for share in PROPOSALS[event])
    assert content["VCMR"][0]["predictions"][0][:3] == pytest.approx([video, start, end])
    for query in content["SVMR"]:
        assert {queries[query["desc_id"] - 10].vid_name} == {
            f"video {moment[0]}" for moment in query["predictions"]
        }
    for moments, videos in zip(content["VCMR"], content["VR"], strict=True):
        best = {moment[0]: moment for moment in reversed(moments["predictions"])}
        assert videos["predictions"] == sorted(best.values(), key=lambda moment: -moment[3])


def test_qvhighlights_export(tmp_path, predictions, queries):
    _, path = export_all(tmp_path, predictions, queries)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["qid"] for line in lines] == [10, 11, 12, 13, 14, 15]
    assert (lines[1]["query"], lines[1]["vid"]) == ("text 1 é", "video 1")
    within = predictions.within_target()
    seconds = within.seconds(within.videos, within.events)
    for line, times, scores in zip(lines, seconds, within.scores, strict=True):
        expected = torch.cat([times, scores[:, None]], dim=1)
        assert torch.equal(torch.tensor(line["pred_relevant_windows"]), expected)
    predictions.scores[0, -1], predictions.target_scores[2] = -torch.inf, torch.nan
    for path in export_all(tmp_path / "not numbers", predictions, queries):
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_annotations_that_do_not_match_are_refused(predictions, queries):
    with pytest.raises(RunError, match=r"1 queries are not in the annotations \(15\)"):
        predictions.align(queries[:5])
    extra = Query("new", "text", "video 0", 61.46, ((0.0, 1.0),))
    with pytest.raises(RunError, match=r"1 queries are not in the predictions \(new\)"):
        predictions.align([*queries, extra])
    moved = Query(10, "text", "video 3", 33.3, ((0.0, 1.0),))
    with pytest.raises(RunError, match="'video 3' in the annotations, to 'video 0'"):
        predictions.align([moved, *queries[1:]])


def test_a_file_of_impossible_durations_is_refused(tmp_path, predictions):
    for duration in (-1.0, torch.inf, torch.nan):
        predictions.durations[1] = duration
        save_predictions(tmp_path / "p.h5", predictions)
        with pytest.raises(RunError, match=r"p\.h5: durations .* --save_predictions"):
            load_predictions(tmp_path / "p.h5")


@pytest.fixture
def words(tmp_path, predictions, annotations):
    """The command line's, about the saved predictions."""
    save_predictions(tmp_path / "p.h5", predictions)
    return ["--predictions", f"{tmp_path / 'p.h5'}", "--annotations", f"{annotations}"]


def test_command_line(tmp_path, capsys, predictions, queries, words):
    score_predictions.main([*words, "--export", f"{tmp_path / 'exports'}"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    report = moment_report(predictions, queries)
    for name in ("VCMR", "SVMR", "VCMR/any", "VR/vt", "VCMR/random_event"):
        assert [name, *(f"{value:.2f}" for value in report[name].values())] in rows
    assert len(list((tmp_path / "exports").iterdir())) == 2


def test_command_line_names_the_wrong_file(tmp_path, queries, annotations, words):
    for wrong, position in (("no predictions", 1), ("no annotations", 3)):
        changed = [*words[:position], str(tmp_path / wrong), *words[position + 1 :]]
        with pytest.raises((DataError, RunError), match=f"{wrong}: no such"):
            score_predictions.main(changed)
    with pytest.raises(OutputError, match=r"p\.h5: cannot be written: File exists"):
        score_predictions.main([*words, "--export", words[1]])
    write_annotations(annotations, queries[:3])
    with pytest.raises(RunError, match=rf"{words[1]}, {annotations}: 3 queries are not"):
        score_predictions.main(words)


def test_command_line_without_some_videos_or_times(capsys, queries, annotations, words):
    write_annotations(annotations, [*queries, Query("more", "text", "video 9", 5.0, None)])
    with pytest.raises(RunError, match=r"1 queries are not .*\(more\).*: --allow_missing"):
        score_predictions.main(words)
    score_predictions.main([*words, "--allow_missing"])
    assert "4 of the 5 videos and 6 of the 7 queries" in capsys.readouterr().out
    write_annotations(annotations, [replace(query, windows=None) for query in queries])
    score_predictions.main(words)
    output = capsys.readouterr().out
    assert f"{annotations}: 6 of 6 queries have no times (ts)" in output
    assert "VR" in output and "VCMR/" not in output
