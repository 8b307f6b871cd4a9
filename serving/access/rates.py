"""How many requests a key may send: a bucket per key that fills evenly."""

import threading
import time
from collections.abc import Callable

from records.errors import AccessError


class RateLimit:
    """Counts requests per key. Safe from several threads.

    Args:
        per_minute: requests a minute, also the size of a burst; 0 is no limit.
        clock_s: a clock that only goes forward.
    """

    def __init__(self, per_minute: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock_s = clock_s
        self._buckets: dict[str, tuple[float, float]] = {}
        self._counting = threading.Lock()

    def take(self, key_id: str, num_requests: int = 1) -> None:
        """Count requests of a key; AccessError (`rate_limited`) if there are too many."""
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
