"""The page of another process, as an ASGI app: requests are passed on, answers streamed back.

The page has a process of its own, so that whoever draws or uploads there takes nothing from the API. It listens on
loopback and answers only requests that carry its token, which the ingress asks it for; all others go around the guard.
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
"""How long a request waits for a page that is starting."""
# Events of the page are one answer that lasts as long as somebody looks at it.
_TIMEOUT = httpx.Timeout(None, connect=5.0)
_KEPT_BACK = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", TOKEN_HEADER})
"""Headers of one connection, and the one that only the ingress may set."""


@dataclass(frozen=True, slots=True)
class PageAddress:
    """Where the page listens.

    Args:
        port: on 127.0.0.1.
        token: that every request has to carry.
    """

    port: int
    token: str = field(repr=False)


class Locked:
    """Lets only requests with the token through to an app.

    Args:
        app: what is locked.
        token: that every request has to carry.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] == "http":
            said = Request(scope).headers.get(TOKEN_HEADER, "")
            if not secrets.compare_digest(said.encode(), self._token.encode()):
                await PlainTextResponse("ask the service, not its page", 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class PageProxy:
    """Passes requests on to the page.

    Args:
        find: asks where the page listens; it may listen elsewhere after its process was replaced.
    """

    def __init__(self, find: Callable[[], Awaitable[PageAddress]]) -> None:
        self._find = find
        self._known: PageAddress | None = None
        self._http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        request = Request(scope, receive)
        answer = await self._passed_on(request)
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        # As they are: a header may come twice, as Set-Cookie does.
        response.raw_headers = [(name, value) for name, value in answer.headers.raw if _is_passed_on(name)]
        await response(scope, receive, send)

    def forget(self) -> None:
        """Ask anew where the page listens, at the next request."""
        self._known = None

    async def _passed_on(self, request: Request) -> httpx.Response:
        path, query = request.scope["raw_path"], request.scope["query_string"]
        if not path.startswith(b"/") or not (path + query).isascii():
            # Written behind an address, such a path would make another address of it.
            raise UnknownIdError("nothing is there: a path begins with a slash and has no letters beyond ASCII")
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        for _ in range(2):
            address = self._known or await self._found()
            headers = [(name, value) for name, value in request.headers.raw if _is_passed_on(name)]
            headers.append((TOKEN_HEADER.encode(), address.token.encode()))
            # Made here and not by the client, which would add headers that nobody sent.
            asked = httpx.Request(
                request.method,
                httpx.URL(
                    scheme="http", host="127.0.0.1", port=address.port, raw_path=path + b"?" * bool(query) + query
                ),
                headers=headers,
                content=request.stream() if has_body else None,
                extensions={"timeout": _TIMEOUT.as_dict()},
            )
            try:
                return await self._http.send(asked, stream=True)
            except httpx.ConnectError:
                # Nothing was sent yet, so asking the next process of the page is no repetition.
                self.forget()
            except httpx.HTTPError as error:
                raise UnavailableError("the page did not answer; load it again") from error
        raise UnavailableError("the page is starting; load it again in a moment")

    async def _found(self) -> PageAddress:
        try:
            self._known = await asyncio.wait_for(self._find(), FIND_TIMEOUT_S)
        except TimeoutError as error:
            raise UnavailableError("the page is starting; load it again in a moment") from error
        return self._known

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._http.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _is_passed_on(name: bytes) -> bool:
    return name.decode("latin-1").lower() not in _KEPT_BACK
