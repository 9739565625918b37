"""A server for the tests of scripts/download_clip.sh: OpenAI's and the hub in one."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """Sends files from any byte on; HEAD answers as huggingface.co does of its LFS files.

    Attributes:
        files: by address.
        sha256: what HEAD says it is, of a file's bytes.
        status: of what is not there.
        cut: after so many bytes the connection ends, once.
        answers: that were given, "status from first byte".
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.sha256 = lambda body: hashlib.sha256(body).hexdigest()
        self.status, self.cut = 404, 0
        self.answers: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        body = self.server.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Linked-Etag", f'"{self.server.sha256(body)}"')
            self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        body = self.server.files.get(self.path)
        if body is None:  # the hub's library asks for other things too
            self.send_error(self.server.status)
            return
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        status = 416 if start >= len(body) else 206 if start else 200
        self.server.answers.append(f"{status} from {start}")
        self.send_response(status)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body[start:])))
        self.end_headers()
        self.wfile.write(body[start : self.server.cut or None])
        self.server.cut = 0

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """One at work on this machine."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
