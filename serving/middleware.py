"""ASGI middleware: Host and Origin checks, body limit, request ids, security headers, problem documents.

It stands before the API and the page and routes each request to one of them by its path. The Host check stops DNS
rebinding and the Origin check foreign web pages: without keys, a browser on this machine could otherwise be made to
use the service. It does not authenticate; see `serving.routes.authenticator`.
"""

import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from records.errors import ImageError
from records.ids import new_id
from serving.problems import problem, problem_of, problem_response
from serving.schemas import Problem

logger = logging.getLogger(__name__)

API_PATHS = ("/v1", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "SAMEORIGIN",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestMiddleware:
    """Checks every request before an app sees it.

    Args:
        api: serves `API_PATHS`, or every path if there is no page.
        max_body_bytes: limit of one request body.
        on_response: called with the HTTP status of every response, refusals included.
        local_only: refuse a Host that is not this machine; false for a service that listens beyond loopback, which
            requires a key for every request.
        page: serves all other paths and gets the lifespan events.
    """

    def __init__(
        self,
        api: ASGIApp,
        max_body_bytes: int,
        on_response: Callable[[int], None],
        *,
        local_only: bool = True,
        page: ASGIApp | None = None,
    ) -> None:
        self._api = api
        self._page = page
        self._max_body_bytes = max_body_bytes
        self._on_response = on_response
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI defines it."""
        if scope["type"] == "websocket":
            # Neither app uses WebSockets, and browsers open them across origins without a preflight request.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope)(scope, receive, send)
            return
        request_id = new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._on_response(message["status"])
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refusal(Headers(scope=scope))
        if refused is not None:
            await problem_response(refused, request_id)(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope)(scope, self._limited(receive), send_with_headers)
        except Exception as error:
            found = problem_of(error)
            if found.status >= 500:
                logger.exception("request %s failed", request_id)
            else:
                logger.exception("request %s was refused late", request_id)
            # Once the status line is out it cannot be replaced; the connection then ends without a full body.
            if not started:
                await problem_response(found, request_id)(scope, receive, send_with_headers)

    def _app(self, scope: Scope) -> ASGIApp:
        path = scope.get("path", "")
        is_api = any(path == prefix or path.startswith(prefix + "/") for prefix in API_PATHS)
        return self._api if is_api or self._page is None else self._page

    def _refusal(self, headers: Headers) -> Problem | None:
        host = headers.get("host", "")
        if self._local_only and _hostname(host) not in LOCAL_HOSTS:
            return problem(403, "foreign_host", "this service accepts only local host names, such as 127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return problem(403, "foreign_origin", "a page of another origin may not use this service")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return problem_of(self._too_large())
        return None

    def _limited(self, receive: Receive) -> Receive:
        # Content-Length may be missing (chunked bodies) or wrong, so the bytes are counted as they arrive.
        received_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal received_bytes
            message = await receive()
            if message["type"] == "http.request":
                received_bytes += len(message.get("body", b""))
                if received_bytes > self._max_body_bytes:
                    raise self._too_large()
            return message

        return receive_within_limit

    def _too_large(self) -> ImageError:
        allowed = self._max_body_bytes / 1e6
        return ImageError(f"the request is larger than the {allowed:g} MB that are allowed", "too_large")


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
