"""Reading annotations: what is accepted, and that every fault is named with its line."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders import DataError
from dataloaders.annotations import Query, Video, corpus_videos, read_annotations

GOOD = {"vid_name": "v1", "desc_id": "q1", "desc": "a dog runs", "duration": 30.5, "ts": [1, 2.5]}


def line(**changes) -> str:
    """A good line with other values; a value of ... removes the field."""
    record = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(record)


def write(tmp_path, *lines: str | bytes):
    path = tmp_path / "annotations.jsonl"
    rows = [text if isinstance(text, bytes) else text.encode() for text in lines]
    path.write_bytes(b"\n".join(rows))
    return path


def problems(path) -> list[str]:
    with pytest.raises(DataError) as raised:
        read_annotations(path)
    return str(raised.value).splitlines()


def test_a_line_becomes_a_query(tmp_path):
    path = write(tmp_path, line(), line(desc_id=7, ts=[[1, 2], [3, 4.5]], type="vt", more="x"))
    assert read_annotations(path) == [
        Query("q1", "a dog runs", "v1", 30.5, ((1.0, 2.5),)),
        Query(7, "a dog runs", "v1", 30.5, ((1.0, 2.0), (3.0, 4.5)), "vt"),
    ]
    for unknown in (..., None, []):
        (query,) = read_annotations(write(tmp_path, line(ts=unknown)))
        assert query.windows is None


def test_harmless_forms_are_read_alike(tmp_path):
    plain = read_annotations(write(tmp_path, line(), line(desc_id="q2")))
    windows = write(tmp_path, b"\xef\xbb\xbf" + line().encode() + b"\r", "\r", "  ",
                    line(desc_id="q2") + "\r", "")  # fmt: skip
    assert read_annotations(windows) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [("vid_name", "0123456"), ("vid_name", "-Qow $(rm) it's_210.0_360.0"),
     ("vid_name", "Wait... what.. (part 1)"), ("vid_name", "...and more"),
     ("desc", "日本語 \u2028 line\nbreak\ttab\r\x85"), ("desc", "word " * 1900), ("desc_id", 0),
     ("duration", 150), ("ts", [10, 45]), ("type", None)],
)  # fmt: skip
def test_unusual_but_right(tmp_path, field, value):
    (query,) = read_annotations(write(tmp_path, line(**{field: value})))
    for name in ("vid_name", "desc_id", "desc", "duration"):
        assert getattr(query, name) == {**GOOD, field: value}[name]


# "..." stands for a field that is absent.
WRONG = {
    "vid_name": [..., 12, "", " ", "../v1", "..", ".", "/etc/passwd", "a/b", "a\0b", "a\nb",
                 "a\x7fb", "a\ud800b", "é" * 126],
    "desc_id": [..., None, "", True, 1.5, ["q"], "a\0", "a\nb", "\x1b[31m",
                "a\ud800b"],
    "desc": [..., None, ["a dog"], "", " \t", "a" * 100_000, "a \0 dog", "a \x07 dog", "\x1b[1m",
             "a\ud800b"],
    "duration": [..., "30.5", None, True, 0, -3, float("nan"), float("inf"), 10**400],
    "ts": [["1", "2"], "1-2", [1], [1, 2, 3], [[1, 2], [3]], [[1, 2], 3], [1, [2, 3]], [-1, 2],
           [1, float("nan")], [1, True], {"start": 1}],
    "type": [3, "v\0"],
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_named(tmp_path, field):
    for value in WRONG[field]:
        path = write(tmp_path, line(desc_id="first"), "", line(**{field: value}))
        (problem,) = problems(path)
        assert problem.startswith(f"{path}:3: {field}: "), value
        assert len(problem) < len(str(path)) + 200


@pytest.mark.parametrize(
    "text",
    ["{", "not json", "[1, 2]", '"text"', "1" * 5000, "[" * 100_000, line().encode() + b"\xff",
     b'{"desc": "caf\xe9"}', line().encode("utf-16")],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named(tmp_path, text):
    path = write(tmp_path, line(), text)
    assert problems(path)[0].startswith(f"{path}:2: line: ")


def test_all_problems_of_all_lines_at_once(tmp_path):
    path = write(tmp_path, line(duration="3", ts=[1]), line(), "{", line(vid_name=3))
    assert [problem.removeprefix(f"{path}:").split(":")[:2] for problem in problems(path)] == [
        ["1", " duration"], ["1", " ts"], ["3", " line"], ["4", " vid_name"],
    ]  # fmt: skip
    many = problems(write(tmp_path, *["{"] * 107))
    assert len(many) == 21 and many[-1] == "and 87 more"


def test_an_id_may_be_used_once(tmp_path):
    path = write(tmp_path, line(desc_id="7"), line(desc_id="8"), line(desc_id=7))
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:3: desc_id: ")
    assert "line 1" in problem


@pytest.mark.parametrize(
    ("ts", "never_hit"),
    [
        ([8, 7], True),
        ([3, 3], True),
        ([30.5, 40], True),
        ([[1, 2], [31, 32]], True),
        ([30.4, 40], False),
        ([0, 1e-9], False),
    ],
)
def test_windows_that_nothing_can_hit_are_kept_and_listed(tmp_path, caplog, ts, never_hit):
    # ActivityNet Captions and Charades-STA have some in their training files.
    path = write(tmp_path, line(), line(desc_id=2, ts=ts))
    windows = ts if isinstance(ts[0], list) else [ts]
    with caplog.at_level(logging.WARNING):
        assert read_annotations(path)[1].windows == tuple(map(tuple, windows))
    told = ("1 of 2 queries have a window that" in caplog.text, f"{path}:2" in caplog.text)
    assert told == (never_hit, never_hit) and bool(caplog.text) == never_hit


@pytest.mark.parametrize(("other", "what"), [(30.5009, ""), (30.6, "warned"), (31.5, "warned"),
                                             (31.6, "refused"), (305, "refused")])  # fmt: skip
def test_two_durations_of_a_video(tmp_path, caplog, other: float, what: str):
    good = [line(), line(desc_id=2, vid_name="v2", duration=99)]
    path = write(tmp_path, *good, line(desc_id=3, duration=other))
    if what == "refused":
        (problem,) = problems(path)
        assert problem.startswith(f"{path}:3: duration: ") and "on line 1" in problem
    else:
        assert corpus_videos(read_annotations(path))[0].duration == 30.5
        assert ("1 of 3 queries" in caplog.text and f"{path}:3" in caplog.text) == bool(what)


RELEASES = {
    "activitynet": [
        b'{"v_a": {"duration": 5.5, "timestamps": [[0, 1]], "sentences": ["a"]}}',
        b'{\n  "v_a": {\n    "timestamps": [],\n "sentences": [], "duration": 5}}',
    ],
    "charades": [b"3MSZA 24.3 30.4##person turn a light on.\n", b"id,subject,length\nAB1,x,3\n"],
    "qvhighlights": [
        b'{"qid": 7, "query": "A girl.", "duration": 150, "vid": "N_0", "saliency_scores": []}\n',
        b'\xef\xbb\xbf{"vid": "N_0", "query": "A girl.", "qid": 7}',
    ],
}


@pytest.mark.parametrize("dataset", RELEASES)
def test_an_original_file_is_recognised(tmp_path, dataset):
    for content in RELEASES[dataset]:
        path = write(tmp_path, content)
        (problem,) = problems(path)
        command = f"-m scripts.data.convert_annotations {dataset} {tmp_path}"
        assert problem.startswith(str(path)) and problem.endswith(command)


def test_tvrs_test_file_is_recognised(tmp_path):
    path = write(tmp_path, *[f'{{"desc": "Monica.", "desc_id": {i}}}' for i in range(3)])
    (problem,) = problems(path)
    assert "names no videos" in problem
    # not one of our own lines that lacks something
    assert ":1: vid_name: missing" in problems(write(tmp_path, line(vid_name=...)))[0]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error_and_so_is_none(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    assert problems(path)[0].startswith(f"{path}: no annotations")
    for path in (tmp_path / "no.jsonl", tmp_path):
        assert str(path) in problems(path)[0]


def test_videos_in_order_of_first_appearance_with_the_first_duration(tmp_path):
    rows = [("b", 10), ("a", 20), ("b", 11), ("c", 5), ("a", 20)]
    lines = [line(vid_name=v, duration=d, desc_id=i) for i, (v, d) in enumerate(rows)]
    queries = read_annotations(write(tmp_path, *lines))
    assert corpus_videos(queries) == [Video("b", 10.0), Video("a", 20.0), Video("c", 5.0)]
    assert [query.duration for query in queries] == [10, 20, 11, 5, 20]


NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=40
).filter(lambda text: text.strip() and text not in (".", ".."))
PLAIN = st.characters(exclude_categories=["Cs", "Cc"])
SECONDS = st.floats(0, 1e6)
QUERIES = st.builds(
    Query,
    desc_id=st.text(PLAIN, min_size=1) | st.integers(),
    desc=st.text(PLAIN | st.sampled_from("\t\n\r"), min_size=1).filter(str.strip),
    vid_name=NAMES,
    duration=st.floats(0.01, 1e6),
    windows=st.none() | st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=3).map(tuple),
    query_type=st.none() | st.sampled_from(["v", "t", "vt"]),
)


@settings(max_examples=60)
@given(
    queries=st.lists(
        QUERIES,
        min_size=1,
        max_size=5,
        unique_by=(lambda query: str(query.desc_id), lambda query: query.vid_name),
    ),
    separator=st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    escape=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, queries, separator, mark, escape):
    names = {"windows": "ts", "query_type": "type"}
    records = [{names.get(k, k): v for k, v in vars(query).items()} for query in queries]
    lines = [json.dumps(record, ensure_ascii=escape) for record in records]
    path = write(tmp_path_factory.getbasetemp(), mark + separator.join(lines))
    assert read_annotations(path) == queries


def test_the_real_clips_file_is_read(shared_data):
    queries = read_annotations(shared_data / "real_clips.jsonl")
    assert {query.windows is None for query in queries} == {True, False}
