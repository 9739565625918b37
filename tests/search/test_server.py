"""What the page's server answers, asked over a real socket: also what no browser would ask."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from dataloaders import DataError
from dataloaders.ffmpeg import decode_chosen, decode_frames
from tests.search.page_index import HOSTILE, FakeIndex, Served, brightness, write_sample
from utils import SearchError
from utils.search import preview
from utils.search.hits import FAILED, Video
from utils.search.preview import BusyError, Previews

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from utils.search import server
from utils.search.server import make_app, serve

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a token that is long enough"


def ask(served: Served, path: str, method: str = "GET", **headers: str):
    """The answer, its body read, to a request that goes out as it stands here."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.body = answer.read()
    connection.close()
    return answer


def search(served: Served, query: str, **more: object) -> dict:
    parameters = "".join(f"&{name}={quote(str(value))}" for name, value in more.items())
    answer = ask(served, f"/api/search?q={quote(query)}{parameters}")
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def video_id(index: FakeIndex, name: str) -> str:
    return next(video.id for video in index.videos() if video.name == name)


class TestAnswers:
    def test_the_page_is_one_file_whose_code_its_policy_names(self, served: Served) -> None:
        answer = ask(served, "/")
        assert answer.status == 200 and answer.headers.get_content_type() == "text/html"
        policy = dict(
            rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
        )
        assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
        html = answer.body.decode()
        for tag in ("script", "style"):
            (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", html)
        without_namespaces = html.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//\w+\.\w", without_namespaces)

    def test_hits_tell_what_a_card_shows_and_no_path(
        self, served: Served, index: FakeIndex
    ) -> None:
        found = search(served, "red door", k=3)
        first = found["hits"][0]
        assert first["video"] == {
            "id": video_id(index, "red door.mp4"), "name": "red door.mp4", "duration": 12.0,
            "playable": True, "gone": False,
        }  # fmt: skip
        assert first["moments"] == [{"start": 5.0, "end": 7.5, "score": 0.31, "level": 1}]
        assert len(found["hits"]) == 3
        assert index.roots[0] not in json.dumps(found)

    def test_by_videos_and_within_a_folder(self, served: Served) -> None:
        found = search(served, "boat", by="videos", **{"in": "holiday"})
        names = [hit["video"]["name"] for hit in found["hits"]]
        assert names[0] == "holiday/boat.webm" and all(n.startswith("holiday/") for n in names)
        assert len(found["hits"][0]["moments"]) == 2

    def test_a_folder_is_a_name_not_a_pattern(self, served: Served, index: FakeIndex) -> None:
        index.put("trip [1]/a*.mp4", 3.0, 0.0, 1.0)
        index.put("trip 1/b.mp4", 3.0, 0.0, 1.0)
        for folder, names in [("trip [1]", {"trip [1]/a*.mp4"}), ("*", set())]:
            hits = search(served, "a", by="videos", **{"in": folder})["hits"]
            assert {hit["video"]["name"] for hit in hits} == names

    def test_status_names_folders_and_the_indexer_at_work(
        self, served: Served, index: FakeIndex
    ) -> None:
        index.indexing = {"done": 1, "total": 3, "name": "a\udcff.mp4"}
        told = json.loads(ask(served, "/api/status").body)
        assert told["folders"] == ["holiday"] and told["videos"] == len(index.known)
        assert told["indexing"]["name"] == "a\ufffd.mp4"

    def test_timeline_has_every_event(self, served: Served, index: FakeIndex) -> None:
        wanted = video_id(index, "red door.mp4")
        events = json.loads(ask(served, f"/api/timeline/{wanted}?q=red").body)["events"]
        assert events == [[m.start, m.end, m.score, m.level] for m in index.timeline("red", wanted)]

    def test_a_name_that_is_no_unicode(self, served: Served, index: FakeIndex, root: Path) -> None:
        index.put("odd \udcff.mp4", 3.0, 0.0, 1.0)
        names = [hit["video"]["name"] for hit in search(served, "odd")["hits"]]
        assert names[0] == "odd \ufffd.mp4"


class TestFiles:
    def test_byte_ranges(self, served: Served, index: FakeIndex, root: Path) -> None:
        path = f"/video/{video_id(index, 'red door.mp4')}"
        content = (root / "red door.mp4").read_bytes()
        whole = ask(served, path)
        assert whole.status == 200 and whole.body == content
        assert whole.headers["content-type"] == "video/mp4"
        part = ask(served, path, Range="bytes=100-199")
        assert part.status == 206 and part.body == content[100:200]
        assert part.headers["content-range"] == f"bytes 100-199/{len(content)}"
        assert ask(served, path, Range=f"bytes={len(content)}-").status == 416
        assert ask(served, path, Range="bytes=" + "0-1," * 5000).status in (200, 400)

    def test_a_thumbnail_shows_its_second(
        self, served: Served, index: FakeIndex, tmp_path: Path
    ) -> None:
        for name in ("red door.mp4", "holiday/old camera.avi", "holiday/new phone.mp4"):
            for second in (0.5, 6.5, 11.95):
                answer = ask(served, f"/thumb/{video_id(index, name)}/{int(second * 1000)}.jpg")
                assert answer.status == 200 and answer.headers["content-type"] == "image/jpeg"
                (tmp_path / "thumb.jpg").write_bytes(answer.body)
                track = decode_frames(tmp_path / "thumb.jpg")
                chosen = decode_chosen(
                    tmp_path / "thumb.jpg", _first(), 60, track.height, track.width
                )
                assert abs(chosen.mean() - brightness(second)) < 6, (name, second)

    def test_a_clip_begins_where_it_was_asked_to(
        self, served: Served, index: FakeIndex, tmp_path: Path
    ) -> None:
        answer = ask(served, f"/clip/{video_id(index, 'holiday/old camera.avi')}/6000-8500.mp4")
        assert answer.status == 200 and answer.headers["content-type"] == "video/mp4"
        (tmp_path / "clip.mp4").write_bytes(answer.body)
        track = decode_frames(tmp_path / "clip.mp4")
        assert abs(track.times[-1, 1] - track.times[0, 0] - 2.5) < 0.15
        chosen = decode_chosen(tmp_path / "clip.mp4", _first(), 60, track.height, track.width)
        assert abs(chosen.mean() - brightness(6)) < 6

    @pytest.mark.parametrize("address", ["video/{}", "thumb/{}/0.jpg", "clip/{}/0-1000.mp4"])
    @pytest.mark.parametrize("name", ["lost.mp4", "link.mp4", "unknown"])
    def test_what_is_gone_or_outside_is_not_there(
        self, served: Served, index: FakeIndex, address: str, name: str
    ) -> None:
        known = name if name == "unknown" else video_id(index, name)
        answer = ask(served, "/" + address.format(known))
        assert answer.status == 404
        assert json.loads(answer.body) == {"error": "this video is no longer there"}

    def test_a_removed_video_is_marked(self, served: Served, index: FakeIndex) -> None:
        gone = {h["video"]["name"]: h["video"]["gone"] for h in search(served, "x")["hits"]}
        assert gone["lost.mp4"] and gone["link.mp4"] and not gone["red door.mp4"]
        del index.known[video_id(index, "red door.mp4")]
        assert ask(served, "/api/timeline/v0?q=x").status == 404

    def test_what_failed_to_index_is_not_served(
        self, served: Served, index: FakeIndex, root: Path
    ) -> None:
        path = str(root / "red door.mp4")
        index.known["bad"] = Video("bad", path, "red door.mp4", 1, 0.0, 0.0, FAILED, "broken")
        assert ask(served, "/video/bad").status == 404

    def test_a_video_under_another_name_is_no_page(
        self, served: Served, index: FakeIndex, root: Path
    ) -> None:
        (root / "page.html").write_text("<script>alert(1)</script>")
        answer = ask(served, f"/video/{index.put('page.html', 1.0, 0.0, 1.0).id}")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-content-type-options"] == "nosniff"
        shown = ask(served, f"/thumb/{index.put('page.html', 1.0, 0.0, 1.0).id}/0.jpg")
        assert shown.status == 415 and b"/page.html" not in shown.body

    @pytest.mark.parametrize(
        "path",
        [
            *("/video/../../etc/passwd", "/video/..%2f..%2fetc%2fpasswd", "//etc/passwd"),
            *("/video/%2e%2e/page.html", "/page.html", "/video/", "/thumb/v0/../../x.jpg"),
            *("/video/v0/../v0", "/video/v0%00", "/video/%2fetc%2fpasswd", "/api/videos"),
        ],
    )
    def test_traversal_leads_nowhere(self, served: Served, path: str) -> None:
        answer = ask(served, path)
        assert answer.status == 404 and b"root:" not in answer.body

    @pytest.mark.parametrize(
        "path", ["clip/v0/0-121000.mp4", "clip/v0/5-5.mp4", "clip/v0/50000-51000.mp4"]
    )
    def test_seconds_that_are_not_there(self, served: Served, path: str) -> None:
        assert ask(served, "/" + path).status == 400
        assert ask(served, "/thumb/v0/99999999.jpg").status == 400


class TestGuards:
    def test_every_answer_has_the_headers(self, served: Served) -> None:
        for path in (
            "/",
            "/api/status",
            "/video/v0",
            "/nowhere",
            "/api/search?q=",
            "/api/search?q=fail",
        ):
            headers = ask(served, path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-security-policy"].startswith("default-src 'self'")
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert headers["x-frame-options"] == "DENY"
            assert "server" not in headers or "uvicorn" in headers["server"]

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    def test_only_get(self, served: Served, method: str) -> None:
        assert ask(served, "/api/search?q=a", method).status == 405

    @pytest.mark.parametrize(
        ("host", "status"),
        [("evil.example", 400), ("127.0.0.1.evil.example", 400), ("", 400), ("localhost", 200),
         ("localhost:1", 200), ("[::1]:80", 200), ("127.0.0.1", 200)],
    )  # fmt: skip
    def test_only_hosts_it_knows(self, served: Served, host: str, status: int) -> None:
        assert ask(served, "/api/status", Host=host).status == status

    def test_other_sites_embed_nothing(self, served: Served) -> None:
        for site in ("cross-site", "same-site"):
            embedded = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "no-cors"}
            assert ask(served, "/thumb/v0/0.jpg", **embedded).status == 403
        followed = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
        assert ask(served, "/?q=a", **followed).status == 200

    def test_a_token_opens_once_it_is_a_cookie(self, index: FakeIndex) -> None:
        with Served(make_app(index, TOKEN)) as served:
            for path in ("/", "/api/status", "/video/v0", "/?token=wrong", "/?token="):
                assert ask(served, path).status == 401
            assert ask(served, "/", Cookie="propy_token=wrong").status == 401
            assert ask(served, "/", Cookie="propy_token=\xff").status == 401
            assert ask(served, f"/api/status?token={quote(TOKEN)}").status == 401
            answer = ask(served, f"/?q=a+b&token={quote(TOKEN)}")
            assert answer.status == 303 and answer.headers["location"] == "/?q=a+b"
            cookie = answer.headers["set-cookie"]
            assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
            assert ask(served, "/api/status", Cookie=cookie.split(";")[0]).status == 200

    @pytest.mark.parametrize(
        "parameters",
        ["q=", "q=%20%09", "q=" + "a" * 501, "q=a&k=0", "q=a&k=101", "q=a&k=x",
         "q=a&k=99999999999", "q=a&by=nobody", "q=a&k=%D9%A3", "q=refuse"],
    )  # fmt: skip
    def test_what_is_out_of_bounds_is_refused(self, served: Served, parameters: str) -> None:
        answer = ask(served, f"/api/search?{parameters}")
        assert answer.status == 400 and json.loads(answer.body)["error"]

    def test_queries_of_any_letters(self, served: Served) -> None:
        for query in (HOSTILE, "'; drop table events; --", "🦊" * 100, "\0\ud800".encode(
            "utf-8", "surrogatepass").decode("utf-8", "replace")):  # fmt: skip
            assert search(served, query)["query"] == query

    def test_a_bug_is_logged_here_and_not_told_there(self, served: Served) -> None:
        answer = ask(served, "/api/search?q=fail")
        assert answer.status == 500
        assert json.loads(answer.body) == {"error": "the server failed; its log says why"}

    def test_one_search_at_a_time_and_not_endlessly_many(
        self, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running, most, threads = 0, 0, set()
        real = index.search

        def counted(*args, **kwargs):
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            threads.add(threading.get_ident())
            time.sleep(0.02)
            running -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(index, "search", counted)
        monkeypatch.setattr(server, "MAX_WAITING", 8)
        with Served(make_app(index)) as served, ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda _: ask(served, "/api/search?q=a"), range(24)))
            statuses = [answer.status for answer in answers]
            assert set(statuses) == {200, 503} and statuses.count(200) >= 8
            assert all(a.headers["retry-after"] for a in answers if a.status == 503)
            assert ask(served, "/api/search?q=a").status == 200  # afterwards as before
        assert most == 1 and len(threads) == 1


