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
from scripts.plot.plot_run import flags_of
from tests.corpus import FLAGS, TRAIN, WITHOUT_CACHES, TinyRun
from utils.arguments import build_parser, parse_args
from utils.evaluation.published import split_size_warning

ROOT = Path(__file__).resolve().parent.parent
VCMR = ("--subtask_type", "VCMR")


def resume(run: TinyRun, name: str = "ckpt.best.pth.tar") -> tuple[str, str]:
    return "--resume", str(run.logs / name)


def test_reading_more_or_less_than_in_training_is_said(run, trained, tmp_path) -> None:
    """As many events of the same parts of a video, so that nothing else tells."""
    (tmp_path / "longer.json").write_text('{"Nf": 16, "H": [[4, 4], [2, 1], [3, 1]]}')
    other = ("--pyr_config_path", str(tmp_path / "longer.json"), "--max_words", "16")
    told = run.works("--do_eval", "1", *resume(trained), *other)
    best = trained.logs / "ckpt.best.pth.tar"
    for number in ("frames of a video 8, but is used with 16", "max_words 32, but is used with 16"):
        assert f"{best} was trained with {number}" in told
    told = run.works(*TRAIN, "--load_from_pretrained", str(best), "--epochs", "1", *other[2:])
    assert f"{best} was trained with max_words 32" in told and "frames of a video 8" not in told


def test_what_an_epoch_leaves_out_is_logged(run, trained) -> None:
    assert "last batch is left out" not in (trained.logs / "log.txt").read_text()
    told = run.works(*TRAIN, "--epochs", "1", "--batch_size", "3")
    assert "an epoch is 1 steps of 3 videos" in told and "left out, 1 of the 4 videos" in told
    assert "one step in all" in told, "at the first learning rate of the warm-up"


def test_captions_that_are_cut_are_counted(run, trained) -> None:
    known = "annos.jsonl: 0 of 8 captions are cut at --max_words 32"
    assert known in (trained.logs / "log.txt").read_text()
    told = run.works("--do_eval", "1", *resume(trained), "--max_words", "9")
    assert "annos.jsonl: 1 of 8 captions are cut at --max_words 9" in told


def test_what_a_run_leaves(trained) -> None:
    files = {path.name for path in trained.logs.iterdir()}
    assert {"args.json", "log.txt", "log.jsonl", "ckpt.pth.tar", "ckpt.best.pth.tar"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if name.endswith(".part")]
    first, last = trained.lines()
    assert (first["epoch"], last["epoch"], last["global_step"]) == (1, 2, 4)
    assert last["loss"] < first["loss"], "nothing was learned"
    expected = {"loss", "lr", "data_time", "step_time", "R1", "R5", "R10", "R100", "SumR"}
    assert expected <= first.keys()
    args = json.loads((trained.logs / "args.json").read_text())
    assert args["lr"] == 2e-3 and args["git"] and args["trainable"] > args["reached_by_gradient"]


def test_evaluating_the_best_checkpoint_gives_the_logged_number(run, trained) -> None:
    """In both scorings."""
    flags = ("--event_scores", "both", "--datatype", "activitynet")
    told = run.works("--do_eval", "1", *resume(trained), *flags)  # needs no training annotations
    assert "events not normalised" in told and "180.00" in told
    assert "not the standard activitynet val split" in told
    (record,) = run.lines("eval.jsonl")
    best = max(trained.lines(), key=lambda r: (r["SumR"], r["epoch"]))
    assert record["epoch"] == best["epoch"] == best["best_epoch"]
    assert record["metrics"].keys() == {"cosine", "dot"}
    for name in ("R1", "R5", "R10", "R100", "SumR", "MedR", "MeanR"):
        assert record["metrics"]["cosine"][name] == best[name], name


def test_the_activation_of_clip(run) -> None:
    """Named, stored and compared; where nothing says it, what is taken is said."""
    gelu = ("--clip_activation", "gelu")
    assert "which activation" not in run.works(*TRAIN, *gelu, "--epochs", "1")
    config = torch.load(run.logs / "ckpt.pth.tar", weights_only=True)["config"]
    assert config["clip_activation"] == "gelu"
    run.works("--do_eval", "1", *resume(run), *gelu)
    told = run.stops("--do_eval", "1", *resume(run))
    assert "trained with clip_activation 'gelu', not 'quick_gelu'" in told
    assert "clip.pt: nothing says which activation" in (run.logs / "log.txt").read_text()


