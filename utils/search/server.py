"""The search page: one file of HTML and what it asks for; by default for this machine only.

Everything is read: GET, files by their id in the index and only inside the indexed folders.
README.md of this folder says what is guarded against, and how.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import glob
import hashlib
import hmac
import ipaddress
import logging
import mimetypes
import os
import re
import secrets
import signal
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dataloaders import DataError
from modules import ModelError
from utils import SearchError
from utils.search.hits import FAILED, Hit, Video
from utils.search.preview import MAX_CLIP_SECONDS, BusyError, Previews

if TYPE_CHECKING:
    from utils.search import VideoIndex

logger = logging.getLogger("propy.search.server")

DEFAULT_PORT = 8000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_QUERY = 500  # characters; CLIP reads 77 tokens
MAX_K = 100
MAX_WAITING = 256  # searches that run or wait for their turn
MAX_CONNECTIONS = 1024
MAX_FOLDERS = 500
MIN_TOKEN = 16  # characters
COOKIE = "propy_token"
SHUTDOWN_SECONDS = 3
GONE = "this video is no longer there"
# What browsers may play as it is; the page takes a clip where one does not.
PLAYABLE = {".mp4", ".m4v", ".mov", ".webm", ".ogv"}

T = TypeVar("T")


def serve(
    index: VideoIndex,
    host: str = LOOPBACK[0],
    port: int = DEFAULT_PORT,
    token: str | None = None,
    open_browser: bool = False,
    names: Collection[str] = (),
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        host: an address of this machine. Other machines reach any but those of `LOOPBACK`: it then
            takes a token.
        port: 0 for any free one.
        token: who does not have it, sees nothing; made up where one is needed and None is given.
        open_browser: open the page, too.
        names: further names by which browsers may call this machine.

    Raises:
        SearchError: nothing can be served there, or the token is too short.
    """
    alone = host in LOOPBACK
    if token is None and not alone:
        token = secrets.token_urlsafe(16)
    if token is not None and len(token) < MIN_TOKEN:
        raise SearchError(f"a token of {len(token)} characters can be guessed: take {MIN_TOKEN}")
    listener = _listen(host, port)
    app = make_app(index, token, {*LOOPBACK, *names, *(() if alone else own_names(host))})
    address = f"[{host}]" if ":" in host else host
    if not alone and ipaddress.ip_address(listener.getsockname()[0]).is_unspecified:
        address = socket.gethostname()
    page = f"http://{address}:{listener.getsockname()[1]}/"
    if token is not None:
        page += "?" + urlencode({"token": token})
    if not alone:
        seen = ", ".join(map(str, index.roots))
        print(f"Other machines reach this page: who has its address sees the videos of {seen}")
    print(f"Search page: {page} (Ctrl-C ends it)", flush=True)
    if open_browser:
        threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # queries are private, and the first address holds the token
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    with listener, _calm_signals():
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        remedy = "give another --port (0: any free one) or --host"
        raise SearchError(f"{host}, port {port}: cannot be served: {error}: {remedy}") from error


@contextlib.contextmanager
def _calm_signals():
    """uvicorn ends at a signal, then raises it again for whoever was there before: no one here."""
    previous = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def own_names(host: str) -> set[str]:
    """Names and addresses by which other machines may call this one if it listens at `host`."""
    found = {host, socket.gethostname(), socket.getfqdn()}
    with contextlib.suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    return found


def make_app(
    index: VideoIndex, token: str | None = None, names: Collection[str] = LOOPBACK
) -> ASGIApp:
    """The page as an ASGI application.

    Args:
        index: its `search` and `timeline` are called in one thread, everything else in another.
        token: as in `serve`.
        names: hosts that requests may name.
    """
    site = Site(index)
    routes = [
        Route("/", site.page),
        Route("/api/search", site.search),
        Route("/api/timeline/{video}", site.timeline),
        Route("/api/status", site.status),
        Route("/video/{video}", site.video),
        Route("/clip/{video}/{start:int}-{end:int}.mp4", site.clip),
        Route("/thumb/{video}/{time:int}.jpg", site.thumbnail),
        Route("/favicon.ico", site.icon),
    ]
    hosts = [f"[{name}]" if ":" in name else name for name in names]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(Guard, token=token),
        ],
        exception_handlers={
            HTTPException: _explain,
            SearchError: _refuse,
            ModelError: _refuse,
            DataError: _cannot_show,
            BusyError: _busy,
            Exception: _fail,
        },
        lifespan=site.lifespan,
    )
    # Around all of it: Starlette answers for a failure outside of its middleware.
    return Headers(app, site.policy)


