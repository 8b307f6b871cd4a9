"""The door in front of API and page: who may knock, how much they may carry, and what a fault looks like.

An ASGI app around another. It refuses a Host that is not this machine and an Origin that is not this
service (a foreign web page must not drive a service that needs no key), bodies over the limit, and turns
what nobody handled into a problem document. It gives every request its id.
"""

import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from records.errors import ImageError
from records.ids import new_id
from serving.problems import MEDIA_TYPE, problem, problem_of
from serving.schemas import Problem

logger = logging.getLogger(__name__)

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "SAMEORIGIN",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Checks every request before the app sees it.

    Args:
        app: what is guarded.
        max_body_bytes: of one request.
        on_response: told the HTTP status of everything that is answered, refusals too.
        local_only: refuse a Host that is not this machine; false for a service that listens beyond loopback,
            where nobody gets in without a key.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, on_response: Callable[[int], None], *, local_only: bool = True
    ) -> None:
        self._app = app
        self._on_response = on_response
        self._local_only = local_only
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] == "websocket":
            # Neither API nor page uses them, and a browser asks no leave before it opens one.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
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
            await self._app(scope, self._limited(receive), send_with_headers)
        except Exception as error:
            found = problem_of(error)
            if found.status >= 500:
                logger.exception("request %s failed", request_id)
            else:
                logger.exception("request %s was refused late", request_id)
            if not started:
                await problem_response(found, request_id)(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> Problem | None:
        host = headers.get("host", "")
        if self._local_only and _hostname(host) not in LOCAL_HOSTS:
            return problem(403, "foreign_host", "this service answers only to local names, such as 127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return problem(403, "foreign_origin", "a page of another origin may not use this service")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return problem_of(self._too_large())
        return None

    def _limited(self, receive: Receive) -> Receive:
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


def problem_response(found: Problem, request_id: str | None, retry_after_s: int | None = None) -> Response:
    """Turn a problem into a response.

    Args:
        found: the problem.
        request_id: of the request.
        retry_after_s: wait that the caller is asked for, seconds.
    Returns:
        The response.
    """
    body = found.model_copy(update={"request_id": request_id}).model_dump_json(exclude_none=True)
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else {}
    if found.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="relook"'
    return Response(body, status_code=found.status, headers=headers, media_type=MEDIA_TYPE)
