"""`Guard`: stands before Gradio and lets through only what the page and the API need, within limits.

It is plain ASGI, so that streams pass as they are.
"""

import asyncio
import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from app.web.addresses import Addresses
from app.web.joins import Joins
from app.web.limits import (
    MAX_CONNECTIONS,
    MAX_JSON_BYTES,
    MAX_MCP_BYTES,
    MAX_TIMELINE_BYTES,
    MAX_UPLOAD_BYTES,
    Refusal,
    UploadQuota,
)
from app.web.log import LOG
from app.web.passwords import CLIENT_ADDRESS

_API = "gradio_api/"
_CONVERSATION = "conversation"
# What the page, the API and MCP use. Gradio has more: editors, run histories, proxies, monitoring.
_PAGE_ROUTES = frozenset(
    {"", "login", "logout", "config", "theme.css", "assets", "static", "svelte", "favicon.ico", "manifest.json"}
    | {"robots.txt", "pwa_icon"}
)
_API_ROUTES = frozenset(
    {"info", "openapi.json", "app_id", "user", "login_check", "token", "startup-events", "theme.css", "heartbeat"}
    | {"queue", "call", "run", "api", "cancel", "reset", "upload", "upload_progress", "file"}
)
_QUIET_ROUTES = ("assets", "static", "svelte", "theme.css", "favicon.ico", "manifest.json", "robots.txt", "pwa_icon")
_FORWARDED = ("forwarded", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-for", "x-forwarded-prefix")
_BODY_TIMEOUT_S = 60.0
_MAX_DISCARDED_BYTES = 64 * 2**20  # of a body that is too large: a client reads the answer only after sending it all


class Guard:
    """An ASGI app around another.

    Args:
        app: Gradio's app.
        addresses: that it answers to.
        joins: checks what enters the queue.
        root_path: path under which a proxy serves the page.
        mcp: whether Gradio's MCP server runs.
        health: a status and a body for `/health`.
        conversations: the app for `/conversation`.
        logged_in: whether a request is that of a visitor who has given a password, if one is needed.
    """

    def __init__(
        self,
        app: ASGIApp,
        addresses: Addresses,
        joins: Joins,
        root_path: str,
        mcp: bool,
        health: Callable[[], tuple[int, dict[str, Any]]],
        conversations: ASGIApp,
        logged_in: Callable[[HTTPConnection], bool],
    ):
        self._app, self._addresses, self._joins, self._health = app, addresses, joins, health
        self._conversations, self._logged_in = conversations, logged_in
        self._root_path = root_path
        self._api_routes = _API_ROUTES | ({"mcp"} if mcp else set())
        self._uploads = UploadQuota()
        self._open: Counter[str] = Counter()
        self._headers = _security_headers(addresses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        address = _network(scope["client"][0] if scope.get("client") else "")
        CLIENT_ADDRESS.set(address)
        route = self._route(scope["path"])
        if scope["type"] == "websocket":
            await self._connect(route, address, scope, receive, send)
            return
        answered = _Answer(send, self._headers, self._addresses, Headers(scope=scope).get("origin"))
        began_s = time.monotonic()
        try:
            with self._counted(address):
                await self._pass_on(route, address, scope, receive, answered)
        except Refusal as refusal:
            await _refuse(refusal, scope, receive, answered)
        except HTTPException:  # Gradio ends a stream so if its session is gone
            pass
        except Exception:
            LOG.exception("a fault while answering %s %s", scope["method"], _logged(route))
            if not answered.status:
                await _refuse(Refusal(500, "the server made a mistake; its log has more"), scope, receive, answered)
        finally:
            if not (route.split("/")[0] in _QUIET_ROUTES and answered.status < 400):
                spent_ms = 1000 * (time.monotonic() - began_s)
                LOG.info("%s %s %s %s %.0f ms", address, scope["method"], _logged(route), answered.status, spent_ms)

    async def _connect(self, route: str, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a WebSocket on to the conversations; Gradio has none."""
        socket, began_s, ended = WebSocket(scope, receive, send), time.monotonic(), "closed"
        try:
            with self._counted(address):
                self._check_sender(scope)
                if route != _CONVERSATION:
                    raise Refusal(404, "there is nothing here")
                self._check_login(scope)
                await self._conversations(_below(scope, route), receive, send)
        except Refusal as refusal:
            ended = str(refusal.status)
            await _refuse_socket(socket, refusal)
        except Exception:
            LOG.exception("a fault in a conversation")
            ended = "ended by an error"
        finally:
            LOG.info("%s WS %s %s %.0f s", address, _logged(route), ended, time.monotonic() - began_s)

    def _check_login(self, scope: Scope) -> None:
        if not self._logged_in(HTTPConnection(scope)):
            raise Refusal(401, "log in first")

    async def _pass_on(self, route: str, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_sender(scope)
        if route == "health":
            status, body = self._health()
            await JSONResponse(body, status)(scope, receive, send)
            return
        first = route.removeprefix(_API).split("/")[0].partition("=")[0]
        if first == _CONVERSATION:
            await self._answer_conversation(route, address, scope, receive, send)
            return
        if first not in (self._api_routes if route.startswith(_API) else _PAGE_ROUTES):
            raise Refusal(404, "there is nothing here")
        if scope["method"] == "OPTIONS":
            await JSONResponse({})(scope, receive, send)
            return
        async with AsyncExitStack() as stack:
            if scope["method"] == "POST":
                body = await self._body(first, address, scope, receive)
                if first in ("queue", "call", "run", "api"):
                    body = await stack.enter_async_context(self._joins.call(route.removeprefix(_API), body, address))
                receive = _replayed(body, receive)
            elif first in ("heartbeat", "call") or route == f"{_API}queue/data":
                query = scope["query_string"].decode("ascii", "replace")
                stack.enter_context(self._joins.listening(route.removeprefix(_API), query))
            await self._app(scope, receive, send)

    async def _answer_conversation(self, route: str, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_login(scope)
        if scope["method"] == "POST":
            receive = _replayed(await self._body("conversation", address, scope, receive), receive)
        await self._conversations(_below(scope, route), receive, send)

    def _check_sender(self, scope: Scope) -> None:
        """Check who is addressed, and on behalf of which page.

        Raises:
            Refusal: not this server, or a page that may not use it.
        """
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        for name in (host, *headers.get("x-forwarded-host", host).split(",")):
            if not self._addresses.answers_to(name.strip()):
                raise Refusal(421, "this server does not answer to this host name; --allow-origin names others")
        own = headers.get("x-forwarded-host", host).split(",")[0].strip()
        if origin is not None and not (self._addresses.may_use(origin, own) or self._addresses.may_use(origin, host)):
            raise Refusal(403, "pages of other sites may not use this server; --allow-origin names those that may")
        dropped = {b"x-gradio-server"}
        if not self._addresses.behind_proxy:
            dropped |= {name.encode() for name in _FORWARDED}
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]

    async def _body(self, first: str, address: str, scope: Scope, receive: Receive) -> bytes:
        """Read the body of a request, and count it if it holds a file.

        Raises:
            Refusal: it is too large, or too slow.
        """
        most = {"upload": MAX_UPLOAD_BYTES, "mcp": MAX_MCP_BYTES, _CONVERSATION: MAX_TIMELINE_BYTES}.get(first)
        if most is None:
            return await _read_in_time(receive, MAX_JSON_BYTES, scope)
        with self._uploads.room(address):
            body = await _read_in_time(receive, most, scope)
            self._uploads.add(address, len(body))
            return body

    def _route(self, path: str) -> str:
        if self._root_path and path.startswith(f"{self._root_path}/"):
            path = path.removeprefix(self._root_path)
        return path.lstrip("/")

    @contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        if self._open[address] >= MAX_CONNECTIONS:
            raise Refusal(429, "too many requests at once from your address")
        self._open[address] += 1
        try:
            yield
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]


class _Answer:
    """Sends an answer with the security headers, and remembers its status."""

    def __init__(self, send: Send, headers: dict[str, str], addresses: Addresses, origin: str | None):
        self._send, self._headers = send, headers
        self._origin = origin if origin is not None and addresses.may_use(origin, "") else None
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self._headers)
            if self._origin is not None:  # Gradio would leave it out if the server's own name is localhost
                headers["access-control-allow-origin"] = self._origin
                headers["access-control-allow-credentials"] = "true"
                headers["access-control-allow-headers"] = "content-type, authorization, mcp-protocol-version"
                headers["access-control-allow-methods"] = "GET, POST, DELETE, OPTIONS"
                headers.add_vary_header("Origin")
        await self._send(message)


def _security_headers(addresses: Addresses) -> dict[str, str]:
    frames = " ".join(["'self'", *sorted(addresses.origins)])
    # Gradio puts scripts and styles into its page, and the player's script is compiled from text. Sound and downloads
    # are made in the browser, as blobs.
    policy = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        f"form-action 'self'; frame-ancestors {frames}"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
    }
    return headers if addresses.origins else headers | {"x-frame-options": "SAMEORIGIN"}


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"detail": refusal.reason}, refusal.status)(scope, receive, send)


async def _refuse_socket(socket: WebSocket, refusal: Refusal) -> None:
    try:
        await socket.send_denial_response(JSONResponse({"detail": refusal.reason}, refusal.status))
    except RuntimeError:  # the server cannot say why
        await socket.close(1008)


def _below(scope: Scope, route: str) -> Scope:
    """A request without the path under which a proxy serves the page."""
    return {**scope, "path": f"/{route}", "root_path": ""}


async def _read_in_time(receive: Receive, most: int, scope: Scope) -> bytes:
    size = Headers(scope=scope).get("content-length", "0")
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await _read(receive, most, int(size[:20]) if size.isdigit() else 0)
    except TimeoutError as error:
        raise Refusal(408, f"the request did not arrive within {_BODY_TIMEOUT_S:.0f} seconds") from error


async def _read(receive: Receive, most: int, announced: int) -> bytes:
    body, size, more = bytearray(), 0, True
    while more and size < _MAX_DISCARDED_BYTES and announced < _MAX_DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the request ended before it was complete")
        size += len(message.get("body", b""))
        if size <= most:
            body += message.get("body", b"")
        more = message.get("more_body", False)
    if size > most or more:
        unit = f"{most // 2**20} MB" if most >= 2**20 else f"{most // 2**10} kB"
        raise Refusal(413, f"a request may have a size of at most {unit}")
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _network(address: str) -> str:
    """The address by which a client is counted: with IPv6, the network that it can choose addresses from."""
    try:
        if ":" in address:
            return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False).network_address)
    except ValueError:
        pass
    return address


def _logged(route: str) -> str:
    """The part of a path that names no session, job or file."""
    parts = route.removeprefix(_API).split("/")
    kept = parts[0].partition("=")[0] if parts[0] not in ("queue", "call", "run", "api") else "/".join(parts[:2])
    return "/" + quote((_API if route.startswith(_API) else "") + kept, safe="/")[:80]
