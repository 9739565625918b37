"""The report page: the run's numbers, nothing from the network, no errors in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dataloaders.annotations import read_annotations
from scripts import report
from tests.corpus import CAPTIONS, ROOT, TinyRun, make_run
from utils import OutputError, RunError
from utils.evaluation.predictions import MomentPredictions, load_predictions
from utils.report.parts import lane, legend, line_chart, pyramid, table
from utils.report.queries import best_and_worst, retrieved

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "img", "br", "line", "circle", "polyline"}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> TinyRun:
    return make_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def page(tiny_run) -> Path:
    command = [
        sys.executable, "-m", "scripts.report", str(tiny_run.logs),
        "--annotations", str(tiny_run.corpus / "annos.jsonl"),
        "--video_dir", str(tiny_run.corpus / "videos"), "--queries", "3",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    assert done.stdout.strip() == str(tiny_run.logs / "report.html")
    return tiny_run.logs / "report.html"


class Structure(HTMLParser):
    """Checks that tags are closed in order; collects attributes and text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


def read(text: str) -> Structure:
    structure = Structure()
    structure.feed(text)
    structure.close()
    assert structure.open == []
    return structure


def test_the_page_is_whole_and_fetches_nothing(page) -> None:
    source = page.read_text()
    structure = read(source)
    ids = [value for _, name, value in structure.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pictures = 0
    for tag, name, value in structure.attributes:
        assert not name.startswith("on"), "a script where text belongs"
        if name in ("src", "href", "srcset", "action", "poster", "data"):
            assert value.startswith(("data:", "#")), (tag, value[:80])
            assert not value.startswith("#") or value[1:] in ids
            pictures += value.startswith("data:image/jpeg")
    assert pictures > 3 * 12 and "@import" not in source and "url(" not in source
    assert sum(tag == "script" for tag in re.findall(r"<(\w+)", source)) == 1


def test_the_page_says_what_the_run_logged(page, tiny_run) -> None:
    structure = read(page.read_text())
    text = " ".join(structure.text)
    epochs = [json.loads(line) for line in (tiny_run.logs / "log.jsonl").read_text().splitlines()]
    best = epochs[epochs[-1]["best_epoch"] - 1]
    for name in ("R1", "R5", "SumR", "MeanR"):
        assert f"{best[name]:.2f}" in text
    assert "212.80" in text and "published" in text, "TVR's row"
    assert CAPTIONS["v/0#1"] in text, "as text, nothing of it as markup"
    labels = [value for _, name, value in structure.attributes if name == "aria-label"]
    assert any(value.startswith(f"training loss: {epochs[0]['loss']:.4g} in") for value in labels)
    sections = {
        value for tag, name, value in structure.attributes if (tag, name) == ("section", "id")
    }
    assert sections == {
        "results",
        "curves",
        "attention",
        "best-queries",
        "worst-queries",
        "settings",
    }
    overviews = [v for t, n, v in structure.attributes if (t, n) == ("img", "alt") and v]
    assert len(overviews) == 3 and all("attends to" in alt for alt in overviews)


def test_cards_show_rank_moment_and_times(page, tiny_run) -> None:
    predictions = load_predictions(tiny_run.logs / "predictions.h5")
    queries = read_annotations(tiny_run.corpus / "annos.jsonl")
    source = page.read_text()
    best, worst = best_and_worst(predictions, 3)
    cards = re.findall(r'<article class="card query".*?</article>', source, re.S)
    assert len(cards) == len(best) + len(worst)
    for row, card in zip(best + worst, cards, strict=True):
        text = html.unescape(re.sub(r"<[^>]*>", " ", card))
        rank = predictions.target_rank[row]
        assert queries[row].desc in text and f"right video at rank {rank} of 4" in text
        first = retrieved(predictions, row)[0]
        assert f"{first.start:.1f}–{first.end:.1f} s of 6.7 s · cosine {first.score:.3f}" in text
        start, end = queries[row].windows[0]
        left, width = 100 * start / (20 / 3), 100 * (end - start) / (20 / 3)
        assert f'class="bar true" style="left:{left:.3f}%;width:{width:.3f}%"' in card
        assert card.count("right video</span>") == 1


def test_what_is_missing_is_left_out_and_named(tiny_run, tmp_path, capsys) -> None:
    for name in ("args.json", "log.jsonl", "predictions.h5"):
        shutil.copy(tiny_run.logs / name, tmp_path / name)
    videos = tmp_path / "videos"
    shutil.copytree(tiny_run.corpus / "videos", videos)
    (videos / "clip 1.mp4").write_bytes(b"broken")
    (videos / "clip 2.mp4").unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "los')
    words = [str(tmp_path), "--annotations", str(tiny_run.corpus / "annos.jsonl")]
    report.main([*words, "--video_dir", str(videos)])
    said = capsys.readouterr().err
    assert "clip 1.mp4: " in said and "clip 2.mp4: no such video file" in said
    text = " ".join(read((tmp_path / "report.html").read_text()).text)
    assert "clip 2.mp4: no such video file" in text and "Left out" in text

    (tmp_path / "predictions.h5").unlink()
    report.main([*words, "--output", str(tmp_path / "new" / "page.html")])
    assert "--save_predictions 1" in capsys.readouterr().err
    assert (tmp_path / "new" / "page.html").is_file()
    with pytest.raises(RunError, match=r"no attn\.hdf5"):
        report.main([*words, "--plots", str(videos)])
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(RunError, match=r"neither log\.jsonl nor eval\.jsonl"):
        report.main(words)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plots/attn.hdf5", b"\x89HDF", "Attention: plots/attn.hdf5: "),
        ("plots/attention/7/meta.json", None, "Attention: plots/attention/7: "),
        ("plots/attention/7/meta.json", b"[]", "Attention: plots/attention/7: "),
        ("plots/attention/7/overview.png", b"PNG", "Attention: plots/attention/7: "),
        ("logs/predictions.h5", b"\x89HDF", "Queries: logs/predictions.h5: "),
        ("logs/eval.jsonl", b'{"metrics": 1}', "logs/eval.jsonl: its metrics are not rows"),
        ("logs/eval.jsonl", b'{"metrics": {"cosine": {"R1": "x"}, "levels/a": {"b": 1}}}', ""),
        ("logs/args.json", b'{"datatype": [1], "plot_dir": "plots"}', "Queries: no annotations"),
    ],
)
def test_a_spoiled_file_is_named_and_the_rest_is_shown(
    tiny_run, tmp_path, monkeypatch, capsys, name, content, said
) -> None:
    """In the folder where main.py ran, whose relative paths args.json has."""
    for folder in ("logs", "plots"):
        shutil.copytree(tiny_run.corpus / folder, tmp_path / folder)
    for part in ("annos.jsonl", "videos"):
        (tmp_path / part).symlink_to(tiny_run.corpus / part)
    settings = json.loads((tmp_path / "logs/args.json").read_text()) | {"plot_dir": "plots"}
    (tmp_path / "logs/args.json").write_text(json.dumps(settings))
    with h5py.File(tmp_path / "plots/attn.hdf5", "r+") as file:
        file.attrs["model"] = "logs/ckpt.best.pth.tar"
    monkeypatch.chdir(tmp_path)
    report.main(["logs"])
    whole = capsys.readouterr()
    assert whole.err == "" and Path("logs/report.html").read_text().count("attends to:") == 3
    Path(name).unlink()
    if content is not None:
        Path(name).write_bytes(content)
    try:
        report.main(["logs"])
        assert said in capsys.readouterr().err
    except RunError as error:
        assert said and said in str(error)