def test_fine_tuning_clip(run) -> None:
    run.works(*TRAIN, "--epochs", "1", "--freeze_clip", "0")
    state = torch.load(run.logs / "ckpt.pth.tar", weights_only=True)["state_dict"]
    before = torch.load(run.corpus / "clip.pt", weights_only=True)
    change = (state["clip.visual.proj"] - before["visual.proj"].float()).abs().max()
    assert 0 < change < 1e-3, "lr·coef_lr"
    run.works("--do_eval", "1", *resume(run))
    (record,) = run.lines("eval.jsonl")
    assert record["metrics"]["cosine"]["SumR"] == run.lines()[0]["SumR"]


@pytest.fixture(scope="module")
def trained_vcmr(trained, tmp_path_factory) -> TinyRun:
    run = TinyRun(trained.corpus, tmp_path_factory.mktemp("vcmr"))
    run.works(*TRAIN, *VCMR, "--epochs", "2", "--datatype", "tvr")
    return run


def test_moment_retrieval_is_logged_and_chooses_the_epoch(trained_vcmr) -> None:
    records = trained_vcmr.lines()
    recalls = {f"VCMR/{t}-r{k}" for t in (0.1, 0.3, 0.5, 0.7) for k in (1, 10, 100)}
    assert recalls | {"SumR", "VR/r1", "SVMR/0.5-r1", "VCMR/random_event/0.5-r1"} <= set(records[0])
    chosen_by = [f"VCMR/{t}-r{k}" for t in (0.5, 0.7) for k in (1, 10, 100)]
    sums = [sum(record[name] for name in chosen_by) for record in records]
    best = max((score, epoch) for epoch, score in enumerate(sums, start=1))
    assert records[-1]["best_epoch"] == best[1]
    text = (trained_vcmr.logs / "log.txt").read_text()
    assert "SVMR/whole_video" in text and "Best event of the right video" in text
    assert "26.26" in text, "the published row"


def test_saved_predictions_give_the_logged_numbers(run, trained_vcmr, capsys) -> None:
    evaluate = ("--do_eval", "1", *resume(trained_vcmr))
    run.works(*evaluate, *VCMR, "--save_predictions", "1")
    (record,) = run.lines("eval.jsonl")
    metrics, logged = record["metrics"], trained_vcmr.lines()[record["epoch"] - 1]
    for name, value in metrics["VCMR"].items():
        assert logged[f"VCMR/{name}"] == value
    score_predictions.main([
        "--annotations", str(run.corpus / "annos.jsonl"),
        "--predictions", str(run.logs / "predictions.h5"),
    ])  # fmt: skip
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["VCMR", *(f"{value:.2f}" for value in metrics["VCMR"].values())] in rows
    for name in ("predictions_tvr.json", "predictions_qvhighlights.jsonl"):
        assert (run.logs / name).is_file()
    run.works(*evaluate)
    assert run.lines("eval.jsonl")[-1]["metrics"] == {"cosine": metrics["cosine"]}


def test_moments_without_known_times(run, trained_vcmr, tmp_path) -> None:
    untimed = tmp_path / "untimed.jsonl"
    with untimed.open("w") as file:
        for line in map(json.loads, (run.corpus / "annos.jsonl").open()):
            file.write(json.dumps(line | {"ts": None}) + "\n")
    flags = (*VCMR, "--prvr_val_annos", str(untimed))
    message = f"{untimed}: 8 of 8 queries have no times (ts): VCMR and SVMR cannot be scored"
    assert message in run.stops(*TRAIN, *flags)
    evaluate = ("--do_eval", "1", *resume(trained_vcmr), "--save_predictions", "1")
    told = run.works(*evaluate, *flags)
    assert message in told and "VCMR/" not in told
    assert len(run.lines("predictions_qvhighlights.jsonl")) == 8


def test_a_run_does_not_continue_with_another_task(run, trained_vcmr) -> None:
    told = run.stops(*TRAIN, *resume(trained_vcmr, "ckpt.pth.tar"), "--epochs", "3")
    assert "resume with --subtask_type VCMR" in told


