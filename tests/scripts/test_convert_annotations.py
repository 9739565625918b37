"""Converting the public annotation files: the lines that come out, and what is said about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dataloaders.annotations import VAL, Split
from scripts.data.convert_annotations import SPLITS, main

ROOT = Path(__file__).resolve().parents[2]

ACTIVITYNET = {
    "v_b": {
        "duration": 55.15,
        "timestamps": [[0.28, 60], [54.32, 13.79]],
        "sentences": ["A weight  lifting tutorial. ", " Zweite Übung\u2028."],
    },
    "v_a": {"duration": 10, "timestamps": [[0, 10.0004]], "sentences": ["Same words."]},
}
CHARADES = """469E8 24.3 30.4##person turn a light on.
00607 9.0 1.5##a ## sign.
469E8 0.0 40.0##person turn a light on.
"""
CHARADES_TABLES = {
    "Charades_v1_train.csv": 'id,script,length\n00607,"one, ""two""\nlines",12.5\n',
    "Charades_v1_test.csv": "id,script,length\n469E8,none,30.96\n",
}
QVHIGHLIGHTS = [
    {"qid": 7, "query": "A girl.", "duration": 150, "vid": "N_210.0_360.0",
     "relevant_windows": [[82, 150], [0, 2]], "saliency_scores": [[1, 2, 3]]},
    {"qid": 3, "query": "No windows.", "duration": 142, "vid": "_x_0.0_150.0"},
]  # fmt: skip
TVR = [
    {"vid_name": "s01e03_clip_19", "duration": 61.46, "ts": [16.48, 33.87], "desc": "Phoebe.",
     "type": "v", "desc_id": 90200},
]  # fmt: skip


def sources(folder: Path) -> Path:
    """The original files of all four data sets, one split each."""
    folder.mkdir()
    (folder / "val_1.json").write_text(json.dumps(ACTIVITYNET))
    (folder / "charades_sta_test.txt").write_text(CHARADES)
    for name, text in CHARADES_TABLES.items():
        (folder / name).write_text(text)
    for name, records in {"highlight_val": QVHIGHLIGHTS, "tvr_val": TVR}.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}_release.jsonl").write_text(lines)
    return folder


def convert(dataset: str, source: Path, out: Path) -> dict[str, list[dict]]:
    main([dataset, str(source), "--output_dir", str(out)])
    return {
        path.name: [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        for path in out.glob("*")
    }


CONVERTED = {
    "activitynet": {"val.jsonl": [
        {"vid_name": "v_b", "desc_id": "v_b#enc#0", "desc": "A weight  lifting tutorial. ",
         "duration": 55.15, "ts": [0.28, 60]},
        {"vid_name": "v_b", "desc_id": "v_b#enc#1", "desc": " Zweite Übung\u2028.",
         "duration": 55.15, "ts": [13.79, 54.32]},
        {"vid_name": "v_a", "desc_id": "v_a#enc#0", "desc": "Same words.", "duration": 10,
         "ts": [0, 10.0004]},
    ]},
    "charades": {"test.jsonl": [
        {"vid_name": "469E8", "desc_id": "469E8#enc#0", "desc": "person turn a light on.",
         "duration": 30.96, "ts": [24.3, 30.4]},
        {"vid_name": "00607", "desc_id": "00607#enc#0", "desc": "a ## sign.",
         "duration": 12.5, "ts": [1.5, 9.0]},
        {"vid_name": "469E8", "desc_id": "469E8#enc#1", "desc": "person turn a light on.",
         "duration": 30.96, "ts": [0.0, 40.0]},
    ]},
    "qvhighlights": {"val.jsonl": [
        {"vid_name": "N_210.0_360.0", "desc_id": 7, "desc": "A girl.", "duration": 150,
         "ts": [[82, 150], [0, 2]]},
        {"vid_name": "_x_0.0_150.0", "desc_id": 3, "desc": "No windows.", "duration": 142},
    ]},
    "tvr": {"val.jsonl": TVR},
}  # fmt: skip


@pytest.mark.parametrize("dataset", CONVERTED)
def test_original_files_become_our_lines(tmp_path, dataset):
    made = convert(dataset, sources(tmp_path / "in"), tmp_path / "out")
    assert made == CONVERTED[dataset]


def test_both_annotators_of_activitynet(tmp_path, capsys):
    """In files of their own and in one; the durations are the first file's."""
    source = sources(tmp_path / "in")
    second = {
        "v_a": {"duration": 10.4, "timestamps": [[2, 10.3]], "sentences": ["Other words."]},
        "v_c": {"duration": 7, "timestamps": [[1, 2]], "sentences": ["Only here."]},
    }
    (source / "val_2.json").write_text(json.dumps(second))
    made = convert("activitynet", source, tmp_path / "out")
    assert made.keys() == {"val.jsonl", "val_2.jsonl", "val_1_2.jsonl"}
    assert [record["duration"] for record in made["val_2.jsonl"]] == [10.4, 7]
    first, both = made["val.jsonl"], made["val_1_2.jsonl"]
    assert both[:3] == first
    assert both[3:] == [
        {"vid_name": "v_a", "desc_id": "v_a#enc2#0", "desc": "Other words.", "duration": 10,
         "ts": [2, 10.3]},
        {"vid_name": "v_c", "desc_id": "v_c#enc2#0", "desc": "Only here.", "duration": 7,
         "ts": [1, 2]},
    ]  # fmt: skip
    split = Split.read(tmp_path / "out" / "val_1_2.jsonl", VAL)
    assert (len(split.videos), len(split.queries)) == (3, 5)
    assert "1 videos have two durations" in capsys.readouterr().out


