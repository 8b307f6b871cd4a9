"""Who stands at the door of a route: the caller of a request, if they may come in."""

from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from records.types import Scope
from serving.access.keys import Caller, KeyRing
from serving.access.rates import RateLimit
from serving.service import Service


class Door:
    """Finds the caller of every request, before its body is read.

    Args:
        service: with the ledger of keys, and the rate limit.
    """

    def __init__(self, service: Service) -> None:
        self._keys = KeyRing(service.store)
        self._rates = RateLimit(service.settings.rate_limit_per_minute)

    def requires(self, scope: Scope | None) -> Callable[[Request], Awaitable[Caller]]:
        """Return a dependency that gives the caller of a request.

        Args:
            scope: that they need; None lets everybody in who has a key.
        Returns:
            The dependency; it raises AccessError.
        """

        async def caller_of(request: Request) -> Caller:
            authorization = request.headers.get("authorization")
            if self._keys.is_fresh:
                caller = self._keys.caller(authorization)
            else:
                caller = await run_in_threadpool(self._keys.caller, authorization)
            if scope is not None:
                caller.require(scope)
            if caller.id != "local":
                self._rates.take(caller.id)
            return caller

        return caller_of

    def caller(self, authorization: str | None) -> Caller:
        """Return who has this authorization; see `KeyRing.caller`."""
        return self._keys.caller(authorization)
