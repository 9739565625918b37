"""The program as its users run it: train, evaluate, resume, and what stops it with a message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import score_predictions
from tests.corpus import FLAGS, TRAIN, tiny_corpus
from tests.forked_main import ForkedMain
from utils.arguments import build_parser, parse_args

ROOT = Path(__file__).resolve().parent.parent
VCMR = ("--subtask_type", "VCMR")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tiny_corpus(tmp_path_factory.getbasetemp())


def run(corpus: Path, output: Path, *flags: str, status: int = 0) -> subprocess.CompletedProcess:
    """A run that ends with this exit status, without a traceback."""
    folders = ("--video_dir", "videos", "--output_dir", str(output))
    done = ForkedMain(corpus).run(*FLAGS, *folders, *flags)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def epochs(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run(corpus, output, *TRAIN, "--epochs", "3")
    return output


def test_reading_more_or_less_than_in_training_is_said(corpus, trained, tmp_path) -> None:
    """As many events of the same parts of a video, so that nothing else tells."""
    (tmp_path / "longer.json").write_text('{"Nf": 16, "H": [[4, 4], [2, 1], [3, 1]]}')
    best = str(trained / "ckpt.best.pth.tar")
    done = run(
        corpus, tmp_path / "other", "--do_eval", "1", "--resume", best,
        "--pyr_config_path", str(tmp_path / "longer.json"), "--max_words", "16",
    )  # fmt: skip
    for number in ("frames of a video 8, but is used with 16", "max_words 32, but is used with 16"):
        assert f"{best} was trained with {number}" in done.stdout
    start = ("--load_from_pretrained", best, "--epochs", "1")
    words = run(corpus, tmp_path / "start", *TRAIN, *start, "--max_words", "16").stdout
    assert f"{best} was trained with max_words 32" in words and "frames of a video 8" not in words


def test_what_an_epoch_leaves_out_is_logged(corpus, trained, tmp_path) -> None:
    assert "last batch is left out" not in (trained / "log.txt").read_text()
    told = run(corpus, tmp_path, *TRAIN, "--epochs", "1", "--batch_size", "3").stdout
    assert "an epoch is 1 steps of 3 videos" in told and "left out, 1 of the 4 videos" in told
    assert "one step in all" in told, "at the first learning rate of the warm-up"


def test_captions_that_are_cut_are_counted(corpus, trained, tmp_path) -> None:
    assert (
        "annos.jsonl: 0 of 8 captions are cut at --max_words 32"
        in (trained / "log.txt").read_text()
    )
    best = str(trained / "ckpt.best.pth.tar")
    told = run(corpus, tmp_path, "--do_eval", "1", "--resume", best, "--max_words", "9").stdout
    assert "annos.jsonl: 1 of 8 captions are cut at --max_words 9" in told


def test_a_batch_of_one_video_is_refused(corpus, tmp_path) -> None:
    told = run(corpus, tmp_path, *TRAIN, "--batch_size", "1", status=2).stderr
    assert "--batch_size 1" in told and not list(tmp_path.iterdir())


def test_what_a_run_leaves(trained) -> None:
    files = {path.name for path in trained.iterdir()}
    assert {"args.json", "log.txt", "log.jsonl", "ckpt.pth.tar", "ckpt.best.pth.tar"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if name.endswith(".part")]
    records = epochs(trained)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[-1]["global_step"] == 6
    assert records[-1]["loss"] < records[0]["loss"], "nothing was learned"
    expected = {"loss", "lr", "data_time", "step_time", "R1", "R5", "R10", "R100", "SumR"}
    assert expected <= records[0].keys()
    args = json.loads((trained / "args.json").read_text())
    assert args["lr"] == 2e-3 and args["git"] and args["trainable"] > args["reached_by_gradient"]


def test_evaluating_the_best_checkpoint_gives_the_logged_number(corpus, trained) -> None:
    best = str(trained / "ckpt.best.pth.tar")
    run(corpus, trained, "--do_eval", "1", "--resume", best)  # needs no training annotations
    record = json.loads((trained / "eval.jsonl").read_text().splitlines()[-1])
    best = max(epochs(trained), key=lambda r: (r["SumR"], r["epoch"]))
    assert record["epoch"] == best["epoch"] == best["best_epoch"]
    for name in ("R1", "R5", "R10", "R100", "SumR", "MedR", "MeanR"):
        assert record["metrics"]["cosine"][name] == best[name], name


def test_both_scorings_of_activitynet(corpus, trained, tmp_path) -> None:
    best = str(trained / "ckpt.best.pth.tar")
    flags = ("--do_eval", "1", "--resume", best, "--event_scores", "both")
    done = run(corpus, tmp_path, *flags, "--datatype", "activitynet")
    assert "events not normalised" in done.stdout and "180.00" in done.stdout
    assert "not the standard activitynet val split" in done.stdout
    metrics = json.loads((tmp_path / "eval.jsonl").read_text())["metrics"]
    assert metrics.keys() == {"cosine", "dot"}


def test_the_activation_of_clip(corpus, tmp_path) -> None:
    """Named, stored and compared; where nothing says it, what is taken is said."""
    gelu = ("--clip_activation", "gelu")
    told = run(corpus, tmp_path, *TRAIN, *gelu, "--epochs", "1").stdout
    assert "which activation" not in told
    config = torch.load(tmp_path / "ckpt.pth.tar", weights_only=True)["config"]
    assert config["clip_activation"] == "gelu"
    again = ("--do_eval", "1", "--resume", str(tmp_path / "ckpt.best.pth.tar"))
    run(corpus, tmp_path, *again, *gelu)
    done = run(corpus, tmp_path, *again, status=1)
    assert "clip.pt: nothing says which activation" in done.stdout
    assert "trained with clip_activation 'gelu', not 'quick_gelu'" in done.stderr


def test_fine_tuning_clip(corpus, tmp_path) -> None:
    run(corpus, tmp_path, *TRAIN, "--epochs", "1", "--freeze_clip", "0")
    state = torch.load(tmp_path / "ckpt.pth.tar", weights_only=True)["state_dict"]
    before = torch.load(corpus / "clip.pt", weights_only=True)
    change = (state["clip.visual.proj"] - before["visual.proj"].float()).abs().max()
    assert 0 < change < 1e-3, "lr·coef_lr"
    again = ("--do_eval", "1", "--resume", str(tmp_path / "ckpt.best.pth.tar"))
    run(corpus, tmp_path, *again)
    record = json.loads((tmp_path / "eval.jsonl").read_text())
    assert record["metrics"]["cosine"]["SumR"] == epochs(tmp_path)[0]["SumR"]


@pytest.fixture(scope="module")
def trained_vcmr(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("vcmr")
    run(corpus, output, *TRAIN, *VCMR, "--epochs", "2", "--datatype", "tvr")
    return output


def test_moment_retrieval_is_logged_and_chooses_the_epoch(trained_vcmr) -> None:
    records = epochs(trained_vcmr)
    recalls = {f"VCMR/{t}-r{k}" for t in (0.1, 0.3, 0.5, 0.7) for k in (1, 10, 100)}
    assert recalls | {"SumR", "VR/r1", "SVMR/0.5-r1", "VCMR/random_event/0.5-r1"} <= set(records[0])
    chosen_by = [f"VCMR/{t}-r{k}" for t in (0.5, 0.7) for k in (1, 10, 100)]
    sums = [sum(record[name] for name in chosen_by) for record in records]
    best = max((score, epoch) for epoch, score in enumerate(sums, start=1))
    assert records[-1]["best_epoch"] == best[1]
    text = (trained_vcmr / "log.txt").read_text()
    assert "SVMR/whole_video" in text and "Best event of the right video" in text
    assert "26.26" in text, "the published row"


def test_saved_predictions_give_the_logged_numbers(corpus, trained_vcmr, tmp_path, capsys) -> None:
    best = ("--resume", str(trained_vcmr / "ckpt.best.pth.tar"))
    run(corpus, tmp_path, "--do_eval", "1", *best, *VCMR, "--save_predictions", "1")
    metrics = json.loads((tmp_path / "eval.jsonl").read_text())["metrics"]
    logged = epochs(trained_vcmr)[epochs(trained_vcmr)[-1]["best_epoch"] - 1]
    for name, value in metrics["VCMR"].items():
        assert logged[f"VCMR/{name}"] == value
    score_predictions.main([
        "--annotations", str(corpus / "annos.jsonl"),
        "--predictions", str(tmp_path / "predictions.h5"),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("VCMR "))
    assert row[1:] == [f"{value:.2f}" for value in metrics["VCMR"].values()]
    assert {"predictions_tvr.json", "predictions_qvhighlights.jsonl"} <= {
        path.name for path in tmp_path.iterdir()
    }
    run(corpus, tmp_path, "--do_eval", "1", *best)
    record = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[-1])
    assert record["metrics"] == {"cosine": metrics["cosine"]}


def test_moments_without_known_times(corpus, trained_vcmr, tmp_path) -> None:
    records = [json.loads(line) for line in (corpus / "annos.jsonl").read_text().splitlines()]
    untimed = tmp_path / "untimed.jsonl"
    untimed.write_text(
        "".join(json.dumps({k: r[k] for k in r if k != "ts"}) + "\n" for r in records)
    )
    annotations = ("--prvr_val_annos", str(untimed))
    message = f"{untimed}: 8 of 8 queries have no times (ts): VCMR and SVMR cannot be scored"
    assert message in run(corpus, tmp_path, *TRAIN, *VCMR, *annotations, status=1).stderr
    best = ("--resume", str(trained_vcmr / "ckpt.best.pth.tar"), "--save_predictions", "1")
    done = run(corpus, tmp_path, "--do_eval", "1", *best, *VCMR, *annotations)
    assert message in done.stdout and "VCMR/" not in done.stdout
    assert (tmp_path / "predictions_qvhighlights.jsonl").read_text().count("\n") == 8


def test_a_run_does_not_continue_with_another_task(corpus, trained_vcmr, tmp_path) -> None:
    flags = ("--resume", str(trained_vcmr / "ckpt.pth.tar"), "--epochs", "3")
    done = run(corpus, tmp_path, *TRAIN, *flags, status=1)
    assert "resume with --subtask_type VCMR" in done.stderr, done.stderr


@pytest.fixture
def stubbed_scripts(tmp_path) -> Path:
    """A copy of scripts/, with a Python that only prints what it is called with."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "utils").mkdir()
    shutil.copy(ROOT / "utils/arguments.py", tmp_path / "utils")  # where the launcher finds flags
    (tmp_path / "scripts/setup.sh").write_text("")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    return tmp_path / "scripts"


