"""Web pages: bounded answers for browsers and scrapers.

Only ``GET`` and ``HEAD``, nothing can be changed by it. Connections and their time-outs are
those of the OTLP receiver (:mod:`esper_tamiyo.receiving.connections`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import html
import json
import logging
import re
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any, Protocol, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from esper_otel.report import live_page
from esper_tamiyo.receiving.connections import IDLE_S, SWEEP_S, Acceptor, Connections
from esper_tamiyo.receiving.credentials import BearerAuth, Certificates
from esper_tamiyo.receiving.http_receiver import HttpConnection
from esper_tamiyo.receiving.pipe import IngestCounts

log = logging.getLogger("tamiyo")

MOST_CONNECTIONS = 32
"""At most so many answers are under way, of 2 MB at most."""

MOST_COMPARED = 8
"""Runs that one page lays over one another."""

LONGEST_PATH = 512
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9A-Za-z.-]+))(?::[0-9]+)?")
_ID = re.compile(r"[0-9a-f]{16}(?:-[0-9]{1,6})?")
READ_BYTES = 16 * 1024

T = TypeVar("T")

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "tamiyo",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Shown(Protocol):
    """What there is to show; each method is called on the thread of the runs."""

    def index(self) -> dict[str, Any]:
        """The runs, and how the sidecar is."""

    def pack(self, ids: tuple[str, ...]) -> bytes | None:
        """The data of these runs."""

    def news(self, ids: tuple[str, ...], since: int) -> bytes | None:
        """What is newer than a version."""

    def metrics(self, openmetrics: bool) -> bytes:
        """The answer to a scrape."""


class WebPages:
    """Serves the pages at a socket that listens already, with HTTPS where there are
    certificates."""

    def __init__(
        self,
        data: Shown,
        worker: ThreadPoolExecutor,
        auth: BearerAuth,
        certificates: Certificates | None,
    ) -> None:
        self.requests = 0
        self.unauthorized = 0
        self.failures = 0
        """Requests that failed here."""
        self._data = data
        self._worker = worker
        self._auth = auth
        self._failed: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._hosts: frozenset[str] | None = None
        self.connections = Connections(MOST_CONNECTIONS, _ignore, self._loop.time)
        self._server = web.Server(
            self._handle,
            keepalive_timeout=IDLE_S,
            read_bufsize=READ_BYTES,
            max_line_size=4096,
            max_field_size=4096,
            access_log=None,
        )
        tls = None if certificates is None else certificates.context
        self._acceptor = Acceptor(self.connections, self._protocol, tls, _ignore)
        self._sweeper: asyncio.Task[None] | None = None

    def serve_at(self, listening: socket.socket) -> None:
        """Answer from now on."""
        host = listening.getsockname()[0]
        if not self._auth.is_needed and (host in _LOOPBACK or host.startswith("127.")):
            # A page of a stranger's, whose name is made to mean this machine, must not read.
            self._hosts = _LOOPBACK | {host}
        self._acceptor.accept_at(listening)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self, grace_s: float) -> None:
        """Let running answers end, for a moment."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._acceptor.stop()
        self._server.pre_shutdown()
        await self._server.shutdown(grace_s)

    def malformed(self, why: str) -> Exception:
        """What came is no HTTP."""
        return ValueError(why)

    def failed(self, error: BaseException) -> None:
        """Something that nobody expected: each kind is logged once."""
        self.failures += 1
        kind = type(error).__name__
        self._failed[kind] += 1
        if self._failed[kind] == 1:
            log.error(
                "a request to the page failed (%s); others like it are only counted: %.200r",
                kind,
                error,
            )

    def on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What the loop tells of exceptions that nobody caught."""
        error = context.get("exception")
        if not isinstance(error, ConnectionError | ssl.SSLError | HttpProcessingError):
            self.failed(error or RuntimeError(context.get("message")))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.connections.sweep()

    def _protocol(self) -> asyncio.Protocol:
        return HttpConnection(self._server, self.connections, self)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, HttpConnection)
        connection.release_head()
        self.connections.answers(connection)
        self.requests += 1
        try:
            response = await self._answer(request)
        except Exception as error:  # whatever one request brings about, others are served
            self.failed(error)
            response = _told(500, "internal error")
        response.headers.update(_HEADERS)
        if request.can_read_body:  # nobody reads what was not asked for
            response.force_close()
        try:
            await response.prepare(request)
            await response.write_eof()
        finally:
            connection.rest()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            response = _told(405, "expected GET")
            response.headers["Allow"] = "GET, HEAD"
            return response
        if self._hosts is not None and _host_of(request) not in self._hosts:
            return _told(
                403,
                "expected a Host that is this machine's loopback, such as 127.0.0.1; with "
                "--token-file any name is served",
            )
        if not self._auth.admits(_bearer_of(request.headers.get("Authorization"))):
            self.unauthorized += 1
            response = _told(401, "expected the token, as a bearer token or as a password")
            response.headers["WWW-Authenticate"] = 'Basic realm="tamiyo", charset="UTF-8"'
            return response
        path = request.path
        if len(path) > LONGEST_PATH:
            return _told(404, "no such page")
        if path in _PAGES:
            return await _PAGES[path](self, request)
        first, _, rest = path.removeprefix("/runs/").partition("/")
        ids = tuple(first.split(","))
        if not path.startswith("/runs/") or not _are_ids(ids):
            return _told(404, "no such page")
        if rest == "":
            page = live_page(f"/runs/{','.join(ids)}")
            return web.Response(text=page, content_type="text/html")
        if rest == "data":
            return _packed(await self._call(self._data.pack, ids))
        if rest == "news":
            since = request.query.get("since", "")
            if not (since.isascii() and since.isdecimal() and len(since) < 19):
                return _told(400, "expected since=VERSION")
            return _packed(await self._call(self._data.news, ids, int(since)))
        return _told(404, "no such page")

    async def _index(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text=index_page(), content_type="text/html")

    async def _runs(self, request: web.BaseRequest) -> web.Response:
        found = await self._call(self._data.index)
        return web.json_response(found, dumps=_json)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        from esper_tamiyo.showing.exposition import OPENMETRICS, TEXT, wants_openmetrics

        openmetrics = wants_openmetrics(request.headers.get("Accept", ""))
        body = await self._call(self._data.metrics, openmetrics)
        kind = OPENMETRICS if openmetrics else TEXT
        return web.Response(body=body, headers={"Content-Type": kind})

    async def _call(self, what: Callable[..., T], *given: Any) -> T:
        return await self._loop.run_in_executor(self._worker, what, *given)


_PAGES: dict[str, Callable[[WebPages, web.BaseRequest], Awaitable[web.Response]]] = {
    "/": WebPages._index,
    "/runs.json": WebPages._runs,
    "/metrics": WebPages._metrics,
}


@cache
def index_page() -> str:
    """The page that lists runs; it holds nothing of them, and asks for ``/runs.json``."""
    elements = _part("esper_otel.report", "elements.js")
    script = elements + _part("esper_tamiyo.showing", "index.js")
    style = _part("esper_otel.report", "report.css")
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {_hash(script)}; "
        f"style-src {_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Template(_part("esper_tamiyo.showing", "index.html")).substitute(
        policy=html.escape(policy, quote=True), script=script, style=style
    )


def _part(package: str, name: str) -> str:
    return files(package).joinpath("page", name).read_text("utf-8")


def _hash(part: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that browsers read: they know no NaN."""
    return json.dumps(value, allow_nan=False)


def _packed(data: bytes | None) -> web.Response:
    """205: all has to be loaded again. 204: there is nothing new."""
    if not data:
        return web.Response(status=205 if data is None else 204)
    return web.Response(body=data, content_type="application/octet-stream")


def _told(status: int, message: str) -> web.Response:
    return web.Response(status=status, text=f"{message}\n", content_type="text/plain")


def _are_ids(ids: tuple[str, ...]) -> bool:
    return len(ids) <= MOST_COMPARED and all(map(_ID.fullmatch, ids))


def _host_of(request: web.BaseRequest) -> str:
    """The name by which we were called, without port and brackets; "" for none."""
    found = _HOST.fullmatch(request.headers.get("Host", ""))
    return (found[1] or found[2]).lower() if found else ""


def _bearer_of(authorization: str | None) -> str | None:
    """The header as a bearer token: browsers ask people for a name and a password."""
    scheme, _, told = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        decoded = base64.b64decode(told.strip(), validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return None
    return f"Bearer {decoded.partition(':')[2]}"


def _ignore(counts: IngestCounts) -> None:
    """Connections that came or went are in nobody's account."""