class TestPreviews:
    @pytest.fixture
    def video(self, tmp_path: Path) -> Path:
        write_sample(tmp_path / "video.mp4", "h264", seconds=3)
        return tmp_path / "video.mp4"

    def test_one_is_made_once_however_many_ask(
        self, video: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls, gate = [], threading.Event()

        def write(video: Path, seconds: float, target: Path) -> None:
            calls.append(seconds)
            gate.wait(10)
            target.write_bytes(b"picture")

        monkeypatch.setattr(preview, "write_thumbnail", write)
        previews = Previews()
        asked = [previews.thumbnail(video, 1.0) for _ in range(20)]
        gate.set()
        assert len({future.result(10) for future in asked}) == 1
        made = previews.thumbnail(video, 1.0).result(10)
        assert made.read_bytes() == b"picture"
        shutil.rmtree(made.parent)  # as programs do that tidy up old files
        assert previews.thumbnail(video, 1.0).result(10).read_bytes() == b"picture"
        os.utime(video, (1, 1))  # another video by now, for all that is known
        previews.thumbnail(video, 1.0).result(10)
        assert calls == [1.0, 1.0, 1.0]
        previews.close()

    def test_the_cache_keeps_what_was_asked_for_last(
        self, video: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            preview,
            "write_thumbnail",
            lambda video, seconds, target: target.write_bytes(b"x" * 100),
        )
        previews = Previews(cache_bytes=350)
        first, *others = [previews.thumbnail(video, float(i)).result(10) for i in range(3)]
        previews.thumbnail(video, 0.0).result(10)
        others += [previews.thumbnail(video, float(i)).result(10) for i in (3, 4)]
        assert [path.exists() for path in (first, *others)] == [True, False, False, True, True]
        folder = first.parent
        assert sum(path.stat().st_size for path in folder.iterdir()) == 300
        previews.close()
        assert not folder.exists()

    def test_what_cannot_be_made_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        previews = Previews()
        for _ in range(2):
            with pytest.raises(DataError, match=r"broken\.mp4"):
                previews.thumbnail(tmp_path / "broken.mp4", 0.0).result(30)
        with pytest.raises(OSError):
            previews.thumbnail(tmp_path / "none.mp4", 0.0)
        previews.close()

    def test_a_clip_without_a_picture_is_none(self, video: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"video\.mp4"):
            preview.write_clip(video, 9.0, 10.0, tmp_path / "clip.mp4")

    def test_too_many_are_refused(self, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = threading.Event()
        monkeypatch.setattr(preview, "MAX_WAITING", 3)
        monkeypatch.setattr(preview, "write_thumbnail", lambda *_: gate.wait(10))
        previews = Previews()
        for i in range(3):
            previews.thumbnail(video, float(i))
        with pytest.raises(BusyError):
            previews.thumbnail(video, 9.0)
        gate.set()
        previews.close()


PROGRAM = """
import sys
from pathlib import Path
from tests.search.page_index import FakeIndex
from utils.search.server import serve
index = FakeIndex([sys.argv[1]])
index.put("red door.mp4", 12.0, 5.0, 7.5)
serve(index, host=sys.argv[2], port=0)
print("ended")
"""


class TestServe:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_cleanly(self, root: Path, tmp_path: Path, number: int) -> None:
        command = [sys.executable, "-c", PROGRAM, str(root), "127.0.0.1"]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
        ) as process:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())[1])
            stream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            stream.request("GET", "/thumb/v0/0.jpg")
            assert stream.getresponse().read()[:2] == b"\xff\xd8"
            assert list(tmp_path.iterdir())
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "ended\n", "")
        assert not list(tmp_path.iterdir())

    def test_other_machines_need_a_token_and_the_program_says_so(self, root: Path) -> None:
        command = [sys.executable, "-c", PROGRAM, str(root), "0.0.0.0"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            warning, page = process.stdout.readline(), process.stdout.readline()
            port, token = re.search(r":(\d+)/\?token=([\w-]+)", page).groups()
            assert "Other machines" in warning and len(token) >= 16
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
            connection.request("GET", "/")
            assert connection.getresponse().status == 401
            connection.close()
            process.terminate()

    def test_what_cannot_be_served_is_an_error(self, index: FakeIndex, served: Served) -> None:
        with pytest.raises(SearchError, match=rf"port {served.port}.*--port"):
            serve(index, port=served.port)
        with pytest.raises(SearchError, match="--host"):
            serve(index, host="192.0.2.1", port=0)
        with pytest.raises(SearchError, match="token"):
            serve(index, port=0, token="short")


def _first():
    import numpy as np

    return np.zeros(1, np.int64)
