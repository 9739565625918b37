"""Decoding: the authors' frames, files that lie about their frames, and files that are broken."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import runpy
import shutil
import subprocess
import threading
import time

import decord
import numpy as np
import pytest
import torch

from dataloaders import DataError, video
from dataloaders.ffmpeg import ffmpeg_program, raw_input_arguments, run_ffmpeg, write_video
from dataloaders.sampling import eval_indices, train_indices
from dataloaders.video import center_crop, load_clip

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def normalise(frames: torch.Tensor) -> np.ndarray:
    """float64 [n, 3, H, W], as the model sees them."""
    rgb = frames.numpy() / 255
    return (rgb - MEAN[:, None, None]) / STD[:, None, None]


def numbered_frames(n: int, height: int = 64, width: int = 64) -> np.ndarray:
    """uint8 [n, H, W, 3]: frame i carries the number i as eight black or white bars."""
    bits = (np.arange(n)[:, None] >> np.arange(8)) & 1  # [n, 8]
    bars = (255 * bits).astype(np.uint8).repeat(width // 8, axis=1)[:, None, :, None]
    return np.broadcast_to(bars, (n, height, width, 3))


def read_numbers(clip: torch.Tensor) -> list[int]:
    """The numbers in the frames of a clip [n, 3, S, S] made from numbered_frames."""
    bar = clip.shape[3] // 8
    bits = clip[:, 1, clip.shape[2] // 2, bar // 2 :: bar] > 127
    return (bits.long() << torch.arange(8)).sum(1).tolist()


def encode(path, frames, *arguments: str):
    """Writes frames with ffmpeg, with encoder settings of one's own."""
    raw = raw_input_arguments(frames.shape[2], frames.shape[1], 3)
    run_ffmpeg([*raw, "-pix_fmt", "yuv420p", *arguments, str(path)], feed=[frames.tobytes()])
    return path


