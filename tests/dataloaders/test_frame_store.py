"""The frame store: the clips' own frames up to JPEG's loss, whatever happens while it is made."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dataloaders import DataError, frame_store
from dataloaders.annotations import Video
from dataloaders.clips import VideoFolder
from dataloaders.datasets import EvaluationLoader, LoaderConfig
from dataloaders.ffmpeg import write_video
from dataloaders.frame_store import FrameStore, FrameStoreWriter, pack_clip
from dataloaders.video import load_every_frame
from scripts.data import pack_frames
from tests.corpus import TRAIN, TinyRun, annotate, in_process, moving_noise

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = 64
LENGTHS = {"one": 1, "few": 5, "v 2.5": 31, "long": 200, "ünder": 32, "sub/clip": 12}


def loader_of(videos, store, num_frames=8, size=SIZE, batch_size=2, num_workers=0):
    config = LoaderConfig(batch_size_val=batch_size, num_thread_reader=num_workers)
    return EvaluationLoader(videos, store, num_frames, size, config)


def moving_pattern(n: int, seed: int, height: int = SIZE, width: int = 98) -> np.ndarray:
    """Smooth colours that move: uint8 [n, H, W, 3]; every frame differs from every other."""
    rng = np.random.default_rng(seed)
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(n), indexing="ij")
    waves = [
        np.sin(x * rng.uniform(0.02, 0.2) + y * rng.uniform(0.02, 0.2) + t * rng.uniform(0.1, 0.9))
        for _ in range(3)
    ]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8).transpose(2, 0, 1, 3)


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for seed, (name, n) in enumerate(LENGTHS.items()):
        tall = {"height": 98, "width": SIZE} if name == "few" else {}
        write_video(folder / f"{name}.mp4", moving_pattern(n, seed, **tall))
    return folder


def files_of(folder: Path, names=LENGTHS) -> list[tuple[str, Path]]:
    return [(name, folder / f"{name}.mp4") for name in names]


def make_store(path: Path, folder: Path, names=LENGTHS) -> FrameStore:
    with FrameStoreWriter(path, SIZE, 90) as writer:
        for name, file in files_of(folder, names):
            writer.add(*pack_clip(name, file, SIZE, 90))
        writer.finish()
    return FrameStore(path)


def flags_of(folder: Path, path: Path) -> list[str]:
    """Of the program that packs a folder into a store."""
    flags = ["--video_dir", str(folder), "--frame_store", str(path), "--size", str(SIZE)]
    return [*flags, "--workers", "1"]


@pytest.fixture(scope="module")
def store(video_dir, tmp_path_factory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store") / "frames.h5", video_dir)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root of the mean squared difference, of 255."""
    return (ours.float() - theirs.float()).square().mean().sqrt().item()


@pytest.mark.parametrize("num_frames", [1, 8, 32, 250])
@pytest.mark.parametrize("seed", [None, 3])
def test_frames_are_those_of_the_video_folder(video_dir, store, num_frames, seed):
    folder = VideoFolder(video_dir)
    for name in LENGTHS:
        clips = []
        for source in (folder, store):
            generator = None if seed is None else np.random.RandomState([seed, len(name)])
            clips.append(source.load(name, num_frames, SIZE, generator))
        ours, theirs = clips
        assert theirs.dtype == torch.uint8
        assert theirs.shape == ours.shape == (num_frames, 3, SIZE, SIZE)
        assert theirs.is_contiguous()
        # The neighbours of a frame are far less like it than its JPEG is.
        assert all(apart(a, b) < 4.5 for a, b in zip(ours, theirs, strict=True))


def test_what_is_stored_is_what_the_clip_has(video_dir, store):
    for clip in store.clips.values():
        path = video_dir / f"{clip.name}.mp4"
        every = load_every_frame(path, SIZE)
        assert len(clip.lengths) == store.probe(clip.name, SIZE) == LENGTHS[clip.name] == len(every)
        loaded = store.load(clip.name, len(every), SIZE)
        assert apart(every, loaded) < 4.5
        assert clip.same_source(path)
        assert clip.source == path.name


