"""Limits of one HTTP connection, enforced while its bytes arrive: before there is a request, no app can refuse it.

uvicorn's HTTP protocol has no limit of headers, no deadline for them or for bodies, and responds to malformed requests
with plain text. `LimitedProtocol` adds these; `Connections` holds all of a listener, checks their deadlines twice a
second and decides who has to leave if there are too many.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.exchange import SECURITY_HEADERS
from serving.problems import problem, problem_response
from serving.schemas import Problem

METHODS = "GET, HEAD, POST, DELETE"
MAX_HEADERS = 100
MAX_LINE_BYTES = 8192
"""Longest single header, bytes."""
MAX_TARGET_BYTES = 16_384
"""Longest request target, bytes: /v1/events takes 200 ids."""
MAX_PIPELINED = 4
"""Requests that may wait on a connection while it responds to an earlier one."""
WINDOW_S = 10.0
"""The rate of a body is measured over this time, seconds."""
SEND_TIMEOUT_S = 30.0
"""How long a caller may take no byte of its response, seconds."""
DRAIN_S = 1.0
"""How long the rest of a body may arrive after a response that came before it, seconds; then the connection ends."""
LINGER_S = 2.0
"""How long a connection stays half open after a response that came before the request was whole, seconds. If it were
closed at once, the kernel would reset it, and the caller might never read the response."""
LINGER_BYTES = 1_000_000
CHECK_S = 0.5
_MALFORMED = "this is not a valid HTTP/1.1 request"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of the connections of a listener.

    Args:
        max_header_bytes: request line and headers of one request.
        header_timeout_s: for them to arrive, seconds.
        min_body_bytes_s: least rate of a body, bytes per second.
        max_connections: open at the same time; one address may hold half of them.
        idle_s: how long a connection may wait for its next request, seconds.
        shares_address: whether an address is that of a reverse proxy, behind which there are many callers.
        on_response: called with the status of every response that is made here.
    """

    max_header_bytes: int
    header_timeout_s: float
    min_body_bytes_s: float
    max_connections: int
    idle_s: float
    shares_address: Callable[[str], bool]
    on_response: Callable[[int], None]


class Reading(IntEnum):
    """What a connection waits for; a lower one is given up first if there are too many connections."""

    FIRST = 0
    """the first byte"""
    HEADERS = 1
    IDLE = 2
    """the next request"""
    BODY = 3
    WHOLE = 4
    """nothing: a request is whole and its response not"""


class Connections:
    """All connections of one listener."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._open: set[LimitedProtocol] = set()
        self._addresses: Counter[str] = Counter()

    def protocol(self, **given: Any) -> "LimitedProtocol":
        """Return the protocol of a new connection; uvicorn calls this."""
        return LimitedProtocol(self, **given)

    def admit(self, new: "LimitedProtocol") -> bool:
        """Return whether a new connection may stay; an idle or slow one may have to leave for it."""
        most, mine = self.limits.max_connections, self._addresses[new.address]
        shared = self.limits.shares_address(new.address)
        admitted = True
        if not shared and mine >= most // 2:
            admitted = self._close_one(new.address)
        elif len(self._open) >= most:
            largest, held = self._addresses.most_common(1)[0]
            admitted = (held > mine or largest == new.address) and self._close_one(largest)
        self._open.add(new)
        self._addresses[new.address] += 1
        return admitted

    def leave(self, gone: "LimitedProtocol") -> None:
        """Forget a connection that has ended."""
        if gone in self._open:
            self._open.discard(gone)
            self._addresses[gone.address] -= 1
            if not self._addresses[gone.address]:
                del self._addresses[gone.address]

    async def watch(self) -> None:
        """Check the deadlines of all connections until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            now_s = time.monotonic()
            for connection in list(self._open):
                connection.check(now_s)

    def _close_one(self, address: str) -> bool:
        """Close the connection of an address that has waited longest with the least done; False if all are at work."""
        waiting = [c for c in self._open if c.address == address and c.reading < Reading.WHOLE]
        if not waiting:
            return False
        victim = min(waiting, key=lambda c: (c.reading, c.since_s))
        self.leave(victim)
        victim.abort()
        return True


