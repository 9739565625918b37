"""Loaders: what a batch holds, that it depends on (seed, epoch, item) alone, and how they fail."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders import DataError, video
from dataloaders.annotations import TRAIN, Query, Split, Video, corpus_videos
from dataloaders.clips import VideoFolder
from dataloaders.datasets import (
    EvaluationLoader,
    LoaderConfig,
    TrainingLoader,
    evaluation_text_batches,
)
from dataloaders.ffmpeg import write_video
from dataloaders.sampling import eval_indices
from dataloaders.tokenizer import tokenize
from dataloaders.video import load_clip

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

FRAMES, SIZE = 4, 32
LENGTHS = [3, 9, 12, 20, 33, 5, 16, 40, 25, 8, 30]  # frames of the clips; 11 are no multiple of 4


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory):
    """Clips named v0, v1, … whose frames are grey: brighter from clip to clip and over time."""
    folder = tmp_path_factory.mktemp("videos")
    for i, n in enumerate(LENGTHS):
        level = 20 * i + np.arange(n) / 2
        frames = np.broadcast_to(level.astype(np.uint8)[:, None, None, None], (n, SIZE, SIZE, 3))
        write_video(folder / f"v{i}.mp4", frames)
    return folder


def make_queries() -> list[Query]:
    """One to three captions a video, those of different videos mixed."""
    rows = [(c, v) for c in range(3) for v in range(len(LENGTHS)) if c <= v % 3]
    return [Query(f"v{v}#{c}", f"caption {c} of video {v}", f"v{v}", 10.0, None) for c, v in rows]


def make_training_loader(folder, queries=None, *, num_workers=0, **config):
    config = {"batch_size": 4, "max_words": 16} | config
    split = Split(TRAIN, queries or make_queries(), Path("train.jsonl"))
    config = LoaderConfig(num_thread_reader=num_workers, **config)
    return TrainingLoader(split, VideoFolder(folder), FRAMES, SIZE, config)


def make_evaluation_loader(folder, videos=None, *, num_workers=0):
    videos = videos or corpus_videos(make_queries())
    config = LoaderConfig(batch_size_val=4, num_thread_reader=num_workers)
    return EvaluationLoader(videos, VideoFolder(folder), FRAMES, SIZE, config)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) if torch.is_tensor(value) else value == right[key]
        for key, value in left.items()
    )


def test_a_batch_holds_videos_with_all_their_captions(video_dir):
    queries = make_queries()
    loader = make_training_loader(video_dir, queries)
    assert len(loader) == len(LENGTHS) // 4
    names = []
    for batch in loader:
        assert batch["frames"].dtype == torch.uint8
        assert batch["frames"].shape == (4, FRAMES, 3, SIZE, SIZE)
        texts = [
            (row, query.desc)
            for row, name in enumerate(batch["vid_names"])
            for query in queries
            if query.vid_name == name
        ]
        assert batch["text_to_video"].tolist() == [row for row, _ in texts]
        assert batch["text_to_video"].dtype == torch.int64
        assert torch.equal(batch["token_ids"], tokenize([desc for _, desc in texts], 16))
        levels = batch["frames"].float().mean((2, 3, 4))
        assert (levels.diff(dim=1) > -1).all()  # the frames are in the order of time
        for name, level in zip(batch["vid_names"], levels, strict=True):
            assert (abs(level - 20 * int(name[1:]) - 10) < 13).all(), "of another video"
        names += batch["vid_names"]
    assert len(set(names)) == len(names) == 8  # the incomplete third batch is dropped


def test_order_and_frames_change_with_epoch_and_seed(video_dir):
    runs = {}
    for seed, epoch in [(43, 0), *((42, epoch) for epoch in range(8))]:
        loader = make_training_loader(video_dir, seed=seed)
        loader.set_epoch(epoch)
        runs[seed, epoch] = {
            name: frames
            for batch in loader
            for name, frames in zip(batch["vid_names"], batch["frames"], strict=True)
        }
    first = runs[42, 0]
    for key in [(42, 1), (43, 0)]:
        assert list(first) != list(runs[key])
        shared = [name for name in first if name in runs[key] and LENGTHS[int(name[1:])] > 7]
        assert any(not torch.equal(first[name], runs[key][name]) for name in shared)
    assert len(set().union(*runs.values())) == len(LENGTHS), "some video is never seen"


def test_batches_depend_neither_on_workers_nor_on_resuming(video_dir):
    def run(num_workers: int, epochs: list[tuple[int, int]]) -> list[list[dict]]:
        loader = make_training_loader(video_dir, num_workers=num_workers, batch_size=2)
        batches = []
        for epoch, first_batch in epochs:
            loader.set_epoch(epoch, first_batch)
            assert len(loader) == 5
            batches.append(list(loader))
        return batches

    reference = run(0, [(0, 0), (1, 0), (2, 0)])
    for num_workers in (1, 3):
        for ours, theirs in zip(run(num_workers, [(0, 0), (1, 0), (2, 0)]), reference, strict=True):
            assert all(map(same, ours, theirs))
            assert len(ours) == len(theirs) == 5
    for num_workers in (0, 3):
        resumed = run(num_workers, [(1, 3), (2, 0)])
        assert [len(batches) for batches in resumed] == [2, 5]
        assert all(map(same, resumed[0], reference[1][3:]))
        assert all(map(same, resumed[1], reference[2]))
    assert run(0, [(1, 5)]) == [[]]


def test_an_iteration_leaves_nothing_behind(video_dir):
    """Also one given up, and workers that were forked after decoding in this process."""
    state, others = torch.get_rng_state(), set(multiprocessing.active_children())
    reference = list(make_training_loader(video_dir))
    loader = make_training_loader(video_dir, num_workers=2)
    next(iter(loader))
    assert set(multiprocessing.active_children()) <= others
    assert all(map(same, loader, reference))
    assert set(multiprocessing.active_children()) <= others
    assert not [t for t in threading.enumerate() if t.name.startswith("decode ")]
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_that_does_not_exist_is_an_error(video_dir):
    loader = make_training_loader(video_dir)
    assert loader.left_out == len(LENGTHS) % 4
    for first_batch in (-1, 3):
        with pytest.raises(ValueError, match="first_batch"):
            loader.set_epoch(0, first_batch)
    for batch_size in (1, 12):
        told = rf"--batch_size {batch_size}: .*train\.jsonl has 11 videos, and one alone"
        with pytest.raises(DataError, match=told):
            make_training_loader(video_dir, batch_size=batch_size)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_videos_come_all_and_in_order(video_dir, num_workers):
    videos = corpus_videos(make_queries())[::-1]
    batches = list(make_evaluation_loader(video_dir, videos, num_workers=num_workers))
    assert [batch["indices"].tolist() for batch in batches] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10],
    ]  # fmt: skip
    frames = torch.cat([batch["frames"] for batch in batches])
    for clip, item in zip(frames, videos, strict=True):
        assert torch.equal(clip, load_clip(video_dir / f"{item.vid_name}.mp4", FRAMES, SIZE))
    levels = 20 * 7 + eval_indices(40, FRAMES) / 2
    np.testing.assert_allclose(frames[3].float().mean((1, 2, 3)), levels, atol=3)


def test_evaluation_texts_come_all_and_sorted_by_length():
    queries = make_queries()
    batches = evaluation_text_batches(queries, 16, 8)
    order = torch.cat([batch["indices"] for batch in batches]).tolist()
    assert sorted(order) == list(range(len(queries))), "each caption once"
    lengths = [tokenize([queries[i].desc], 16).shape[1] for i in order]
    assert lengths == sorted(lengths), "captions of a length are batched together"
    for batch in batches:
        texts = [queries[i].desc for i in batch["indices"].tolist()]
        assert torch.equal(batch["token_ids"], tokenize(texts, 16))


def test_missing_files_are_listed_before_anything_is_read(video_dir):
    videos = [Video("v0", 1.0), *(Video(f"gone{i}", 1.0) for i in range(25))]
    with pytest.raises(DataError) as raised:
        make_evaluation_loader(video_dir, videos)
    first, *listed = str(raised.value).splitlines()
    assert first.startswith(f"{video_dir}: 25 of 26 clips are missing from the video folder: ")
    assert "bash scripts/prepare.sh" in first
    assert listed == [*(f"gone{i}: missing" for i in range(20)), "and 5 more"]
    gone = [Query(name, "text", name, 1.0, None) for name in ("gone0", "gone1")]
    with pytest.raises(DataError, match="2 of 2 clips are missing"):
        make_training_loader(video_dir, gone, batch_size=2)
    with pytest.raises(DataError, match="no such video folder"):
        make_evaluation_loader(video_dir / "gone", videos)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_clip_is_named_without_a_traceback(video_dir, tmp_path, num_workers):
    for path in video_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "v6.mp4").unlink()
    (tmp_path / "v6.mp4").write_bytes((video_dir / "v6.mp4").read_bytes()[:600])
    for loader in (
        make_training_loader(tmp_path, num_workers=num_workers, batch_size=11),
        make_evaluation_loader(tmp_path, num_workers=num_workers),
    ):
        with pytest.raises(DataError) as raised:
            list(loader)
        assert str(raised.value).startswith(f"{tmp_path}/v6.mp4: cannot be decoded")
        assert f"check_videos --decode --video_dir {tmp_path} --annotations" in str(raised.value)
        assert "Traceback" not in str(raised.value)


@pytest.fixture
def before_decoding(monkeypatch):
    """Have a function called with the path of every clip that is read, in forked workers too."""
    decode = video._decode
    return lambda act: monkeypatch.setattr(
        video, "_decode", lambda path, *rest: act(path) or decode(path, *rest)
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: time.sleep(1000), r"{}: not decoded within"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"worker died(.|\n)*{}"),
        # as by storage that does not answer: nothing in the worker itself runs any more
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), r"a loader worker hangs: .*{}"),
    ],
)
def test_what_stops_a_worker_is_named(video_dir, before_decoding, monkeypatch, fault, message):
    # At its first clip: it could not hand over a batch that it had read before either.
    loader = make_evaluation_loader(video_dir, num_workers=1)
    before_decoding(lambda path: fault() if path.stem == loader.names[0] else None)
    monkeypatch.setattr(video, "DECODE_TIME_LIMIT", 1)
    monkeypatch.setattr("dataloaders.loader.WORKER_TIME_LIMIT", 2)
    with pytest.raises(DataError, match=message.format(rf"{loader.names[0]}\.mp4")):
        list(loader)


def test_a_signal_does_not_end_workers(video_dir, before_decoding):
    for number in (signal.SIGTERM, signal.SIGINT):
        before_decoding(lambda _, number=number: os.kill(os.getpid(), number))
        assert len(list(make_evaluation_loader(video_dir, num_workers=1))) == 3


PROGRAM = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
import dataloaders.datasets

def child(path):
    time.sleep(2)
    Path(path).touch()

folder, work, mark = sys.argv[1:]
multiprocessing.Process(target=child, args=(mark,)).start()
if work == "hang":
    dataloaders.clips.load_clip = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
videos = [dataloaders.annotations.Video(f"v{i}", 1.0) for i in range(8)]
clips = dataloaders.clips.VideoFolder(folder)
batches = iter(dataloaders.datasets.EvaluationLoader(
    videos, clips, 4, 32, dataloaders.datasets.LoaderConfig(batch_size_val=2, num_thread_reader=2)
))
time.sleep(1) if work == "hang" else next(batches)
"""


