"""ASGI middleware: refusal of foreign hosts and pages, body limit, request ids, security headers, problem documents.

It stands before the API and the page and routes each request to one of them by its path. The Host check stops DNS
rebinding. The checks of Origin and Sec-Fetch-Site stop foreign web pages, also those of other ports of this machine,
which to a browser are of the same site: without keys, a browser here could otherwise be made to use the service. It
does not authenticate; see `serving.routes.authenticator`.
"""

import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from records import tracing
from records.errors import RelookError
from records.ids import new_id
from serving.access.proxies import Proxies
from serving.access.shares import Shares
from serving.exchange import Exchange, too_large
from serving.problems import OPEN_INFERENCE_PATH, problem, problem_of
from serving.routes.authenticator import Authenticator
from serving.schemas import Problem
from serving.settings import ServingSettings

logger = logging.getLogger(__name__)

API_PATHS = ("/v1", OPEN_INFERENCE_PATH, "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
HEALTH_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics", "/docs", "/openapi.json")
"""Paths that also take HEAD."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class RequestMiddleware:
    """Checks every request before an app sees it, by its headers alone.

    Args:
        api: serves `API_PATHS`, or every path if there is no page.
        settings: limits, names of hosts and proxies.
        on_response: called with the HTTP status of every response, refusals included.
        authenticator: checks the keys of requests to the API; None where the app behind does.
        page: serves all other paths and gets the lifespan events.
    """

    def __init__(
        self,
        api: ASGIApp,
        settings: ServingSettings,
        on_response: Callable[[int], None],
        *,
        authenticator: Authenticator | None = None,
        page: ASGIApp | None = None,
    ) -> None:
        self._api = api
        self._page = page
        self._settings = settings
        self.on_response = on_response
        self._authenticator = authenticator
        self._proxies = Proxies(settings.forwarded_allow_ips, settings.root_path)
        self._hosts = LOCAL_HOSTS.union([settings.host, *settings.trusted_hosts])
        self._bodies = Shares(settings.max_bodies_mb * 1e6)
        # Fewer than one address may have connections: who holds as many streams as possible leaves connections for
        # others behind the same address.
        self._requests = Shares(settings.max_connections / 2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope)(scope, receive, send)
            return
        scope = self._proxies.resolve(scope)
        scope["state"]["request_id"] = request_id = new_id()
        exchange = Exchange(scope, receive, send, self._settings.retry_after_s, self.on_response)
        refused = self._refusal(scope)
        if refused is not None:
            await exchange.respond(refused)
            return
        try:
            await self._traced(scope, exchange)
        except Exception as error:
            if exchange.was_cancelled:
                # What fails once nobody listens is no fault: reading the rest of a body, above all.
                logger.info("request %s was cancelled by its caller", request_id)
                if not exchange.started:
                    self.on_response(scope["state"]["ended"])
                return
            found = problem_of(error)
            if found.status >= 500:
                logger.exception("request %s failed", request_id)
            elif not isinstance(error, RelookError):
                logger.exception("request %s was refused late", request_id)
            await exchange.respond(found)

    async def _traced(self, scope: Scope, exchange: Exchange) -> None:
        """Let the app respond, within the first span of the request's trace if traces are recorded."""
        if not tracing.is_on() or scope["path"] in HEALTH_PATHS or self._app(scope) is self._page:
            await self._serve(scope, exchange)
            return
        request_id, method = scope["state"]["request_id"], scope["method"]
        with tracing.trace("request", request_id, **{"http.request.method": method}) as found:
            try:
                await self._serve(scope, exchange)
            finally:
                # The route and not the path, in which ids and names may be.
                found["http.route"] = getattr(scope.get("route"), "path", "none")
                found["http.response.status_code"] = exchange.status

    async def _serve(self, scope: Scope, exchange: Exchange) -> None:
        """Check who sends a request and how large it may be, then let the app respond."""
        owner, limit_bytes = await self._admitted(scope)
        if int(Headers(scope=scope).get("content-length", "0")) > limit_bytes:
            await exchange.respond(too_large(limit_bytes))
            return
        if not self._requests.take(owner):
            await exchange.respond(problem(429, "busy", "too many requests are open at once; try again soon"))
            return
        exchange.limit_body(limit_bytes, self._bodies, owner)
        if scope["method"] == "HEAD" and scope["path"] in HEALTH_PATHS:
            # The server leaves the body out.
            scope = {**scope, "method": "GET"}
        try:
            await self._app(scope)(scope, exchange.receive, exchange.send)
        finally:
            exchange.forget_body()
            self._requests.give_back(owner)

    async def _admitted(self, scope: Scope) -> tuple[str | None, int]:
        """Return who shares what is limited, None for the only user, and the largest body of the request, bytes."""
        owner: str | None = f"address {(scope.get('client') or ('',))[0]}"
        limit_bytes = self._settings.max_body_bytes
        if self._authenticator is None:
            return owner, limit_bytes
        if self._app(scope) is self._page:
            # The page checks the visitor's key itself. Without keys it is for this machine alone, as the API is.
            await self._authenticator.refuse_strangers(scope)
            return owner, limit_bytes
        caller, limit_bytes = await self._authenticator.admit(scope)
        if caller is not None:
            scope["state"]["caller"] = caller
            owner = caller.share
        return owner, limit_bytes

    def _app(self, scope: Scope) -> ASGIApp:
        path = scope.get("path", "")
        is_api = any(path == prefix or path.startswith(prefix + "/") for prefix in API_PATHS)
        return self._api if is_api or self._page is None else self._page

    def _refusal(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # Load balancers ask for health by address. Beyond loopback without names, every request needs a key.
        local = self._settings.is_loopback
        checked = local or (self._settings.trusted_hosts and scope["path"] not in HEALTH_PATHS)
        if checked and _hostname(host) not in self._hosts:
            named = "the names in serving.trusted_hosts" if self._settings.trusted_hosts else "local host names"
            return problem(403, "foreign_host", f"this service accepts only {named}, such as 127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return problem(403, "foreign_origin", "a page of another origin may not use this service")
        # Browsers send it, other clients do not. "none" is what a person typed or chose among bookmarks.
        foreign = not {"same-origin", "none"}.issuperset(headers.getlist("sec-fetch-site"))
        if foreign and not self._opens_page(scope, headers):
            return problem(403, "foreign_site", "a page of another site or port may not use this service")
        if headers.get("content-encoding", "identity").lower() != "identity":
            return problem(415, "unsupported_type", "a compressed body is not supported; send it as it is")
        return None

    def _opens_page(self, scope: Scope, headers: Headers) -> bool:
        """Return whether a request follows a link to the page: that shows it in a window and does nothing else."""
        fetched = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
        asked = (scope["method"], scope["path"], scope["query_string"])
        return self._page is not None and asked == ("GET", "/", b"") and fetched == ("navigate", "document")


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
