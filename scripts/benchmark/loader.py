"""Stages of loading, on one core: 32 frames of prepared clips of half a minute to five minutes.

``loader``: decoding by index beside decoding everything. ``store``: the frame store beside decoding
by index, whose frames it gives up to JPEG's loss.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import decord
import numpy as np
import torch
from torch import Tensor

from dataloaders.clips import VideoFolder
from dataloaders.ffmpeg import PREPARED_FPS, PREPARED_SHORT_SIDE, write_video
from dataloaders.frame_store import DEFAULT_QUALITY, FrameStore, FrameStoreWriter, pack_clip
from dataloaders.sampling import train_indices
from dataloaders.video import center_crop
from models.clip import IMAGE_MEAN, IMAGE_STD
from scripts.benchmark.harness import Options, Stage, largest_deviation

SIZE, WIDTH = PREPARED_SHORT_SIDE, 398  # 16:9
SHOT = 5.0  # seconds from cut to cut in rendered clips
MAX_LOSS = 0.02  # root of the mean squared difference, of 255: 34 dB
SECONDS = (30, 120, 300)


def loader(seconds: int, options: Options) -> Stage:
    """Exactly the same frames, by index and out of all."""
    checks = {"compare": _deviation, "tolerance": 1e-6}
    return _stage(options, seconds, _by_index, _decode_everything, "decoded by index", **checks)


def store(seconds: int, options: Options) -> Stage:
    """The same frames up to JPEG's loss."""
    checks = {"compare": _loss, "tolerance": MAX_LOSS, "time_aim": 5 if seconds == 120 else None}
    return _stage(options, seconds, _from_store, _by_index, "from the frame store", **checks)


def _stage(options: Options, seconds: int, ours, reference, how: str, **rest) -> Stage:
    videos = options.videos or 4
    folder = _corpus(seconds, videos, options.clips, options.seed)
    return Stage(
        title=f"{options.frames} frames of {videos} clips of {seconds} s {how}",
        ours=lambda: ours(folder, options),
        reference=lambda: reference(folder, options),
        work=videos,
        unit="videos",
        **rest,
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.mp4"))


def _by_index(folder: Path, options: Options):
    source = VideoFolder(folder)
    return lambda: _load(source, folder, options)


def _from_store(folder: Path, options: Options):
    source = FrameStore(folder / "frames.h5")
    return lambda: _load(source, folder, options)


def _load(source, folder: Path, options: Options) -> Tensor:
    generator = np.random.RandomState(options.seed)
    return torch.stack(
        [source.load(name, options.frames, SIZE, generator) for name in _names(folder)]
    )


def _decode_everything(folder: Path, options: Options):
    """Every frame is decoded, cropped, and normalised to float32; then those sampled are taken."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))

    def load(path: Path, generator: np.random.RandomState) -> Tensor:
        reader = decord.VideoReader(str(path), num_threads=1)
        n = len(reader)
        clip = reader.get_batch(range(n)).asnumpy()
        chosen = train_indices(n, options.frames, generator)
        frames = center_crop(torch.from_numpy(clip), SIZE)[chosen]
        return (frames.float() / 255 - mean) / std

    def run() -> Tensor:
        generator = np.random.RandomState(options.seed)
        return torch.stack([load(folder / f"{name}.mp4", generator) for name in _names(folder)])

    return run


def _deviation(frames: Tensor, normalised: Tensor) -> float:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return largest_deviation((frames.float() / 255 - mean) / std, normalised)


def _loss(frames: Tensor, exact: Tensor) -> float:
    return ((frames.float() - exact.float()) / 255).square().mean().sqrt().item()


@cache
def _corpus(seconds: int, videos: int, clips: Path | None, seed: int) -> Path:
    """A folder of prepared clips and a store of them, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="propy-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    n = round(seconds * PREPARED_FPS)
    with FrameStoreWriter(folder / "frames.h5", SIZE, DEFAULT_QUALITY) as writer:
        for index in range(videos):
            path = folder / f"{index}.mp4"
            rng = np.random.default_rng([seed, index])
            write_video(path, _rendered(n, rng) if clips is None else _looped(n, clips, rng))
            writer.add(*pack_clip(path.stem, path, SIZE, DEFAULT_QUALITY))
        writer.finish()
    return folder


def _looped(n: int, folder: Path, rng: np.random.Generator) -> np.ndarray:
    """Frames of the folder's landscape clips in turn: as long as wanted, with real content."""
    names, frames = _names(folder), []
    while len(frames) < n:
        reader = decord.VideoReader(str(folder / f"{rng.choice(names)}.mp4"), num_threads=1)
        clip = reader.get_batch(range(len(reader))).asnumpy()
        if clip.shape[1] == SIZE and clip.shape[2] >= WIDTH:
            frames += list(clip[:, :, :WIDTH])
    return np.stack(frames[:n])


def _rendered(n: int, rng: np.random.Generator) -> np.ndarray:
    """A camera that pans over pictures with about the spectrum of natural images.

    Returns:
        uint8 [n, 224, 398, 3].
    """
    frames = np.empty((n, SIZE, WIDTH, 3), np.uint8)
    per_shot = round(SHOT * PREPARED_FPS)
    for first in range(0, n, per_shot):
        picture = _natural_picture(SIZE + 64, WIDTH + 128, rng)
        speed = rng.uniform(-2, 2, 2)
        for frame in range(first, min(first + per_shot, n)):
            y, x = np.round([32, 64] + speed * (frame - first)).astype(int)
            frames[frame] = picture[y : y + SIZE, x : x + WIDTH]
    return frames


def _natural_picture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with the frequency (Field, 1987): uint8 [H, W, 3].

    The exponent is the one with which clips have the size of real ones, some 8 KiB a frame.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    amplitude = frequency**-1.7

    def layer() -> np.ndarray:
        picture = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * amplitude).real
        return picture / picture.std()

    light = layer()
    colours = np.stack([layer() for _ in range(3)], -1)
    return (120 + 55 * light[..., None] + 15 * colours).clip(0, 255).astype(np.uint8)
