"""One HTTP listener inside a running event loop, on a port that is known before and free again after.

The ingress replica listens by itself instead of through Ray Serve's proxy or its direct ingress: the proxy
costs several times the latency, and the direct ingress never comes back on a fixed port after its
replica was killed, because it binds without SO_REUSEADDR and then blocks the port for good.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from records.errors import ConfigError, UnavailableError

BACKLOG = 512
KEEP_ALIVE_S = 75
"""How long an idle connection stays open, seconds: longer than the 60 s after which load balancers let go, so that
the one who may send a request is the one who closes."""
DRAIN_S = 10
"""How long requests that are under way may take to finish when the listener stops, seconds."""


class _Server(uvicorn.Server):
    """A server that leaves signals to the process it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an ASGI app.

    Args:
        app: what is served.
        host: address to listen on.
        port: TCP port; 0 picks a free one.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self._address = (host, port)
        self.port = port
        """where it listens, once it does"""
        # Behind no proxy: headers that claim another client or scheme are not believed.
        config = uvicorn.Config(
            app, log_config=None, access_log=False, proxy_headers=False, server_header=False, lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=DRAIN_S,
        )  # fmt: skip
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and return when requests are taken.

        Raises:
            ConfigError: the port is in use.
            UnavailableError: the app did not start.
        """
        listening = bind(*self._address)
        self.port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._task.done():
                raise UnavailableError("the HTTP app did not start") from self._task.exception()
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        """Listen, if nobody asked for it yet; later say whether it still does.

        Raises:
            ConfigError: the port is in use.
            UnavailableError: the app did not start, or the listener ended.
        """
        if self._task is None:
            await self.start()
        elif self._task.done():
            raise UnavailableError("the HTTP listener ended")

    async def stop(self) -> None:
        """Take no more requests, finish those under way, and free the port."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task], timeout=DRAIN_S + 5)


def bind(host: str, port: int) -> socket.socket:
    """Bind a TCP socket.

    Args:
        host: address.
        port: TCP port; 0 picks a free one.
    Returns:
        The bound socket, not yet listening.
    Raises:
        ConfigError: the port is in use or may not be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio switches Nagle's delay (40 ms an answer) off only where it is.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"serving.port {port} on {host} cannot be used ({error.strerror}); "
            "stop what uses it, or choose another with --port"
        ) from error
    return bound


def require_free_port(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen at an address."""
    bind(host, port).close()