@pytest.fixture
def stubbed_scripts(tmp_path) -> Path:
    """A copy of scripts/, with a Python that only prints what it is called with."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=WITHOUT_CACHES)
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
    def flags(task: str) -> dict[str, str]:
        flags = flags_from(stubbed_scripts / f"{task}_{split}.sh", "--wd", "7", wd="3")
        assert flags.pop("--subtask_type") == task.upper()
        assert flags.pop("--output_dir") == f"logs/{task}_{split}"
        return flags

    assert flags("vcmr") == flags("prvr") and flags("vcmr")["--wd"] == "7"


@pytest.mark.parametrize("name", ["prvr_tvr", "vcmr_tvr", "prvr_activitynet"])
def test_the_scripts_evaluate_clip_alone(name, stubbed_scripts) -> None:
    script = stubbed_scripts / f"{name}.sh"
    _, *words = words_of(script, do_train="0", do_eval="1", zero_shot="best")
    args = parse_args(words)
    assert (args.zero_shot, args.do_train, args.do_eval) == ("best", 0, 1)
    assert str(args.output_dir) == f"logs/{name}_zero_shot_best"
    assert args.plot_dir.name == f"{args.datatype}_zero_shot_best"


@pytest.mark.parametrize("name", ["prvr_tvr", "vcmr_activitynet", "prvr_custom"])
def test_the_recipe_past_the_published_one(name, stubbed_scripts) -> None:
    """A flag and folders of its own; the flag can still be set from outside."""
    script = stubbed_scripts / f"{name}.sh"

    def flags(**variables: str) -> dict[str, str]:
        return flags_from(script, split="mine", **variables)

    recipe = {"--readout": "consensus"}
    folders = ("--output_dir", "--plot_dir")
    published, plus = flags(), flags(variant="plus")
    folder = f"logs/{name}_plus".replace("custom", "mine")
    assert [plus.pop(key) for key in folders] == [folder, f"VIS/{folder.partition('_')[2]}"]
    assert plus == {key: v for key, v in published.items() if key not in folders} | recipe
    assert flags(variant="plus", readout="half")["--readout"] == "half"
    assert not words_of(script, variant="more"), "no such variant"


def test_an_own_data_set_has_folders_of_its_name(stubbed_scripts) -> None:
    script = stubbed_scripts / "prvr_custom.sh"
    flags = flags_from(script, split="mine", subtask_type="VCMR", do_train="0", do_eval="1")
    assert flags["--output_dir"] == "logs/vcmr_mine" and flags["--plot_dir"] == "VIS/mine"
    assert flags["--prvr_val_annos"] == "annotations/mine/val.jsonl"
    assert "--prvr_train_annos" not in flags
    assert split_size_warning(flags["--datatype"], "val", 3, 7) is None


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
        ((*TRAIN, "--zero_shot", "best"), "not --do_train 1"),
        (("--do_eval", "1", "--zero_shot", "best", "--resume", "auto"), "takes no checkpoint"),
        (("--zero_shot", "best"), "nothing to do"),
        (("--do_eval", "1", "--zero_shot", "median"), "invalid choice: 'median'"),
        ((*TRAIN, "--lr", "nan"), "--lr: must be from 1e-08 to 1000.0"),
        ((*TRAIN, "--batch_size", "1"), "--batch_size: must be at least 2"),
        ((*TRAIN, "--freeze_clip", "0", "--text_relations", "1"), "compares with a frozen CLIP"),
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
        (
            ("--batch_size", "5", "--pretrained_clip_name", "not_read.pt"),
            "--batch_size 5: annos.jsonl has 4 videos",
        ),
        (("--max_words", "99"), "77"),
    ],
)
def test_mistakes_end_with_a_message_and_leave_no_folder(
    trained, tmp_path, flags, message: str
) -> None:
    run, plots = TinyRun(trained.corpus, tmp_path / "a/run"), str(tmp_path / "b/plots")
    assert message in run.stops(*TRAIN, "--do_plot", "1", "--plot_dir", plots, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "flags"),
    [
        ("log.txt", ()),
        ("missing_videos.jsonl", ()),
        ("predictions.h5", ("--save_predictions", "1")),
        ("kept.h5", ("--save_embeddings", "{}/kept.h5")),
        ("file/kept.h5", ("--save_embeddings", "{}/file/kept.h5")),
        ("file/pictures", ("--do_plot", "1", "--plot_dir", "{}/file/pictures")),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_computed(run, folder, flags) -> None:
    (run.logs / "file").write_text("")
    if not folder.startswith("file"):
        (run.logs / folder).mkdir()
    untouched = ("--resume", "clip.pt", "--pretrained_clip_name", "not_read.pt")
    told = run.stops("--do_eval", "1", *untouched, *(flag.format(run.logs) for flag in flags))
    assert f"error: {run.logs / folder}: cannot be written: " in told


def test_the_program_in_an_interpreter_of_its_own(trained, tmp_path) -> None:
    """What all other tests run in a fork."""
    flags = [*FLAGS, "--video_dir", "videos", "--output_dir", str(tmp_path)]
    evaluate = ["--do_eval", "1", *resume(trained)]
    for words, status in (([*flags, *evaluate], 0), (["--help"], 0), (flags, 2)):
        command = [sys.executable, str(ROOT / "main.py"), *words]
        done = subprocess.run(command, cwd=trained.corpus, capture_output=True, text=True)
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
    passed = flags_from(stubbed_scripts / "prvr_tvr.sh", **variables)
    assert passed.pop("--datatype") == "tvr"
    assert passed == {f"--{name}": value for name, value in variables.items()}


def words_of(script: Path, *flags: str, **variables: str) -> list[str]:
    """The program that a script of `stubbed_scripts` calls in the end, and its arguments."""
    command = ["bash", str(script), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, cwd="/"
    )
    return done.stdout.splitlines()


def flags_from(script: Path, *flags: str, **variables: str) -> dict[str, str]:
    """What it calls main.py with; of a flag that is given twice the last counts."""
    program, *words = words_of(script, *flags, **variables)
    assert program == "main.py"
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("prvr_tvr", ["main.py"]),
        ("plot/plot_tvr", ["-m", "scripts.plot.plot_run"]),
        ("prepare", ["-m", "scripts.data.prepare_videos"]),
        ("demo", ["-m", "scripts.demo.run"]),
    ],
)
def test_scripts_find_the_checkout_through_a_link(name, program, stubbed_scripts, tmp_path) -> None:
    link = tmp_path / "bin/link"
    link.parent.mkdir()
    link.symlink_to(stubbed_scripts / f"{name}.sh")
    assert words_of(link, input_dir="a", video_dir="b")[: len(program)] == program


OPTIONS = (
    "--readout", "consensus", "--visibility", "all", "--text_prompts", "none", "--Nvp", "0",
    "--lora_rank", "2", "--frame_groups", "2", "--frame_embedding", "1",
)  # fmt: skip
LOSSES = ("--hard_negatives", "0.5", "--text_relations", "1", "--reversed_negatives", "0.3")


def test_all_options_at_once(run) -> None:
    """Trained in parts, resumed, evaluated, also from saved embeddings, ranked by the read-out."""
    training = (*TRAIN, *OPTIONS, *LOSSES, "--gradient_accumulation_steps", "2")
    run.works(*training, "--epochs", "1")
    run.works(*training, "--epochs", "2", "--resume", "auto")
    best = max(run.lines(), key=lambda record: (record["SumR"], record["epoch"]))
    assert len(run.lines()) == 2 and best["loss"] > 0
    saved = str(run.logs / "e.h5")
    run.works("--do_eval", "1", *resume(run), *OPTIONS, "--save_embeddings", saved)
    told = run.works("--do_eval", "1", *OPTIONS, "--load_embeddings", saved)
    assert "videos ranked by their half" in told
    for record in run.lines("eval.jsonl"):
        assert record["metrics"]["cosine"]["MeanR"] == best["MeanR"]
    told = run.stops("--do_eval", "1", *resume(run))
    assert "trained with " in told and "readout 'consensus', not 'max'" in told
    flags = flags_of(run.logs)
    assert {f"--{OPTIONS[i][2:]}={OPTIONS[i + 1]}" for i in range(0, len(OPTIONS), 2)} <= set(flags)
    run.works(*flags, "--plot_limit", "1", "--plot_dir", str(run.logs / "plots"))
