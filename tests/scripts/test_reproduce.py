"""scripts/reproduce: a row from its files to its comparison, killed anywhere, and what stops it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from itertools import count
from pathlib import Path

import pytest

from scripts import reproduce
from scripts.reproduce import SUM_TOLERANCE, TOLERANCE, compare
from tests.corpus import tiny_corpus
from tests.forked_main import ForkedMain
from utils.evaluation.published import PRVR_RESULTS


class Killed(BaseException):
    pass


@pytest.fixture
def corpus(tmp_path_factory, monkeypatch) -> Path:
    """A data set of one's own, as its user names it to the scripts: in variables."""
    folder = tiny_corpus(tmp_path_factory.getbasetemp())
    variables = {
        "split": "tiny", "video_dir": folder / "videos", "train_annos": folder / "annos.jsonl",
        "val_annos": folder / "annos.jsonl", "pretrained_clip_name": folder / "clip.pt",
        "clip_activation": "quick_gelu", "pyr_config_path": folder / "pyramid.json",
        "adapter_channels": 16, "batch_size": 2, "num_thread_reader": 0, "epochs": 2, "lr": 2e-3,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return folder


@pytest.fixture
def launched(monkeypatch) -> list[dict]:
    """What main.py is started with, which runs in forks, with what the script gives it. A dict of
    the fault for the next training may be put in as `launched.fault`."""

    class Launched(list):
        fault: dict = {}  # noqa: RUF012

    done = Launched()

    def launch(row: reproduce.Row, **variables: object) -> None:
        done.append(variables)
        script = ["bash", f"scripts/prvr_{row.split}.sh"]
        env = reproduce.environment(dry_run=1, **variables)
        flags = subprocess.run(script, cwd=reproduce.ROOT, env=env, capture_output=True, text=True)
        fault = done.fault if variables["do_train"] else {}
        ended = ForkedMain(reproduce.ROOT).run(*flags.stdout.split("\0")[:-1], **fault)
        if ended.returncode == 128 + signal.SIGTERM:
            raise KeyboardInterrupt
        assert ended.returncode == 0, ended.stdout + ended.stderr

    monkeypatch.setattr(reproduce, "launch", launch)
    return done


@pytest.fixture
def no_report(monkeypatch) -> None:
    """The page about a run is an empty file."""
    monkeypatch.setattr("scripts.report.main", lambda words: Path(words[0], "report.html").touch())


def results(logs: Path) -> dict:
    return json.loads((logs / "reproduction.json").read_text())


def numbers(logs: Path) -> dict:
    """Everything that must not depend on how often a run was killed."""
    return {
        row: [
            item["metrics"] for step in ("zero-shot", "evaluation") for item in steps.get(step, [])
        ]
        + [item["ours"] for item in steps["comparison"]]
        for row, steps in results(logs).items()
    }


def run(logs: Path, *more: str) -> int:
    return reproduce.main(["custom", "--logs", str(logs), *more])


def test_both_rows_and_once_more(corpus, launched, tmp_path, capsys) -> None:
    assert run(tmp_path) == 0
    assert set(results(tmp_path)) == {"prvr_tiny", "vcmr_tiny"}
    assert "no published row to compare with" in capsys.readouterr().out
    for row, metric in (("prvr_tiny", "SumR"), ("vcmr_tiny", "0.5-r10")):
        assert set(results(tmp_path)[row]) == {"git", *reproduce.STEPS} - {"frame store"}
        assert results(tmp_path)[row]["comparison"][0]["ours"][metric] >= 0
        assert (tmp_path / row / "report.html").is_file()
    started = len(launched)
    assert run(tmp_path) == 0
    assert len(launched) == started
    assert reproduce.main(["check", "custom", "--logs", str(tmp_path)]) == 0


def test_killed_after_every_step_it_goes_on(
    corpus, launched, no_report, tmp_path, monkeypatch
) -> None:
    """Before what the step found is written down, then after that."""
    monkeypatch.setenv("epochs", "1")
    flags = ("--task", "PRVR")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert run(tmp_path / "whole", *flags) == 0
    calls, save, started = count(), reproduce.save, len(launched)

    def save_and_die(*what) -> None:
        if next(calls) % 2:
            save(*what)
        raise Killed

    monkeypatch.setattr(reproduce, "save", save_and_die)
    for _ in range(30):
        try:
            assert run(tmp_path / "killed", *flags) == 0
            break
        except Killed:
            pass
    assert next(calls) >= 14  # each of the steps that find something, twice
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert sum(variables["do_train"] for variables in launched[started:]) == 1


def test_training_that_is_stopped_goes_on_and_seeds_are_compared_by_their_mean(
    corpus, launched, no_report, tmp_path, monkeypatch, capsys
) -> None:
    """With a published row, and with a best epoch of events that are not normalised."""
    monkeypatch.setenv("event_scores", "both")
    monkeypatch.setitem(PRVR_RESULTS, "custom", {"R1": 0.0, "SumR": 1000.0})
    flags = ("--task", "PRVR", "--seeds", "1", "2")
    launched.fault = {"fault": "at", "when": 3, "act": "terminate"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *flags)
    launched.fault = {}
    assert run(tmp_path, *flags) == 0
    row = results(tmp_path)["prvr_tiny"]
    folders = [str(tmp_path / f"prvr_tiny_seed{seed}") for seed in (1, 2)]
    assert [item["folder"] for item in row["training"]] == folders
    assert [item["page"] for item in row["report"]] == [f"{f}/report.html" for f in folders]
    names = [Path(item["checkpoint"]).name for item in row["evaluation"]]
    assert names == ["ckpt.best.pth.tar", "ckpt.best_dot.pth.tar"] * 2
    for kind, number in (("cosine", 0), ("dot", 1)):
        found = row["comparison"][number]
        ours = [item["metrics"][kind]["R1"] for item in row["evaluation"][number::2]]
        assert found["row"] == kind and found["runs"] == 2
        assert found["ours"]["R1"] == pytest.approx(sum(ours) / 2)
        assert found["spread"]["R1"] == pytest.approx(abs(ours[0] - ours[1]) / 2**0.5)
        assert found["difference"]["SumR"] == pytest.approx(found["ours"]["SumR"] - 1000)
        assert not found["within_tolerance"] and not found["reproduced"]
        assert found["other_settings"] == [
            "adapter_channels 16", "batch_size 2", "clip_activation quick_gelu", "epochs 2",
            "event_scores both", "lr 0.002", f"pretrained_clip_name {corpus}/clip.pt",
            f"pyr_config_path {corpus}/pyramid.json",
        ]  # fmt: skip
    for item in row["evaluation"]:  # the logged number of the best epoch again
        log = [json.loads(x) for x in (Path(item["folder"]) / "log.jsonl").read_text().splitlines()]
        key = "SumR" if item["checkpoint"].endswith("best.pth.tar") else "dot/SumR"
        kind = "cosine" if key == "SumR" else "dot"
        assert item["metrics"][kind]["SumR"] == max(line.get(key, 0) for line in log)
    assert "SumR outside the tolerance" in capsys.readouterr().out
    monkeypatch.setenv("lr", "1e-3")
    assert run(tmp_path, *flags) == 1
    assert "was trained with lr 0.002, not 0.001: move it away" in capsys.readouterr().out
    monkeypatch.setenv("lr", "2e-3")
    monkeypatch.setenv("readout", "consensus")
    assert run(tmp_path, *flags) == 1
    assert "was trained with readout max, not consensus" in capsys.readouterr().out


def test_a_fine_tuned_clip_is_not_the_published_setting(monkeypatch) -> None:
    monkeypatch.setenv("freeze_clip", "0")
    (row,) = reproduce.rows_of(reproduce.parse_arguments(["tvr", "--task", "PRVR"]))
    assert reproduce.other_settings(row) == ["freeze_clip 0"]


def test_a_frame_store_that_is_asked_for_is_made_and_used(
    corpus, launched, no_report, tmp_path, monkeypatch, capsys
) -> None:
    store = tmp_path / "frames.h5"
    monkeypatch.setenv("frame_store", str(store))
    monkeypatch.setenv("epochs", "1")
    assert run(tmp_path, "--task", "PRVR") == 0
    assert results(tmp_path)["prvr_tiny"]["frame store"] == [{"file": str(store)}]
    args = json.loads((tmp_path / "prvr_tiny/args.json").read_text())
    assert (args["frame_store"], args["video_dir"]) == (str(store), None)
    monkeypatch.setenv("video_dir", str(tmp_path / "gone"))  # it is not needed any more
    capsys.readouterr()
    assert run(tmp_path, "--task", "PRVR") == 0
    assert "frames.h5 has them all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "problem"),
    [("pretrained_clip_name", "no CLIP weights there"), ("val_annos", "no such annotation file"),
     ("video_dir", "4 of 4 videos missing: `input_dir=FOLDER")],
)  # fmt: skip
def test_what_is_missing_is_named_by_check_and_stops_the_row(
    corpus, launched, tmp_path, monkeypatch, capsys, name: str, problem: str
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "gone"))
    assert reproduce.main(["check", "custom", "--logs", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path}/gone: {problem}" in printed
    assert "`split=tiny bash scripts/reproduce.sh custom --task PRVR`" in printed
    assert run(tmp_path) == 1
    assert f"prvr_tiny cannot be finished: {tmp_path}/gone: {problem}" in capsys.readouterr().out
    assert not launched


def test_published_weights_are_fetched_and_have_to_be_the_published_ones(
    corpus, launched, tmp_path, monkeypatch, capsys
) -> None:
    path, commands = tmp_path / "ViT-B-32.pt", []
    monkeypatch.delenv("pretrained_clip_name")
    monkeypatch.setattr(reproduce, "weights_path", lambda *_: path)
    monkeypatch.setattr(reproduce, "run_program", lambda command: commands.append(command))
    assert run(tmp_path) == 1
    assert commands[0] == ["bash", "scripts/download_clip.sh", "ViT-B/32"]
    message = f"{path}: no CLIP weights there: `bash scripts/download_clip.sh ViT-B/32`"
    assert f"prvr_tiny cannot be finished: {message}" in capsys.readouterr().out
    path.write_bytes((corpus / "clip.pt").read_bytes())
    assert run(tmp_path) == 1
    assert f"{path}: not the published file (sha256 differs)" in capsys.readouterr().out
    assert len(commands) == 2 and not launched


def test_a_broken_video_stops_it_unless_it_may_be_missing(
    corpus, launched, no_report, tmp_path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(corpus / "videos", folder)
    cut = folder / "clip 2.mp4"
    cut.write_bytes(cut.read_bytes()[:-100])
    monkeypatch.setenv("video_dir", str(folder))
    monkeypatch.setenv("epochs", "1")
    assert run(tmp_path, "--task", "PRVR") == 1
    printed = capsys.readouterr().out
    assert f"1 videos of {folder} cannot be used, {tmp_path}/prvr_tiny_videos.jsonl" in printed
    assert "clip 2" in (tmp_path / "prvr_tiny_videos.jsonl").read_text()
    assert not launched
    monkeypatch.setenv("allow_missing", "1")
    assert run(tmp_path, "--task", "PRVR") == 0
    assert "on 3 of the 4 videos" in capsys.readouterr().out


def test_all_nine_rows_are_checked_with_the_command_that_gets_them(tmp_path, capsys) -> None:
    assert reproduce.main(["check", "--logs", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    for split in ("tvr", "activitynet", "charades", "qvhighlights_val", "qvhighlights_test"):
        for task in ("PRVR", "VCMR"):
            command = f"`bash scripts/reproduce.sh {split} --task {task}`"
            assert (command in printed) == ((split, task) != ("qvhighlights_test", "VCMR"))


def test_annotations_of_another_size_are_refused(corpus, launched, tmp_path, monkeypatch, capsys):
    assert reproduce.main(["charades", "--logs", str(tmp_path), "--task", "PRVR"]) == 1
    printed = capsys.readouterr().out
    assert "annos.jsonl: not the standard charades val split: 4 videos and 8 queries" in printed
    assert "scripts.data.convert_annotations charades" in printed
    assert not launched


def test_the_tolerance_is_of_each_metric_both_ways() -> None:
    published = {"R1": 20.0, "SumR": 200.0}
    for off, within in ((0, True), (TOLERANCE, True), (-TOLERANCE, True), (TOLERANCE + 0.1, False)):
        ours = {"R1": 20.0 + off, "SumR": 200.0}
        assert compare("cosine", [ours], published)["within_tolerance"] == within
    ours = {"R1": 20.0, "SumR": 200.0 - SUM_TOLERANCE - 0.1}
    assert not compare("cosine", [ours], published)["within_tolerance"]


def test_activitynet_has_the_published_row_and_the_cosine_s() -> None:
    """Each by its own best epoch; moments have one."""
    prvr, vcmr = reproduce.rows_of(reproduce.parse_arguments(["activitynet"]))
    assert prvr.best_checkpoints() == ["ckpt.best.pth.tar", "ckpt.best_dot.pth.tar"]
    assert vcmr.best_checkpoints() == ["ckpt.best.pth.tar"]
    assert not reproduce.other_settings(prvr)
