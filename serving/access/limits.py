"""What callers may use: cost units of a key a minute, images and heat maps at the same time.

`Limits` counts what passes one ingress. Where several ingress replicas serve, `serving.access.together` counts for all.
"""

import threading
import time
from collections.abc import Callable
from typing import Literal

from records.errors import AccessError
from serving.access.shares import Shares
from serving.settings import ServingSettings

Slot = Literal["images", "maps"]
"""What is limited at the same time: images that are predicted, heat maps that are computed."""


class RateLimit:
    """A token bucket per key. Thread-safe.

    Args:
        per_minute: refill rate and size of a bucket, in cost units; 0 is no limit.
        clock_s: a monotonic clock, seconds.
    """

    def __init__(self, per_minute: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock_s = clock_s
        self._buckets: dict[str, tuple[float, float]] = {}
        self._counting = threading.Lock()

    def take(self, key_id: str, units: int = 1) -> None:
        """Take units of a key; AccessError (`rate_limited`) if its bucket has too few."""
        if self._per_minute == 0:
            return
        with self._counting:
            now_s = self._clock_s()
            left, at_s = self._buckets.get(key_id, (float(self._per_minute), now_s))
            left = min(float(self._per_minute), left + (now_s - at_s) * self._per_minute / 60)
            # What costs more than a full bucket needs a full one and leaves a debt, else it could never be had.
            if left < min(units, self._per_minute):
                self._buckets[key_id] = (left, now_s)
                raise too_many_units(self._per_minute)
            self._buckets[key_id] = (left - units, now_s)


class Limits:
    """The limits of one ingress. It belongs to one event loop.

    Args:
        settings: how much there is.
        clock_s: a monotonic clock, seconds.
    """

    def __init__(self, settings: ServingSettings, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._rates = RateLimit(settings.rate_limit_per_minute, clock_s)
        self._slots: dict[Slot, Shares] = {
            "images": Shares(settings.max_in_flight),
            "maps": Shares(settings.max_explaining),
        }

    async def charge(self, key_id: str, units: int) -> None:
        """Charge a key for work; AccessError (`rate_limited`) if it has used too much this minute."""
        self._rates.take(key_id, units)

    async def take(self, slot: Slot, owner: str | None, amount: int = 1) -> bool:
        """Return whether an owner gets slots; give them back later. None is the only user of a service without keys."""
        return self._slots[slot].take(owner, amount)

    def give_back(self, slot: Slot, owner: str | None, amount: int = 1) -> None:
        """Take slots from their owner."""
        self._slots[slot].give_back(owner, amount)

    def used(self, slot: Slot) -> float:
        """Return how many slots this ingress uses."""
        return self._slots[slot].used


def too_many_units(per_minute: int) -> AccessError:
    """Return the error of a key that has used up its units."""
    return AccessError(
        f"this key may use {per_minute} units a minute, one per request and image and more for large images and slow "
        "explanations; wait",
        "rate_limited",
    )
