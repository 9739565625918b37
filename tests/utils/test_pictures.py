"""Pictures: what is drawn is what the model attends to, in files that others can read."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps, font_manager
from PIL import Image

from dataloaders.annotations import VAL, Query, Split, read_annotations
from models import ProPy
from modules import ModelError
from modules.pyramid import PromptPyramid
from scripts.plot import plot_run
from tests.corpus import ROOT, WITHOUT_CACHES
from tests.golden_model import GoldenModel
from utils import OutputError, RunError
from utils.arguments import PLOT_STYLES, parse_args
from utils.evaluation.embed import Embeddings
from utils.evaluation.predictions import load_predictions
from utils.pictures.attention_store import SCORES, attention_store, query_name, read_attention
from utils.pictures.draw import (
    STYLES,
    EventAttention,
    QueryPicture,
    Style,
    caption_fonts,
    event_rows,
    heat_frames,
    save_overview,
    save_tree,
)
from utils.pictures.plots import PlotSettings, check_request, choose_queries, plot_split
from utils.training.checkpoint import BEST, load_checkpoint

SPLITS = ["tvr", "activitynet", "charades", "qvhighlights_val", "qvhighlights_test"]
PYRAMIDS = [
    {"Nf": 32, "H": [[2, 2], [2, 1], [3, 2], [3, 2], [3, 1]]},
    {"Nf": 8, "H": [[2, 2], [2, 1], [3, 1]]},
    {"Nf": 9, "H": [[3, 1], [3, 1], [5, 1]]},
    {"Nf": 4, "H": [[4, 1]]},
]


def query(desc_id: str | int, vid_name: str = "v", desc: str = "a dog") -> Query:
    return Query(desc_id, desc, vid_name, 8.0, ((1.0, 3.0),))


def load_golden(name: str, folder: Path) -> tuple[GoldenModel, ProPy]:
    golden = GoldenModel.read(name)
    model = golden.build()
    load_checkpoint(golden.write_authors_checkpoint(folder / "authors.pth.tar"), model)
    return golden, model.double().eval()


def test_stored_attention_is_the_authors(tmp_path) -> None:
    golden, model = load_golden("m1", tmp_path)
    frames = golden.video()
    split = Split(VAL, [query(f"v{i}#0", f"v{i}") for i in range(len(frames))])
    evaluator = SimpleNamespace(
        split=split,
        normalize_events=True,
        ranks=lambda *_: torch.ones(len(frames)),
        load_videos=lambda _: [{"frames": frames, "indices": torch.arange(len(frames))}],
    )
    embeddings = Embeddings(torch.rand(len(frames), model.pyramid.num_events, 4),
                            torch.rand(len(frames), 4))  # fmt: skip
    settings = PlotSettings(tmp_path)
    plot_split(evaluator, embeddings, model, settings, ids=[], limit=0, seed=0, source="golden")
    stored = np.stack([read_attention(tmp_path, q.desc_id) for q in split.queries], axis=1)
    np.testing.assert_allclose(stored, golden["attention_weights"], rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", ["m1", "m5"])
def test_heads_average_to_the_authors(name: str, tmp_path) -> None:
    golden, model = load_golden(name, tmp_path)
    with torch.no_grad():
        heads = [
            model.encode_video(golden.video(), return_attention=True, head=head)[1]
            for head in range(model.num_heads)
        ]
    mean = torch.stack(heads).mean(0)
    np.testing.assert_allclose(mean, golden["attention_weights"], rtol=0, atol=5e-7)
    for head in heads:
        np.testing.assert_allclose(head.sum(-1), 1, atol=1e-9)
    assert all(not torch.allclose(heads[0], other) for other in heads[1:])
    with pytest.raises(ValueError, match="head"):
        model.encode_video(golden.video(), return_attention=True, head=model.num_heads)


def test_columns_of_a_row() -> None:
    """Each column holds its own number, so that every part can be told by what it holds."""
    pyramid = PromptPyramid.from_config(PYRAMIDS[1])
    prompts, grid, frames = 3, 4, 8
    first = pyramid.num_events + prompts * pyramid.num_bottom_events
    row = np.arange(first + (1 + grid * grid) * frames, dtype=np.float64)
    rows = np.stack([row * 0, row, *[row * 0] * (pyramid.num_events - 2)])
    got = EventAttention.of_event(rows, 1, pyramid, prompts)
    assert got.events.tolist() == list(range(pyramid.num_events))
    assert got.prompts == sum(range(pyramid.num_events, first))
    assert got.class_tokens.tolist() == [first + f for f in range(frames)]
    assert got.patches.shape == (frames, grid, grid)
    for f, y, x in np.ndindex(got.patches.shape):
        assert got.patches[f, y, x] == first + (1 + y * grid + x) * frames + f


# ---------------------------------------------------------------- drawing


def test_heat_lies_where_the_attention_is() -> None:
    frames = torch.zeros(2, 3, 35, 35, dtype=torch.uint8)  # 5 pixels a patch, one is its middle
    frames[:, :, :, 20:] = 200
    patches = np.zeros((2, 7, 7))
    patches[1, 2, 5] = 0.4
    heat = heat_frames(frames, patches, STYLES["readable"])
    assert heat.shape == (2, 3, 35, 35) and heat.dtype == torch.uint8
    heat = heat.permute(0, 2, 3, 1).numpy()
    cold, hot = (255 * np.array(colormaps["inferno"](x)[:3]) for x in (0.0, 1.0))
    np.testing.assert_allclose(heat[0, :, :20], np.broadcast_to(cold / 2, (35, 20, 3)), atol=1)
    np.testing.assert_allclose(heat[0, 0, 30], (cold + 200) / 2, atol=1)
    np.testing.assert_allclose(heat[1, 2 * 5 + 2, 5 * 5 + 2], (hot + 200) / 2, atol=1)
    elsewhere = np.ones((35, 35), bool)
    elsewhere[1 * 5 : 4 * 5, 4 * 5 : 7 * 5] = False  # bilinear: it reaches its neighbours
    assert (heat[0] == heat[1])[elsewhere].all()


def test_heat_is_scaled_over_the_video_and_the_authors_frames_one_by_one() -> None:
    patches = np.full((3, 4, 4), 0.1)
    patches[1], patches[2] = 0.2, 0.3
    frames = torch.full((3, 3, 8, 8), 60, dtype=torch.uint8)
    frames[0, :, :4] = 110
    plain = heat_frames(frames * 0, patches, Style("gray", "red", "orange", "-", stretch=False))
    assert plain[:, 0, 4, 4].tolist() == [0, 64, 128]
    stretched = Style("gray", "red", "orange", "-", stretch=True)
    heat = heat_frames(frames, patches * 0 + 0.5, stretched)
    assert heat[0, 0, :, 0].tolist() == [128] * 4 + [0] * 4 and not heat[1:].any()


@pytest.mark.parametrize("config", PYRAMIDS)
def test_boxes_of_the_pyramid_do_not_overlap(config: dict) -> None:
    pyramid = PromptPyramid.from_config(config)
    spans, levels = pyramid.spans.tolist(), pyramid.level_of_event.tolist()
    rows, centres = event_rows(np.array(spans), np.array(levels))
    for a in range(len(rows)):
        for b in range(a):
            apart = spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0]
            assert apart or abs(rows[a] - rows[b]) > 0.999
            assert levels[a] == levels[b] or (rows[a] < rows[b]) == (levels[a] < levels[b])
    assert centres == sorted(centres) and len(centres) == max(levels)


def picture(title: str, windows: tuple = ((1.0, 3.0),)) -> QueryPicture:
    pyramid = PromptPyramid.from_config(PYRAMIDS[0])
    rng = np.random.default_rng(0)
    attention = EventAttention(
        rng.random(42), pyramid.related[3].numpy(), 0.1, rng.random(32), rng.random((32, 7, 7))
    )
    frames = torch.from_numpy(rng.integers(0, 256, (32, 3, 16, 16), dtype=np.uint8))
    return QueryPicture(
        64.0, windows, frames, pyramid.spans.numpy() * 2.0, pyramid.level_of_event.numpy(), 3,
        rng.random(42), "cosine", title, "video v", attention,
    )  # fmt: skip


@pytest.mark.parametrize("style", PLOT_STYLES)
def test_overview_says_what_is_what(style: str, tmp_path) -> None:
    title = "it costs $5, then $6_x^2 & <b>"
    save_overview(tmp_path / "o.svg", picture(title), STYLES[style])
    svg = (tmp_path / "o.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for label in (
        "it costs $5, then $6_x^2 &amp; &lt;b&gt;", "time (s)", "level 1", "(4 s)",
        "attention to events", "attention per patch", "chosen event", "true moment",
        "text and event", "event it attends to most", "event it cannot see", "60",
    ):  # fmt: skip
        assert label in texts, label
    save_overview(tmp_path / "o.svg", picture(title, windows=()), STYLES[style])
    assert "true moment: unknown" in (tmp_path / "o.svg").read_text()


def test_captions_in_scripts_that_the_font_lacks(tmp_path, monkeypatch, caplog) -> None:
    """A font that has them is found and used; of what none has one warning tells, not hundreds."""
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "dog"])
    builder.setupCharacterMap({ord("犬"): "dog"})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 700)), pen.lineTo((700, 0)), pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "dog": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "dog": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Dogs", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "dogs.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "dogs.ttf")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for caption in ("a dog\n", "a 犬", "강아지 🐶 犬"):
            assert not caplog.text
            with caption_fonts(caption):
                save_overview(tmp_path / "o.svg", picture(caption), STYLES["readable"])
                save_tree(tmp_path / "o.jpg", picture(caption), STYLES["readable"])
                save_tree(tmp_path / "o.pdf", picture(caption), STYLES["readable"])
            svg = (tmp_path / "o.svg").read_text()
            assert ("Test Dogs" in svg) == ("犬" in caption) and caption.strip() in svg
    assert (tmp_path / "o.pdf").read_bytes().startswith(b"%PDF")
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("강", "🐶", "HANGUL")), caplog.text
    assert "犬" not in record.getMessage()


# ---------------------------------------------------------------- choosing


def test_hits_limit_and_names() -> None:
    queries = [query(name) for name in ("a", "b", 3, "d", "e", "f")]
    ranks = torch.tensor([1, 2, 1, 1, 7, 1])
    assert choose_queries(ranks, queries, [], 0, 0) == [0, 2, 3, 5]
    choices = {tuple(choose_queries(ranks, queries, [], 2, seed)) for seed in range(30)}
    assert all(set(c) <= {0, 2, 3, 5} and c == tuple(sorted(c)) for c in choices)
    assert len(choices) == 6, "every pair comes up"
    assert choose_queries(ranks, queries, ["e", "3"], 1, 0) == [2, 4], "named ones, whatever rank"
    with pytest.raises(RunError, match="none of the 6"):
        choose_queries(ranks + 1, queries, [], 0, 0)
    with pytest.raises(RunError, match="none of the videos of --plot_ids g"):
        choose_queries(ranks, queries, ["g"], 0, 0)


# ---------------------------------------------------------------- files

NASTY = ["a", "a/b", "a/b/c", "/", ".", "..", "", "%", "%2F", "a%2Fb", "x#0", "con:", "é", " ",
         "a ", "\n", "x" * 400, "x" * 399 + "y", "é" * 200]  # fmt: skip


@given(st.lists(st.text(max_size=8), unique=True, max_size=20))
def test_names_are_safe_and_distinct(ids: list[str]) -> None:
    ids = list(dict.fromkeys(ids + NASTY))
    names = [query_name(desc_id) for desc_id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert name and "/" not in name and "\\" not in name and not name.startswith(".")
        assert len(name.encode(errors="surrogatepass")) <= 200 and "\0" not in name
    assert query_name("v_x-1#0") == "v_x-1#0" and query_name(7) == "7"


def test_store_holds_every_id_and_a_video_once(tmp_path) -> None:
    rng = np.random.default_rng(0)
    attention = {name: rng.random((3, 7, 50), dtype=np.float32) for name in "uvw"}
    scores = {name: rng.random(7, dtype=np.float32) for name in NASTY}
    with attention_store(tmp_path, {"model": "m"}) as add:
        for i, name in enumerate(NASTY):
            add(name, "uvw"[i % 3], attention["uvw"[i % 3]], scores[name], 1 + i % 2)
        assert not list(tmp_path.glob("*.hdf5")), "files appear when they are complete"
    for i, name in enumerate(NASTY):
        assert (read_attention(tmp_path, name) == attention["uvw"[i % 3]]).all()
        assert (read_attention(tmp_path, name, SCORES) == scores[name]).all()
        (tmp_path / query_name(name)).mkdir()
    hits = json.loads((tmp_path / "r1_ids.json").read_text())
    assert hits == [[name, "uvw"[i % 3]] for i, name in enumerate(NASTY) if i % 2 == 0]
    with h5py.File(tmp_path / "attn.hdf5") as file:
        assert len(file) == len(NASTY) and dict(file.attrs) == {"model": "m"}
        data = file[query_name("a")]
        assert data.chunks == (1, 7, 50) and data.compression == "gzip"
    assert (tmp_path / "attn.hdf5").stat().st_size < 4 * attention["u"].nbytes + 40_000
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".hdf5", ".json"}


def test_a_broken_off_store_leaves_the_old_files(tmp_path) -> None:
    one = np.ones((1, 2, 3), np.float32)
    with attention_store(tmp_path, {}) as add:
        add("a", "v", one, one[0, 0], 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(FileNotFoundError, match="of the caller"),
        attention_store(tmp_path, {}) as add,
    ):
        add("b", "v", one, one[0, 0], 1)
        raise FileNotFoundError("of the caller")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("limit", [100_000, 3_000_000])
def test_a_store_on_a_full_disk(limit: int, tmp_path) -> None:
    """HDF5 itself would end the program by a segmentation fault."""
    one = np.random.default_rng(0).random((3, 7, 30_000), np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with (
            pytest.raises(OutputError, match=r"attn\.hdf5: cannot be written"),
            attention_store(tmp_path, {}) as add,
        ):
            for name in NASTY:
                add(name, f"v{name}", one, one[0, 0, :7], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the program


def test_what_plotting_leaves(trained) -> None:
    queries = {str(q.desc_id): q for q in read_annotations(trained.corpus / "annos.jsonl")}
    predictions = load_predictions(trained.logs / "predictions.h5")
    pyramid = PromptPyramid.from_config(PYRAMIDS[1])
    folders = {path.name for path in (trained.plots / "attention").iterdir()}
    assert folders == {"v%2F0#1", "%2E%2E", "7"}
    hits = []
    for row, desc_id in enumerate(predictions.desc_ids):
        if query_name(desc_id) not in folders:
            continue
        q, own = queries[desc_id], predictions.target_scores[row]
        rank, event = int(predictions.target_rank[row]), int(own.argmax())
        hits += [[q.desc_id, q.vid_name]] if rank == 1 else []
        per_frame = q.duration / 8
        start, end = pyramid.spans[event].tolist()
        folder = trained.plots / "attention" / query_name(desc_id)
        meta = json.loads((folder / "meta.json").read_text())
        expected = {
            "desc_id": q.desc_id, "text": q.desc, "video": q.vid_name, "duration": q.duration,
            "rank": rank, "event": event, "model": str(trained.logs / BEST),
            "level": int(pyramid.level_of_event[event]),
            "proposal_frames": [start, end], "layer": 3, "head": "mean",
            "proposal_seconds": [start * per_frame, end * per_frame],
            "true_windows_seconds": [list(w) for w in q.windows],
        }  # fmt: skip
        assert expected.items() <= meta.items()
        assert meta["score"] == pytest.approx(float(own.max()), abs=1e-5)
        assert meta["true_windows_frames"][0] == pytest.approx(np.array(q.windows[0]) / per_frame)
        stored = read_attention(trained.plots, desc_id)
        assert meta["strongest_event"] == stored[-1, event, : pyramid.num_events].argmax()
        best = read_attention(trained.plots, desc_id, SCORES)
        assert (best >= own.numpy() - 1e-5).all()
        assert (best.max() == pytest.approx(float(own.max()), abs=1e-5)) == (rank == 1)
        assert {p.name for p in (folder / "figures").iterdir()} == {f"{i}.jpg" for i in range(8)}
        for name in ("tree.jpg", "overview.png"):
            assert Image.open(folder / name).size[0] > 1000
    assert json.loads((trained.plots / "r1_ids.json").read_text()) == hits


@pytest.mark.parametrize(
    ("settings", "ids", "message"),
    [
        ({"layer": 99}, [], "--plot_layer 99: the model has layers 1 to"),
        ({"head": -1}, [], "--plot_head -1: the model has heads 1 to"),
        ({}, ["v_x#0", "nobody"], "not in the split: nobody"),
    ],
)
def test_impossible_requests(settings: dict, ids: list[str], message: str, tmp_path) -> None:
    model = GoldenModel.read("m1").build()
    queries = [query("v_x#0"), query(7)]
    check_request(PlotSettings(tmp_path, layer=1, head=1), ["7"], queries, model)
    with pytest.raises(RunError, match=message):
        check_request(PlotSettings(tmp_path, **settings), ids, queries, model)


def test_a_run_is_drawn_with_the_settings_of_its_checkpoint(trained, tmp_path) -> None:
    shutil.copy(trained.logs / BEST, tmp_path)
    folder = tmp_path / "attention" / "v_1#0"
    (folder / "figures").mkdir(parents=True)
    for name in ("overview.png", "tree.pdf", "figures/8.jpg"):
        (folder / name).write_text("of an earlier plot")
    command = [
        sys.executable, "-m", "scripts.plot.plot_run", str(tmp_path), "--plot_ids", "v_1#0",
        "--plot_layer", "2", "--plot_head", "1", "--plot_style", "authors",
    ]  # fmt: skip
    outside = {"plot_format": "svg", "plot_dir": str(tmp_path), "PYTHONPATH": str(ROOT)}
    # its videos, CLIP and pyramid have relative paths, which count from where main.py ran
    done = subprocess.run(
        command, cwd=trained.corpus, env=os.environ | outside, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"from the environment: plot_dir={tmp_path} plot_format=svg" in done.stderr
    assert len(list((folder / "figures").iterdir())) == 8
    files = {path.name for path in folder.iterdir()}
    assert files == {"figures", "meta.json", "tree.jpg", "tree.svg", "overview.svg"}
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["layer"], meta["head"]) == (2, 1)
    with h5py.File(tmp_path / "attn.hdf5") as file:
        assert dict(file.attrs) == {"heads": "1", "model": str(tmp_path / BEST)}


def test_flags_of_a_run(trained, tmp_path, monkeypatch) -> None:
    flags = plot_run.flags_of(trained.logs)
    assert parse_args(flags).resume == trained.logs / BEST
    args = json.loads((trained.logs / "args.json").read_text())
    for name in ("prvr_val_annos", "video_dir", "pretrained_clip_name", "pyr_config_path",
                 "adapter_channels", "temp_kernel_sz", "max_words", "datatype", "plot_dir",
                 "event_scores"):  # fmt: skip
        assert f"--{name}={args[name]}" in flags, name
    assert flags == plot_run.flags_of(trained.logs / BEST)
    stored = plot_run.flags_of(trained.logs, ["--frame_store", "f.h5"])
    assert stored[-2:] == ["--frame_store", "f.h5"] and "--video_dir=videos" not in stored
    monkeypatch.setenv("video_dir", "elsewhere")
    assert "--video_dir=elsewhere" in plot_run.flags_of(trained.logs)
    with pytest.raises((ModelError, RunError), match="no such checkpoint"):
        plot_run.flags_of(tmp_path)
    golden = GoldenModel.read("m1")
    with pytest.raises(RunError, match=r"no settings in it.*bash scripts/prvr_"):
        plot_run.flags_of(golden.write_authors_checkpoint(tmp_path / "authors.pth.tar"))


@pytest.mark.parametrize(
    ("script", "variables", "run"),
    [
        *((f"plot_{split}.sh", {}, f"logs/prvr_{split}") for split in SPLITS),
        ("plot_tvr.sh", {"resume": "a b.pth.tar"}, "a b.pth.tar"),
        ("plot_demo.sh", {}, "logs/demo"),
        ("plot_demo.sh", {"run": "logs/prvr_mine"}, "logs/prvr_mine"),
    ],
)
def test_plot_scripts(script: str, variables: dict, run: str, tmp_path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=WITHOUT_CACHES)
    (tmp_path / "scripts/setup.sh").write_text("")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(tmp_path / "scripts/plot" / script), "--plot_ids", "a b", "c"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    words = ["-m", "scripts.plot.plot_run", run, "--plot_ids", "a b", "c"]
    assert done.stdout.splitlines() == words, done.stderr
