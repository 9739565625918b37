"""One pass over a video file: the frames of its windows, each decoded once, none written to disk.

The frames are those of the clip that ``scripts/prepare.sh`` would make (3 a second, upright, square
pixels), without its compression.
"""

from __future__ import annotations

import codecs
import re
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloaders import DataError
from dataloaders.ffmpeg import (
    DEFAULT_TIME_LIMIT,
    Completed,
    decode_frames,
    every_frame,
    input_arguments,
    listing_arguments,
    parse_track,
    read_packets,
    select_frames,
    stream_output,
)
from dataloaders.prepared import (
    WARN_BELOW,
    clip_format,
    clip_length,
    clip_rate,
    decoded_share,
    prepared_size,
    video_clock,
)
from dataloaders.sampling import eval_indices
from dataloaders.video import center_crop
from utils.search.windows import cut_windows, grid_frames, grid_step

MIN_DECODED = 0.5  # share of a video below which it is not indexed
TEXT_BYTES = 512  # of the start of a file, by which a text is known


class VideoFrames:
    """The windows of one file, in order: an iterator over uint8 [N_f, 3, size, size], once.

    Attributes:
        seconds: how long the video is.
        windows: what it is cut into.
        note: after the last window, what is wrong with the file; empty if nothing is.

    Args:
        path: any file that ffmpeg decodes.
        size: side of the square frames, pixels.
        num_frames: N_f.
        window_seconds: W.
        time_limit: seconds that opening the file, or the next frame of it, may take.

    Raises:
        DataError: it is no video, or less than half of it decodes; without the file's name.
        OSError: it cannot be read.
    """

    def __init__(
        self, path: Path, size: int, num_frames: int, window_seconds: float,
        time_limit: float = DEFAULT_TIME_LIMIT,
    ) -> None:  # fmt: skip
        refuse_text(path)
        self.path, self.size, self.num_frames = path, size, num_frames
        self.window_seconds, self.time_limit = window_seconds, time_limit
        self.packets = read_packets(path, time_limit)
        if not len(self.packets.times):
            raise DataError(f"its video stream is empty ({self.packets.error or 'no packets'})")
        first = decode_frames(path, time_limit, limit=1)
        self.shape = prepared_size(first.width, first.height, first.sample_aspect, short=size)
        self.start, told = video_clock(self.packets)
        # A stream without times has those of its frames, one after the other.
        self.seconds = float(decode_frames(path, time_limit).times[-1, 1]) if told is None else told
        if not 0 < self.seconds < np.inf:
            raise DataError("it has no length: its times are all the same")
        self.windows = cut_windows(self.seconds, window_seconds, num_frames)
        self.note = ""

    def __iter__(self) -> Iterator[Tensor]:
        if len(self.windows) == 1:
            yield self._whole()
            return
        ends = [window.first + self.num_frames for window in self.windows]
        latest = deque(maxlen=self.num_frames)
        for count, frame in enumerate(self._on_grid(), start=1):
            latest.append(frame)
            if count == ends[0]:
                ends.pop(0)
                yield torch.stack(list(latest))

    def _whole(self) -> Tensor:
        """The frames that an evaluation takes of the clip. Which they are depends on its length: a
        file whose last frame does not come ends early, and is decoded again, whole."""
        length = clip_length(self.seconds)
        chosen = eval_indices(length, self.num_frames)
        needed = np.union1d(chosen, length - 1)
        frames = list(self._frames(f"{clip_rate(self.seconds)},{select_frames(needed)}"))
        if len(frames) == len(needed):
            chosen = needed.searchsorted(chosen)
        else:
            frames = list(self._frames(clip_rate(self.seconds)))
            chosen = eval_indices(len(frames), self.num_frames)
        return torch.stack([frames[i] for i in chosen])

    def _on_grid(self) -> Iterator[Tensor]:
        """The frames of the grid. A file that ends early shows its last one for the rest."""
        chosen = grid_frames(self.seconds, self.window_seconds, self.num_frames)
        step = grid_step(self.window_seconds, self.num_frames)
        picked = rf"select=gt(ceil((n+1)/{step}-0.5)\,ceil(n/{step}-0.5))+eq(n\,{chosen[-1]})"
        frames, frame = self._frames(f"{clip_rate(self.seconds)},{picked}"), None
        for before, number in pairwise([-1, *chosen.tolist()]):
            frame = next(frames, frame) if number != before else frame
            yield frame
        for _ in frames:  # nothing: it is at its end, and says how it went
            pass

    def _frames(self, which: str) -> Iterator[Tensor]:
        """Frames of the clip, uint8 [3, size, size], those that ffmpeg's filters let pass."""
        width, height = self.shape
        with tempfile.TemporaryDirectory() as folder:
            listing = Path(folder) / "frames"
            pieces = stream_output([
                *("-v", "level+warning", "-max_error_rate", "1", "-reinit_filter", "0"),
                *("-itsoffset", f"{-self.start:.6f}"),
                *input_arguments(self.path, self.packets.codec),
                *("-map", "0:V:0", "-filter_threads", "1"),
                *("-vf", f"{which},{clip_format(self.shape)}", *every_frame()),
                *("-frames:v", str(clip_length(self.seconds))),
                *("-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"),
                *listing_arguments(to=f"file:{listing}"),
            ], width * height * 3, self.time_limit)  # fmt: skip
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    done = end.value
                    break
                frame = torch.frombuffer(piece, dtype=torch.uint8)
                yield center_crop(frame.view(1, height, width, 3), self.size)[0]
            listed = listing.read_text() if listing.exists() else ""
        self._judge(replace(done, output=listed))

    def _judge(self, done: Completed) -> None:
        if done.status != 0:
            raise DataError(f"cannot be decoded: {done.reason}")
        decoded = parse_track(done)
        words = decoded.error or self.packets.error or "the rest is damaged or not there"
        if not len(decoded.times):
            raise DataError(f"no frame of it decodes: {words}")
        told = None if np.isnan(self.packets.times).any() else self.seconds
        share = decoded_share(self.packets, decoded.times[:, 0], told)
        if share < WARN_BELOW:
            self.note = f"only {share:.0%} of it decodes: {words}"
        if share < MIN_DECODED:
            raise DataError(self.note)


def refuse_text(path: Path) -> None:
    """DataError for an empty file and for a text: ffmpeg takes playlists for videos, and reads
    whatever they name."""
    with path.open("rb") as file:
        start = file.read(TEXT_BYTES)
    if not start:
        raise DataError("it is empty")
    if not re.search(rb"[^\t\n\f\r -\x7e]", start.removeprefix(codecs.BOM_UTF8)):
        raise DataError("it is a text, no video")