class LimitedProtocol(HttpToolsProtocol):
    """One HTTP connection with limits of size, time and rate."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._app, self.app = self.app, self._run
        self._all, self._limits = connections, connections.limits
        self.address = ""
        self.reading, self.since_s = Reading.FIRST, time.monotonic()
        self._refusal: Problem | None = None
        self._header_bytes = self._num_headers = 0
        self._body_bytes = self._raw_bytes = self._window_bytes = 0
        self._close_after = False
        self._draining_s: float | None = None
        self._lingering_s: float | None = None
        self._closing_s: float | None = None
        self._blocked_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse the connection if there are too many."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if not self._all.admit(self):
            self._refuse(problem(503, "busy", "the service has as many connections as it accepts; try again soon"))
            # At once, because one that lingers counts.
            self._all.leave(self)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End; a request that had no whole response is marked as cancelled by its caller."""
        self._all.leave(self)
        for cycle in [self.cycle, *(queued for queued, _ in self.pipeline)]:
            if cycle is not None and not cycle.response_complete:
                cycle.scope["state"].setdefault("ended", 499)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Finish what runs, since the listener stops; requests that only wait learn of it and end."""
        if self.cycle is not None:
            self.cycle.scope["state"]["stopping"] = True
        super().shutdown()

    def abort(self) -> None:
        """Close the connection at once, whatever is under way."""
        self.transport.abort()

    # ------------------------------------------------------------ bytes

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, within the limits."""
        if self._lingering_s is not None:
            # Thrown away, up to a bound: then the caller's own buffers fill and it stops.
            self._raw_bytes += len(data)
            if self._raw_bytes > LINGER_BYTES:
                self.flow.pause_reading()
            return
        if self.transport.is_closing():
            return
        was = self.reading
        self._raw_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserInvalidMethodError:
            if data.partition(b" ")[0].isalpha():
                self._refuse(problem(405, "method_not_allowed", f"the methods of this service are {METHODS}"))
            else:
                self._refuse(problem(400, "malformed", _MALFORMED))
        except httptools.HttpParserError:
            self._refuse(self._refusal or problem(400, "malformed", _MALFORMED))
        except httptools.HttpParserUpgrade:
            # The request itself was served; whatever protocol follows it is none of ours.
            self._close_after = True
        if self._lingering_s is not None or self.transport.is_closing():
            return
        # A single header reaches the callbacks below only once it is whole, so its bytes are counted here.
        if was is self.reading is Reading.HEADERS:
            self._header_bytes += len(data)
            if self._header_bytes > self._limits.max_header_bytes:
                self._refuse(self._headers_too_large())
        # What is neither body nor its framing: extensions of chunks, trailers, empty lines between requests.
        elif self._raw_bytes > 8 * self._body_bytes + 2 * len(data) + self._limits.max_header_bytes:
            self._refuse(problem(400, "malformed", "the request has more framing than content"))

    def on_message_begin(self) -> None:
        """A request begins."""
        # The deadline of the first request counts from the connection, or a caller would get twice the time.
        since_s = self.since_s if self.reading is Reading.FIRST else time.monotonic()
        self.reading, self.since_s = Reading.HEADERS, since_s
        self._header_bytes = self._num_headers = 0
        self._refusal = None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Part of the request target."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._stop(problem(414, "too_large", f"the address is longer than {MAX_TARGET_BYTES} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer behind the body, which is counted and dropped."""
        self._num_headers += 1
        size = len(name) + len(value) + 4
        self._header_bytes += size
        if size > MAX_LINE_BYTES or self._num_headers > MAX_HEADERS:
            self._stop(self._headers_too_large())
        if self.reading is Reading.HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers are whole: the app is called."""
        if self._header_bytes + len(self.url) > self._limits.max_header_bytes:
            self._stop(self._headers_too_large())
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(problem(400, "malformed", f"at most {MAX_PIPELINED} requests may wait on one connection"))
        self._read(Reading.BODY)
        super().on_headers_complete()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app; a response that ends the connection says so in its headers."""
        # `self.cycle` may be the one of a later request, which waits for this one.
        cycle = send.__self__  # type: ignore[attr-defined]

        async def send_and_mark(message: Message) -> None:
            # Without a header a caller takes the connection for its next request, which would be lost. One that
            # waits for "100 Continue" may send its body or not, so nothing after it could be told from it.
            ends = cycle.more_body and (cycle.waiting_for_100_continue or not self._drains(scope))
            if ends and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)
            # uvicorn would close the connection at the end of the response, which resets it if the body is not whole.
            if not cycle.keep_alive:
                cycle.keep_alive, self._close_after = True, True

        await self._app(scope, receive, send_and_mark)

    @staticmethod
    def _drains(scope: Scope) -> bool:
        """Return whether the rest of a request's body is known to be small enough to be read and thrown away."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        return length.isdigit() and int(length) <= LINGER_BYTES

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._body_bytes += len(body)
        self._window_bytes += len(body)
        super().on_body(body)
        if self._draining_s is not None and self._body_bytes > LINGER_BYTES:
            self._linger()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._read(Reading.WHOLE)
        super().on_message_complete()
        if self._draining_s is not None:
            self._draining_s = None
            self.on_response_complete()

    def on_response_complete(self) -> None:
        """A response is whole: the connection waits for the next request, or ends."""
        if self.reading is Reading.BODY and not self.pipeline and not self.transport.is_closing():
            # A small rest of the body is thrown away: the caller was not told that the connection ends, and its next
            # request would be lost.
            self._draining_s = time.monotonic()
            self.flow.resume_reading()
            return
        if self.reading is Reading.WHOLE and not self.pipeline:
            self._read(Reading.IDLE)
        super().on_response_complete()
        if self._close_after and not self.pipeline:
            self.transport.close()

    # ------------------------------------------------------------ time

    def pause_writing(self) -> None:
        """The caller does not take its response."""
        super().pause_writing()
        self._blocked_s = time.monotonic()

    def resume_writing(self) -> None:
        """The caller takes its response again."""
        super().resume_writing()
        self._blocked_s = None

    def check(self, now_s: float) -> None:
        """End the connection if a deadline has passed."""
        if self.transport.is_closing():
            self._closing_s = self._closing_s or now_s
            # Closing waits until the caller has taken everything.
            if now_s - self._closing_s > SEND_TIMEOUT_S:
                self.abort()
        elif self._lingering_s is not None:
            if now_s - self._lingering_s > LINGER_S:
                self.transport.close()
        elif self._blocked_s is not None and now_s - self._blocked_s > SEND_TIMEOUT_S:
            self.abort()
        elif self._draining_s is not None:
            if now_s - self._draining_s > DRAIN_S:
                self._linger()
        elif self.reading is Reading.BODY:
            self._check_rate(now_s)
        elif self.reading is Reading.IDLE:
            if now_s - self.since_s > self._limits.idle_s:
                self.transport.close()
        elif self.reading < Reading.IDLE and now_s - self.since_s > self._limits.header_timeout_s:
            if self.reading is Reading.FIRST:
                self.transport.close()
            else:
                self._refuse(problem(408, "too_slow", "the headers of the request did not arrive in time"))

    def _check_rate(self, now_s: float) -> None:
        # While the app does not read, the caller cannot send.
        if self.flow.read_paused:
            self.since_s, self._window_bytes = now_s, 0
        elif now_s - self.since_s > WINDOW_S:
            if self._window_bytes < self._limits.min_body_bytes_s * WINDOW_S:
                self._refuse(problem(408, "too_slow", "the body of the request arrives too slowly"))
            self.since_s, self._window_bytes = now_s, 0

    # ------------------------------------------------------------ refusals

    def _read(self, now_reading: Reading) -> None:
        self.reading, self.since_s = now_reading, time.monotonic()
        if now_reading is Reading.BODY or now_reading is Reading.IDLE:
            self._body_bytes = self._raw_bytes = self._window_bytes = 0

    def _headers_too_large(self) -> Problem:
        kilobytes = self._limits.max_header_bytes / 1000
        return problem(
            431,
            "too_large",
            f"the headers of a request may have {kilobytes:g} kB in all, {MAX_HEADERS} lines and "
            f"{MAX_LINE_BYTES} bytes in each",
        )

    def _stop(self, refusal: Problem) -> None:
        """Stop the parser, which raises its own error."""
        self._refusal = refusal
        raise ValueError(refusal.detail)

    def _refuse(self, refusal: Problem) -> None:
        """Respond without the app and end the connection."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy:
            # The app learns that nobody waits for its response any more.
            self.cycle.scope["state"]["ended"] = refusal.status
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.pipeline or (busy and self.cycle.response_started):
            # A second response in the middle of the first one would be taken for a part of it.
            self.abort()
            return
        if not busy:
            self._limits.on_response(refusal.status)
        response = problem_response(refusal, None, 1 if refusal.status == 503 else None)
        response.headers.update(SECURITY_HEADERS)
        if refusal.status == 405:
            response.headers["Allow"] = METHODS
        lines = [b"HTTP/1.1 %d %s" % (refusal.status, refusal.title.encode()), b"connection: close"]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
        self._linger()

    def _linger(self) -> None:
        """End the response, and the connection as soon as the caller has read it."""
        self._draining_s = None
        self._unset_keepalive_if_required()
        self._lingering_s, self._raw_bytes = time.monotonic(), 0
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
