"""The ffmpeg module: clips are written whole or not at all, read as they are, and never hang."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import decord
import numpy as np
import psutil
import pytest

from dataloaders import DataError, ffmpeg
from dataloaders.ffmpeg import (
    Completed,
    decode_frames,
    ffmpeg_program,
    parse_track,
    read_packets,
    run_ffmpeg,
    write_video,
)

ENDLESS = ["-f", "lavfi", "-i", "testsrc2=s=64x64", "-f", "null", "-"]
# Names that a shell, an option parser, ffmpeg's protocols or its image patterns could stumble on.
HOSTILE_NAMES = ["-y", "two words", 'it\'s "so"', "$(touch x);&", "a%03d", "concat:x", "ü\n*?[z]"]


def ramp(n: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 [n, height, width, 3]: gray, brighter with every frame."""
    levels = np.linspace(20, 235, n).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, height, width, 3))


def no_child_is_left() -> bool:
    """Neither running nor a zombie; other tests' processes are none of ffmpeg."""
    return not [p for p in psutil.Process().children() if "ffmpeg" in p.name()]


def test_a_written_clip_decodes_to_its_frames(tmp_path):
    frames = ramp(10)
    write_video(tmp_path / "a.mp4", frames)
    clip = decord.VideoReader(str(tmp_path / "a.mp4"))
    assert len(clip) == 10
    assert clip.get_avg_fps() == 3
    decoded = clip.get_batch(range(10)).asnumpy()
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).max() <= 3
    assert list(clip.get_key_indices()) == list(range(10))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_any_file_name_is_harmless(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(f"{name}.mp4")  # relative: nothing stands before its first character
    write_video(path, ramp(4))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert len(read_packets(path).times) == len(decode_frames(path).times) == 4


def test_bad_frames_are_refused(tmp_path):
    refused = {
        "no frames": [],
        r"not uint8 \[63": ramp(2, height=63),
        "not float32": ramp(2).astype(np.float32),
        r"not uint8 \[64, 96, 1\]": ramp(2)[..., :1],
        r"not uint8 \[64, 64, 3\]": [*ramp(3), *ramp(1, width=64)],
    }
    for message, frames in refused.items():
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / "a.mp4", frames)
    assert no_child_is_left()


def test_reading_tells_size_times_and_duration(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(7))
    for track in (read_packets(tmp_path / "a.mp4"), decode_frames(tmp_path / "a.mp4")):
        assert (track.width, track.height, track.sample_aspect) == (96, 64, 1)
        assert np.allclose(track.times[:, 0], np.arange(7) / 3)
        assert np.allclose(track.times[:, 1], np.arange(1, 8) / 3)
        assert track.container_seconds == pytest.approx(7 / 3, abs=0.01)
        assert track.error is None
    assert len(read_packets(tmp_path / "a.mp4", limit=2).times) == 2


def test_the_time_limit_ends_the_process():
    start = time.monotonic()
    with pytest.raises(DataError, match=r"not done within 0\.3 s"):
        run_ffmpeg(ENDLESS, time_limit=0.3)
    assert time.monotonic() - start < 5
    assert no_child_is_left()


def test_running_processes_can_be_killed_from_another_thread():
    threading.Timer(0.3, ffmpeg.kill_running).start()
    with pytest.raises(DataError, match="signal 9"):
        run_ffmpeg(ENDLESS, time_limit=30)
    assert no_child_is_left()


def test_memory_is_limited(monkeypatch):
    large = ["-f", "lavfi", "-i", "color=s=12000x12000", "-frames:v", "1"]
    large += ["-c:v", "wrapped_avframe", "-f", "framecrc", "pipe:1"]
    assert len(parse_track(run_ffmpeg(large)).times) == 1
    monkeypatch.setattr(ffmpeg, "MEMORY_LIMIT", 2**28)  # the picture alone takes 216 MB
    assert not re.findall("^0,", run_ffmpeg(large).output, re.MULTILINE)


def test_a_reason_is_the_most_telling_error():
    messages = """[mov,mp4 @ 0x55] [error] moov atom not found
[in#0 @ 0x5f0] [error] Error opening input: Invalid data found
[fatal] Error opening input files: Invalid data found"""
    assert Completed(183, "", messages).reason == "moov atom not found"
    assert Completed(1, "", "[info] fine").reason == "ffmpeg ended with status 1"
    messages = "[error] Stream map '0:V:0' matches no streams.\n[error] Failed to set value"
    assert Completed(1, "", messages).reason == "it has no video stream"


@pytest.fixture
def fresh_program():
    ffmpeg_program.cache_clear()
    yield
    ffmpeg_program.cache_clear()


def test_the_pinned_ffmpeg_runs_unless_another_is_named(tmp_path, monkeypatch, fresh_program):
    monkeypatch.delenv("FFMPEG", raising=False)
    pinned = ffmpeg_program()
    assert pinned == ffmpeg.get_ffmpeg_exe()
    for name in ("path", "named"):
        program = tmp_path / name / "ffmpeg"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{pinned}" "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    for named, expected in (("", pinned), (str(tmp_path / "named" / "ffmpeg"), None)):
        ffmpeg_program.cache_clear()
        monkeypatch.setenv("FFMPEG", named)
        assert ffmpeg_program() == (expected or named)
    ffmpeg_program.cache_clear()
    monkeypatch.setenv("FFMPEG", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"FFMPEG.*absent"):
        ffmpeg_program()
