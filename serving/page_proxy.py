"""Reverse proxy to the page, which runs in a process of its own so that its work takes no CPU time from the API.

`PageProxy` is the ASGI app in the ingress: it forwards requests and streams responses. `RequireToken` wraps the page's
app: only requests with the token of the ingress are served. Without it, every local process, or one on another node of
a cluster, could reach the page and bypass the authentication and limits of the ingress.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from records.errors import UnavailableError, UnknownIdError

TOKEN_HEADER = "x-relook-page"
FIND_TIMEOUT_S = 3.0
"""How long a request waits for a page process that is starting."""
# Gradio streams events in one response that lasts as long as the browser tab is open, so reads have no timeout.
_TIMEOUT = httpx.Timeout(None, connect=5.0)
_NOT_FORWARDED = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", TOKEN_HEADER})
"""Hop-by-hop headers (RFC 9110, 7.6.1), and the token's, which only the ingress may set."""


@dataclass(frozen=True, slots=True)
class PageAddress:
    """Where the page listens, and the token that every request must carry."""

    port: int
    token: str = field(repr=False)
    host: str = "127.0.0.1"


class RequireToken:
    """ASGI middleware that responds 403 to requests without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        # Lifespan events come from the server and carry no headers.
        if scope["type"] == "http":
            given = Request(scope).headers.get(TOKEN_HEADER, "")
            # compare_digest takes equally long for every wrong token, so response times do not help to guess it.
            if not secrets.compare_digest(given.encode(), self._token.encode()):
                await PlainTextResponse("use the address of the service, not that of its page", 403)(
                    scope, receive, send
                )
                return
        await self._app(scope, receive, send)


class PageProxy:
    """ASGI app that forwards requests to the page.

    Args:
        find: returns the page's current address, which changes when its process is replaced.
    """

    def __init__(self, find: Callable[[], Awaitable[PageAddress]]) -> None:
        self._find = find
        self._address: PageAddress | None = None
        self._http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        request = Request(scope, receive)
        upstream = await self._forward(request)
        # aiter_raw and not aiter_bytes: a compressed body stays as its Content-Encoding header says.
        response = StreamingResponse(
            upstream.aiter_raw(), upstream.status_code, background=BackgroundTask(upstream.aclose)
        )
        # A list and not a mapping, because a header such as Set-Cookie may occur more than once.
        response.raw_headers = [(name, value) for name, value in upstream.headers.raw if _is_forwarded(name)]
        await response(scope, receive, send)

    def forget(self) -> None:
        """Drop the cached address; the next request finds the page again."""
        self._address = None

    async def _forward(self, request: Request) -> httpx.Response:
        path, query = request.scope["raw_path"], request.scope["query_string"]
        if not path.startswith(b"/") or not (path + query).isascii():
            # Appended to host and port, a path like "@evil.example/" would turn them into the URL of another host.
            raise UnknownIdError("not found: a path must begin with a slash and be ASCII")
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        for _ in range(2):
            address = self._address or await self._find_page()
            headers = [(name, value) for name, value in request.headers.raw if _is_forwarded(name)]
            headers.append((TOKEN_HEADER.encode(), address.token.encode()))
            # Built directly: AsyncClient.build_request would add its default headers, such as User-Agent.
            forwarded = httpx.Request(
                request.method,
                httpx.URL(
                    scheme="http", host=address.host, port=address.port, raw_path=path + b"?" * bool(query) + query
                ),
                headers=headers,
                content=request.stream() if has_body else None,
                extensions={"timeout": _TIMEOUT.as_dict()},
            )
            try:
                return await self._http.send(forwarded, stream=True)
            except httpx.ConnectError:
                # The connection failed before anything was sent, so a second try cannot run an event twice.
                self.forget()
            except httpx.HTTPError as error:
                raise UnavailableError("the page did not respond; reload it") from error
        raise UnavailableError("the page is starting; reload it in a moment")

    async def _find_page(self) -> PageAddress:
        try:
            self._address = await asyncio.wait_for(self._find(), FIND_TIMEOUT_S)
        except TimeoutError as error:
            raise UnavailableError("the page is starting; reload it in a moment") from error
        return self._address

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._http.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _is_forwarded(name: bytes) -> bool:
    return name.decode("latin-1").lower() not in _NOT_FORWARDED
