"""Curves: what is drawn is what was logged, for whole and for broken logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.plot.plot_curves import main
from utils import OutputError, RunError
from utils.logger import append_json
from utils.report.curves import draw_curves, published_values, shown_names
from utils.report.run_log import best_epoch, curve, curve_names, label, read_epochs


def records(count: int, factor: float = 1.0) -> list[dict]:
    return [
        {"epoch": e, "global_step": 9 * e, "steps": 9, "skipped_steps": 0, "loss": factor / e,
         "lr": 1e-3, "R1": 10.0 * e, "SumR": 40.0 * e, "VCMR/0.5-r10": 1.0 * e,
         "VCMR/random_event/0.5-r10": 1.5, "VR/r1": 5, "best_epoch": e - (e > 2)}
        for e in range(1, count + 1)
    ]  # fmt: skip


def write(folder: Path, lines: list[dict], torn: str = "", **args: object) -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + torn)
    (folder / "args.json").write_text(json.dumps(args))
    return folder


def test_lines_are_what_was_logged() -> None:
    runs = {"$a": records(5), "b": records(3, factor=2.0)}
    figure = draw_curves(runs, {"tvr"})
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["training loss", "learning rate", "R@1 (%)", "SumR",
                            "VCMR R@10, IoU ≥ 0.5 (%)", "VR R@1 (%)"]  # fmt: skip
    for name, axes in zip(shown_names(runs), panels.values(), strict=True):
        drawn = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
        for epochs in runs.values():
            assert [(r["epoch"], r[name]) for r in epochs] in drawn
            best = epochs[epochs[-1]["best_epoch"] - 1]
            assert [(best["epoch"], best[name])] in drawn
    heights = [set(line.get_ydata()) for line in panels["R@1 (%)"].lines]
    assert {22.4} in heights and len(heights) == 5
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["$a", "b", "best epoch", "published"]
    colours = {line.get_color() for line in panels["training loss"].lines}
    assert len(colours) == 2


def test_the_legend_names_a_reduced_split() -> None:
    left = {"val_videos": 1000, "val_videos_left_out": 179}
    left |= {"val_queries": 5000, "val_queries_left_out": 895}
    runs = {"a": [record | left for record in records(2)], "b": records(2)}
    figure = draw_curves(runs, {"tvr"})
    (legend,) = figure.legends
    shown = [" ".join(t.get_text().split()) for t in legend.get_texts()]
    size = "on 1,000 of the 1,179 videos and 5,000 of the 5,895 queries"
    assert shown == [f"a {size}", "b", "best epoch", "published"]
    figure.draw_without_rendering()
    left, bottom, right, top = legend.get_window_extent().extents
    assert min(left, bottom) >= 0
    assert right <= figure.bbox.width and top < figure.bbox.height / 2


def test_torn_and_damaged_lines_are_left_out(tmp_path, caplog) -> None:
    folder = write(tmp_path / "run", records(3), torn='{"epoch": 4, "lo')
    assert [r["epoch"] for r in read_epochs(folder)] == [1, 2, 3]
    assert "log.jsonl: unreadable lines skipped: 1 (line 4)" in caplog.text
    append_json(folder / "log.jsonl", {"epoch": 4})  # the run goes on, and is killed again
    with (folder / "log.jsonl").open("a") as file:
        file.write("{")
    assert [r["epoch"] for r in read_epochs(folder)] == [1, 2, 3, 4]
    assert "log.jsonl: unreadable lines skipped: 2 (line 4, 6)" in caplog.text
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b"\n" + bytes(300) + b"\nepoch 5\n[1]\n" + b"[" * 100_000)
    assert [r["epoch"] for r in read_epochs(folder)] == [1, 2, 3, 4]
    assert "skipped: 6 (line 4, 6, 7, 8, 9, 10)" in caplog.text
    whole = write(tmp_path / "no_line_end", records(2), torn='{"epoch": 3}')
    assert [r["epoch"] for r in read_epochs(whole)] == [1, 2, 3]


@pytest.mark.parametrize("content", ['{"epoch": 1\n', "[1]\n", "", '{"step": 1}\n'])
def test_damaged_logs_are_named(tmp_path, content: str) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(RunError, match=r"log\.jsonl: no finished epoch"):
        read_epochs(tmp_path)


def test_an_epoch_run_again_counts_once(tmp_path) -> None:
    again = records(2)[1] | {"loss": 99.0}
    folder = write(tmp_path / "run", [*records(3), again])
    assert curve(read_epochs(folder), "loss") == [(1, 1.0), (2, 99.0), (3, 1 / 3)]


def test_what_is_a_curve() -> None:
    epochs = [*records(2), {"epoch": 3, "loss": None, "lr": float("nan"), "note": "text", "R1": 1,
                            "gradient/level_2": 40.0}]  # fmt: skip
    assert curve_names(epochs) == ["loss", "lr", "gradient/level_2", "R1", "SumR", "VCMR/0.5-r10",
                                   "VCMR/random_event/0.5-r10", "VR/r1"]  # fmt: skip
    assert curve(epochs, "loss") == [(1, 1.0), (2, 0.5)] and len(curve(epochs, "lr")) == 2
    assert curve(epochs, "R1")[-1] == (3, 1)
    assert best_epoch(records(5))["epoch"] == 4
    assert label("VR/r5") == "VR R@5 (%)" and label("something") == "something"
    assert label("gradient/level_2") == "share of the gradient, level 2 (%)"


def test_scores_that_are_not_normalised_have_a_panel_of_their_own(tmp_path) -> None:
    dot = write(tmp_path / "run", [record | {"row": "dot"} for record in records(2)])
    both = write(tmp_path / "both", [record | {"dot/R1": 1.0} for record in records(2)])
    names = curve_names(read_epochs(dot))
    assert names[:4] == ["loss", "lr", "dot/R1", "dot/SumR"]
    assert label("dot/R1") == "R@1 (%), events not normalised"
    assert published_values({"tvr"})["dot/SumR"] == published_values({"tvr"})["SumR"] == 212.8
    assert published_values({"tvr"})["VCMR/0.5-r10"] == 17.49
    assert published_values({"tvr", "charades"}) == published_values({"custom"}) == {}
    assert {"R1", "dot/R1"} <= set(curve_names(read_epochs(both)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("curves.xyz", "its ending is to be .png, .svg or .pdf"),
        ("folder.png", "folder.png: cannot be written: Is a directory"),
        ("run/log.jsonl/a.png", "log.jsonl/a.png: cannot be written: File exists"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path, capsys, output, message) -> None:
    folder = write(tmp_path / "run", records(2), datatype=["tvr"])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises((OutputError, SystemExit)) as error:
        main([str(folder), "--output", str(tmp_path / output)])
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "folder.png"}


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path) -> None:
    lines = [*records(2), {"epoch": 10**400, "loss": 1}, {"epoch": 3, "loss": 10**400, "R1": 1}]
    folder = write(tmp_path / "run", lines, datatype={})
    main([str(folder)])
    assert curve(read_epochs(folder), "loss") == [(1, 1.0), (2, 0.5)]


def test_the_program(tmp_path, capsys, caplog) -> None:
    a = write(tmp_path / "a", records(4), datatype="tvr", torn='{"epo')
    b = write(tmp_path / "b", records(2), datatype="tvr")
    output = str(tmp_path / "new" / "ab.svg")
    main([str(a), str(b), "--output", output])
    assert "unreadable" in caplog.text and capsys.readouterr().out.strip() == output
    assert str(b) in Path(output).read_text()
    with pytest.raises(RunError, match=r"log\.jsonl: no such file"):
        main([str(tmp_path / "none")])