def test_qvhighlights_test_split_with_times(tmp_path):
    source = sources(tmp_path / "in")
    for name, lines in (("test_release", QVHIGHLIGHTS[1:]), ("test_with_gt", QVHIGHLIGHTS)):
        (source / f"highlight_{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = convert("qvhighlights", source, tmp_path / "out")
    assert made["test.jsonl"] == made["val.jsonl"] and made["test.jsonl"][0]["ts"]
    (source / "highlight_test_with_gt.jsonl").unlink()
    assert len(convert("qvhighlights", source, tmp_path / "out")["test.jsonl"]) == 1


def test_what_is_unusual_is_counted_and_said(tmp_path, capsys):
    source = sources(tmp_path / "in")
    assert main(["activitynet", str(source), "--output_dir", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "3 queries, 2 videos" in printed.out
    assert "WARNING: the published split has 17505 and 4917" in printed.out
    assert "1 windows ended before they started: put in order" in printed.out
    assert "1 windows reach beyond the duration: left as they are" in printed.out, "not by 0.4 ms"
    assert "train.json" in printed.err  # the split that is not there


def test_the_published_counts_are_recognised(tmp_path, capsys):
    source = sources(tmp_path / "in")
    lines = [TVR[0] | {"desc_id": i, "vid_name": f"v{i % 2179}"} for i in range(10895)]
    (source / "tvr_val_release.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main(["tvr", str(source), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "10895 queries, 2179 videos, as published" in printed
    assert "WARNING" not in printed


@pytest.mark.parametrize(
    ("dataset", "file", "text", "message"),
    [
        ("activitynet", "val_1.json", "{", r"val_1\.json: not in the form"),
        ("activitynet", "val_1.json", "[]", r"val_1\.json: not in the form"),
        ("activitynet", "val_1.json", '{"v_x": {"duration": 1, "timestamps": [[0, 1]], '
         '"sentences": []}}', r"val_1\.json: v_x: .*shorter"),
        ("activitynet", "val_1.json", '{"v_x": {"duration": 1, "timestamps": [3], '
         '"sentences": ["a"]}}', r"val_1\.json: .*v_x"),
        ("activitynet", "val_1.json", '{"v_x": {"duration": -1, "timestamps": [[0, 1]], '
         '"sentences": ["a"]}}', r"line:1: duration"),
        ("activitynet", "val_1.json", '{"v_x": {"duration": 1, "timestamps": [{"a": 1}], '
         '"sentences": ["a"]}}', r"val_1\.json: query v_x#enc#0: not in the form"),
        ("activitynet", "val_1.json", "[" * 100_000, r"val_1\.json: not in the form"),
        ("charades", "charades_sta_test.txt", CHARADES + "469E8 1##x\n", r"test\.txt:4: not in"),
        ("charades", "charades_sta_test.txt", CHARADES + "469E8 1 2 x\n", r"test\.txt:4: not in"),
        ("charades", "charades_sta_test.txt", "XXXXX 1 2##x\n", r"no length of video XXXXX"),
        ("charades", "Charades_v1_test.csv", "id,length\n469E8,\n", r"test\.csv:2: .*convert"),
        ("charades", "Charades_v1_test.csv", f"id,length\n469E8,{'9' * 131073}\n",
         r"test\.csv: .*field larger"),
        ("qvhighlights", "highlight_val_release.jsonl", '{"qid": 1}\n', r":1: .*no field 'vid'"),
        ("tvr", "tvr_val_release.jsonl", "\n\n{]\n", r"jsonl:3: not in the form"),
        ("tvr", "tvr_val_release.jsonl", '{"a":' + "[" * 100_000, r"jsonl:1: not in the form"),
        ("tvr", "tvr_val_release.jsonl", "\xff", r"tvr val: .*jsonl: .*utf-8"),
        ("charades", "Charades_v1_test.csv", "id,length\n\xff,3\n", r"test\.csv: .*utf-8"),
    ],
)  # fmt: skip
def test_a_bad_source_is_named_and_nothing_is_written(
    tmp_path, capsys, dataset, file, text, message
):
    source = sources(tmp_path / "in")
    (source / file).write_text(text, encoding="latin-1")
    assert main([dataset, str(source), "--output_dir", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "out").glob("*"))


def test_the_public_files_give_the_counts_and_checksums_of_the_readme(
    tmp_path, shared_data, capsys
):
    folders = {"charades": "charades_sta"}
    for dataset in SPLITS:
        source = shared_data / "annotations" / folders.get(dataset, dataset)
        main([dataset, str(source), "--output_dir", str(tmp_path / dataset)])
    printed = capsys.readouterr().out
    assert "WARNING" not in printed
    found = re.findall(r"(\w+/\w+\.jsonl): (\d+) queries, (\d+) videos.*(?:\n  .*)*sha256 (\w+)",
                       printed)  # fmt: skip
    table = re.findall(r"\| `(\S+)` \| ([\d,]+) \| ([\d,]+) \| `(\w+)` \|",
                       (ROOT / "annotations" / "README.md").read_text())  # fmt: skip
    expected = {(name, q.replace(",", ""), v.replace(",", ""), sha) for name, q, v, sha in table}
    assert set(found) == expected
    assert len(expected) == 8
