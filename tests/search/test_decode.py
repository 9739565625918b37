"""The frames of a video file: those of the clip that would be prepared of it, each decoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders import DataError
from dataloaders.ffmpeg import run_ffmpeg, write_video
from dataloaders.sampling import eval_indices
from dataloaders.video import load_clip, load_every_frame
from scripts.data.convert_video import Settings, convert_video
from utils.search.decode import VideoFrames
from utils.search.windows import grid_frames

SIZE = 64
NOISE = 12.0  # mean difference that the compression of a clip may make, of 255


def numbered(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames that differ, uint8 [count, H, W, 3]: a bright bar moves, over a slow colour."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = [number * 5 % 256, number * 3 % 256, 128]
        frame[:, number * 4 % (width - 8) :][:, :8] = 255
    return frames


def read(path: Path, num_frames: int = 8, window_seconds: float = 64.0) -> list[torch.Tensor]:
    video = VideoFrames(path, SIZE, num_frames, window_seconds)
    windows = list(video)
    assert len(windows) == len(video.windows)
    return windows


@pytest.mark.parametrize("count", [1, 5, 8, 9, 100])
def test_a_prepared_clip_gives_the_frames_of_the_protocol(tmp_path: Path, count: int) -> None:
    write_video(tmp_path / "clip.mp4", numbered(count))
    (frames,) = read(tmp_path / "clip.mp4")
    assert torch.equal(frames, load_clip(tmp_path / "clip.mp4", 8, SIZE))


@pytest.mark.parametrize("frames_more", [1, 2, 5, 40])
def test_a_time_beyond_the_last_frame_changes_nothing(tmp_path: Path, frames_more: int) -> None:
    write_video(tmp_path / "clip.mp4", numbered(100))
    video = VideoFrames(tmp_path / "clip.mp4", SIZE, 8, 64.0)
    video.seconds += frames_more / 3  # as if the file said so
    (frames,) = video
    assert torch.equal(frames, load_clip(tmp_path / "clip.mp4", 8, SIZE))


@pytest.mark.parametrize("length", [6.0, 8.0, 9.7, 3.1])
def test_windows_are_cut_from_the_clip(tmp_path: Path, length: float) -> None:
    """Also where the grid is finer than the clip (3.1 s have 9 frames, and 16 are taken)."""
    write_video(tmp_path / "clip.mp4", numbered(100))
    every = load_every_frame(tmp_path / "clip.mp4", SIZE)
    grid = grid_frames(100 / 3, length, 16)
    video = VideoFrames(tmp_path / "clip.mp4", SIZE, 16, length)
    for window, frames in zip(video.windows, video, strict=True):
        own = grid[window.first : window.first + 16]
        assert torch.equal(frames, every[own])


SOURCES = {
    "25 frames a second, portrait": ["-r", "25", "-vf", "scale=180:320"],
    "NTSC, wide pixels": ["-r", "30000/1001", "-vf", "scale=160:144,setsar=2/1"],
    "variable rate": ["-vf", "fps=20,select='lt(n\\,40)+not(mod(n\\,7))'", "-fps_mode", "vfr"],
    "starts late": ["-r", "10", "-output_ts_offset", "2.5"],
    "rotated": ["-r", "12", "-vf", "scale=128:96"],
    "another matrix": ["-r", "25", "-vf", "scale=1280:720:out_color_matrix=bt709",
                       "-colorspace", "bt709", "-color_range", "tv"],
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_any_file_gives_the_frames_that_its_clip_would(tmp_path: Path, kind: str) -> None:
    """Up to the compression of the clip; one frame off would be far more."""
    write_video(tmp_path / "made.mp4", numbered(60, 96, 128), fps=10)
    source, rotated = tmp_path / "source.mkv", tmp_path / "source.mp4"
    encode = ["-c:v", "libx264", "-qp", "4", "-f", "matroska"]
    arguments = ["-i", f"file:{tmp_path / 'made.mp4'}", *SOURCES[kind], *encode, f"file:{source}"]
    assert run_ffmpeg(["-v", "level+error", *arguments]).status == 0
    if kind == "rotated":
        turn = ["-display_rotation", "90", "-i", f"file:{source}", "-c", "copy", f"file:{rotated}"]
        assert run_ffmpeg(["-v", "level+error", *turn]).status == 0
        source = rotated
    convert_video(source, tmp_path / "clip.mp4", Settings())
    every = load_every_frame(tmp_path / "clip.mp4", 224)
    (frames,) = VideoFrames(source, 224, 8, 64.0)
    expected = every[eval_indices(len(every), 8)]
    difference = (frames.float() - expected.float()).abs().mean(dim=(1, 2, 3))
    assert (difference < NOISE).all(), difference
    others = every[(eval_indices(len(every), 8) + 1).clip(max=len(every) - 1)]
    off_by_one = (frames.float() - others.float()).abs().mean(dim=(1, 2, 3))
    assert (difference < off_by_one)[:-1].all()


def test_a_file_that_was_cut_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    write_video(tmp_path / "whole.mkv", numbered(90))
    encode = ["-i", f"file:{tmp_path / 'whole.mkv'}", "-c", "copy", "-f", "mpegts"]
    run_ffmpeg([*encode, f"file:{tmp_path / 'whole.ts'}"])
    content = (tmp_path / "whole.ts").read_bytes()
    broken = bytearray(content)
    broken[len(content) * 70 // 100 :] = bytes(len(content) - len(content) * 70 // 100)
    (tmp_path / "cut.ts").write_bytes(broken)
    (frames,) = read(tmp_path / "cut.ts")
    assert len(frames) == 8


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "text"),
        (b"\xef\xbb\xbfffconcat version 1.0\nfile clip.mp4\n", "text"),
        (bytes(range(256)) * 40, "cannot be read"),
    ],
)
def test_what_is_no_video_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "file.mp4").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "file.mp4")


def test_a_decoder_that_gives_no_frame_in_time_is_stopped(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", numbered(9))
    video = VideoFrames(tmp_path / "clip.mp4", SIZE, 8, 64.0)
    video.time_limit = 0.0001
    with pytest.raises(DataError, match="no frame within"):
        list(video)
