"""The stores: one behaviour, in a folder, over S3, and on a Milvus server."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.readout import best_event
from tests.search import programs
from tests.search.programs import started, write_noise
from tests.search.stores import MODEL, N_E, Corpus, queries
from utils import SearchError
from utils.search import VideoIndex
from utils.search.engine import StoredEvents, rank_moments, rank_videos
from utils.search.index import Storage, current, new_token
from utils.search.lance import LanceIndex, event_table
from utils.search.video_index import open_storage


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def serving(command: list[str], port: int) -> Iterator[subprocess.Popen]:
    """A server on loopback, once it takes connections; killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def check_storage(storage: Storage, again: Storage | None = None) -> None:
    """What every store does; `again` is the same, opened by another client."""
    assert storage.model is None
    storage.create(MODEL)
    storage.create(MODEL)  # as another process may, at the same time
    corpus = Corpus()
    corpus.fill(storage, 8)
    again = again or storage
    if again.model is None:
        again.create(MODEL)
    by_name = lambda entries: sorted(map(dataclasses.astuple, entries))  # noqa: E731
    assert by_name(again.videos()) == by_name(corpus.entries)
    version = again.version()
    assert version == again.version()
    check_results(again, corpus)
    old = corpus.entries.pop(3)
    new = corpus.draw(old.name, 2)
    storage.add(new, corpus.events[new.id], [old])
    assert again.version() != version
    gone = corpus.entries.pop(0)
    storage.remove([gone])
    moved = dataclasses.replace(corpus.entries.pop(0), path="/videos/new", row=new_token())
    storage.add(moved, None, [dataclasses.replace(moved, path="/videos/old", row="0")])
    corpus.entries.append(moved)
    # a row of another process for the same file, and events that no row has
    twin = corpus.draw(moved.name)
    storage.add(dataclasses.replace(twin, path=moved.path), corpus.events[twin.id])
    corpus.entries.remove(moved)
    corpus.entries[-1] = dataclasses.replace(twin, path=moved.path)
    assert by_name(again.videos()) == by_name(corpus.entries)
    storage.optimize()
    assert by_name(again.videos()) == by_name(corpus.entries)
    check_results(again, corpus)


def check_results(storage: Storage, corpus: Corpus) -> None:
    entries = {entry.id: entry for entry in storage.videos()}
    texts = queries(3)
    source = StoredEvents(storage, entries.keys(), best_event, N_E)
    for query, scores in zip(texts, source.scores(torch.from_numpy(texts), None), strict=True):
        expected = {token: float(x.max()) for token, x in corpus.cosines(query).items()}
        order = sorted(expected, key=lambda token: -expected[token])
        hits = rank_videos(scores, 5, entries)
        assert [hit.video.id for hit in hits] == order[:5]
        assert [hit.score for hit in hits] == pytest.approx([expected[x] for x in order[:5]],
                                                            abs=1e-5)  # fmt: skip
        assert rank_moments(scores, 1, entries)[0].video.id == order[0]
    ids = {order[0], order[-1]}
    pieces = list(storage.vectors(ids))
    assert set(np.concatenate([piece.video for piece in pieces])) == ids
    for token in ids:
        rows = np.concatenate([piece.vectors[piece.video == token] for piece in pieces])
        np.testing.assert_allclose(rows, corpus.events[token].vectors, atol=1e-6)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    check_storage(LanceIndex(str(tmp_path / "i")), LanceIndex(str(tmp_path / "i")))


def test_an_index_made_anew_for_another_model_is_not_searched_on(tmp_path: Path) -> None:
    reader, other = (LanceIndex(str(tmp_path / "i")) for _ in range(2))
    for storage in (reader, other):
        storage.create(MODEL)
    corpus = Corpus()
    corpus.fill(reader, 2)
    other.create(MODEL, replace=True)
    assert reader.videos() == []
    other.create({**MODEL, "fingerprint": "g"}, replace=True)
    for refused in (reader.videos, lambda: reader.add(corpus.entries[0], None)):
        with pytest.raises(SearchError, match="another model"):
            refused()
    assert other.videos() == []


def test_the_last_row_counts(tmp_path: Path) -> None:
    corpus = Corpus()
    old, new = corpus.draw("a"), corpus.draw("a")
    assert current([new, old]) == ([new], [old]) == current([old, new])


def test_orphans_go_when_they_are_old(tmp_path: Path, monkeypatch) -> None:
    storage, corpus = LanceIndex(str(tmp_path / "i")), Corpus()
    storage.create(MODEL)
    corpus.fill(storage, 3)
    left = corpus.draw("left.mp4")
    count = storage._latest("events").count_rows()
    storage._change("events", lambda t: t.add(event_table(corpus.events[left.id])))
    storage.optimize()  # it may be another indexer's
    assert storage._latest("events").count_rows() == count + N_E
    monkeypatch.setattr("utils.search.lance.ORPHANED_AFTER", -1)
    storage.optimize()
    assert storage._latest("events").count_rows() == count
    assert len(storage.videos()) == 4


