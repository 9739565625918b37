"""The report page: the run's numbers, nothing from the network, no errors in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataloaders.annotations import Query, read_annotations
from scripts import report
from scripts.data import pack_frames
from tests.corpus import CAPTIONS, ROOT
from utils import OutputError, RunError
from utils.evaluation.predictions import MomentPredictions, load_predictions
from utils.files import write_records
from utils.report.page import Run, curves, facts, result_tables, write_page
from utils.report.queries import Thumbnails, best_and_worst, query_card, retrieved

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def page(trained) -> Path:
    run = Run.read(trained.logs)
    path, corpus = trained.logs / "report.html", trained.corpus
    write_page(run, path, corpus / "annos.jsonl", corpus / "videos", queries=3)
    assert not run.notes
    return path


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
            if value.startswith("data:image/svg"):
                svg = b64decode(value.split(",")[1]).decode()
                assert not re.search(r'(href|src)="(?!#)|url\((?!#)|<script|@import', svg)
    assert pictures > 3 * 4 and "@import" not in source and "url(" not in source
    assert "script" not in re.findall(r"<(\w+)", source)


def test_the_page_says_what_the_run_logged(page, trained) -> None:
    structure = read(page.read_text())
    text = " ".join(structure.text)
    epochs = [json.loads(line) for line in (trained.logs / "log.jsonl").read_text().splitlines()]
    best = epochs[epochs[-1]["best_epoch"] - 1]
    for name in ("R1", "R5", "SumR", "MeanR"):
        assert f"{best[name]:.2f}" in text
    assert "212.80" in text and "published" in text, "TVR's row"
    assert CAPTIONS["v/0#1"] in text, "as text, nothing of it as markup"
    alts = [value for tag, name, value in structure.attributes if (tag, name) == ("img", "alt")]
    assert any(value.startswith(f"training loss: {epochs[0]['loss']:.4g} to") for value in alts)
    assert any(
        "the highest is event" in value and "true moment: 3.0–6.0 s" in value for value in alts
    )
    sections = {
        value for tag, name, value in structure.attributes if (tag, name) == ("section", "id")
    }
    queries = {"best-queries", "worst-queries"}
    assert sections == {"results", "curves", "attention", "settings"} | queries
    assert sum("attends to" in alt for alt in alts) == 3
    assert text.count(f"drawn with {trained.logs / 'ckpt.best.pth.tar'}") == 3


def test_cards_show_rank_moment_and_times(page, trained) -> None:
    predictions = load_predictions(trained.logs / "predictions.h5")
    queries = read_annotations(trained.corpus / "annos.jsonl")
    source = page.read_text()
    best, worst = best_and_worst(predictions, 3)
    cards = re.findall(r'<article class="card query".*?</article>', source, re.S)
    assert len(cards) == len(best) + len(worst)
    for row, card in zip(best + worst, cards, strict=True):
        text = html.unescape(re.sub(r"<[^>]*>", " ", card))
        rank = predictions.target_rank[row]
        assert queries[row].desc in text and f"right video at rank {rank} of 4" in text
        first = retrieved(predictions, row)[0]
        start, end = first["moment"]
        assert f"{start:.1f}–{end:.1f} s of 6.7 s · cosine {first['score']:.3f}" in text
        start, end = queries[row].windows[0]
        left, width = 100 * start / (20 / 3), 100 * (end - start) / (20 / 3)
        assert f'class="bar true" style="left:{left:.3f}%;width:{width:.3f}%"' in card
        assert card.count("right video</span>") == 1


def test_what_is_missing_is_left_out_and_named(trained, tmp_path, capsys) -> None:
    for name in ("args.json", "log.jsonl", "predictions.h5"):
        shutil.copy(trained.logs / name, tmp_path / name)
    videos = tmp_path / "videos"
    shutil.copytree(trained.corpus / "videos", videos)
    (videos / "clip 1.mp4").write_bytes(b"broken")
    (videos / "clip 2.mp4").unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "los')
    words = [str(tmp_path), "--annotations", str(trained.corpus / "annos.jsonl")]
    report.main([*words, "--video_dir", str(videos)])
    said = capsys.readouterr().err
    assert "clip 1.mp4: " in said and "clip 2.mp4: no such video" in said
    text = " ".join(read((tmp_path / "report.html").read_text()).text)
    assert "clip 2.mp4: no such video" in text and "Left out" in text

    (tmp_path / "predictions.h5").unlink()
    report.main([*words, "--output", str(tmp_path / "new" / "page.html")])
    assert "--save_predictions 1" in capsys.readouterr().err
    assert (tmp_path / "new" / "page.html").is_file()
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(RunError, match=r"neither log\.jsonl nor eval\.jsonl"):
        report.main(words)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plots/attention/7/meta.json", None, "Attention: plots/attention/7: "),
        ("plots/attention/7/meta.json", b"[]", "Attention: plots/attention/7: "),
        ("plots/attention/7/overview.png", b"PNG", "Attention: plots/attention/7: "),
        ("logs/predictions.h5", b"\x89HDF", "Queries: logs/predictions.h5: "),
        ("logs/eval.jsonl", b'{"metrics": 1}', "logs/eval.jsonl: its metrics are not rows"),
        ("logs/eval.jsonl", b'{"metrics": {"cosine": {"R1": "x"}, "levels/a": {"b": 1}}}', ""),
        ("logs/args.json", b'{"datatype": [1], "plot_dir": "plots"}', "Queries: no annotations"),
    ],
)
def test_a_corrupt_file_is_named_and_the_rest_is_shown(
    trained, tmp_path, monkeypatch, capsys, name, content, said
) -> None:
    """In the folder where main.py ran, whose relative paths args.json has."""
    for folder in ("logs", "plots"):
        shutil.copytree(trained.corpus / folder, tmp_path / folder)
    for part in ("annos.jsonl", "videos"):
        (tmp_path / part).symlink_to(trained.corpus / part)
    settings = json.loads((tmp_path / "logs/args.json").read_text()) | {"plot_dir": "plots"}
    (tmp_path / "logs/args.json").write_text(json.dumps(settings))
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


def test_a_page_that_cannot_be_written(trained, tmp_path) -> None:
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        report.main([str(trained.logs), "--queries", "0", "--output", str(tmp_path)])


def test_thumbnails_from_a_frame_store(trained, tmp_path, capsys) -> None:
    store = tmp_path / "frames.h5"
    videos = ["--video_dir", str(trained.corpus / "videos"), "--size", "64"]
    assert pack_frames.main([*videos, "--frame_store", str(store)]) == 0
    capsys.readouterr()
    for name in ("log.jsonl", "predictions.h5"):
        shutil.copy(trained.logs / name, tmp_path / name)
    args = json.loads((trained.logs / "args.json").read_text())
    args |= {"frame_store": str(store), "video_dir": None, "event_scores": "dot"}
    (tmp_path / "args.json").write_text(json.dumps(args))
    report.main([str(tmp_path), "--annotations", str(trained.corpus / "annos.jsonl")])
    assert "Thumbnails" not in capsys.readouterr().err
    source = (tmp_path / "report.html").read_text()
    assert source.count("data:image/jpeg") > 2 * 4
    assert "by the largest lead, ranked by cosine." in source


# ---------------------------------------------------------------- parts


def test_the_head_says_how_it_was_trained(trained) -> None:
    shown = facts(Run.read(trained.logs))
    assert {name for name, value in shown.items() if not value} == {"evaluated"}, "all were there"
    assert shown["precision"] == "fp32" and shown["epochs"] == len(trained.lines("log.jsonl"))


def some_predictions() -> tuple[torch.Tensor, MomentPredictions]:
    """Cosines [T, V, N_e] and what they predict; half of the queries find their video."""
    generator = torch.Generator().manual_seed(0)
    texts, videos, events = 40, 9, 5
    cosines = torch.rand(texts, videos, events, generator=generator)
    target = torch.randint(videos, (texts,), generator=generator)
    cosines[torch.arange(0, texts, 2), target[::2]] += 0.3
    order = cosines.flatten(1).argsort(dim=1, descending=True)
    best = cosines.amax(-1)
    own = best[torch.arange(texts), target]
    return cosines, MomentPredictions(
        desc_ids=[str(i) for i in range(texts)],
        vid_names=[f"v{i}" for i in range(videos)],
        durations=torch.full((videos,), 10.0),
        proposals=torch.rand(events, 2, generator=generator).sort(1)[0],
        per_video=events,
        videos=order // events,
        events=order % events,
        scores=cosines.flatten(1).gather(1, order),
        target=target,
        target_rank=1 + (best > own[:, None]).sum(1),
        target_scores=cosines[torch.arange(texts), target],
    )


def test_best_and_worst_against_a_plain_search() -> None:
    cosines, predictions = some_predictions()
    target, rank, best = predictions.target, predictions.target_rank, cosines.amax(-1)
    good, bad = best_and_worst(predictions, 4)
    lead = {
        t: float(best[t, v] - max(best[t, other] for other in range(9) if other != v))
        for t, v in enumerate(target.tolist())
        if rank[t] == 1
    }
    expected: list[int] = []
    for t in sorted(lead, key=lambda t: -lead[t]):
        if target[t] not in target[expected]:
            expected.append(t)
    assert good == expected[:4]
    assert bad[0] == int(rank.argmax()) and all(rank[t] > 1 for t in bad)
    assert len({int(target[t]) for t in bad}) == len(bad) == 4
    found = retrieved(predictions, 7)
    ranked = best[7].argsort(descending=True)[:5].tolist()
    assert [hit["name"] for hit in found] == [f"v{v}" for v in ranked]
    for hit, v in zip(found, ranked, strict=True):
        assert hit["score"] == float(best[7, v])
        moment = 10 * predictions.proposals[cosines[7, v].argmax()]
        assert hit["moment"] == pytest.approx(moment.tolist())


def test_a_video_without_length() -> None:
    """As float32, the shortest durations that annotations can have are 0."""
    _, predictions = some_predictions()
    predictions.durations.zero_()
    query = Query("q", "a dog", "v0", 1e-46, None)
    card = query_card(predictions, 0, query, Thumbnails(None))
    assert card["alt"].endswith("true moment: unknown") and card["hits"][0]["duration"] == 0


def a_run(folder: Path, records: list[dict], evaluations: list[dict] = (), **args: object) -> Run:
    write_records(folder / "log.jsonl", records)
    write_records(folder / "eval.jsonl", evaluations)
    (folder / "args.json").write_text(json.dumps(args))
    return Run.read(folder)


def test_scores_that_are_not_normalised_are_called_so(tmp_path) -> None:
    record = {"epoch": 1, "loss": 1.0, "R1": 12.5, "SumR": 99.0, "best_epoch": 1, "row": "dot"}
    evaluation = {"checkpoint": "c", "epoch": 1, "metrics": {"dot": {"R1": 12.5}}}
    run = a_run(tmp_path, [record], [evaluation], datatype="activitynet")
    (table,) = result_tables(run)
    assert list(table["rows"]) == [
        "epoch 1, events not normalised", "evaluated c, epoch 1, events not normalised",
        "published",
    ]  # fmt: skip
    alt = curves(run)["alt"]
    assert alt.startswith("training loss: 1 to 1")
    assert "R@1 (%), events not normalised: 12.5 to 12.5" in alt


def test_numbers_that_are_none(tmp_path) -> None:
    record = {"epoch": 1, "loss": None, "R1": None, "SumR": 9.0, "best_epoch": None, "row": None}
    metrics = {"cosine": {"R1": None, "SumR": 9.0}, "VCMR": {"0.5-r1": None}}
    run = a_run(tmp_path, [record], [{"metrics": metrics}], trainable=None, datatype=None)
    source = report_of(run)
    assert "–" in source and "9.00" in source
    assert curves(run)["alt"] == "SumR: 9 to 9"


def test_hostile_texts_stay_texts(tmp_path) -> None:
    bad = "<img src=x onerror=alert(1)>\"'&{{ 1 }}$x^{"
    evaluation = {"checkpoint": bad, "epoch": bad, "metrics": {bad: {bad: 1}, "cosine": {"R1": 1}}}
    evaluation["metrics"] |= {f"levels/{bad}": {bad: 1.0}, f"VCMR/{bad}": {"0.5-r1": 1}}
    record = {"epoch": 1, bad: 1.0, "val_videos": 1, "best_epoch": 1}
    folder = tmp_path / bad.replace("/", "")
    folder.mkdir()
    structure = read(report_of(a_run(folder, [record], [evaluation], **{bad: bad, "git": bad})))
    assert not [a for a in structure.attributes if a[1] == "onerror" or a[2] == "x"]
    assert any(bad in text for text in structure.text)


def report_of(run: Run) -> str:
    write_page(run, run.folder / "p.html", annotations=None, video_dir=None, queries=1)
    return (run.folder / "p.html").read_text()


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
    phone = tmp_path / "phone.html"  # the page, with a script that it does not allow itself
    look = "<script>if (document.documentElement.scrollWidth > innerWidth) throw 'wide'</script>"
    allowed = page.read_text().replace("default-src 'none'", "default-src 'unsafe-inline'")
    phone.write_text(allowed.replace("</body>", look + "</body>"))
    assert console(phone, tmp_path, "--window-size=500,900") == []
    dark = console(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    with Image.open(tmp_path / "page.png") as picture:
        assert dark == [] and max(picture.convert("RGB").getpixel((2, 500))) < 40, "a dark page"