@pytest.mark.parametrize("work", ["read", "hang"])
def test_a_program_keeps_its_own_children(video_dir, tmp_path, work):
    """And ends, whatever the workers do."""
    command = [sys.executable, "-c", PROGRAM, str(video_dir), work, str(tmp_path / "mark")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "mark").exists()


def test_a_worker_that_continues_to_read_is_waited_for(video_dir, before_decoding, monkeypatch):
    """For a batch that takes many times as long as one clip may."""
    before_decoding(lambda _: time.sleep(0.2))
    tokenize(["its table"], 8)  # the worker is forked with it; reading it takes longer
    monkeypatch.setattr("dataloaders.loader.WORKER_TIME_LIMIT", 1.5)
    loader = make_training_loader(video_dir, num_workers=1, batch_size=11)
    assert [len(batch["vid_names"]) for batch in loader] == [11]


SMALL_MACHINE = """
import sys, time, torch
from dataloaders.annotations import Video
from dataloaders.datasets import EvaluationLoader, LoaderConfig

class Clips:
    check_command = None
    def check(self, names, size): pass
    def load(self, name, num_frames, size, generator):
        return torch.full((num_frames, 3, size, size), int(name), dtype=torch.uint8)

videos = [Video(str(i), 1.0) for i in range(40)]
config = LoaderConfig(batch_size_val=4, num_thread_reader=2)
batches = []
for batch in EvaluationLoader(videos, Clips(), 8, 64, config):
    batches.append(batch)
    time.sleep(0.02)  # the workers read ahead
frames = torch.cat([batch["frames"] for batch in batches])
assert frames.shape == (40, 8, 3, 64, 64), frames.shape
assert (frames == torch.arange(40)[:, None, None, None, None]).all()
assert torch.cat([batch["indices"] for batch in batches]).tolist() == list(range(40))
"""


def test_workers_need_no_room_in_dev_shm_and_no_short_tmpdir(tmp_path):
    """One batch is 384 KiB, /dev/shm 64 KiB; TMPDIR is longer than the name of a socket may be.

    And each batch is the consumer's own, however many more are read meanwhile.
    """
    folder = tmp_path / ("x" * 150)
    folder.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"']
    may_mount = not subprocess.run([*mount, "-", "true"], capture_output=True).returncode
    command = [*([*mount, "-"] if may_mount else []), sys.executable, "-c", SMALL_MACHINE]
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_that_cannot_start_say_what_they_need(video_dir, monkeypatch):
    def no_semaphores(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", no_semaphores)
    loader = make_evaluation_loader(video_dir, corpus_videos(make_queries()), num_workers=1)
    with pytest.raises(DataError, match=r"/dev/shm.*--shm-size.*--ipc=host.*num_thread_reader 0"):
        iter(loader)