def decode_with_ffmpeg(path) -> np.ndarray:
    """uint8 [n, H, W, 3]: every frame that the ffmpeg program gets out of a file."""
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-i", str(path)]
    sizes = subprocess.run(
        [*command, "-frames:v", "1", "-f", "image2pipe", "-c:v", "ppm", "-"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    width, height = map(int, sizes.split(maxsplit=3)[1:3])
    raw = subprocess.run(
        [*command, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize(
    "height_width", [(64, 64), (70, 91), (91, 70), (65, 64), (48, 100), (40, 33)]
)
def test_crop_is_the_authors(golden, height_width):
    height, width = height_width
    make_frames = runpy.run_path(str(golden / "inputs.py"))["frames"]
    frames = torch.from_numpy(make_frames(5, 2, height, width))
    crop = center_crop(frames, 64)
    assert crop.dtype == torch.uint8
    assert crop.shape == (2, 3, 64, 64)
    data = np.load(golden / "data.npz")
    name = f"transform_{height}x{width}_64"
    ours = normalise(crop)
    np.testing.assert_allclose(ours[:, :, ::9, ::7], data[name], atol=1e-6)
    sums = data[f"{name}_sums"]
    np.testing.assert_allclose([ours.sum(), np.abs(ours).sum()], sums, rtol=1e-6)


def test_crop_is_torchvisions():
    from torchvision.transforms.functional import center_crop as theirs

    for height, width in itertools.product(range(1, 12), repeat=2):
        frames = torch.arange(1, height * width * 3 + 1, dtype=torch.uint8)
        frames = frames.view(1, height, width, 3)
        for size in (4, 5, 6):
            expected = theirs(frames.permute(0, 3, 1, 2), [size, size])
            assert torch.equal(center_crop(frames, size), expected)


@pytest.mark.parametrize(
    ("height_width", "size", "side"),
    [
        ((224, 224), 336, 224),
        ((224, 336), 336, 224),  # 3:2, no portrait that was squashed to 336
        ((128, 224), 336, 224),  # one that was squashed to 224
        ((224, 304), 64, 224),
        ((336, 400), 336, 336),
    ],
)
def test_a_clip_is_resized_to_what_the_model_reads(tmp_path, height_width, size, side):
    path = tmp_path / "v.mp4"
    write_video(path, numbered_frames(20, *height_width), 3)
    assert video.probe_clip(path, size) == 20
    clip = load_clip(path, 8, size)
    assert clip.shape == (8, 3, size, size) and clip.dtype == torch.uint8
    square = center_crop(torch.from_numpy(decode_with_ffmpeg(path)), side)[eval_indices(20, 8)]
    if side == size:
        assert torch.equal(clip, square)
    expected = torch.nn.functional.interpolate(
        square.float(), (size, size), mode="bicubic", antialias=True
    )
    assert (clip - expected.clamp(0, 255)).abs().mean() < 1


def test_a_clip_of_another_size_is_refused(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(20, 240, 320), 3)
    for size, sides in ((224, "224"), (336, "336 or 224")):
        for read in (video.probe_clip, lambda path, size: load_clip(path, 8, size)):
            with pytest.raises(DataError, match=rf"320×240 pixels.* has to be {sides}: prepare"):
                read(tmp_path / "v.mp4", size)


@pytest.mark.parametrize("name", ["short", "long", "tall"])
def test_frames_are_the_authors(golden, name):
    data = np.load(golden / "video_files.npz")
    for suffix, generator in [("val", None), ("train42", np.random.RandomState(42))]:
        clip = load_clip(golden / f"{name}.mp4", 32, 64, generator)
        assert clip.dtype == torch.uint8
        assert clip.shape == (32, 3, 64, 64)
        ours = normalise(clip)[:, :, ::16, ::16]
        np.testing.assert_allclose(ours, data[f"{name}_{suffix}"], atol=1e-6)


@pytest.mark.parametrize("name", ["short", "long", "tall", "noframes"])
def test_every_pixel_is_the_authors(golden, name, monkeypatch):
    facts = json.loads((golden / "video_files.json").read_text())[name]
    monkeypatch.setattr(video, "center_crop", lambda frames, size: frames)
    frames = load_clip(golden / f"{name}.mp4", facts["frames_decoded"], 64)
    assert hashlib.sha256(frames.numpy().tobytes()).hexdigest() == facts["rgb_sha256"]


@pytest.mark.parametrize("n", [1, 5, 8, 9, 15, 16, 100])
@pytest.mark.parametrize("gop", ["1", "12", "250"])
def test_the_frames_asked_for_come_out(tmp_path, n, gop):
    path = encode(tmp_path / "v.mp4", numbered_frames(n), "-c:v", "libx264", "-g", gop, "-bf", "3")
    assert read_numbers(load_clip(path, 8, 64)) == eval_indices(n, 8).tolist()
    drawn = load_clip(path, 8, 64, np.random.RandomState(3))
    assert read_numbers(drawn) == train_indices(n, 8, np.random.RandomState(3)).tolist()


@pytest.mark.parametrize("gop", ["12", "250"])
def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path, gop):
    # There is one if a clip is cut without being encoded again.
    # decord counts the packets, 60 or 20 here, makes up the last frames and seeks to wrong ones.
    whole = encode(tmp_path / "w.mp4", numbered_frames(60), "-c:v", "libx264", "-g", gop)
    cut = tmp_path / "cut.mp4"
    run_ffmpeg(["-ss", "14.9", "-i", str(whole), "-c", "copy", str(cut)])
    n = 60 - 45
    assert read_numbers(load_clip(cut, 8, 64)) == (45 + eval_indices(n, 8)).tolist()
    drawn = load_clip(cut, 4, 64, np.random.RandomState(3))
    expected = train_indices(n, 4, np.random.RandomState(3))
    assert read_numbers(drawn) == (45 + expected).tolist()


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / "v.mp4", noise, "-c:v", "libx264", "-movflags", "+faststart")
    load_clip(path, 8, 64)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DataError) as raised:
        load_clip(path, 8, 64)
    assert str(raised.value).startswith(f"{path}: cannot be decoded (")
    assert "bash scripts/prepare.sh" in str(raised.value)


@pytest.mark.parametrize(
    ("height", "width", "right"),
    [
        (64, 64, True),
        (64, 98, True),
        (98, 64, True),
        (36, 64, True),  # portrait, as the authors squash it
        (64, 36, False),
        (66, 98, False),
        (62, 66, False),
        (32, 48, False),
    ],
)
def test_only_prepared_sizes_are_read(tmp_path, height, width, right):
    path = tmp_path / "v.mp4"
    write_video(path, np.full((8, height, width, 3), 200, np.uint8))
    if right:
        clip = load_clip(path, 4, 64)
        black = (clip == 0).float().mean().item()
        assert black == pytest.approx(1 - min(height, 64) / 64)
        return
    with pytest.raises(DataError) as raised:
        load_clip(path, 4, 64)
    message = str(raised.value)
    assert message.startswith(f"{path}: {width}×{height} pixels, ")
    assert "bash scripts/prepare.sh" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 1000,
        b"not a video",
        b"\0\0\0\x18ftypmp42" + b"\0" * 1000,
        b"ffconcat version 1.0\nfile 'other.mp4'\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_what_is_no_video_is_refused(tmp_path, golden, content):
    shutil.copy(golden / "short.mp4", tmp_path / "other.mp4")
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        load_clip(path, 8, 64)
    assert str(raised.value).startswith(f"{path}: ")


def test_an_edit_list_that_hides_everything_is_refused(tmp_path):
    path = encode(tmp_path / "v.mp4", numbered_frames(20), "-c:v", "libx264")
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 16  # of the one entry, 4 bytes
    data[start : start + 4] = (2**30).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(DataError, match="hides every frame"):
        load_clip(path, 8, 64)


def test_a_refused_file_leaves_no_reader_behind(tmp_path, golden):
    """One that is still there when a worker is forked would abort the worker."""
    data = (golden / "long.mp4").read_bytes()
    start = data.index(b"mdat") + 4
    (tmp_path / "v.mp4").write_bytes(data[:start] + bytes(3000) + data[start + 3000 :])
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DataError, match="cannot be decoded"):
            load_clip(tmp_path / "v.mp4", 8, 64)
        assert not [o for o in gc.get_objects() if type(o) is decord.VideoReader]
    finally:
        gc.enable()


