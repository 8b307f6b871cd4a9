"""Who sends a request, decided from its headers alone, before a byte of its body is read.

In: the headers of a request. Out: a `Caller`, or an AccessError. The middleware calls `Authenticator.admit` before
anything else; the routes declare what they need with `requires` and receive the caller that was found.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match

from records.errors import AccessError, UnavailableError
from records.store import Store
from records.types import Scope
from serving.access.keys import LOCAL, Caller, KeyRing
from serving.access.limits import Limits
from serving.settings import ServingSettings

HttpScope = Any
"""The scope of one HTTP request, as ASGI defines it."""

ADMIN_TIMEOUT_S = 2.0
"""How long a health route looks for an administrator's key in a ledger that does not respond, seconds."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a route asks of a request."""

    route: APIRoute
    needs_key: bool
    scopes: frozenset[Scope]
    """one of them is enough; empty accepts any key"""
    is_json: bool


class Authenticator:
    """Authenticates requests by their keys and limits what each key may use a minute.

    Args:
        store: with the ledger of keys.
        settings: whether a reverse proxy is expected.
        limits: of what keys may use; by default those of this ingress alone.
    """

    def __init__(self, store: Store, settings: ServingSettings, limits: Limits | None = None) -> None:
        self._keys = KeyRing(store)
        self.limits = limits or Limits(settings)
        self._settings = settings
        self._rules: list[_Rule] = []

    def requires(self, *scopes: Scope | None) -> Callable[[Request], Awaitable[Caller]]:
        """Return a dependency that yields the caller; the key must have one of the scopes; None accepts any key."""

        async def caller_of(request: Request) -> Caller:
            caller: Caller = request.state.caller
            return caller

        # Read by `cover`: the check itself happens in `admit`, because FastAPI reads bodies before dependencies.
        caller_of.scopes = frozenset(scopes) - {None}  # type: ignore[attr-defined]
        return caller_of

    def cover(self, routers: Sequence[APIRouter]) -> None:
        """Collect what the routes ask for."""
        for router in routers:
            for route in router.routes:
                assert isinstance(route, APIRoute)
                asked = [getattr(d.call, "scopes", None) for d in route.dependant.dependencies]
                scopes = next((found for found in asked if found is not None), None)
                sends_image = "requestBody" in (route.openapi_extra or {})
                is_json = scopes is not None and not sends_image
                self._rules.append(_Rule(route, scopes is not None, scopes or frozenset(), is_json))

    def keyed_operations(self) -> set[tuple[str, str]]:
        """Return verb and path of the operations that ask for a key."""
        return {(verb, rule.route.path) for rule in self._rules if rule.needs_key for verb in rule.route.methods or ()}

    async def admit(self, scope: HttpScope) -> tuple[Caller | None, int]:
        """Check the key of a request to the API, by its headers.

        Args:
            scope: of the request.
        Returns:
            The caller, None where no key is needed, and the largest body that the route takes, bytes.
        Raises:
            AccessError: no valid key, a key without the scope, or one that sent too much.
            UnavailableError: the ledger cannot be reached.
        """
        rule = self._rule(scope)
        if rule is None or not rule.needs_key:
            # The app responds to an unknown path; the webhook and the health routes take no body worth a limit.
            return None, self._settings.max_json_bytes if rule is None else self._settings.max_body_bytes
        caller = await self.caller(scope)
        if rule.scopes:
            caller.require(*rule.scopes)
        await self.charge(caller, 1)
        return caller, self._settings.max_json_bytes if rule.is_json else self._settings.max_body_bytes

    async def caller(self, scope: HttpScope) -> Caller:
        """Return the caller of a request by its Authorization header; AccessError if it has no valid key."""
        caller = await self._keys.find(Headers(scope=scope).get("authorization"))
        # Behind a reverse proxy on this machine, everybody's requests come from loopback.
        if caller is LOCAL and (self._settings.is_proxied or scope["state"].get("proxied", False)):
            raise AccessError(
                "this request came through a reverse proxy, where a key is needed; make one with `relook keys create`",
                "unauthenticated",
            )
        return caller

    async def refuse_strangers(self, scope: HttpScope) -> None:
        """Raise AccessError for a request through a reverse proxy while there are no keys."""
        if self._settings.is_proxied or scope["state"].get("proxied", False):
            anonymous = {**scope, "headers": []}
            try:
                await self.caller(anonymous)
            except AccessError:
                if not self._keys.any_exist:
                    raise

    async def is_admin(self, scope: HttpScope) -> bool:
        """Return whether a request to a route for everybody has an admin's key; never raises."""
        if "authorization" not in Headers(scope=scope):
            return False
        try:
            caller = await asyncio.wait_for(self.caller(scope), ADMIN_TIMEOUT_S)
        except (AccessError, UnavailableError, TimeoutError):
            return False
        return Scope.ADMIN in caller.scopes

    async def charge(self, caller: Caller, units: int) -> None:
        """Charge a key for work; AccessError (`rate_limited`) if it has used too much this minute."""
        # Without keys there is one local caller, the user of this machine, who is not limited.
        if caller is not LOCAL and units:
            await self.limits.charge(caller.id, units)

    def _rule(self, scope: HttpScope) -> _Rule | None:
        partial = None
        for rule in self._rules:
            match, _ = rule.route.matches(scope)
            if match is Match.FULL:
                return rule
            if match is Match.PARTIAL:
                partial = partial or rule
        return partial