class Headers:
    """An application around another: what every answer tells the browser to keep to."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self._app = app
        self._headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Guard:
    """Middleware: refuses what is not GET, what other sites embed, and who lacks the token."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            answer = self._answer(Request(scope))
            if answer is not None:
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _answer(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return _said(405, "only GET", {"allow": "GET, HEAD"})
        site = request.headers.get("sec-fetch-site", "none")
        mode = request.headers.get("sec-fetch-mode")
        if site not in ("none", "same-origin") and mode != "navigate":
            return _said(403, "only from this page")
        if self._token is None:
            return None
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and self._right(given):
            # Into a cookie, so that no address that is passed on holds it.
            rest = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
            answer = RedirectResponse("/?" + urlencode(rest) if rest else "/", status_code=303)
            answer.set_cookie(COOKIE, given, httponly=True, samesite="lax")
            return answer
        if self._right(request.cookies.get(COOKIE, "")):
            return None
        return _said(401, "a token is needed: open the address that the program printed")

    def _right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


class Site:
    """What the addresses answer.

    Attributes:
        policy: the content security policy of the page.
    """

    def __init__(self, index: VideoIndex) -> None:
        self._index = index
        self._html = Path(__file__).with_name("page.html").read_bytes()
        self.policy = content_policy(self._html.decode())
        # One after the other: two products at once only take turns at the memory.
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix="lookup")
        self._waiting = 0
        self._folders: tuple[object, list[str]] = (None, [])

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._previews = Previews()
        self._scoring.submit(self._warm_up)
        try:
            yield
        finally:
            self._scoring.shutdown(wait=False, cancel_futures=True)
            self._lookups.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self._previews.close)

    def _warm_up(self) -> None:
        try:
            self._index.load()
        except (SearchError, ModelError) as error:
            logger.warning("%s", error)  # the first search says it again

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self._html, headers={"cache-control": "no-cache"})

    async def search(self, request: Request) -> Response:
        query = _query(request)
        by = request.query_params.get("by", "moments")
        if by not in ("moments", "videos"):
            raise HTTPException(400, "by: moments or videos")
        k = _number(request.query_params.get("k", "24"), "k", 1, MAX_K)
        folder = request.query_params.get("in", "")[:4096]
        within = glob.escape(folder) + "/*" if folder else None
        found = await self._score(lambda: self._index.search(query, k=k, by=by, within=within))
        hits = await self._look_up(lambda: described(found.hits, self._index.roots))
        answer = {"query": query, "seconds": found.seconds, "version": found.version}
        return JSONResponse({**answer, "hits": hits})

    async def timeline(self, request: Request) -> Response:
        query, video, _ = _query(request), *await self._file(request)
        moments = await self._score(lambda: self._index.timeline(query, video.id))
        return JSONResponse({"events": [[m.start, m.end, m.score, m.level] for m in moments]})

    async def icon(self, _: Request) -> Response:
        """None: the page has its own, but browsers ask for one beside an error."""
        return Response(status_code=204)

    async def status(self, _: Request) -> Response:
        return JSONResponse(await self._look_up(self._status))

    def _status(self) -> dict[str, Any]:
        status = self._index.status()
        if self._folders[0] != status["version"]:
            self._folders = (status["version"], folders(self._index.videos()))
        if status["indexing"]:
            status["indexing"] = {**status["indexing"], "name": shown(status["indexing"]["name"])}
        return {**status, "folders": self._folders[1]}

    async def video(self, request: Request) -> Response:
        _, path = await self._file(request)
        kind = mimetypes.guess_type(path.name)[0] or ""
        # Whatever its name, a video: never a page of this site.
        kind = kind if kind.startswith("video/") else "application/octet-stream"
        return FileResponse(path, media_type=kind, headers={"cache-control": "private, no-cache"})

    async def clip(self, request: Request) -> Response:
        video, path = await self._file(request)
        start, end = request.path_params["start"], request.path_params["end"]
        if not 0 < end - start <= MAX_CLIP_SECONDS * 1000 or start > video.duration * 1000:
            raise HTTPException(400, "no such seconds")
        made = await self._preview(
            path, lambda: self._previews.clip(path, start / 1000, end / 1000)
        )
        return FileResponse(made, media_type="video/mp4")

    async def thumbnail(self, request: Request) -> Response:
        video, path = await self._file(request)
        seconds = request.path_params["time"] / 1000
        if seconds > video.duration + 1:
            raise HTTPException(400, "no such second")
        made = await self._preview(path, lambda: self._previews.thumbnail(path, seconds))
        headers = {"cache-control": "private, max-age=3600"}
        return FileResponse(made, media_type="image/jpeg", headers=headers)

    async def _file(self, request: Request) -> tuple[Video, Path]:
        """The video of a request and where it lies; 404 if it is gone or lies elsewhere by now."""

        def look_up() -> tuple[Video, Path] | None:
            try:
                video = self._index.video(request.path_params["video"])
            except SearchError:
                return None
            path = inside(video, self._index.roots)
            return None if path is None or video.status == FAILED else (video, path)

        found = await self._look_up(look_up)
        if found is None:
            raise HTTPException(404, GONE)
        return found

    async def _preview(self, video: Path, ask: Callable[[], Future[Path]]) -> Path:
        try:
            future = await asyncio.to_thread(ask)
            # Shielded: others may wait for the same one.
            return await asyncio.shield(asyncio.wrap_future(future))
        except (OSError, DataError) as error:
            if video.exists():
                raise
            raise HTTPException(404, GONE) from error

    async def _score(self, work: Callable[[], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise BusyError
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._scoring, work)
        finally:
            self._waiting -= 1

    async def _look_up(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._lookups, work)


def inside(video: Video, roots: Collection[str]) -> Path | None:
    """Where a video's file really lies; None if that is outside of what was indexed, or nowhere."""
    try:
        path = Path(video.path).resolve(strict=True)
        regular = path.is_file()
        within = any(path.is_relative_to(Path(root).resolve()) for root in roots)
    except (OSError, ValueError, RuntimeError):  # the last: a circle of links
        return None
    return path if regular and within else None


def described(hits: Collection[Hit], roots: Collection[str]) -> list[dict[str, Any]]:
    """What the page needs of them, and nothing of where they lie."""
    answer = []
    for hit in hits:
        name = shown(hit.video.name)
        video = {"id": hit.video.id, "name": name, "duration": hit.video.duration}
        video["playable"] = Path(hit.video.path).suffix.lower() in PLAYABLE
        video["gone"] = inside(hit.video, roots) is None
        moments = [asdict(moment) for moment in hit.moments]
        answer.append({"video": video, "score": hit.score, "moments": moments})
    return answer


def shown(name: str) -> str:
    """A name without what JSON cannot hold: bytes of a file name that are no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def folders(videos: Collection[Video]) -> list[str]:
    """The folders below the roots that hold videos, sorted; the first ones only."""
    found = {str(p) for v in videos for p in PurePosixPath(v.name).parents if str(p) != "."}
    return sorted(name for name in found if shown(name) == name)[:MAX_FOLDERS]


def content_policy(html: str) -> str:
    """Only this site, and of inline code only what the page came with."""

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    rules = {
        "default-src": "'self'",
        "script-src": sources("script"),
        "style-src": sources("style"),
        "img-src": "'self' data:",
        **dict.fromkeys(("object-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _query(request: Request) -> str:
    query = " ".join(request.query_params.get("q", "").split())
    if not query:
        raise HTTPException(400, "say what to look for")
    if len(query) > MAX_QUERY:
        raise HTTPException(400, f"at most {MAX_QUERY} characters")
    return query


def _number(text: str, name: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or not low <= int(text) <= high:
        raise HTTPException(400, f"{name}: a number from {low} to {high}")
    return int(text)


def _said(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status_code=status, headers=headers)


async def _explain(_: Request, error: Exception) -> Response:
    return _said(error.status_code, error.detail, error.headers)


async def _refuse(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    return _said(400, shown(str(error)))


async def _cannot_show(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    return _said(415, "this video cannot be shown")


async def _busy(*_: object) -> Response:
    return _said(503, "too many at once: try again in a moment", {"retry-after": "1"})


async def _fail(*_: object) -> Response:
    return _said(500, "the server failed; its log says why")  # the exception goes there by itself
