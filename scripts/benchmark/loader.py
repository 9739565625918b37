"""Stages of loading, on one core: training frames of prepared clips, half a minute to five long."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
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
from scripts.benchmark.harness import Options, relative_error
from scripts.benchmark.model import Run, normalized

SIZE, WIDTH = PREPARED_SHORT_SIDE, 398  # 16:9
SHOT = round(5 * PREPARED_FPS)  # frames from cut to cut in rendered clips


def by_index(seconds: int, options: Options, ours: bool) -> Run:
    """Decoding the sampled frames beside decoding all of them."""
    folder = _corpus(seconds, options.videos, options.clips)
    return _run(VideoFolder(folder).load if ours else partial(_load_out_of_all, folder), options)


def from_store(seconds: int, options: Options, ours: bool) -> Run:
    """The frame store beside decoding by index, whose frames it gives up to JPEG's loss."""
    folder = _corpus(seconds, options.videos, options.clips)
    source = FrameStore(folder / "frames.h5") if ours else VideoFolder(folder)
    return _run(source.load, options)


def exact_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Of the frames of `by_index`: a model normalises ours, the reference has done so."""
    return relative_error({"frames": normalized(ours["frames"])}, reference)


def _run(load: Callable[..., Tensor], options: Options) -> Run:
    def run() -> dict[str, Tensor]:
        generator = np.random.RandomState(0)
        clips = [load(str(i), options.frames, SIZE, generator) for i in range(options.videos)]
        return {"frames": torch.stack(clips)}

    return run


def _load_out_of_all(folder: Path, name: str, num_frames: int, size: int, generator) -> Tensor:
    clip = _decode(folder / f"{name}.mp4")
    chosen = train_indices(len(clip), num_frames, generator)
    return normalized(center_crop(torch.from_numpy(clip), size)[chosen])


def _decode(path: Path) -> np.ndarray:
    """uint8 [n, H, W, 3]"""
    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


@cache
def _corpus(seconds: int, videos: int, clips: Path | None) -> Path:
    """A folder of prepared clips and a store of them, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="propy-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    n = round(seconds * PREPARED_FPS)
    with FrameStoreWriter(folder / "frames.h5", SIZE, DEFAULT_QUALITY) as writer:
        for index in range(videos):
            path = folder / f"{index}.mp4"
            rng = np.random.default_rng([0, index])
            write_video(path, _looped(n, clips, rng) if clips else rendered(n, rng))
            writer.add(*pack_clip(path.stem, path, SIZE, DEFAULT_QUALITY))
        writer.finish()
    return folder


def _looped(n: int, folder: Path, rng: np.random.Generator) -> np.ndarray:
    """Frames of the folder's landscape clips in turn: as long as wanted, with real content."""
    paths, frames = sorted(folder.glob("*.mp4")), []
    while len(frames) < n:
        clip = _decode(paths[rng.integers(len(paths))])
        if clip.shape[1] == SIZE and clip.shape[2] >= WIDTH:
            frames += list(clip[:, :, :WIDTH])
    return np.stack(frames[:n])


def rendered(n: int, rng: np.random.Generator) -> np.ndarray:
    """A camera that pans over one picture after another: uint8 [n, 224, 398, 3].

    Amplitudes fall with the frequency as in natural images (Field, 1987); the exponent is the one
    with which clips have the size of real ones, some 8 KiB a frame.
    """
    height, width = SIZE + 64, WIDTH + 128
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf

    def layer() -> np.ndarray:
        picture = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * frequency**-1.7).real
        return picture / picture.std()

    frames = np.empty((n, SIZE, WIDTH, 3), np.uint8)
    for number in range(n):
        step = number % SHOT
        if step == 0:
            light, colours = layer()[..., None], np.stack([layer() for _ in range(3)], -1)
            picture = (120 + 55 * light + 15 * colours).clip(0, 255).astype(np.uint8)
            speed = rng.uniform(-2, 2, 2)
        y, x = np.round([32, 64] + speed * step).astype(int)
        frames[number] = picture[y : y + SIZE, x : x + WIDTH]
    return frames