def test_no_file_is_refused(tmp_path):
    for path in (tmp_path / "no.mp4", tmp_path):
        with pytest.raises(DataError, match="no such video file") as raised:
            load_clip(path, 8, 64)
        assert str(path) in str(raised.value)


def test_hostile_names_are_only_names(tmp_path, golden, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "-i.mp4", "$(x) 'q' %03d.mp4", "日本.mp4", "file:v.mp4"):
        shutil.copy(golden / "short.mp4", name)
        assert load_clip(name, 8, 64).shape == (8, 3, 64, 64)


def test_a_decoder_that_hangs_is_given_up_and_not_tried_again(tmp_path, golden, monkeypatch):
    path = shutil.copy(golden / "short.mp4", tmp_path)
    hanging = threading.Event()
    monkeypatch.setattr(video, "DECODE_TIME_LIMIT", 0.2)
    monkeypatch.setattr(decord, "VideoReader", lambda *args, **kwargs: hanging.wait(60))
    threads = threading.active_count()
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(DataError, match=r"short\.mp4: not decoded within"):
            load_clip(path, 8, 64)
    assert time.monotonic() - start < 3
    assert threading.active_count() == threads + 1
    hanging.set()


def test_nasty_files_decode_or_are_refused(shared_data, monkeypatch):
    monkeypatch.setattr(video, "_clip_side", lambda *args: 64)  # or most would stop there
    decoded = 0
    for path in sorted((shared_data / "nasty").iterdir()):
        if path.stat().st_size > 10**6:  # 4K and 1080p: right, but seconds each
            continue
        try:
            clip = load_clip(path, 8, 64)
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        every = decode_with_ffmpeg(path)
        expected = torch.from_numpy(every[eval_indices(len(every), 8)])
        assert torch.equal(clip, center_crop(expected, 64)), path.name
        decoded += 1
    assert decoded >= 8
