"""Videos that cannot be used: found before a run and refused or skipped; or they stop it later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataloaders import DataError, video
from dataloaders.annotations import Query, Split, Video
from dataloaders.clips import VideoFolder, missing_names
from dataloaders.ffmpeg import run_ffmpeg, write_video
from dataloaders.preflight import probe_all
from scripts import report, score_predictions
from tests.corpus import TinyRun, moving_noise
from tests.fuzz import mutations
from utils import RunError
from utils.missing_videos import MissingVideos

SIZE, FRAMES = 64, 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "good.mp4"
    write_video(path, moving_noise(24, SIZE, 80))
    return path


def probe(folder: Path, *names: str, seconds: float = 8.0):
    return probe_all([Video(name, seconds) for name in names], VideoFolder(folder), SIZE)


def test_probing_finds_what_headers_show(tmp_path, clip):
    good = clip.read_bytes()
    wide = np.zeros((3, 32, 80, 3), np.uint8)
    write_video(tmp_path / "small.mp4", wide)
    shutil.copy(clip, tmp_path / "good.mp4")
    run_ffmpeg(["-i", str(clip), "-c", "copy", "-f", "matroska", str(tmp_path / "mkv.mp4")])
    contents = {
        "empty": b"",
        "text": b"<html>404</html>",
        "short": good[: len(good) // 2],
        "headless": good.replace(b"moov", b"free"),
        "endless": good.replace(b"stts", b"free"),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
    names = ["good", "mkv", "gone", "small", *contents]
    unusable, doubtful = probe(tmp_path, *names)
    assert set(unusable) == set(names) - {"good", "mkv"} and not doubtful
    assert all(str(tmp_path / f"{name}.mp4") in reason for name, reason in unusable.items())
    assert "80×32 pixels" in unusable["small"]
    with pytest.raises(DataError, match="no such video folder"):
        probe(tmp_path / "nowhere", "good")


NFC, NFD = "caf\u00e9", "cafe\u0301"
CONFUSED = [
    ("x", "x.MP4", "'x.MP4' is there, not 'x.mp4'"),
    ("x", "x.mkv", "'x.mkv' is there, not 'x.mp4'"),
    ("x", "x.mp4.mp4", "'x.mp4.mp4' is there, not 'x.mp4'"),
    ("x.mkv", "x.mp4", "'x.mp4' is there, not 'x.mkv.mp4'"),
    (NFC, f"{NFD}.mp4", r"'cafe\u0301.mp4' is there, not 'caf\xe9.mp4'"),
    ("x", "y.mp4", None),
]


@pytest.mark.parametrize(("vid_name", "file", "said"), CONFUSED)
def test_a_name_that_is_easily_confused_is_named(tmp_path, vid_name, file, said):
    (tmp_path / file).write_bytes(b"")
    unusable, _ = probe(tmp_path, vid_name)
    with pytest.raises(DataError) as raised:
        VideoFolder(tmp_path).check([vid_name], SIZE)
    for message in (unusable[vid_name], str(raised.value).splitlines()[1]):
        assert message.endswith("missing") if said is None else f"{said}: correct" in message


def test_so_is_a_clip_of_a_frame_store():
    found = missing_names(["x.mp4", "y", "X", "z"], ["x", "y"])
    assert list(found) == ["x.mp4", "X", "z"] and found["z"] == "missing"
    assert "'x' is there, not 'x.mp4'" in found["x.mp4"]
    assert "'x' is there, not 'X'" in found["X"]


@pytest.mark.parametrize(("seconds", "doubt"), [(8, False), (5, False), (15, False), (80, True)])
def test_frames_that_do_not_fit_the_length_are_doubtful(tmp_path, clip, seconds, doubt):
    shutil.copy(clip, tmp_path / "good.mp4")
    assert probe(tmp_path, "good", seconds=seconds) == ({}, ["good"] if doubt else [])


def test_what_probing_refuses_does_not_load(tmp_path, clip):
    """And whatever the damage, each of the two ends in an answer."""
    good = clip.read_bytes()
    counts = {True: 0, False: 0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        corrupt = mutations.corrupt_mp4 if seed % 2 else mutations.corrupt_bytes
        (tmp_path / "v.mp4").write_bytes(corrupt(good, rng, good))
        unusable, _ = probe(tmp_path, "v")
        counts["v" in unusable] += 1
        try:
            video.load_clip(tmp_path / "v.mp4", FRAMES, SIZE)
        except DataError:
            continue
        assert not unusable, (seed, unusable)
    assert min(counts.values()) > 20


def test_missing_videos_are_listed_and_counted(tmp_path) -> None:
    """Lines of an earlier run on the same splits are replaced, those of training's stay."""
    path = tmp_path / "missing_videos.jsonl"
    earlier = [{"split": split, "vid_name": "of an earlier run"} for split in ("val", "train")]
    path.write_text("".join(json.dumps(line) + "\n" for line in earlier) + '{"spl')
    val = Split("val", [Query(i, "", f"v{i // 2}", 10.0, None) for i in range(6)])
    missing = MissingVideos(tmp_path, [(val, {"v0": "gone", "v2": "gone too"})])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [
        earlier[1],
        {"split": "val", "vid_name": "v0", "queries": 2, "reason": "gone"},
        {"split": "val", "vid_name": "v2", "queries": 2, "reason": "gone too"},
    ]
    assert [query.desc_id for query in missing.remaining(val).queries] == [2, 3]
    assert missing.counts("val") == {
        "val_videos": 1, "val_videos_left_out": 2, "val_queries": 2, "val_queries_left_out": 4,
    }  # fmt: skip
    assert "on 1 of the 3 videos and 2 of the 6 queries" in missing.summary("val")
    whole = MissingVideos(tmp_path, [(val, {}), (replace(val, name="train"), {})])
    assert not path.exists(), "nothing is missing"
    assert whole.summary("val") is None and whole.remaining(val) == val


