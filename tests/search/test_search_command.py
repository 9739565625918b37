"""scripts/search.py: what its commands print and write, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.search import main
from tests.search import programs
from tests.search.programs import ROOT, write_noise
from utils import OutputError, SearchError
from utils.search import VideoIndex

COMMANDS = ("index", "find", "serve", "info", "remove", "optimize", "export", "demo")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of five videos, one of which is none."""
    folder = tmp_path_factory.mktemp("command")
    for number in range(4):
        write_noise(folder / "videos" / f"{number}.mp4", number)
    (folder / "videos" / "bad.mp4").write_bytes(b"\0" * 99)
    clip = programs.clip_file(tmp_path_factory.getbasetemp())
    main(["index", str(folder / "videos"), "--index", str(folder / "i"),
          "--clip_weights", str(clip)])  # fmt: skip
    return folder


def run(capsys: pytest.CaptureFixture, made: Path, command: str, *arguments: str) -> str:
    capsys.readouterr()
    main([command, *arguments, "--index", str(made / "i")])
    return capsys.readouterr().out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "--index" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_finding(capsys: pytest.CaptureFixture, made: Path) -> None:
    table = run(capsys, made, "find", "a red door", "--by", "videos")
    assert table.count(".mp4") >= 4 and "level" in table
    found = json.loads(run(capsys, made, "find", "a red door", "--k", "2", "--json"))
    assert len(found["hits"]) == 2 and found["query"] == "a red door"
    assert set(found["hits"][0]["moments"][0]) == {"start", "end", "score", "level"}
    narrow = json.loads(run(capsys, made, "find", "a red door", "--in", "[01].mp4", "--json"))
    assert {hit["video"]["name"] for hit in narrow["hits"]} == {"0.mp4", "1.mp4"}
    pictures = run(capsys, made, "find", "a door", "--k", "2", "--pictures", str(made / "p"))
    assert sorted(path.name for path in (made / "p").iterdir()) == ["001.jpg", "002.jpg"]
    assert str(made / "p" / "002.jpg") in pictures


def test_information(capsys: pytest.CaptureFixture, made: Path) -> None:
    assert "failed: 1" in run(capsys, made, "info")
    facts = json.loads(run(capsys, made, "info", "--json"))
    assert facts["videos"] == 4 and list(facts["reasons"]) == [str(made / "videos" / "bad.mp4")]


def test_the_approximate_index(capsys: pytest.CaptureFixture, made: Path) -> None:
    with pytest.raises(SearchError, match="optimize --approximate"):
        main(["info", "--recall", "--index", str(made / "i")])
    run(capsys, made, "optimize", "--approximate")
    facts = json.loads(run(capsys, made, "info", "--recall", "--json"))
    assert 0.5 < facts["recall at 10"] <= 1
    assert "mp4" in run(capsys, made, "find", "a red door", "--approximate")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_export(capsys: pytest.CaptureFixture, made: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    output = made / f"events.{suffix}"
    assert "168 events" in run(capsys, made, "export", str(output))
    read = {"parquet": pa.parquet.read_table, "arrow": lambda x: pa.ipc.open_file(x).read_all()}
    rows = read[suffix](str(output))
    assert [rows.schema.names[i] for i in (0, 1, 2, -1)] == ["path", "video", "window", "vector"]
    assert rows.num_rows == 168 and rows["path"][0].as_py().startswith(str(made / "videos"))
    assert len(rows["vector"][0]) == rows.schema.field("vector").type.list_size
    with pytest.raises(SearchError, match="parquet"):
        main(["export", str(made / "events.csv"), "--index", str(made / "i")])


def test_removing(capsys: pytest.CaptureFixture, made: Path, tmp_path: Path) -> None:
    index = VideoIndex(tmp_path / "i", clip_weights=made.parent / "search_clip.pt")
    index.add(made / "videos", quiet=True)
    main(["remove", "[01].mp4", "bad.mp4", "--index", str(tmp_path / "i")])
    assert "[01].mp4: 2 removed" in capsys.readouterr().out
    assert [video.name for video in index.videos()] == ["2.mp4", "3.mp4"]


def test_serving_takes_all_its_flags(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    calls = []
    monkeypatch.setattr("utils.search.server.serve", lambda *a, **k: calls.append((a[1:], k)))
    main(["serve", "--index", str(made / "i"), "--port", "0", "--open", "--name", "a.example",
          "--name", "b.example", "--token", "x" * 16])  # fmt: skip
    assert calls == [(
        ("127.0.0.1", 0, "x" * 16), {"open_browser": True, "names": ["a.example", "b.example"]}
    )]  # fmt: skip


def test_mistakes_say_what_to_do(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SearchError, match="no index there"):
        main(["find", "x", "--index", str(made / "nothing")])
    with pytest.raises(SearchError, match="empty"):
        main(["find", " ", "--index", str(made / "i")])
    with pytest.raises(SearchError, match="no such file"):
        main(["index", str(made / "nothing"), "--index", str(made / "i")])
    with pytest.raises(OutputError):
        main(["find", "x", "--pictures", "/proc/nothing", "--index", str(made / "i")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SearchError, match="one process"):
        main(["index", str(made), "--rebuild", "--index", str(made / "i")])


def test_without_any_model(monkeypatch: pytest.MonkeyPatch, made: Path, caplog) -> None:
    monkeypatch.setattr("utils.search.model.WEIGHTS_FOLDER", made)
    monkeypatch.setattr("utils.search.model.DEMO", {"checkpoint": made / "a", "clip_weights": made})
    with pytest.raises(SearchError, match=r"scripts/demo.sh"):
        main(["index", str(made / "videos"), "--index", str(made / "new")])
    (made / "ViT-B-32.pt").write_bytes((made.parent / "search_clip.pt").read_bytes())
    main(["index", str(made / "videos"), "--index", str(made / "new")])
    assert "CLIP as it is" in caplog.text
    assert VideoIndex(made / "new").info()["checkpoint"] is None


@pytest.mark.slow
def test_under_torchrun(made: Path, tmp_path: Path) -> None:
    """And by its name in a shell, from another folder."""
    clip, uri = made.parent / "search_clip.pt", tmp_path / "i"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--index", str(uri), "--clip_weights", str(clip)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "scripts.search", "index", str(made / "videos"), *flags],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "process 0: " in done.stdout and "process 1: " in done.stdout
    assert VideoIndex(uri).status()["videos"] == 4