def test_packing_twice_gives_the_same_bytes_and_does_nothing(video_dir, tmp_path, capsys):
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path in paths:
        assert pack_frames.main([*flags_of(video_dir, path), "--workers", "2"]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "5 clips to pack" in capsys.readouterr().out
    before = paths[0].stat()
    assert pack_frames.main(flags_of(video_dir, paths[0])) == 0
    assert paths[0].stat().st_mtime_ns == before.st_mtime_ns
    out = capsys.readouterr().out
    assert "clips to pack" not in out
    assert "5 clips, 269 frames of 64×64, quality 90, all checksums right" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_a_store_is_extended_and_changed_clips_are_packed_again(video_dir, tmp_path):
    folder, path = tmp_path / "videos", tmp_path / "f.h5"
    folder.mkdir()
    files = {name: (video_dir / f"{name}.mp4").read_bytes() for name in ("few", "long", "one")}
    for name in ("few", "long"):
        (folder / f"{name}.mp4").write_bytes(files[name])
    assert pack_frames.main(flags_of(folder, path)) == 0
    size = path.stat().st_size
    (folder / "few.mp4").write_bytes(files["few"])  # touched: the same frames
    (folder / "long.mp4").write_bytes(files["one"])  # replaced
    (folder / "one.mp4").write_bytes(files["one"])  # new
    assert pack_frames.main(flags_of(folder, path)) == 0
    store = FrameStore(path)
    assert list(store.clips) == ["few", "long", "one"]
    assert store.probe("long", SIZE) == 1
    assert torch.equal(store.load("long", 1, SIZE), store.load("one", 1, SIZE))
    expected = load_every_frame(folder / "few.mp4", SIZE)
    assert apart(store.load("few", 5, SIZE), expected) < 4.5
    assert store.clips["few"].same_source(folder / "few.mp4")
    assert path.stat().st_size < size  # nothing is left of what was replaced


def test_readers_keep_reading_while_a_store_is_extended(video_dir, tmp_path):
    path = tmp_path / "f.h5"
    before = make_store(path, video_dir, ["few", "long"])
    expected = {name: before.load(name, 8, SIZE) for name in ("few", "long")}

    def check() -> None:
        """By a reader of old and by one that opens the file now, in this and in worker processes"""
        loader = loader_of([Video(name, 1.0) for name in expected], before, batch_size=1,
            num_workers=1
        )  # fmt: skip
        for (name, frames), batch in zip(expected.items(), loader, strict=True):
            loaded = [store.load(name, 8, SIZE) for store in (before, FrameStore(path))]
            assert all(torch.equal(clip, frames) for clip in (*loaded, batch["frames"][0]))

    for attempt in range(2):  # the first one is interrupted
        with FrameStoreWriter(path, SIZE, 90) as writer:
            check()
            if attempt == 0:
                writer.add(*pack_clip("one", video_dir / "one.mp4", SIZE, 90))
                continue
            assert list(writer.clips) == ["few", "long", "one"]
            writer.finish()
        check()
    assert list(FrameStore(path).clips) == ["few", "long", "one"]
    with FrameStoreWriter(path, SIZE, 90) as writer:
        writer.add(*pack_clip("few", video_dir / "v 2.5.mp4", SIZE, 90))
        writer.finish()
    assert torch.equal(before.load("long", 8, SIZE), expected["long"])
    with pytest.raises(DataError, match=r"f\.h5: clip 'few': changed while it was in use"):
        before.load("few", 8, SIZE)


@pytest.mark.parametrize("step", range(8))
def test_a_writer_that_is_killed_anywhere_is_continued(video_dir, tmp_path, monkeypatch, step):
    """Dies at the step-th time that anything becomes lasting, then once more at each later one."""
    names = ["few", "one", "v 2.5"]
    whole = make_store(tmp_path / "whole.h5", video_dir, names)
    path = tmp_path / "f.h5"

    class Killed(BaseException):
        pass

    def run(die_at: int | None) -> None:
        calls = 0

        def dying(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == die_at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(frame_store.os, "fsync", dying(os.fsync))
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, dying(getattr(Path, name)))
            with FrameStoreWriter(path, SIZE, 90) as writer:
                for name, file in files_of(video_dir, names):
                    if name not in writer.clips:
                        writer.add(*pack_clip(name, file, SIZE, 90))
                writer.finish()

    for die_at in range(step + 1, 20, step + 1):
        try:
            run(die_at)
            break
        except Killed:
            pass
    run(None)
    assert path.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.h5", "whole.h5"]


def start_shard(flags: list[str], shard: str, die_after: int | None = None):
    """pack_frames in a process of its own, which kills itself after so many clips."""

    def run() -> int:
        add = FrameStoreWriter.add

        def add_and_die(writer, *clip) -> None:
            add(writer, *clip)
            if len(writer.clips) == die_after:
                os.kill(os.getpid(), signal.SIGKILL)

        FrameStoreWriter.add = add_and_die
        return pack_frames.main([*flags, "--shard", shard])

    return in_process(run)


def test_shards_side_by_side_one_of_them_killed_make_the_store_of_one_process(
    video_dir, tmp_path, capsys
):
    path, whole = tmp_path / "[f].h5", tmp_path / "whole.h5"  # a name that is a pattern
    assert pack_frames.main(flags_of(video_dir, whole)) == 0
    flags = flags_of(video_dir, path)
    shards = [start_shard(flags, "0/2", die_after=1), start_shard(flags, "1/2")]
    for shard in shards:
        shard.join(60)
    assert [shard.exitcode for shard in shards] == [-signal.SIGKILL, 0]
    assert not path.exists()
    with pytest.raises(DataError, match="is not finished"):
        FrameStore(path)
    with FrameStoreWriter(path, SIZE, 90, shared=True) as writer:  # one that is still at work
        assert len(writer.clips) == 3
        busy = in_process(lambda: pack_frames.main(flags))
        busy.join(60)
        assert busy.exitcode == 1
    again = start_shard(flags, "0/2")
    again.join(60)
    assert again.exitcode == 0
    capsys.readouterr()
    assert pack_frames.main(flags) == 0
    assert "clips to pack" not in capsys.readouterr().out
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["[f].h5", "whole.h5"]


def test_no_shard_begins_while_what_was_packed_is_removed(video_dir, tmp_path, monkeypatch):
    """What it adds would be removed too."""
    path, unlink, ended = tmp_path / "f.h5", Path.unlink, []

    def unlink_and_begin(file: Path, **settings: bool) -> None:
        unlink(file, **settings)
        if file.suffix == ".frames":
            shard = in_process(lambda: FrameStoreWriter(path, SIZE, 90, shared=True) and 0)
            shard.join(60)
            ended.append(shard.exitcode)

    with FrameStoreWriter(path, SIZE, 90) as writer:
        for name, file in files_of(video_dir, ["few", "one"]):
            writer.add(*pack_clip(name, file, SIZE, 90))
        monkeypatch.setattr(Path, "unlink", unlink_and_begin)
        writer.finish()
    assert ended == [1, 1] and [p.name for p in tmp_path.iterdir()] == ["f.h5"]


def test_what_did_not_come_to_the_disk_is_packed_again(video_dir, tmp_path):
    path, packing = tmp_path / "f.h5", tmp_path / "f.h5.packing"
    whole = make_store(tmp_path / "whole.h5", video_dir, ["few"])
    clip = pack_clip("few", video_dir / "few.mp4", SIZE, 90)
    with FrameStoreWriter(path, SIZE, 90) as writer:
        writer.add(*clip)
    with pytest.raises(DataError, match="is not finished"):
        FrameStore(path)
    (file,) = packing.glob("*.frames")
    data = file.read_bytes()
    for half in (data[:-1], data[:50], b"", bytes(70_000), b"[]\n"):
        file.write_bytes(half)
        with FrameStoreWriter(path, SIZE, 90) as writer:
            assert not writer.clips
    file.write_bytes(data[:-900] + bytes(900))
    with FrameStoreWriter(path, SIZE, 90) as writer:
        with pytest.raises(DataError, match=rf"{file}: frame \d is damaged .*: remove it"):
            writer.finish()
        writer.add(*clip)
        writer.finish()
    assert path.read_bytes() == whole.path.read_bytes() and not packing.exists()


@pytest.mark.parametrize("content", [bytes(70_000), b"my notes\n", b"{}", b'{"format": 1}\n'])
def test_a_file_of_another_is_not_touched(tmp_path, content):
    """Nor is it advised to remove it."""
    for name in ("f.h5", "f.h5.packing"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}: ")) as raised:
            FrameStoreWriter(tmp_path / "f.h5", SIZE, 90)
        assert "remove" not in str(raised.value)
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()


def test_failures_are_counted_and_listed_and_the_rest_is_packed(video_dir, tmp_path, capsys):
    folder, path = tmp_path / "videos", tmp_path / "f.h5"
    folder.mkdir()
    good = (video_dir / "long.mp4").read_bytes()
    (folder / "good.mp4").write_bytes(good)
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    write_video(folder / "small.mp4", moving_pattern(3, 0, 32, 32))
    annotate(tmp_path / "a.jsonl", ["good", "cut", "small", "gone"])
    flags = ["--annotations", str(tmp_path / "a.jsonl"), "--workers", "2"]
    assert pack_frames.main([*flags_of(folder, path), *flags]) == 1
    out = capsys.readouterr().out
    assert f"failed: {folder}/cut.mp4: cannot be decoded" in out
    assert f"failed: {folder}/small.mp4: 32×32 pixels" in out
    assert f"missing: {folder}/gone.mp4" in out
    assert "2 of 3 clips failed, 1 are missing" in out
    assert list(FrameStore(path).clips) == ["good"]


@pytest.mark.parametrize("noted", [True, False])
def test_a_clip_that_decodes_with_errors_or_is_not_what_was_prepared_fails(tmp_path, capsys, noted):
    folder = tmp_path / "videos"
    folder.mkdir()
    lines = []
    for name in ("good", "flipped"):
        clip = folder / f"{name}.mp4"
        write_video(clip, moving_noise(9, SIZE, 98))
        data = bytearray(clip.read_bytes())
        facts = {"bytes": len(data), "crc32": zlib.crc32(data), "frames": 9}
        lines.append(json.dumps({"vid_name": name} | facts) + "\n")
    if noted:
        (folder / "manifest.jsonl").write_text("".join(lines))
    start = data.index(b"mdat") + 100
    for place in range(start + 1500, start + 40_000, 700):
        data[place] ^= 0x55
    clip.write_bytes(data)
    assert len(load_every_frame(clip, SIZE)) == 9  # decord is content with it
    assert pack_frames.main(flags_of(folder, tmp_path / "f.h5")) == 1
    reason = "is not as it was prepared" if noted else "with errors"
    assert re.search(rf"failed: {clip}: .*{reason}.*prepare\.sh", capsys.readouterr().out)
    assert list(FrameStore(tmp_path / "f.h5").clips) == ["good"]


@pytest.mark.parametrize("limit", [20_000, 450_000])  # while collecting, and at the end
def test_no_room_is_said_of_the_folder_and_what_is_packed_is_kept(video_dir, tmp_path, limit):
    path = tmp_path / "f.h5"
    flags = flags_of(video_dir, path)
    whole = make_store(tmp_path / "whole.h5", video_dir, sorted(set(LENGTHS) - {"sub/clip"}))
    if limit > 20_000:
        limit = whole.path.stat().st_size - 100  # what is collected has a smaller index
    run = subprocess.run(
        [sys.executable, "-m", "scripts.data.pack_frames", *flags], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"make room in {tmp_path}" in run.stderr and "what is packed is kept" in run.stderr
    assert "failed" not in run.stdout and "Traceback" not in run.stderr
    assert pack_frames.main(flags) == 0
    assert path.read_bytes() == whole.path.read_bytes()


def die_on_v(name, path, size, quality):
    if name == "v":
        os.kill(os.getpid(), signal.SIGKILL)
    return pack_clip(name, path, size, quality)


def test_a_clip_that_crashes_its_decoder_costs_only_itself(video_dir, monkeypatch):
    names = {"one": "one", "few": "few", "v": "one", "v 2.5": "v 2.5", "long": "long"}
    files = [(name, video_dir / f"{clip}.mp4", None) for name, clip in names.items()]
    monkeypatch.setattr(pack_frames, "pack_clip", die_on_v)  # the workers are forked with it
    results = dict(zip(names, pack_frames.pack_side_by_side(files, SIZE, 90, 2), strict=True))
    assert "its decoder crashed" in str(results.pop("v"))
    assert all(clip.name == name for name, (clip, _) in results.items())


def test_what_does_not_fit_is_refused(store, video_dir, tmp_path):
    videos = [Video(name, 1.0) for name in ("one", "gone")]
    with pytest.raises(DataError) as raised:
        loader_of(videos, store, size=SIZE)
    first, *listed = str(raised.value).splitlines()
    assert first.startswith(f"{store.path}: 1 of 2 clips are missing from the frame store")
    assert "scripts.data.pack_frames" in first
    assert listed == ["gone: missing"]
    with pytest.raises(DataError, match=r"frames\.h5: its frames are 64×64.*reads 224×224"):
        loader_of(videos[:1], store, size=224)
    with pytest.raises(DataError, match="no such frame store"):
        FrameStore(tmp_path / "no.h5")
    for size, quality in [(SIZE, 80), (32, 90)]:
        with pytest.raises(DataError, match="begun with --size 64 --quality 90"):
            FrameStoreWriter(store.path, size, quality)
    FrameStore(store.path)  # nothing happened to it
    path = tmp_path / "f.h5"
    with FrameStoreWriter(path, SIZE, 90) as writer:
        writer.add(*pack_clip("one", video_dir / "one.mp4", SIZE, 90))
        other = subprocess.run(
            [sys.executable, "-m", "scripts.data.pack_frames", *flags_of(video_dir, path)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert other.returncode == 1
        assert f"{path}: another process is packing it" in other.stderr
    with pytest.raises(DataError, match="begun with"):
        FrameStoreWriter(path, SIZE, 91)


def test_what_is_no_store_is_refused(store, tmp_path):
    path = tmp_path / "f.h5"
    data = store.path.read_bytes()
    for content in (b"", b"not HDF5" * 100, data[: len(data) // 2], data[:-1], data[:100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"f\.h5: no readable frame store"):
            FrameStore(path)
    with h5py.File(path, "w") as file:
        file["predictions"] = [1]
    with pytest.raises(DataError, match=r"f\.h5: format and version are \(None, 0\)"):
        FrameStore(path)
    path.write_bytes(data)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(DataError, match=r"'propy frames', 2\), but this program reads"):
        FrameStore(path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_named_file_clip_and_frame(store, tmp_path, num_workers):
    path = tmp_path / "f.h5"
    data = bytearray(store.path.read_bytes())
    target = store.jpegs("long", np.array([150]))[0]
    data[data.index(target) + len(target) // 2] ^= 1
    path.write_bytes(data)
    damaged = FrameStore(path)
    message = r"f\.h5: clip 'long': frame 150 is damaged"
    with pytest.raises(DataError, match=message):
        damaged.jpegs("long")
    videos = [Video(name, 1.0) for name in LENGTHS]
    loader = loader_of(videos, damaged, num_frames=200, num_workers=num_workers)
    with pytest.raises(DataError, match=message) as raised:
        list(loader)
    assert "Traceback" not in str(raised.value)
    assert damaged.load("few", 5, SIZE).shape == (5, 3, SIZE, SIZE)


def test_main_trains_and_evaluates_alike_from_a_store(trained, tmp_path):
    from_store = TinyRun(trained.corpus, tmp_path / "logs")
    path = tmp_path / "frames.h5"
    assert pack_frames.main(flags_of(trained.corpus / "videos", path)) == 0
    from_store.works(*TRAIN, "--epochs", "2", "--frame_store", str(path))
    for a, b in zip(trained.lines(), from_store.lines(), strict=True):
        assert a["loss"] != b["loss"]  # it did not read the folder
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["SumR"] == pytest.approx(a["SumR"], abs=100 / 8)