def test_a_page_that_cannot_be_written(tiny_run, tmp_path) -> None:
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        report.main([str(tiny_run.logs), "--queries", "0", "--output", str(tmp_path)])


def test_a_video_without_length() -> None:
    """As float32, the shortest durations that annotations can have are 0."""
    proposals = np.array([[0, 1], [0, 0.5]], np.float32)
    read(pyramid(proposals, np.array([0.1, 0.4]), 1, 0.0, "cosine"))
    read(lane(0.0, [(0.0, 0.0, "chosen")], "moment"))


# ---------------------------------------------------------------- parts


def test_best_and_worst_against_a_plain_search() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, videos, events = 40, 9, 5
    cosines = torch.rand(texts, videos, events, generator=generator)
    target = torch.randint(videos, (texts,), generator=generator)
    cosines[torch.arange(0, texts, 2), target[::2]] += 0.3
    order = cosines.flatten(1).argsort(dim=1, descending=True)
    best = cosines.amax(-1)
    own = best[torch.arange(texts), target]
    rank = 1 + (best > own[:, None]).sum(1)
    predictions = MomentPredictions(
        desc_ids=[str(i) for i in range(texts)],
        vid_names=[f"v{i}" for i in range(videos)],
        durations=torch.full((videos,), 10.0),
        proposals=torch.rand(events, 2, generator=generator),
        per_video=events,
        videos=order // events,
        events=order % events,
        scores=cosines.flatten(1).gather(1, order),
        target=target,
        target_rank=rank,
        target_scores=cosines[torch.arange(texts), target],
    )
    good, bad = best_and_worst(predictions, 4)
    hits = [t for t in range(texts) if rank[t] == 1]
    lead = {
        t: float(own[t] - max(best[t, v] for v in range(videos) if v != target[t])) for t in hits
    }
    expected: list[int] = []
    for t in sorted(hits, key=lambda t: -lead[t]):
        if target[t] not in target[expected]:
            expected.append(t)
    assert good == expected[:4]
    assert bad[0] == int(rank.argmax()) and all(rank[t] > 1 for t in bad)
    assert len({int(target[t]) for t in bad}) == len(bad) == 4
    for t in (0, 7):
        found = retrieved(predictions, t)
        ranked = best[t].argsort(descending=True)[:5].tolist()
        assert [f.video for f in found] == ranked
        for f in found:
            assert f.score == float(best[t, f.video])
            moment = 10 * predictions.proposals[cosines[t, f.video].argmax()]
            assert (f.start, f.end) == pytest.approx(moment.tolist())


