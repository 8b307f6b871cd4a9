"""One request and its response, between the middleware and the app: bodies are counted, responses completed.

In: an ASGI request. Out: the app's response with the headers that every response has, or a problem document where the
app has none.
"""

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from records.errors import ImageError
from serving.access.shares import Shares
from serving.problems import MEDIA_TYPE, problem, problem_of, problem_response, speaks_open_inference
from serving.schemas import Problem

CANCELLED = 499
"""Counted for a request whose caller hung up before the response; nginx's number, nobody receives it."""

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    # The page, its files, the documentation and reports have policies of their own; nothing else loads anything.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every response, also of those that the listener makes itself, unless the app sets them."""


class Exchange:
    """One request and its response.

    Args:
        scope: of the request.
        receive: of the server.
        send: of the server.
        retry_after_s: wait that a 429 or 503 asks for, seconds.
        on_response: called with the status of the response.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        retry_after_s: int,
        on_response: Callable[[int], None],
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._retry_after_s = retry_after_s
        self._on_response = on_response
        self._refusal: Problem | None = None
        self._replaced = False
        self.started = False
        self.status = 0
        """of the response, once it has begun"""
        self._bodies: Shares | None = None
        self._owner: str | None = None
        self._limit_bytes = self._held_bytes = 0

    @property
    def was_cancelled(self) -> bool:
        """Whether the caller hung up, or was too slow to be waited for; the listener writes it into the state."""
        return "ended" in self._scope["state"]

    def limit_body(self, limit_bytes: int, bodies: Shares, owner: str | None) -> None:
        """Set the largest body, and the memory of all bodies of which it takes its share."""
        self._limit_bytes, self._bodies, self._owner = limit_bytes, bodies, owner

    def forget_body(self) -> None:
        """Give the memory of the body back."""
        if self._bodies is not None:
            self._bodies.give_back(self._owner, self._held_bytes)

    async def receive(self) -> Message:
        """Return the next part of the request, counted: Content-Length may be missing or wrong."""
        message = await self._receive()
        if message["type"] == "http.request" and self._bodies is not None:
            size = len(message.get("body", b""))
            if self._held_bytes + size > self._limit_bytes:
                self._refuse(too_large(self._limit_bytes))
            if not self._bodies.take(self._owner, size):
                self._refuse(problem(429, "busy", "too many bodies are being sent at once; try again soon"))
            self._held_bytes += size
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the app's response, or a problem document in its place."""
        if message["type"] == "http.response.start":
            found = self._refusal or self._without_document(message)
            if found is not None:
                self._replaced = True
                await self.respond(found, allow=Headers(raw=message.get("headers", [])).get("allow"))
                return
            self._complete(message)
        elif self._replaced:
            return
        await self._send(message)

    async def respond(self, found: Problem, allow: str | None = None) -> None:
        """Send a problem document, unless a response has begun: its status line cannot be replaced."""
        if self.started:
            return
        found = self._refusal or found
        wait_s = self._retry_after_s if found.status in (429, 503) else None
        response = problem_response(found, self._scope["state"]["request_id"], wait_s, path=self._scope["path"])
        if allow is not None:
            response.headers["Allow"] = allow

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._complete(message)
            await self._send(message)

        await response(self._scope, self._receive, send)

    def _refuse(self, refusal: Problem) -> None:
        # Frameworks turn an error while a body is read into a response of their own, which `send` replaces.
        self._refusal = refusal
        raise ImageError(refusal.detail, refusal.code)

    def _without_document(self, message: Message) -> Problem | None:
        """Return the problem of a 404 or 405 that has no document: those of mounts, static files and the page."""
        status, kind = message["status"], Headers(raw=message.get("headers", [])).get("content-type", "")
        path = self._scope["path"][:200]
        if status not in (404, 405) or kind.startswith(MEDIA_TYPE) or speaks_open_inference(path):
            return None
        if status == 404:
            return problem(404, "not_found", f"nothing is at {path}; /docs lists what there is")
        return problem(
            405, "method_not_allowed", f"{self._scope['method']} is not possible at {path}; /docs lists what is"
        )

    def _complete(self, message: Message) -> None:
        self.started = True
        self.status = self._scope["state"].get("ended", message["status"])
        self._on_response(self.status)
        headers = MutableHeaders(scope=message)
        headers["X-Request-Id"] = self._scope["state"]["request_id"]
        for name, value in SECURITY_HEADERS.items():
            headers.setdefault(name, value)


def too_large(limit_bytes: int) -> Problem:
    """Return the problem of a body that is too large."""
    allowed = f"{limit_bytes / 1e6:g} MB" if limit_bytes >= 1e6 else f"{limit_bytes / 1e3:g} kB"
    return problem_of(ImageError(f"the request is larger than the {allowed} that are allowed", "too_large"))