# ---------------------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory) -> TinyRun:
    """The tiny corpus and a checkpoint; clip 1 is missing, clip 3 is cut short."""
    corpus = tmp_path_factory.mktemp("damaged") / "corpus"
    run = TinyRun(corpus, corpus / "logs")
    shutil.copytree(trained.corpus, run.corpus)
    (run.corpus / "videos" / "clip 1.mp4").unlink()
    broken = run.corpus / "videos" / "clip 3.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    lines = (run.corpus / "annos.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["vid_name"] in ("clip 0", "clip 2")]
    (run.corpus / "kept.jsonl").write_text("\n".join(kept))
    return run


def missing(run: TinyRun) -> list[dict]:
    return run.lines("missing_videos.jsonl")


def checkpoint(run: TinyRun) -> tuple[str, ...]:
    return "--do_eval", "1", "--resume", str(run.logs / "ckpt.pth.tar")


SIZE_USED = "on 2 of the 4 videos and 4 of the 8 queries"
TRAIN = ("--do_train", "1", "--epochs", "1", "--prvr_train_annos")


def test_a_run_refuses_what_is_missing(damaged):
    told = damaged.stops(*checkpoint(damaged))
    assert "2 videos are missing or unreadable:\nvideos/clip 1.mp4: missing\n" in told
    assert "--allow_missing 1" in told
    record, _ = missing(damaged)
    assert (record["split"], record["vid_name"], record["queries"]) == ("val", "clip 1", 2)
    assert "clip 1.mp4: missing" in damaged.stops(*TRAIN, "kept.jsonl")


def test_a_run_skips_them_if_told_so(damaged):
    """The metrics are those of annotations without these videos, and say that something lacks."""
    assert SIZE_USED in damaged.works(*checkpoint(damaged), "--allow_missing", "1")
    assert {record["vid_name"] for record in missing(damaged)} == {"clip 1", "clip 3"}
    assert "clip 3.mp4: cannot be decoded" in missing(damaged)[1]["reason"]
    damaged.works(*checkpoint(damaged), "--prvr_val_annos", "kept.jsonl")
    ours, reference = damaged.lines("eval.jsonl")[-2:]
    assert ours["metrics"] == reference["metrics"]
    assert (ours["val_queries"], ours["val_queries_left_out"]) == (4, 4)
    assert "val_queries" not in reference