def test_a_damaged_or_newer_index_says_so(tmp_path: Path) -> None:
    storage = LanceIndex(str(tmp_path / "i"))
    storage.create(MODEL)
    storage._db.open_table("model").update(values={"format": 99})
    with pytest.raises(SearchError, match="format is 99"):
        LanceIndex(str(tmp_path / "i"))
    for file in (tmp_path / "i" / "model.lance").rglob("*.manifest"):
        file.write_bytes(b"nothing")
    with pytest.raises(SearchError, match="damaged"):
        LanceIndex(str(tmp_path / "i"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SearchError):
        LanceIndex(str(tmp_path / "file")).create(MODEL)


# ------------------------------------------------------------------------------------------- S3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an index in a bucket of a server on loopback."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("moto_server")),
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    with serving(command, port):
        address = f"http://127.0.0.1:{port}"
        request = urllib.request.Request(f"{address}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        for name, value in {
            "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield "s3://bucket/videos.index"


def index_s3(environment: dict[str, str], *arguments: object) -> None:
    """`programs.add` in the environment of this process."""
    os.environ.update(environment)
    programs.add(*arguments)


@pytest.mark.slow
def test_s3_with_two_writers(bucket: str, tmp_path: Path, tmp_path_factory) -> None:
    clip = programs.clip_file(tmp_path_factory.getbasetemp())
    for number in range(8):
        write_noise(tmp_path / f"{number}.mp4", number)
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    shares = [(aws, bucket, [tmp_path], clip, None, {"part": (rank, 2)}) for rank in range(2)]
    with started(index_s3, *shares[0]) as one, started(index_s3, *shares[1]) as other:
        one.join()
        other.join()
        assert (one.exitcode, other.exitcode) == (0, 0)
    there, here = VideoIndex(bucket), VideoIndex(tmp_path / "i", clip_weights=clip)
    here.add(tmp_path, quiet=True)
    found = [
        [(hit.video.name, hit.moments) for hit in index.search("a red door", k=99)]
        for index in (there, here)
    ]
    assert found[0] == found[1] and len(found[0]) == 8
    check_storage(LanceIndex(f"{bucket}.other"))


# ---------------------------------------------------------------------------------------- Milvus


@contextmanager
def milvus(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    command = [str(Path(sys.executable).with_name("milvus-lite")), "server", "--host", "127.0.0.1"]
    with serving([*command, "--data-dir", str(folder), "--port", str(port)], port) as server:
        yield server


@pytest.mark.slow
def test_milvus_over_the_wire(tmp_path: Path, tmp_path_factory) -> None:
    """What is embedded finds the same; also after the server was killed; and by two clients."""
    clip = programs.clip_file(tmp_path_factory.getbasetemp())
    for number in range(5):
        write_noise(tmp_path / "videos" / f"{number}.mp4", number)
    write_noise(tmp_path / "videos" / "long.mp4", 9, frames=400)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    here = VideoIndex(tmp_path / "i", clip_weights=clip)
    here.add(tmp_path / "videos", quiet=True)

    def found(index: VideoIndex, by: str) -> list[tuple]:
        return [
            (hit.video.name, round(hit.score, 4), [(m.start, m.end, m.level) for m in hit.moments])
            for hit in index.search("a red door", k=6, by=by)
        ]

    with milvus(tmp_path / "milvus", port):
        check_storage(open_storage(f"{uri}#check"), open_storage(f"{uri}#check"))
        VideoIndex(uri, clip_weights=clip).add(tmp_path / "videos", quiet=True)
        other = VideoIndex(uri)
        for by in ("videos", "moments"):
            assert found(other, by) == found(here, by)
        within = here.search("a red door", within="[0-2].mp4")
        assert [hit.video.name for hit in other.search("a red door", within="[0-2].mp4")] == [
            hit.video.name for hit in within
        ]
        long = next(video for video in other.videos() if video.name == "long.mp4")
        assert len(other.timeline("a red door", long.id)) == 3 * 42
    with milvus(tmp_path / "milvus", port):
        again = VideoIndex(uri)
        assert again.status()["videos"] == 6
        assert found(again, "moments") == found(here, "moments")
        assert again.remove("long.mp4") == 1 and len(found(again, "videos")) == 5
    with pytest.raises(SearchError, match="Milvus"):
        VideoIndex(f"http://127.0.0.1:{free_port()}")
