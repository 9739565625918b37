"""Pictures and short clips of videos for the page, made by ffmpeg and kept in a bounded folder."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dataloaders import DataError
from dataloaders.ffmpeg import Completed, input_arguments, kill_running, run_ffmpeg

CACHE_BYTES = 512 * 2**20
MAX_WAITING = 256  # previews that are being made or wait for their turn
MAX_CLIP_SECONDS = 120.0
THUMBNAIL_LIMIT, CLIP_LIMIT = 30.0, 120.0  # seconds of ffmpeg
THUMBNAIL_BOX, CLIP_BOX = (480, 360), (960, 540)  # pixels


class BusyError(Exception):
    """More previews are asked for than can wait."""


class Previews:
    """Makes each preview once, two at a time, and forgets those not asked for longest.

    Args:
        cache_bytes: what the folder may hold; it goes with `close`.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="propy-previews-")
        self._limit = cache_bytes
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="preview")
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # the one asked for longest ago first
        self._waiting: dict[Path, Future[Path]] = {}

    def close(self) -> None:
        """End what is being made and remove the folder."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        kill_running()
        self._workers.shutdown()
        self._folder.cleanup()

    def thumbnail(self, video: Path, seconds: float) -> Future[Path]:
        """A JPEG of the frame shown at that time, or the last one before it. See `clip`."""
        return self._made(video, f"{seconds:.3f}.jpg", partial(write_thumbnail, video, seconds))

    def clip(self, video: Path, start: float, end: float) -> Future[Path]:
        """An mp4 that every browser plays, of some seconds of a video.

        Raises, from the future's `result`:
            DataError: ffmpeg finds nothing there that it can decode.

        Raises:
            BusyError: too many wait.
            OSError: the video is gone.
        """
        write = partial(write_clip, video, start, min(end, start + MAX_CLIP_SECONDS))
        return self._made(video, f"{start:.3f}-{end:.3f}.mp4", write)

    def _made(self, video: Path, what: str, write: Callable[[Path], None]) -> Future[Path]:
        state = video.stat()
        key = f"{video}\0{state.st_size}\0{state.st_mtime_ns}\0{what}"
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        target = Path(self._folder.name, digest + Path(what).suffix)
        with self._lock:
            if target in self._sizes and target.exists():  # systems tidy old files up
                self._sizes.move_to_end(target)
                done: Future[Path] = Future()
                done.set_result(target)
                return done
            if target not in self._waiting:
                if len(self._waiting) >= MAX_WAITING:
                    raise BusyError
                self._waiting[target] = self._workers.submit(self._make, target, write)
            return self._waiting[target]

    def _make(self, target: Path, write: Callable[[Path], None]) -> Path:
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            write(target)
            size = target.stat().st_size
        except BaseException:
            target.unlink(missing_ok=True)
            with self._lock:
                del self._waiting[target]
            raise
        with self._lock:
            self._sizes[target] = size
            del self._waiting[target]
            while sum(self._sizes.values()) > self._limit and len(self._sizes) > 1:
                oldest, _ = self._sizes.popitem(last=False)
                oldest.unlink(missing_ok=True)
        return target


def write_thumbnail(video: Path, seconds: float, target: Path) -> None:
    """DataError: no frame there, nor before it, can be decoded."""
    one, last = ["-frames:v", "1"], ["-t", "4"]
    # The sound may outlast the picture, and a container may claim too much.
    for start, frames in ((seconds, one), (max(0.0, seconds - 3.0), last), (0.0, one)):
        output = [*frames, "-vf", _fit(THUMBNAIL_BOX), "-q:v", "4", "-f", "image2", "-update", "1"]
        done = _run(video, start, ["-map", "0:V:0", *output], target, THUMBNAIL_LIMIT)
        if done.status == 0 and target.exists() and target.stat().st_size:
            return
    raise DataError(f"{video}: {done.reason}")


def write_clip(video: Path, start: float, end: float, target: Path) -> None:
    """DataError: nothing there can be decoded."""
    picture = ["-map", "0:V:0", "-vf", _fit(CLIP_BOX), "-c:v", "libx264", "-preset", "veryfast"]
    picture += ["-crf", "24", "-pix_fmt", "yuv420p", "-threads", "2"]
    sound = ["-map", "0:a:0?", "-c:a", "aac", "-b:a", "128k", "-ac", "2"]
    container = ["-t", f"{end - start:.3f}", "-sn", "-dn", "-movflags", "+faststart", "-f", "mp4"]
    # Without a sound that cannot be decoded, and from the start where the middle cannot be found.
    for output, seek in (([*picture, *sound], True), (picture, True), (picture, False)):
        done = _run(video, start, [*output, *container], target, CLIP_LIMIT, seek)
        if done.status == 0:
            return
    raise DataError(f"{video}: {done.reason}")


def _run(
    video: Path, start: float, output: list[str], target: Path, limit: float, seek: bool = True
) -> Completed:
    at, source = ["-ss", f"{start:.3f}"], input_arguments(video)
    arguments = ["-v", "level+error", "-abort_on", "empty_output_stream"]
    arguments += [*at, *source] if seek else [*source, *at]
    return run_ffmpeg([*arguments, *output, "-y", f"file:{target}"], limit)


def _fit(box: tuple[int, int]) -> str:
    """A filter: square pixels, even sides, within the box."""
    width, height = box
    sides = f"'min({width},iw)':'min({height},ih)'"
    keep = "force_original_aspect_ratio=decrease:force_divisible_by=2"
    return f"scale='ceil(iw*sar/2)*2':ih,setsar=1,scale={sides}:{keep}"
