"""Videos that cannot be used: found before a run, or while it decodes; refused, or left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders import DataError, video
from dataloaders.annotations import Query, Video, corpus_videos
from dataloaders.clips import VideoFolder
from dataloaders.datasets import evaluation_video_loader, training_loader
from dataloaders.ffmpeg import run_ffmpeg, write_video
from dataloaders.preflight import find_unusable
from scripts import report
from tests.corpus import TinyRun, make_run
from tests.fuzz import mutations
from utils.evaluation import moment_metrics
from utils.missing_videos import LeftOut

SIZE, FRAMES = 64, 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A clip of 24 frames of moving noise, so that damage to its bytes shows."""
    path = tmp_path_factory.mktemp("clip") / "good.mp4"
    noise = np.random.RandomState(0).randint(0, 255, (SIZE, 80, 3), dtype=np.uint8)
    write_video(path, (np.roll(noise, 8 * i, axis=1) for i in range(24)))
    return path


def damaged(data: bytes, count: int) -> bytes:
    """A clip whose header is whole and whose first frame's bytes are not."""
    start = data.index(b"mdat") + 4
    return data[:start] + bytes(count) + data[start + count :]


def look(folder: Path, *names: str, seconds: float = 8.0, open_files: bool = True):
    videos = [Video(name, seconds) for name in names]
    clips = VideoFolder(folder)
    return find_unusable(videos, clips, SIZE, open_files=open_files, num_threads=2)


def test_a_first_look_finds_what_headers_show(tmp_path, clip):
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
    unusable, doubtful = look(tmp_path, *names)
    assert set(unusable) == set(names) - {"good", "mkv"} and not doubtful
    assert all(str(tmp_path / f"{name}.mp4") in reason for name, reason in unusable.items())
    assert "80×32 pixels" in unusable["small"]
    assert set(look(tmp_path, *names, open_files=False)[0]) == {"gone"}
    with pytest.raises(DataError, match="no such video folder"):
        look(tmp_path / "nowhere", "good")


@pytest.mark.parametrize(("seconds", "doubt"), [(8, False), (5, False), (15, False), (80, True)])
def test_frames_that_do_not_fit_the_length_are_doubtful(tmp_path, clip, seconds, doubt):
    shutil.copy(clip, tmp_path / "good.mp4")
    assert look(tmp_path, "good", seconds=seconds) == ({}, ["good"] if doubt else [])


def test_what_a_first_look_refuses_does_not_load(tmp_path, clip):
    """And whatever the damage, each of the two ends in an answer."""
    good = clip.read_bytes()
    counts = {True: 0, False: 0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        spoil = mutations.spoil_mp4 if seed % 2 else mutations.spoil_bytes
        (tmp_path / "v.mp4").write_bytes(spoil(good, rng, good))
        unusable, _ = look(tmp_path, "v")
        counts["v" in unusable] += 1
        try:
            video.load_clip(tmp_path / "v.mp4", FRAMES, SIZE)
        except DataError:
            continue
        assert not unusable, (seed, unusable)
    assert min(counts.values()) > 20


def test_nasty_files_in_place_of_videos(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_check_size", lambda *args: None)  # or most would stop there
    files = [p for p in sorted((shared_data / "nasty").iterdir()) if p.stat().st_size < 10**6]
    queries = []
    for i, path in enumerate(files):
        shutil.copy(path, tmp_path / f"v{i}.mp4")
        queries.append(Query(i, path.name, f"v{i}", 10.0, None))
    videos = corpus_videos(queries)
    unusable, _ = look(tmp_path, *(v.vid_name for v in videos))
    assert len(unusable) >= 10
    left_out = LeftOut(tmp_path / "missing.jsonl", {"val": queries})
    left_out.add("val", unusable)
    rest = corpus_videos(left_out.kept("val", queries))
    loader = evaluation_video_loader(
        rest, VideoFolder(tmp_path), num_frames=FRAMES, size=SIZE, batch_size=5, num_workers=2,
        pin_memory=False, leave_out=lambda *reason: left_out.leave_out("val", *reason),
    )  # fmt: skip
    read = [i for batch in loader for i in batch["indices"].tolist()]
    assert len(read) >= 8
    kept = corpus_videos(left_out.kept("val", queries))
    assert [rest[i] for i in read] == kept
    for name in unusable:
        with pytest.raises(DataError):
            video.load_clip(tmp_path / f"{name}.mp4", FRAMES, SIZE)


def test_the_list_appears_with_the_first_video(tmp_path) -> None:
    path = tmp_path / "missing.jsonl"
    path.write_text('{"split": "val", "vid_name": "of an earlier run"}\n{"spl')
    queries = [Query(i, "", f"v{i // 2}", 10.0, None) for i in range(4)]
    left_out = LeftOut(path, {"val": queries})
    assert left_out.add("val", {}) == [] and not path.exists()
    assert left_out.add("val", {"v0": "gone", "v1": "gone too"}) == ["v0", "v1"]
    assert left_out.add("val", {"v1": "said before"}) == []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["vid_name"], r["queries"], r["reason"]) for r in records] == [
        ("v0", 2, "gone"), ("v1", 2, "gone too"),
    ]  # fmt: skip


