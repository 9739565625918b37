"""Preparing videos: the right moments at the right size, damage noticed, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import decord
import numpy as np
import pytest
from PIL import Image

from dataloaders import DataError
from dataloaders.clips import read_manifest
from dataloaders.ffmpeg import ffmpeg_program, raw_input_arguments, run_ffmpeg
from dataloaders.prepared import prepared_size
from scripts.data import prepare_videos
from scripts.data.convert_video import Settings, prepare
from scripts.data.prepare_videos import find_inputs, main
from tests.corpus import annotate, in_process

ROOT = Path(__file__).resolve().parents[2]


def make_video(
    path: Path, seconds: float, size=(96, 64), encode=("-c:v", "libx264"), more=()
) -> Path:
    """A video of 12 fps whose gray level tells the time: 20 at its start, 20 more every second."""
    width, height = size
    levels = (round(20 + 20 * i / 12) for i in range(round(12 * seconds)))
    feed = (bytes([level]) * (width * height * 3) for level in levels)
    arguments = [*raw_input_arguments(width, height, 12), *more, *encode, "-y", f"file:{path}"]
    done = run_ffmpeg(["-v", "level+error", *arguments], feed=feed)
    assert done.status == 0, done.messages
    return path


def read(path: Path) -> np.ndarray:
    """uint8 [n, H, W, 3]: all frames of a clip, by a reader that knows nothing of ffmpeg.py."""
    clip = decord.VideoReader(str(path))
    assert clip.get_avg_fps() == 3
    return clip.get_batch(range(len(clip))).asnumpy()


def shown_seconds(frames: np.ndarray) -> np.ndarray:
    """float64 [n]: the moment of the source that each frame shows."""
    return (frames[:, 40:-40, 40:-40].mean(axis=(1, 2, 3)) - 20) / 20


def assert_on_time(frames: np.ndarray) -> None:
    """Every frame shows a moment within its third of a second, up to the interval of the source's
    frames (gray levels blur by 0.06 s)."""
    late = shown_seconds(frames) - np.arange(len(frames)) / 3
    assert (late >= -1 / 12 - 0.06).all() and (late <= 1 / 3 + 0.06).all()


# --- sizes


@pytest.mark.parametrize(
    ("size", "expected", "authors"),
    [
        ((640, 360), (398, 224), (398, 224)),
        ((320, 240), (298, 224), (298, 224)),
        ((426, 240), (396, 224), (396, 224)),
        ((224, 224), (224, 224), (224, 224)),
        ((1, 1), (224, 224), (224, 224)),
        ((161, 121), (298, 224), (298, 224)),
        ((360, 640), (224, 398), (224, 126)),
        ((576, 1024), (224, 398), (224, 126)),
        ((223, 224), (224, 224), (224, 222)),
    ],
)
def test_sizes(size, expected, authors):
    assert prepared_size(*size) == expected
    assert prepared_size(*size, authors_scale=True) == authors


def test_extreme_aspects_are_refused():
    with pytest.raises(DataError, match="4000:20"):
        prepared_size(4000, 20)


# --- whole videos


def test_pictures_that_start_after_the_sound_stay_on_the_files_clock(tmp_path):
    video = make_video(tmp_path / "video.mp4", 2)
    source = tmp_path / "a.mkv"
    late = ["-itsoffset", "1", "-i", f"file:{video}", "-f", "lavfi", "-t", "3", "-i", "anullsrc"]
    done = run_ffmpeg([*late, "-map", "0:v", "-map", "1:a", "-c:v", "copy", f"file:{source}"])
    assert done.status == 0, done.messages
    assert prepare(source, tmp_path / "out.mp4", Settings())["status"] == "done"
    frames = read(tmp_path / "out.mp4")
    assert len(frames) == 9
    assert np.abs(shown_seconds(frames)[:3]).max() < 0.1
    assert_on_time(frames[3:])


def test_a_change_of_resolution_midway(tmp_path):
    encode = ("-c:v", "libx264", "-bf", "0")
    later = ("-output_ts_offset", "2")
    first = make_video(tmp_path / "first.ts", 2, encode=encode)
    second = make_video(tmp_path / "second.ts", 2, size=(192, 128), encode=encode, more=later)
    source = tmp_path / "a.ts"
    source.write_bytes(first.read_bytes() + second.read_bytes())
    result = prepare(source, tmp_path / "out.mp4", Settings())
    assert result["status"] == "done", result
    frames = read(tmp_path / "out.mp4")
    assert len(frames) == 12
    assert_on_time(frames[:6])
    assert_on_time(frames[6:])


@pytest.mark.parametrize(
    ("name", "encode", "size"),
    [
        ("a.mp4", ("-c:v", "libx264", "-bf", "3", "-vf", "setsar=1/2"), (192, 64)),
        ("a.avi", ("-c:v", "mpeg4"), (96, 64)),
        ("b.webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime"), (162, 108)),
    ],
)
def test_any_container_and_codec_with_sound_three_times_as_long(tmp_path, name, encode, size):
    sound = ("-f", "lavfi", "-t", "10.5", "-i", "anullsrc")
    source = make_video(tmp_path / name, 3.5, size, encode, more=sound)
    result = prepare(source, tmp_path / "out.mp4", Settings(strict=True))
    assert (result["status"], result["decoded"]) == ("done", 1), result
    frames = read(tmp_path / "out.mp4")
    assert abs(len(frames) / 3 - 3.5) <= 1 / 6 + 0.05
    assert (result["frames"], result["height"], result["width"]) == frames.shape[:3]
    assert frames.shape[1:3] == (224, 336)
    assert_on_time(frames)


PATCHES = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40], [230, 230, 230]])


@pytest.mark.parametrize("depth", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("span", ["tv", "pc"])
@pytest.mark.parametrize("matrix", ["smpte170m", "bt709", "bt2020nc", None])
def test_colours_are_the_sources_whatever_its_matrix_and_range(tmp_path, matrix, span, depth):
    picture = np.repeat(np.repeat(PATCHES[None], 224, 0), 64, 1).astype(np.uint8)
    scale = {"bt709": "bt709", "bt2020nc": "bt2020"}.get(matrix, "bt601")
    filters = f"scale=out_color_matrix={scale}:out_range={span},format={depth}"
    filters += f",setparams=range={span}:colorspace={matrix or 'unknown'}"
    encode = ["-vf", filters, "-c:v", "libx264", "-qp", "4", "-color_range", span]
    encode += ["-colorspace", matrix] if matrix else []
    raw = raw_input_arguments(320, 224, 3)
    done = run_ffmpeg([*raw, *encode, f"file:{tmp_path}/a.mp4"], feed=[picture.tobytes()] * 3)
    assert done.status == 0, done.messages
    assert prepare(tmp_path / "a.mp4", tmp_path / "out.mp4", Settings())["status"] == "done"
    (described,) = re.findall(
        "Video: (.*)", run_ffmpeg(["-i", f"file:{tmp_path}/out.mp4"]).messages
    )
    assert "yuv420p(tv, smpte170m/" in described
    shown = read(tmp_path / "out.mp4")[1, 112, 32::64].astype(int)
    assert np.abs(shown - PATCHES).max() <= 5


# --- damage


def flip(path: Path, count: int, start: float = 0.25, stop: float = 0.97) -> Path:
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    rng = np.random.default_rng(0)
    places = rng.integers(int(start * len(data)), int(stop * len(data)), count)
    data[places] ^= rng.integers(1, 256, count, np.uint8)
    path.write_bytes(data.tobytes())
    return path


LONG_GOPS = ("-c:v", "libx264", "-g", "250", "-vf", "noise=alls=20:allf=t")


@pytest.mark.parametrize(
    ("name", "encode"),
    [("a.mp4", LONG_GOPS), ("a.avi", ("-c:v", "mpeg4", "-g", "250")),
     ("a.webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-g", "250"))],
)  # fmt: skip
def test_damage_that_the_decoder_conceals_is_counted(tmp_path, capsys, name, encode):
    source = noisy_video(tmp_path / name, more=encode)
    whole = prepare(source, tmp_path / "whole.mp4", Settings())
    assert whole["status"] == "done" and "damaged" not in whole
    flip(source, 40)
    out = tmp_path / "out"
    command = ["--inputs", str(source), "--output_dir", str(out), "--min_decoded", "0.1"]
    for _ in range(2):  # the second one finds the clip, and says again what it was made of
        assert main(command) == 1
        (line,) = report_of(out)
        assert line["status"] == ("partial" if name == "a.webm" else "damaged")
        assert line["damaged"]["messages"] >= 10
        assert 3 < line["damaged"]["seconds"] <= 9.5
        assert f"{line['status']}: " in capsys.readouterr().out
    assert main([*command, "--strict"]) == 1
    assert report_of(out)[0]["status"] == "failed"
    assert prepare(source, tmp_path / "b.mp4", Settings(strict=True))["status"] == "failed"
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.webm", "a.flv"])
def test_a_file_that_was_cut_is_short_and_keeps_what_decodes(tmp_path, name):
    codec = ("-c:v", {"a.avi": "mpeg4", "a.webm": "libvpx", "a.flv": "libx264"}.get(name, "mjpeg"))
    sound = ("-f", "lavfi", "-t", "10", "-i", "sine")
    source = truncate(noisy_video(tmp_path / name, inputs=sound, more=codec), 0.6)
    result = prepare(source, tmp_path / "out.mp4", Settings(min_decoded=0.1))
    assert result["status"] == "partial"
    assert result["short"]["header"] == pytest.approx(10, abs=0.3)
    assert result["short"]["frames"] == pytest.approx(10 * result["decoded"], abs=0.3)
    assert "lengths disagree" in result["reason"]
    assert len(read(tmp_path / "out.mp4")) == pytest.approx(30 * result["decoded"], abs=1)
    assert "--min_decoded" in prepare(source, tmp_path / "b", Settings(min_decoded=0.9))["reason"]


def truncate(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def noisy_video(path: Path, seconds: float = 10, more=(), inputs=()) -> Path:
    """A video whose bytes are spread evenly over its time."""
    source = ["-f", "lavfi", "-i", f"testsrc2=s=96x64:r=12:d={seconds}", *inputs]
    encode = ["-vf", "noise=alls=40:allf=t", "-c:v", "libx264", "-g", "12"]
    done = run_ffmpeg(["-v", "level+error", *source, *encode, *more, f"file:{path}"])
    assert done.status == 0, done.messages
    return path


def test_broken_inputs_are_reported_with_their_reasons(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    truncate(noisy_video(tmp_path / "no_index.mp4", 2), 0.5)
    tone = ["-f", "lavfi", "-t", "1", "-i", "sine", f"file:{tmp_path / 'sound_only.mp4'}"]
    assert run_ffmpeg(tone).status == 0
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    reasons = {}
    for path in tmp_path.glob("*.mp4"):
        result = prepare(path, out / path.name, Settings(time_limit=30))
        assert result["status"] == "failed"
        reasons[path.stem] = result["reason"]
    assert not list(out.iterdir())
    assert "no video stream" in reasons["sound_only"]
    assert "moov atom not found" in reasons["no_index"]
    assert "No such file" in reasons["dangling"]


# --- folders of frames


def write_frames(folder: Path, levels: list[int], names: list[str]) -> None:
    folder.mkdir(parents=True)
    for gray, name in zip(levels, names, strict=True):
        Image.new("RGB", (96, 64), (gray, gray, gray)).save(folder / name, "JPEG")


def test_frame_folders_are_read_in_natural_order_as_3_fps(tmp_path):
    levels = list(range(20, 220, 16))
    write_frames(tmp_path / "clip", levels, [f"{i}.jpg" for i in range(1, len(levels) + 1)])
    result = prepare(tmp_path / "clip", tmp_path / "out.mp4", Settings())
    assert result["status"] == "done"
    frames = read(tmp_path / "out.mp4")
    assert frames.shape[:3] == (len(levels), 224, 336)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - levels).max() < 4


def test_a_broken_frame_shows_the_one_before_it(tmp_path):
    write_frames(tmp_path / "clip", [50, 100, 150, 200], [f"{i}.jpg" for i in range(4)])
    (tmp_path / "clip" / "2.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    result = prepare(tmp_path / "clip", tmp_path / "out.mp4", Settings())
    assert result["status"] == "partial"
    assert "2.jpg" in result["reason"]
    means = read(tmp_path / "out.mp4").mean(axis=(1, 2, 3))
    assert np.abs(means - [50, 100, 100, 200]).max() < 4


# --- runs


@pytest.fixture(scope="module")
def small_video(tmp_path_factory) -> Path:
    return make_video(tmp_path_factory.mktemp("small") / "small.mp4", 1)


@pytest.fixture
def downloads(tmp_path, small_video) -> Path:
    """A folder as it may be downloaded: names that hurt, a sub-folder, frames, other files."""
    folder = tmp_path / "down loads"
    (folder / "sub").mkdir(parents=True)
    for name in ("-y.mp4", 'it\'s "so".mp4', "sub/v_a.1_2.0.mkv", "$(touch x).mp4"):
        (folder / name).write_bytes(small_video.read_bytes())
    write_frames(folder / "frames" / "s01e02_clip_00", [50, 100], ["1.jpg", "2.jpg"])
    (folder / "notes.txt").write_text("not a video")
    (folder / "sub" / "thumb.jpg").write_bytes(b"beside a video")
    return folder


def report_of(out: Path) -> list[dict]:
    lines = (out / "prepare_report.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_prepares_all_and_a_second_one_what_is_missing(tmp_path, downloads, capsys):
    out = tmp_path / "out"
    command = ["--inputs", str(downloads), "--output_dir", str(out), "--workers", "2"]
    assert main(command) == 0
    names = {"-y", 'it\'s "so"', "v_a.1_2.0", "$(touch x)", "s01e02_clip_00"}
    assert {path.stem for path in out.glob("*.mp4")} == names
    assert {line["vid_name"] for line in report_of(out)} == names
    assert "ignored, as their names are not those of videos: 1 .txt, 1 .jpg" in (
        capsys.readouterr().out
    )
    (out / "-y.mp4").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert main(command) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert after.items() > before.items()
    assert "-y.mp4" in after
    assert all(line["frames"] in (2, 3) for line in report_of(out))


def test_failures_are_listed_and_change_the_exit_status(tmp_path, downloads, capsys):
    (downloads / "broken.webm").write_text("nothing")
    (downloads / "sub" / "-y.avi").write_text("the same name as -y.mp4")
    out = tmp_path / "out"
    assert main(["--inputs", str(downloads), "--output_dir", str(out)]) == 1
    failed = {line["input"]: line for line in report_of(out) if line["status"] == "failed"}
    assert set(failed) == {str(downloads / "broken.webm"), str(downloads / "sub" / "-y.avi")}
    assert "same name as" in failed[str(downloads / "sub" / "-y.avi")]["reason"]
    printed = capsys.readouterr().out
    assert "5 done, 2 failed" in printed or "2 failed, 5 done" in printed
    assert "broken.webm: cannot be read" in printed


@pytest.mark.parametrize("noted", [True, False])
def test_a_clip_that_was_damaged_is_made_again_and_a_good_one_kept(tmp_path, capsys, noted):
    inputs = [noisy_video(tmp_path / f"{name}.mp4", 4) for name in ("bad", "cut", "good")]
    out = tmp_path / "out"
    command = ["--inputs", *map(str, inputs), "--output_dir", str(out), "--workers", "1"]
    assert main(command) == 0
    manifest = out / "manifest.jsonl"
    before = {clip.name: clip.read_bytes() for clip in out.glob("*.mp4")}
    for line in map(json.loads, manifest.read_text().splitlines()):
        data = before[f"{line['vid_name']}.mp4"]
        assert (line["bytes"], line["crc32"], line["frames"]) == (len(data), zlib.crc32(data), 12)
    made = (out / "good.mp4").stat().st_mtime_ns
    flip(out / "bad.mp4", 60, 0.3, 0.7)
    truncate(out / "cut.mp4", 0.9)
    manifest.write_text(manifest.read_text() + '{"vid_na' if noted else "")
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 kept" in printed and "2 done" in printed
    assert all(f"made again: {out / name}.mp4: it" in printed for name in ("bad", "cut"))
    assert {clip.name: clip.read_bytes() for clip in out.glob("*.mp4")} == before
    assert (out / "good.mp4").stat().st_mtime_ns == made
    assert set(read_manifest(out)) == {"bad", "cut", "good"}


def test_no_room_stops_the_run_and_blames_no_input(tmp_path, small_video):
    large = noisy_video(tmp_path / "z.mp4", 20)
    out = tmp_path / "out"
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    run = subprocess.run(
        [sys.executable, "-m", "scripts.data.prepare_videos", "--inputs", small_video, large,
         "--output_dir", out, "--workers", "1"],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert run.returncode == 1
    assert f"stopped: {out}" in run.stdout and "kept" in run.stdout and "1 done" in run.stdout
    assert "failed" not in run.stdout and "Traceback" not in run.stderr
    assert {path.name for path in out.glob("*.mp4")} == {"small.mp4"}
    assert not list(out.glob(".preparing-*"))


def test_what_may_be_an_original_is_never_replaced(tmp_path, small_video, capsys):
    out = tmp_path / "out"
    (out / "folder.mp4").mkdir(parents=True)
    original = small_video.read_bytes()
    (out / "small.mp4").write_bytes(original)  # a sound video in the way of its clip
    (out / "cut.mp4").write_bytes(original[:-100])  # input and output
    (tmp_path / "folder.mp4").write_bytes(original)
    inputs = [small_video, tmp_path / "folder.mp4", out / "cut.mp4"]
    assert main(["--inputs", *map(str, inputs), "--output_dir", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "small.mp4: has 96x64 pixels, so it is no prepared clip: rename it" in printed
    assert "folder.mp4: Is a directory: rename it" in printed
    assert "it is input and output at once" in printed
    assert (out / "small.mp4").read_bytes() == original
    assert (out / "cut.mp4").read_bytes() == original[:-100]


def test_a_needed_clip_without_an_input_is_probed_too(tmp_path, small_video, capsys):
    out = tmp_path / "out"
    out.mkdir()
    prepare(small_video, out / "good.mp4", Settings())
    (out / "lost.mp4").write_bytes((out / "good.mp4").read_bytes()[:-100])
    annotations = annotate(tmp_path / "a.jsonl", ["small", "lost", "good"])
    command = ["--inputs", str(small_video), "--output_dir", str(out)]
    assert main([*command, "--annotations", str(annotations)]) == 1
    printed = capsys.readouterr().out
    assert f"missing: lost: {out}/lost.mp4: cannot be decoded (it " in printed
    assert "1 done, 1 missing" in printed


def start_shard(command: list[str], shard: str, die: bool = False):
    """The program in a process of its own, which kills itself once its first clip is done."""

    def run() -> int:
        if die:
            prepare_videos._line = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return main([*command, "--shard", shard])

    return in_process(run)


def test_shards_side_by_side_one_of_them_killed_make_what_one_process_does(
    tmp_path, downloads, capsys
):
    (downloads / "broken.webm").write_text("nothing")
    annotations = annotate(tmp_path / "a.jsonl", ["v_a.1_2.0", "v_lost", "-y"])
    command = ["--inputs", str(downloads), "--annotations", str(annotations), "--workers", "1"]
    one, out = tmp_path / "one", tmp_path / "out"
    assert main([*command, "--output_dir", str(one)]) == 1
    command += ["--output_dir", str(out)]
    shards = [start_shard(command, "0/2", die=True), start_shard(command, "1/2")]
    for shard in shards:
        shard.join(60)
    assert [shard.exitcode for shard in shards] == [-signal.SIGKILL, 0]
    again = start_shard(command, "0/2")
    again.join(60)
    assert again.exitcode == 1  # broken.webm and v_lost are its own

    def facts(name: str) -> list[tuple]:
        """All reports' lines whose files are called so, but for what depends on the run."""
        lines = (json.loads(x) for file in out.glob(name) for x in file.read_text().splitlines())
        return sorted((x["vid_name"], x["status"].replace("kept", "done")) for x in lines)

    whole = sorted((line["vid_name"], line["status"]) for line in report_of(one))
    assert [name for name, status in whole if status == "missing"] == ["v_lost"]
    unused = {name for name, status in whole if status == "unused"}
    assert unused == {'it\'s "so"', "$(touch x)", "s01e02_clip_00"}
    assert facts("prepare_report.?-of-2.jsonl") == whole
    assert read_manifest(out) == read_manifest(one)
    before = {clip.name: clip.stat().st_mtime_ns for clip in out.glob("*.mp4")}
    capsys.readouterr()
    assert main(command) == 1  # everything once more: one report of all shards
    assert facts("prepare_report.jsonl") == whole
    printed = capsys.readouterr().out
    assert all(count in printed for count in ("5 kept", "1 failed", "1 missing"))
    assert {clip.name: clip.stat().st_mtime_ns for clip in out.glob("*.mp4")} == before
    for name in before:
        assert (out / name).read_bytes() == (one / name).read_bytes()


