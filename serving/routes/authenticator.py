"""Authenticator and request limits: a FastAPI dependency that returns the caller of a request.

In: the Authorization header. Out: a `Caller`, or an AccessError. It runs before the body is read, so a request
without permission costs no upload.
"""

import threading
import time
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from records.errors import AccessError
from records.store import Store
from records.types import Scope
from serving.access.keys import Caller, KeyRing


class Authenticator:
    """Authenticates requests by their keys and limits the rate of each key.

    Args:
        store: with the ledger of keys.
        rate_limit_per_minute: requests per key; 0 is no limit.
    """

    def __init__(self, store: Store, rate_limit_per_minute: int) -> None:
        self._keys = KeyRing(store)
        self._rates = RateLimit(rate_limit_per_minute)

    def requires(self, scope: Scope | None) -> Callable[[Request], Awaitable[Caller]]:
        """Return a dependency that yields the caller if their key has `scope`; None accepts every valid key."""

        async def caller_of(request: Request) -> Caller:
            authorization = request.headers.get("authorization")
            # A thread costs more than the cached lookup, but reading the ledger would block the event loop.
            if self._keys.is_fresh:
                caller = self._keys.caller(authorization)
            else:
                caller = await run_in_threadpool(self._keys.caller, authorization)
            if scope is not None:
                caller.require(scope)
            # Without keys there is one local caller, the user of this machine, who is not limited.
            if caller.id != "local":
                self._rates.take(caller.id)
            return caller

        return caller_of


class RateLimit:
    """A token bucket per key. Thread-safe.

    Args:
        per_minute: refill rate and size of a bucket; 0 is no limit.
        clock_s: a monotonic clock, seconds.
    """

    def __init__(self, per_minute: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock_s = clock_s
        self._buckets: dict[str, tuple[float, float]] = {}
        self._counting = threading.Lock()

    def take(self, key_id: str, num_requests: int = 1) -> None:
        """Take tokens of a key; AccessError (`rate_limited`) if its bucket has too few."""
        if self._per_minute == 0:
            return
        with self._counting:
            now_s = self._clock_s()
            left, at_s = self._buckets.get(key_id, (float(self._per_minute), now_s))
            left = min(float(self._per_minute), left + (now_s - at_s) * self._per_minute / 60)
            if left < num_requests:
                self._buckets[key_id] = (left, now_s)
                raise AccessError(f"this key may send {self._per_minute} requests a minute; wait", "rate_limited")
            self._buckets[key_id] = (left - num_requests, now_s)