def test_an_evaluation_leaves_the_list_of_training(tmp_path) -> None:
    path = tmp_path / "missing.jsonl"
    queries = [Query(0, "", "v0", 10.0, None)]
    training = LeftOut(path, {"train": queries, "val": queries})
    training.add("train", {"v0": "gone"})
    training.add("val", {"v0": "gone"})
    LeftOut(path, {"val": queries})
    (record,) = map(json.loads, path.read_text().splitlines())
    assert (record["split"], record["vid_name"]) == ("train", "v0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip) -> Path:
    """Eight clips of which v2 and v5 do not decode."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(8):
        content = clip.read_bytes()
        (folder / f"v{i}.mp4").write_bytes(damaged(content, 9000) if i in (2, 5) else content)
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_training_batch_is_the_same_without_the_broken_video(folder, clip, tmp_path, num_workers):
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    for name in ("v2", "v5"):
        shutil.copy(clip, whole / f"{name}.mp4")
    queries = [Query(f"{v}{c}", f"{c} {v}", f"v{v}", 8.0, None) for v in range(8) for c in "ab"]
    found: list[str] = []

    def batches(folder: Path, first: int = 0) -> list[dict]:
        loader = training_loader(
            queries, VideoFolder(folder), num_frames=FRAMES, size=SIZE, max_words=8, batch_size=4,
            seed=1, num_workers=num_workers, pin_memory=False,
            leave_out=lambda name, reason: found.append(name),
        )  # fmt: skip
        loader.set_epoch(0, first)
        return list(loader)

    reference, reduced = batches(whole), batches(folder)
    assert sorted(found) == ["v2", "v5"]
    for full, batch in zip(reference, reduced, strict=True):
        rows = [i for i, name in enumerate(full["vid_names"]) if name not in ("v2", "v5")]
        assert batch["vid_names"] == [full["vid_names"][i] for i in rows]
        assert torch.equal(batch["frames"], full["frames"][rows])
        texts = torch.isin(full["text_to_video"], torch.tensor(rows))
        assert torch.equal(batch["token_ids"], full["token_ids"][texts])
        assert batch["text_to_video"].tolist() == [i for i in range(len(rows)) for _ in "ab"]
    (resumed,) = batches(folder, first=1)
    assert torch.equal(resumed["frames"], reduced[1]["frames"])


def test_a_batch_of_broken_videos_only_is_an_error(folder):
    queries = [Query(name, "text", name, 8.0, None) for name in ("v2", "v5")]
    loader = training_loader(
        queries, VideoFolder(folder), num_frames=FRAMES, size=SIZE, max_words=8, batch_size=2,
        seed=1, num_workers=0, pin_memory=False, leave_out=lambda *_: None,
    )  # fmt: skip
    with pytest.raises(DataError, match="no clip of a training batch"):
        list(loader)


# ---------------------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> TinyRun:
    """The tiny corpus and a checkpoint; clip 1 is missing, of clip 3 only the header is whole."""
    good = make_run(tmp_path_factory.getbasetemp())
    run = TinyRun(tmp_path_factory.mktemp("spoiled") / "corpus")
    shutil.copytree(good.corpus, run.corpus)
    (run.corpus / "videos" / "clip 1.mp4").unlink()
    broken = run.corpus / "videos" / "clip 3.mp4"
    data = broken.read_bytes()
    broken.write_bytes(
        data.replace(b"mdat" + data[data.index(b"mdat") + 4 :][:400], b"mdat" + bytes(400))
    )
    lines = (run.corpus / "annos.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["vid_name"] in ("clip 0", "clip 2")]
    (run.corpus / "kept.jsonl").write_text("\n".join(kept))
    return run


def missing(run: TinyRun) -> list[dict]:
    text = (run.logs / "missing_videos.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_refuses_what_is_missing(spoiled):
    done = spoiled.main("--do_eval", "1", "--resume", str(spoiled.logs / "ckpt.pth.tar"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 videos are missing or unreadable:\nvideos/clip 1.mp4: missing\n" in done.stderr
    assert "--allow_missing 1" in done.stderr
    (record,) = missing(spoiled)
    assert (record["split"], record["vid_name"], record["queries"]) == ("val", "clip 1", 2)


def test_a_run_goes_on_without_them_if_told_so(spoiled):
    """The metrics are those of annotations without these videos, and say that something lacks."""
    flags = ("--do_eval", "1", "--resume", str(spoiled.logs / "ckpt.pth.tar"))
    done = spoiled.main(*flags, "--allow_missing", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 of the 4 videos and 4 of the 8 queries" in done.stdout
    assert {record["vid_name"] for record in missing(spoiled)} == {"clip 1", "clip 3"}
    assert "clip 3.mp4: cannot be decoded" in missing(spoiled)[1]["reason"]
    done = spoiled.main(*flags, "--prvr_val_annos", "kept.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    ours, reference = map(json.loads, (spoiled.logs / "eval.jsonl").read_text().splitlines()[-2:])
    assert ours["metrics"] == reference["metrics"]
    assert (ours["val_queries"], ours["val_queries_left_out"]) == (4, 4)
    assert "val_queries" not in reference


def test_what_is_kept_of_a_reduced_split_can_be_used(spoiled, tmp_path, capsys):
    """Embeddings, predictions and the report: refused as they stand, accepted and named if told."""
    kept, size = str(tmp_path / "e.h5"), "on 2 of the 4 videos and 4 of the 8 queries"
    shutil.rmtree(spoiled.logs / "VIS", ignore_errors=True)
    evaluate = ("--do_eval", "1", "--subtask_type", "VCMR", "--save_predictions", "1")
    done = spoiled.main(
        *evaluate, "--resume", str(spoiled.logs / "ckpt.pth.tar"), "--allow_missing", "1",
        "--save_embeddings", kept,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = spoiled.main(*evaluate, "--load_embeddings", kept)
    assert (
        done.returncode == 1 and "without the 2 videos it lacks: --allow_missing 1" in done.stderr
    )
    done = spoiled.main(*evaluate, "--load_embeddings", kept, "--allow_missing", "1")
    assert done.returncode == 0 and size in done.stdout, done.stdout + done.stderr
    computed, again = map(json.loads, (spoiled.logs / "eval.jsonl").read_text().splitlines()[-2:])
    assert computed == again
    assert {record["vid_name"] for record in missing(spoiled)} == {"clip 1", "clip 3"}

    words = ["--predictions", str(spoiled.logs / "predictions.h5")]
    words += ["--annotations", str(spoiled.corpus / "annos.jsonl")]
    with pytest.raises(SystemExit, match="go without what the predictions lack: --allow_missing"):
        moment_metrics.main(words)
    moment_metrics.main([*words, "--allow_missing"])
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("SVMR "))
    assert row[1:] == [f"{value:.2f}" for value in again["metrics"]["SVMR"].values()]
    assert size in printed

    report.main([str(spoiled.logs), "--annotations", str(spoiled.corpus / "annos.jsonl")])
    assert "Queries" not in capsys.readouterr().err
    page = (spoiled.logs / "report.html").read_text()
    assert f"<li>evaluated <b>{size}</b></li>" in page
    assert f'<th scope="row">evaluated ckpt.pth.tar, epoch 2, {size}</th>' in page
    assert f"SVMR), in %, {size}<" in page and f"largest lead, {size}." in page


def test_training_goes_on_without_them_if_told_so(spoiled):
    done = spoiled.main(
        "--do_train", "1", "--prvr_train_annos", "annos.jsonl", "--epochs", "1",
        "--batch_size", "3", "--allow_missing", "1", "--skip_check", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((spoiled.logs / "log.jsonl").read_text().splitlines()[-1])
    assert "trained on 2 of the 4 videos and 4 of the 8 queries" in done.stdout
    assert (record["val_videos"], record["val_videos_left_out"]) == (2, 2)
    done = spoiled.main("--do_train", "1", "--prvr_train_annos", "kept.jsonl", "--epochs", "1",
                        "--prvr_val_annos", "annos.jsonl", "--skip_check", "1")  # fmt: skip
    assert done.returncode == 1
    assert "clip 1.mp4: missing" in done.stderr


@pytest.mark.parametrize(
    ("timed", "message"),
    [
        ("clip 1", "6 of 6 queries have no times (ts): VCMR and SVMR cannot be scored"),
        ("clip 3", "of the queries with times (ts) no video can be read"),
    ],
)
def test_moments_whose_videos_are_all_left_out(spoiled, timed: str, message: str) -> None:
    """clip 1 is missing, clip 3 does not decode."""
    lines = map(json.loads, (spoiled.corpus / "annos.jsonl").read_text().splitlines())
    records = [
        {key: line[key] for key in line if key != "ts" or line["vid_name"] == timed}
        for line in lines
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (spoiled.corpus / "timed.jsonl").write_text(text)
    done = spoiled.main(
        "--do_train", "1", "--prvr_train_annos", "kept.jsonl", "--prvr_val_annos", "timed.jsonl",
        "--subtask_type", "VCMR", "--epochs", "1", "--allow_missing", "1",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stderr
    assert "PRVR" in done.stderr


def test_plotting_a_query_whose_video_does_not_decode(spoiled) -> None:
    done = spoiled.main(
        "--do_plot", "1", "--resume", str(spoiled.logs / "ckpt.pth.tar"), "--plot_ids", "clip 3#0",
        "--allow_missing", "1", "--plot_dir", str(spoiled.logs / "VIS"),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "--plot_ids" in done.stderr