def test_what_is_kept_of_a_reduced_split_can_be_used(damaged, tmp_path, capsys):
    """Embeddings, predictions and the report: refused as they stand, accepted and named if told."""
    kept, allowed = str(tmp_path / "e.h5"), ("--allow_missing", "1")
    shutil.rmtree(damaged.logs / "VIS", ignore_errors=True)
    (damaged.logs / "eval.jsonl").unlink(missing_ok=True)  # the page shows the last few
    evaluate = ("--do_eval", "1", "--subtask_type", "VCMR", "--save_predictions", "1")
    damaged.works(*evaluate, *checkpoint(damaged), *allowed, "--save_embeddings", kept)
    again = (*evaluate, "--load_embeddings", kept)
    assert "without the 2 missing videos: --allow_missing 1" in damaged.stops(*again)
    assert SIZE_USED in damaged.works(*again, *allowed)
    computed, loaded = damaged.lines("eval.jsonl")[-2:]
    assert computed == loaded
    assert {record["vid_name"] for record in missing(damaged)} == {"clip 1", "clip 3"}

    words = ["--predictions", str(damaged.logs / "predictions.h5")]
    words += ["--annotations", str(damaged.corpus / "annos.jsonl")]
    with pytest.raises(RunError, match="go without what the predictions lack: --allow_missing"):
        score_predictions.main(words)
    score_predictions.main([*words, "--allow_missing"])
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("SVMR "))
    assert row[1:] == [f"{value:.2f}" for value in loaded["metrics"]["SVMR"].values()]
    assert SIZE_USED in printed

    report.main([str(damaged.logs), "--annotations", str(damaged.corpus / "annos.jsonl")])
    assert "Queries" not in capsys.readouterr().err
    page = (damaged.logs / "report.html").read_text()
    for place in ("<li>evaluated <b>{}</b></li>", "SVMR), in %, {}<", "largest lead, {}.",
                  '<th scope="row">evaluated ckpt.pth.tar, epoch 2, {}</th>'):  # fmt: skip
        assert place.format(SIZE_USED) in page


@pytest.fixture
def training(damaged, tmp_path) -> TinyRun:
    """On its corpus, into a folder of the test's own."""
    return TinyRun(damaged.corpus, tmp_path)


def test_training_skips_them_if_told_so(training):
    told = training.works(*TRAIN, "annos.jsonl", "--allow_missing", "1")
    assert f"trained {SIZE_USED}" in told
    (record,) = training.lines()
    assert (record["val_videos"], record["val_videos_left_out"]) == (2, 2)


def test_moments_whose_videos_are_all_missing(training) -> None:
    with (training.corpus / "timed.jsonl").open("w") as file:
        for line in map(json.loads, (training.corpus / "annos.jsonl").open()):
            line["ts"] = line["ts"] if line["vid_name"] == "clip 1" else None
            file.write(json.dumps(line) + "\n")
    flags = ("--prvr_val_annos", "timed.jsonl", "--subtask_type", "VCMR", "--allow_missing", "1")
    told = training.stops(*TRAIN, "kept.jsonl", *flags)
    assert "4 of 4 queries have no times (ts): VCMR and SVMR cannot be scored" in told
    assert "--subtask_type PRVR" in told


def test_a_clip_that_only_breaks_while_decoding_stops_the_run(training, tmp_path) -> None:
    """Named, with the command that finds all of them, even where missing videos are skipped."""
    shutil.copytree(training.corpus / "videos", tmp_path / "videos")
    broken = tmp_path / "videos" / "clip 2.mp4"
    data = broken.read_bytes()
    start = data.index(b"mdat") + 4
    broken.write_bytes(data[:start] + bytes(400) + data[start + 400 :])
    flags = ("--video_dir", str(broken.parent), "--num_thread_reader", "1", "--allow_missing", "1")
    told = training.stops(*TRAIN, "kept.jsonl", *flags)
    assert f"{broken}: cannot be decoded" in told
    assert f"check_videos --decode --video_dir {broken.parent}" in told
