"""Indexing: what is new, changed, moved, gone or broken; killed, watched, by several at once."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.search import programs
from tests.search.programs import started, write_noise
from utils import SearchError
from utils.search import VideoIndex
from utils.search.hits import FAILED

QUERY = "a red door"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.clip_file(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        write_noise(tmp_path / "videos" / f"{number}.mp4", number)
    return tmp_path / "videos"


@pytest.fixture
def index(tmp_path: Path, clip: Path) -> VideoIndex:
    return VideoIndex(tmp_path / "videos.index", clip_weights=clip)


def names(index: VideoIndex) -> list[str]:
    return sorted(video.name for video in index.videos())


def found(index: VideoIndex) -> list[tuple]:
    """What a search finds, all of it."""
    return [
        (
            hit.video.name,
            round(hit.score, 5),
            [(m.start, m.end, m.level, round(m.score, 5)) for m in hit.moments],
        )
        for hit in index.search(QUERY, k=1000).hits
    ]


def test_videos_are_indexed_once(index: VideoIndex, folder: Path) -> None:
    report = index.add(folder, quiet=True)
    assert (report.added, report.failed) == (4, []) and report.video_seconds == pytest.approx(48)
    before = found(index)
    assert len(before) == 4 and {row[0] for row in before} == {f"{i}.mp4" for i in range(4)}
    report = index.add(folder, quiet=True)
    assert (report.added, report.unchanged) == (0, 4)
    assert found(index) == before
    assert index.roots == [str(folder)]


def test_changed_touched_moved_and_vanished_files(index: VideoIndex, folder: Path) -> None:
    index.add(folder, quiet=True)
    ids = {video.name: video.id for video in index.videos()}
    write_noise(folder / "0.mp4", 100)  # changed
    os.utime(folder / "1.mp4", (1, 1))  # touched
    (folder / "2.mp4").rename(folder / "moved.mp4")
    (folder / "3.mp4").unlink()
    report = index.add(folder, quiet=True)
    assert (report.changed, report.unchanged, report.moved, report.vanished) == (1, 1, 1, 1)
    assert names(index) == ["0.mp4", "1.mp4", "3.mp4", "moved.mp4"]
    now = {video.name: video.id for video in index.videos()}
    assert now["moved.mp4"] == ids["2.mp4"] and now["1.mp4"] == ids["1.mp4"]
    assert now["0.mp4"] != ids["0.mp4"]
    assert index.add(folder, quiet=True, prune=True).removed == 1
    assert names(index) == ["0.mp4", "1.mp4", "moved.mp4"]
    anew = VideoIndex(f"{index.uri}.anew", clip_weights=index._named["clip_weights"])
    anew.add(folder, quiet=True)
    assert found(index) == found(anew)
    assert index.storage._latest("events").count_rows() == 3 * 42


def test_a_moved_file_and_its_copy_are_two(index: VideoIndex, folder: Path) -> None:
    index.add(folder, quiet=True)
    shutil.copy(folder / "0.mp4", folder / "copy.mp4")
    (folder / "0.mp4").rename(folder / "moved.mp4")
    report = index.add(folder, quiet=True, prune=True)
    assert (report.moved, report.added) == (1, 1)
    assert names(index) == ["1.mp4", "2.mp4", "3.mp4", "copy.mp4", "moved.mp4"]


def test_a_copy_is_a_video_of_its_own(index: VideoIndex, folder: Path) -> None:
    shutil.copy(folder / "0.mp4", folder / "copy.mp4")
    index.add(folder, quiet=True)
    assert len(found(index)) == 5


def test_pruning_keeps_to_the_folders_that_were_named(index: VideoIndex, folder: Path) -> None:
    write_noise(folder.parent / "others" / "5.mp4", 5)
    index.add([folder, folder.parent / "others"], quiet=True)
    (folder.parent / "others" / "5.mp4").unlink()
    assert index.add(folder, quiet=True, prune=True).removed == 0
    assert len(index.videos()) == 5


def test_broken_files_are_listed_and_tried_again_when_they_change(
    index: VideoIndex, folder: Path
) -> None:
    (folder / "broken.mp4").write_bytes(bytes(range(256)) * 9)
    (folder / "notes.txt").write_text("no video")
    report = index.add(folder, quiet=True)
    assert [entry.name for entry in report.failed] == ["broken.mp4"]
    assert report.ignored == {".txt": 1} and "broken.mp4: cannot be read" in str(report)
    (failed,) = [video for video in index.videos() if video.status == FAILED]
    assert failed.reason and index.status()["failed"] == 1
    assert index.timeline(QUERY, failed.id) == []
    again = index.add(folder, quiet=True)
    assert [entry.row for entry in again.failed] == [entry.row for entry in report.failed]
    write_noise(folder / "broken.mp4", 7)
    assert index.add(folder, quiet=True).changed == 1
    assert index.status()["failed"] == 0 and len(found(index)) == 5
    (folder / "0.mp4").write_bytes(b"")  # and a good one that breaks is no longer found
    assert len(index.add(folder, quiet=True).failed) == 1
    assert len(found(index)) == 4


NAMES = ["a b.mp4", "it's.mp4", 'say "hi".mp4', "-rf.mp4", "--help.mp4", "🎬.mp4", "two\nlines.mp4",
         unicodedata.normalize("NFC", "Übung.mp4"), unicodedata.normalize("NFD", "Übung.mp4"),
         "%s.mp4", "a;b&c.mp4", "[x].mp4", "concat:a.mp4", "<img onerror=1>.mp4"]  # fmt: skip


def test_names_of_all_kinds(index: VideoIndex, tmp_path: Path) -> None:
    write_noise(tmp_path / "one.mp4", 1)
    folder = tmp_path / "it's 100% 'mine'"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(tmp_path / "one.mp4", folder / name)
    os.symlink(tmp_path / "nowhere.mp4", folder / "dangling.mp4")  # noqa: PTH211
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.mp4"))).write_bytes(b"x")
    report = index.add(folder, quiet=True)
    assert report.added == len(NAMES)
    reasons = sorted(entry.reason for entry in report.failed)
    assert len(reasons) == 2 and "not UTF-8" in reasons[1], reasons
    assert sorted(v.name for v in index.videos() if v.status != FAILED) == sorted(NAMES)
    assert all(Path(v.path).is_file() for v in index.videos() if v.status != FAILED)
    assert index.remove("two\nlines.mp4") == 1
    assert len(found(index)) == len(NAMES) - 1
    assert str(index.search(QUERY, k=99)).count("\n") > len(NAMES)


def test_long_videos_are_found_where_the_moment_is(index: VideoIndex, tmp_path: Path) -> None:
    write_noise(tmp_path / "long.mp4", 3, frames=3 * 150)
    index.add(tmp_path / "long.mp4", quiet=True)
    (video,) = index.videos()
    assert video.duration == pytest.approx(150)
    timeline = index.timeline(QUERY, video.id)
    # three windows of 64 s at 0, 48 and 86 s
    assert len(timeline) == 3 * 42 == index.status()["events"]
    assert {m.start for m in timeline if m.level == 4} == {0.0, 48.0, 86.0}
    assert max(m.end for m in timeline) == pytest.approx(150)
    best = max(timeline, key=lambda moment: moment.score)
    (hit,) = index.search(QUERY, k=1, by="moments")
    assert hit.moments[0] == best


def test_another_model_is_refused(index: VideoIndex, folder: Path, tmp_path: Path) -> None:
    index.add(folder / "0.mp4", quiet=True)
    state = torch.load(index._named["clip_weights"])
    name = next(name for name in state if name.endswith("in_proj_weight"))
    other = tmp_path / "other.pt"
    torch.save(state | {name: state[name] * 1.5}, other)
    with pytest.raises(SearchError, match=r"another model.*--rebuild"):
        VideoIndex(index.uri, clip_weights=other).add(folder, quiet=True)
    with pytest.raises(SearchError, match="another model"):
        VideoIndex(index.uri, clip_weights=other).search(QUERY)
    rebuilt = VideoIndex(index.uri, clip_weights=other)
    rebuilt.add(folder, quiet=True, rebuild=True)
    assert len(found(rebuilt)) == 4
    assert found(VideoIndex(index.uri)) == found(rebuilt)  # which remembers its model


def test_what_is_not_there_says_so(tmp_path: Path, clip: Path, folder: Path) -> None:
    with pytest.raises(SearchError, match="no index there"):
        VideoIndex(tmp_path / "none").search(QUERY)
    assert not (tmp_path / "none").exists()
    index = VideoIndex(tmp_path / "i", clip_weights=clip)
    with pytest.raises(SearchError, match="no such file"):
        index.add(tmp_path / "nothing")
    index.add(folder, quiet=True)
    with pytest.raises(SearchError, match="no video"):
        index.video("0123")
    with pytest.raises(SearchError, match="approximate"):
        VideoIndex(tmp_path / "i", approximate=True).search(QUERY)


def test_an_index_that_changes_is_followed(index: VideoIndex, folder: Path) -> None:
    index.add(folder / "0.mp4", quiet=True)
    reader = VideoIndex(index.uri)
    assert len(found(reader)) == 1
    index.add(folder, quiet=True)
    assert len(found(reader)) == 4
    index.remove("1.mp4")
    assert len(found(reader)) == 3
    assert found(reader) == found(index) == found(VideoIndex(index.uri, memory_gib=0))


def test_looking_a_video_up_waits_for_no_search(
    index: VideoIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(folder, quiet=True)
    index.load()
    token = index.videos()[0].id
    inside, end = threading.Event(), threading.Event()
    real = index.encode_texts

    def encode_texts(texts):
        inside.set()
        assert end.wait(60)
        return real(texts)

    monkeypatch.setattr(index, "encode_texts", encode_texts)
    search = threading.Thread(target=index.search, args=(QUERY,))
    look = threading.Thread(target=lambda: (index.video(token), index.roots, index.status()))
    search.start()
    try:
        assert inside.wait(60)
        look.start()
        look.join(30)
        assert not look.is_alive()
    finally:
        end.set()
        search.join()


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, clip: Path, rounds: int) -> None:
    """What was acknowledged is there, nothing is twice, and the next run goes on."""
    dice = random.Random(rounds)
    folder, uri, acknowledged = tmp_path / "videos", str(tmp_path / "i"), tmp_path / "acknowledged"
    for number in range(8 * rounds):
        write_noise(folder / f"{number}.mp4", number)
    acknowledged.touch()
    for round_ in range(rounds):
        already = len(acknowledged.read_text().splitlines())
        with started(programs.add, uri, [folder], clip, acknowledged) as process:
            while len(acknowledged.read_text().splitlines()) < already + 2 and process.is_alive():
                time.sleep(0.01)
            time.sleep(dice.random() * 0.15)
            process.kill()
            process.join()
        lines = acknowledged.read_text().splitlines()
        index = VideoIndex(uri)
        there = names(index)
        assert set(lines) <= set(there) and len(there) == len(set(there)), round_
        assert {row[0] for row in found(index)} == set(there)
        changed = folder / f"{dice.randrange(8)}.mp4"  # so that videos are replaced, too
        write_noise(changed, 1000 + round_)
    programs.add(uri, [folder], clip)
    anew = str(tmp_path / "anew")
    programs.add(anew, [folder], clip)
    assert found(VideoIndex(uri)) == found(VideoIndex(anew))
    assert len(names(VideoIndex(uri))) == 8 * rounds


def test_searched_while_it_is_indexed(tmp_path: Path, clip: Path) -> None:
    folder, uri, results = tmp_path / "videos", str(tmp_path / "i"), tmp_path / "results"
    for number in range(20):
        write_noise(folder / f"{number:02d}.mp4", number)
    programs.add(uri, [folder / "00.mp4"], clip)
    with started(programs.watch, uri, results) as reader:
        while not results.exists() or not results.read_text().endswith("\n"):
            assert reader.is_alive()
            time.sleep(0.05)
        with started(programs.add, uri, [folder], clip) as writer:
            writer.join()
            assert writer.exitcode == 0
        seen = len(results.read_text().splitlines())
        while len(results.read_text().splitlines()) < seen + 2:
            assert reader.is_alive()
            time.sleep(0.05)
    counts = np.array([line.split() for line in results.read_text().splitlines()[:-1]], dtype=int)
    assert (np.diff(counts[:, 0]) >= 0).all() and (np.diff(counts[:, 1]) >= 0).all()
    assert counts[0, 0] == 1 and counts[-1, 0] == 20 and len(set(counts[:, 0])) > 3


def test_two_indexers_at_once(tmp_path: Path, clip: Path) -> None:
    folder, uri = tmp_path / "videos", str(tmp_path / "i")
    for number in range(10):
        write_noise(folder / f"{number}.mp4", number)
    with (
        started(programs.add, uri, [folder], clip) as one,
        started(programs.add, uri, [folder], clip) as other,
    ):
        one.join()
        other.join()
        assert (one.exitcode, other.exitcode) == (0, 0)
    index, anew = VideoIndex(uri), VideoIndex(tmp_path / "anew", clip_weights=clip)
    anew.add(folder, quiet=True)
    assert names(index) == names(anew) and found(index) == found(anew)
    index.optimize()
    assert index.storage._latest("events").count_rows() == 10 * 42
    assert len(index.storage._rows()) == 10


def test_shares_of_several_processes(tmp_path: Path, clip: Path, folder: Path) -> None:
    uri = str(tmp_path / "i")
    with (
        started(programs.add, uri, [folder], clip, None, {"part": (0, 2)}) as one,
        started(programs.add, uri, [folder], clip, None, {"part": (1, 2)}) as other,
    ):
        one.join()
        other.join()
        assert (one.exitcode, other.exitcode) == (0, 0)
    index = VideoIndex(uri)
    assert names(index) == [f"{i}.mp4" for i in range(4)]
    assert len(index.storage._rows()) == 4 and len(found(index)) == 4


def test_progress_is_told(index: VideoIndex, folder: Path) -> None:
    from utils.search.progress import Progress

    index.add(folder, quiet=True)
    assert index.status()["indexing"] is None
    progress = Progress(index.uri, 7)
    progress.show(3, "a.mp4")
    told = index.status()["indexing"]
    assert (told["done"], told["total"], told["name"]) == (3, 7, "a.mp4")
    progress.close()
    assert index.status()["indexing"] is None