@pytest.mark.parametrize(
    "values", [[1.0, 3.0, 2.0], [5.0], [0.0, 0.0], [1e-5, 8e-4], [-2.0, 1e7]], ids=str
)
def test_charts_put_larger_values_higher_and_inside(values: list[float]) -> None:
    points = list(enumerate(values, start=1))
    svg = line_chart("loss & more", points, 1, published=None)
    read(svg)
    (path,) = re.findall(r'points="([^"]*)"', svg)
    places = [tuple(map(float, point.split(","))) for point in path.split()]
    assert all(0 <= x <= 320 and 0 <= y <= 190 for x, y in places)
    for (_, y1), v1 in zip(places, values, strict=True):
        for (_, y2), v2 in zip(places, values, strict=True):
            assert (v1 < v2) <= (y1 > y2) and (v1 == v2) <= (y1 == y2)
    assert [x for x, _ in places] == sorted({x for x, _ in places})
    labels = re.findall(r'text-anchor="end">([^<>]*)</text>', svg)
    assert len(set(labels)) == len(labels) > 2 and all(len(label) <= 7 for label in labels)


def test_pyramid_colours_follow_the_scores() -> None:
    proposals = np.array([[0, 1], [0, 0.5], [0.25, 0.75], [0.5, 1]], np.float32)
    source = pyramid(proposals, np.array([0.1, 0.4, -0.2, 0.4 - 1e-9]), 1, 60.0, "cosine")
    read(source)
    colours = re.findall(r"background:(#\w{6})", source)
    assert colours[1] == colours[3] and len(set(colours)) == 3
    assert source.count("chosen-edge") == 1 and "0.0–30.0 s: cosine 0.400" in source
    assert pyramid(proposals, np.zeros(4), 0, 60.0, "cosine").count("background:#") == 4


def test_the_legend_runs_from_the_lowest_to_the_highest_colour() -> None:
    scores = np.array([0.1, 0.4, -0.2])
    proposals = np.array([[0, 1], [0, 0.5], [0.5, 1]], np.float32)
    boxes = re.findall(r"background:(#\w{6})", pyramid(proposals, scores, 1, 60.0, "cosine"))
    source = legend(scores, "cosine", timed=True)
    stops = re.findall(r"#\w{6}", source)
    assert (stops[0], stops[-1]) == (boxes[2], boxes[1])
    assert "-0.200" in source and "0.400" in source and "true moment" in source
    assert "true moment" not in legend(scores, "cosine", timed=False)


def test_tables_escape_and_fill_gaps() -> None:
    source = table(
        "a <b>", {"<i>x</i>": {"R1": 1.005, "n": 3}}, {"R1": "R@1", "n": "n", "no": "no"}
    )
    text = read(source).text
    assert "a <b>" in text and "<i>x</i>" in text and "–" in text and "3" in text


# ---------------------------------------------------------------- browser


def console(path: Path, tmp_path: Path, *flags: str) -> list[str]:
    """What Chromium writes to the console for a page."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", *flags,
        f"file://{path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "page.png").is_file(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_no_console_errors_in_a_browser(page, tmp_path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<script>nothing.at.all()</script>")
    assert console(broken, tmp_path), "errors would be seen"
    assert console(page, tmp_path, "--window-size=1200,2000") == []
    driven = tmp_path / "driven.html"  # the page with its keys and its button used
    drive = """<script>
      for (const key of ["j", "j", "k"])
        document.dispatchEvent(new KeyboardEvent("keydown", {key}));
      if (document.activeElement !== document.querySelector("article.query")) throw "no focus";
      const theme = document.getElementById("theme");
      theme.click(); theme.click();
      if (document.documentElement.dataset.theme !== "dark") throw "not dark";
      if (document.documentElement.scrollWidth > innerWidth) throw "wider than the phone";
    </script>"""
    driven.write_text(page.read_text().replace("</body>", drive + "</body>"))
    assert console(driven, tmp_path, "--window-size=500,900") == []
