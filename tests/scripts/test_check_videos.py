"""Checking a folder of clips: each kind of fault is found, and a healthy folder passes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from dataloaders import DataError
from dataloaders.clips import VideoFolder
from dataloaders.ffmpeg import write_video
from scripts.data import check_videos
from scripts.data.check_videos import check_size, main
from tests.corpus import annotate, moving_noise


def clip(path: Path, seconds: float, size=(224, 298), fps: float = 3) -> None:
    write_video(path, moving_noise(round(seconds * fps), *size), fps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    clip(folder / "good.mp4", 3)
    clip(folder / "portrait.mp4", 3, (398, 224))
    clip(folder / "squashed.mp4", 3, (126, 224))
    clip(folder / "large.mp4", 3, (240, 320))
    clip(folder / "fast.mp4", 3, fps=5)
    clip(folder / "short.mp4", 1)
    clip(folder / "unused.mp4", 1)
    (folder / "text.mp4").write_text("no video")
    damaged = bytearray((folder / "good.mp4").read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 20000] = bytes(20000)
    (folder / "damaged.mp4").write_bytes(damaged)
    return folder


def faults(folder: Path, tmp_path: Path, names: list[str], *more: str) -> dict[str, set[str]]:
    annotations, report = annotate(tmp_path / "a.jsonl", names, 3), tmp_path / "report.jsonl"
    command = ["--video_dir", str(folder), "--annotations", str(annotations), *more]
    status = main([*command, "--report", str(report)])
    found: dict[str, set[str]] = {}
    for line in map(json.loads, report.read_text().splitlines()):
        assert line["detail"]
        found.setdefault(line["vid_name"], set()).add(line["problem"])
    assert status == (1 if found else 0)
    return found


ALL = ["good", "portrait", "squashed", "large", "fast", "short", "text", "damaged", "absent"]
HEADER_FAULTS = {
    "squashed": {"size"},
    "large": {"size"},
    "fast": {"rate"},
    "short": {"duration"},
    "text": {"unreadable"},
    "absent": {"missing"},
}


def test_headers_show_most_faults(folder, tmp_path):
    assert faults(folder, tmp_path, ALL) == HEADER_FAULTS


def test_decoding_also_shows_damage(folder, tmp_path):
    assert faults(folder, tmp_path, ALL, "--decode") == HEADER_FAULTS | {"damaged": {"broken"}}


def test_the_manifest_shows_other_sizes_and_with_checksums_other_bytes(folder, tmp_path, capsys):
    names, lines = ["good", "portrait", "fast"], []
    for name in names[:2]:
        data = (folder / f"{name}.mp4").read_bytes()
        facts = {"bytes": len(data) - (name == "good"), "crc32": 1 + zlib.crc32(data), "frames": 9}
        lines.append(json.dumps({"vid_name": name} | facts))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    try:
        found = faults(folder, tmp_path, names)
        assert found == {"good": {"changed"}, "fast": {"rate"}}
        assert "1 of them are not in a manifest.jsonl" in capsys.readouterr().out
        assert faults(folder, tmp_path, names, "--checksums")["portrait"] == {"changed"}
        with pytest.raises(DataError, match=r"good\.mp4: it is not as it was prepared: bytes"):
            VideoFolder(folder).probe("good", 224)
        assert VideoFolder(folder).probe("portrait", 224) == 9
    finally:
        (folder / "manifest.jsonl").unlink()


def test_a_healthy_folder_passes(folder, tmp_path, capsys):
    assert faults(folder, tmp_path, ["good", "portrait"]) == {}
    printed = capsys.readouterr().out
    assert "2 videos checked, 0 with problems" in printed
    assert " clips are used by none" in printed


def test_the_tolerance_decides_what_is_too_short(folder, tmp_path):
    assert faults(folder, tmp_path, ["short"], "--tolerance", "2") == {}


def test_the_authors_size_is_right_where_it_was_asked_for(folder, tmp_path):
    assert faults(folder, tmp_path, ["squashed", "good"], "--authors_scale") == {}


def test_a_reader_that_hangs_costs_a_message(folder, tmp_path):
    assert faults(folder, tmp_path, ["good"], "--time_limit", "0.0001") == {"good": {"unreadable"}}


def test_bad_annotations_are_refused(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"vid_name": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        main(["--video_dir", str(folder), "--annotations", str(tmp_path / "a.jsonl")])


def test_an_interrupt_leaves_what_is_known(folder, tmp_path, monkeypatch, capsys):
    whole = check_videos.check_video

    def interrupted(path: Path, *args) -> dict[str, str]:
        if path.stem == "good":
            raise KeyboardInterrupt
        return whole(path, *args)

    monkeypatch.setattr(check_videos, "check_video", interrupted)
    annotations, report = annotate(tmp_path / "a.jsonl", ALL[::-1], 3), tmp_path / "report.jsonl"
    command = ["--video_dir", str(folder), "--annotations", str(annotations)]
    assert main([*command, "--report", str(report), "--workers", "1"]) == 130
    known = {json.loads(line)["vid_name"] for line in report.read_text().splitlines()}
    assert known == set(HEADER_FAULTS)
    printed = capsys.readouterr().out
    assert "8 videos checked, 6 with problems" in printed
    assert "interrupted: this is of the first 8 of 9 videos only" in printed


@pytest.mark.parametrize(
    "flags",
    [("--workers", "0"), ("--time_limit", "nan"), ("--time_limit", "-1"), ("--tolerance", "nan"),
     ("--report", "."), ("--report", "nowhere/report.jsonl")],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_before_any_work(folder, tmp_path, capsys, flags):
    annotations = annotate(tmp_path / "a.jsonl", ["good"], 3)
    with pytest.raises(SystemExit):
        main(["--video_dir", str(folder), "--annotations", str(annotations), *flags])
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "ours", "theirs"),
    [
        ((398, 224), True, True),
        ((224, 224), True, True),
        ((224, 398), True, False),
        ((224, 126), False, True),
        ((399, 224), False, False),
        ((320, 240), False, False),
        ((80, 64), False, False),
    ],
)
def test_sizes(size, ours, theirs):
    assert check_size(*size) == ours
    assert check_size(*size, authors_scale=True) == theirs