def test_links_are_followed_but_not_in_circles(tmp_path, small_video):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.mp4").write_bytes(small_video.read_bytes())
    (elsewhere / "back").symlink_to(elsewhere)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(elsewhere)
    found, _ = find_inputs([tmp_path / "in"], skip=tmp_path / "out")
    assert found == {"a": [tmp_path / "in" / "link" / "a.mp4"]}


def test_old_parts_of_killed_runs_are_removed_and_young_ones_left(tmp_path, small_video):
    old, young = tmp_path / ".preparing-old.part", tmp_path / ".preparing-young.part"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 10**5,) * 2)
    assert main(["--inputs", str(small_video), "--output_dir", str(tmp_path)]) == 0
    assert young.exists()
    assert not old.exists()


@pytest.mark.parametrize(
    ("signum", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 130, "interrupted"),
     (None, 1, "not done within 2 s")],
)  # fmt: skip
def test_what_ends_a_decoder_that_hangs_leaves_nothing_half_written(
    tmp_path, small_video, signum, status, message
):
    """An interrupt, or its time limit; it works like ffmpeg until it is to encode."""
    program, out = tmp_path / "hanging ffmpeg", tmp_path / "out"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *wrapped_avframe*libx264*|*libx264*wrapped_avframe*) '
        f'exec sleep 60;; *) exec "{ffmpeg_program()}" "$@";; esac\n'
    )
    program.chmod(0o755)
    run = subprocess.Popen(
        [sys.executable, "-m", "scripts.data.prepare_videos", "--inputs", small_video,
         "--output_dir", out, "--time_limit", "60" if signum else "2"],
        cwd=ROOT, env=os.environ | {"FFMPEG": str(program)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if signum:
        deadline = time.monotonic() + 30
        while not list(out.glob(".preparing-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        run.send_signal(signum)
    printed, _ = run.communicate(timeout=30)
    assert run.returncode == status
    assert message in printed
    assert [path.name for path in out.iterdir()] == ["prepare_report.jsonl"]


# --- real files


@pytest.mark.slow
def test_nasty_videos_convert_or_are_reported(tmp_path, shared_data):
    files = list((shared_data / "nasty").iterdir())
    main(["--inputs", *map(str, files), "--output_dir", str(tmp_path), "--time_limit", "120"])
    lines = report_of(tmp_path)
    assert len(lines) == len(files)
    assert all(line["status"] == "failed" or line["frames"] > 0 for line in lines)
    assert all(line["status"] != "failed" or line["reason"] for line in lines)
    assert not list(tmp_path.glob(".preparing-*"))
    frames = {line["vid_name"]: line.get("frames") for line in lines}
    # half of its pictures lie before the file's zero; older versions of ffmpeg cannot decode it
    assert frames["mp4ff__vvc_400kbps_2s"] in (6, None)