@pytest.mark.parametrize("split", ["tvr", "activitynet", "charades", "qvhighlights_val"])
def test_moment_scripts_are_the_video_scripts_with_another_task(split, stubbed_scripts) -> None:
    flags = {}
    for task in ("PRVR", "VCMR"):
        script = stubbed_scripts / f"{task.lower()}_{split}.sh"
        program, *words = words_of(script, "--wd", "7")
        assert program == "main.py"
        flags[task] = dict(zip(words[::2], words[1::2], strict=True))
        assert flags[task].pop("--subtask_type") == task
        assert flags[task].pop("--output_dir") == f"logs/{task.lower()}_{split}"
    assert flags["VCMR"] == flags["PRVR"]
    assert flags["VCMR"]["--wd"] == "7"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to do"),
        (("--do_train", "1"), "needs --prvr_train_annos"),
        (("--do_eval", "1"), "needs --resume"),
        (("--do_eval", "1", "--resume", "auto"), "needs --resume"),
        (("--do_eval", "1", "--resume", "none.pth.tar"), "no such checkpoint: none.pth.tar"),
        ((*TRAIN, "--resume", "none.pth.tar"), "no such checkpoint: none.pth.tar"),
        ((*TRAIN, *VCMR, "--save_predictions", "1"), "needs --do_eval 1"),
        ((*TRAIN, "--temp_kernel_sz", "4"), "odd"),
        ((*TRAIN, "--npev", "0"), "--npev: must be at least 1"),
        ((*TRAIN, "--lr", "nan"), "--lr: must be from 1e-08 to 1000.0"),
        ((*TRAIN, "--clip_grad_norm", "-1"), "--clip_grad_norm: must be at least 1e-12"),
        ((*TRAIN, "--num_thread_reader", "-1"), "--num_thread_reader: must be from 0 to 1024"),
    ],
)
def test_flags_that_make_no_sense(capsys, flags, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_args([*FLAGS, "--video_dir", "videos", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prvr_val_annos", "none.jsonl"), "none.jsonl"),
        (("--video_dir", "nowhere"), "nowhere"),
        (("--pretrained_clip_name", "ViT-B/16"), "ViT-B-16.pt"),
        (("--pyr_config_path", "annos.jsonl"), "annos.jsonl"),
        (("--batch_size", "5"), "--batch_size 5: annos.jsonl has only 4 videos"),
        (("--max_words", "99"), "77"),
    ],
)
def test_mistakes_end_with_a_message(corpus, tmp_path, flags, message: str) -> None:
    done = run(corpus, tmp_path, *TRAIN, *flags, status=1)
    assert message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("folder", "flags"),
    [
        ("log.txt", ()),
        ("missing_videos.jsonl", ()),
        ("predictions.h5", ("--save_predictions", "1")),
        ("kept.h5", ("--save_embeddings", "kept.h5")),
        ("file/pictures", ("--do_plot", "1", "--plot_dir", "file/pictures")),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_computed(
    corpus, tmp_path, folder, flags
) -> None:
    (tmp_path / "file").write_text("")
    if not folder.startswith("file"):
        (tmp_path / folder).mkdir()
    flags = [str(tmp_path / flag) if flag in ("kept.h5", folder) else flag for flag in flags]
    untouched = ("--resume", "clip.pt", "--pretrained_clip_name", "not_read.pt")
    done = run(corpus, tmp_path, "--do_eval", "1", *flags, *untouched, status=1)
    assert f"error: {tmp_path / folder}: cannot be written: " in done.stderr


def test_the_program_in_an_interpreter_of_its_own(corpus, trained, tmp_path) -> None:
    """What all other tests run in a fork."""
    flags = [*FLAGS, "--video_dir", "videos", "--output_dir", str(tmp_path)]
    best = ["--do_eval", "1", "--resume", str(trained / "ckpt.best.pth.tar")]
    for words, status in (([*flags, *best], 0), (["--help"], 0), (flags, 2)):
        command = [sys.executable, str(ROOT / "main.py"), *words]
        done = subprocess.run(command, cwd=corpus, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        if "--help" in words:
            assert all(f"--{flag}" in done.stdout for flag in all_flags())


def all_flags() -> set[str]:
    return {action.dest for action in build_parser()._actions} - {"help"}


@pytest.mark.parametrize("clips", ["video_dir", "frame_store"])
def test_every_flag_can_be_set_as_a_variable(clips: str, stubbed_scripts) -> None:
    """One of the two folders of clips, that is; and a list is no variable."""
    flags = all_flags() - {"plot_ids", "datatype", "video_dir", "frame_store"} | {clips}
    variables = {flag: f"the {flag}" for flag in flags} | {"do_train": "1"}
    _, *words = words_of(stubbed_scripts / "prvr_tvr.sh", "--wd", "7", **variables)
    assert words[-2:] == ["--wd", "7"]  # and the last of a name counts
    passed = dict(zip(words[:-2:2], words[1:-2:2], strict=True))
    assert passed.pop("--datatype") == "tvr"
    assert passed == {f"--{name}": value for name, value in variables.items()}


def words_of(script: Path, *flags: str, **variables: str) -> list[str]:
    """The program that a script of `stubbed_scripts` calls in the end, and its arguments."""
    command = ["bash", str(script), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, cwd="/"
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["prvr_tvr", "vcmr_tvr", "plot/plot_tvr", "prepare", "demo"])
def test_scripts_find_the_checkout_through_a_link(name: str, stubbed_scripts, tmp_path) -> None:
    link = tmp_path / "bin/link"
    link.parent.mkdir()
    link.symlink_to(stubbed_scripts / f"{name}.sh")
    called, module, *_ = words_of(link, input_dir="a", video_dir="b")
    own = {"prepare": "scripts.data.prepare_videos", "demo": "scripts.demo.run"}
    own["plot/plot_tvr"] = "scripts.plot.plot_run"
    assert called == ("-m" if name in own else "main.py")
    assert name not in own or module == own[name]
