"""An HTTP listener inside a running event loop, on a fixed port that is free again after a restart.

The ingress replica listens itself instead of through Ray Serve's proxy or its direct ingress. The proxy has several
times the latency. The direct ingress cannot bind a fixed port again after its replica was killed, because it binds
without SO_REUSEADDR and then keeps the port blocked.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from records.errors import ConfigError, UnavailableError
from serving.access.proxies import Proxies
from serving.connections import ConnectionLimits, Connections
from serving.settings import ServingSettings
from serving.tls import Certificate

BACKLOG = 512
KEEP_ALIVE_S = 75
"""How long an idle connection stays open, seconds. Longer than the 60 s of common load balancers, so that the balancer
closes first; if the server did, a request that was just sent would be lost."""
DRAIN_S = 10
"""How long running requests may take to finish when the listener stops, seconds."""


class _Server(uvicorn.Server):
    """A uvicorn server that installs no signal handlers; the replica's process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an ASGI app.

    Args:
        app: what is served.
        host: address to listen on.
        port: TCP port; 0 picks a free one.
        limits: of its connections; None for a listener that only this program calls.
        shares_port: whether other processes listen on the port, too; the kernel divides connections among them.
        certificate: for TLS; None listens without.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        limits: ConnectionLimits | None = None,
        *,
        shares_port: bool = False,
        certificate: Certificate | None = None,
    ) -> None:
        self._address = (host, port)
        self._shares_port = shares_port
        self.port = port
        """where it listens, once it does"""
        self._connections = None if limits is None else Connections(limits)
        # Forwarded headers are the middleware's (`serving.access.proxies`), which also knows the Host.
        config = uvicorn.Config(
            app, log_config=None, access_log=False, proxy_headers=False, server_header=False, lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=DRAIN_S, ws="none",
            http="httptools" if self._connections is None else cast(Any, self._connections.protocol),
            ssl_context_factory=None if certificate is None else lambda config, default: certificate.context,
        )  # fmt: skip
        self._certificate = certificate
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen, and return once requests are accepted.

        Raises:
            ConfigError: the port is in use.
            UnavailableError: the app did not start.
        """
        listening = bind(*self._address, shared=self._shares_port)
        self.port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        watched = (self._connections, self._certificate)
        self._watches = [asyncio.create_task(one.watch()) for one in watched if one is not None]
        # uvicorn sets a flag and no event, so it has to be polled.
        while not self._server.started:
            if self._task.done():
                raise UnavailableError("the HTTP app did not start") from self._task.exception()
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        """Start to listen at the first call; later raise if the listener has ended.

        Raises:
            ConfigError: the port is in use.
            UnavailableError: the app did not start, or the listener ended.
        """
        if self._task is None:
            await self.start()
        elif self._task.done() or any(watch.done() for watch in self._watches):
            raise UnavailableError("the HTTP listener ended")

    async def stop(self) -> None:
        """Accept no more requests, finish the running ones, and free the port."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task], timeout=DRAIN_S + 5)
        for watch in self._watches:
            watch.cancel()


def limits_of(settings: ServingSettings, on_response: Callable[[int], None]) -> ConnectionLimits:
    """Return the limits of the service's connections; `on_response` is called with the status of each refusal."""
    return ConnectionLimits(
        max_header_bytes=int(settings.max_header_kb * 1000),
        header_timeout_s=settings.header_timeout_s,
        min_body_bytes_s=settings.min_upload_kb_s * 1000,
        max_connections=settings.max_connections,
        idle_s=KEEP_ALIVE_S,
        shares_address=Proxies(settings.forwarded_allow_ips, settings.root_path).trusts,
        on_response=on_response,
    )


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a bound, listening TCP socket; ConfigError if the port cannot be used.

    Args:
        host: address.
        port: 0 picks a free one.
        shared: whether other processes of this user may listen on the port, too, if they say the same.
    Returns:
        The socket.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets whose protocol is given; without it a response takes 40 ms longer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # Without it, closed connections in TIME_WAIT keep the port blocked for a minute after a restart.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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
