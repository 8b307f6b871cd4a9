"""Shares of something limited among callers, so that one caller cannot use up what others need.

`Shares` refuses: memory of bodies, open requests, images in flight. `Turns` lets wait: it decides whose image is
computed next. Both belong to one event loop, so they need no locks.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

GREED = 2
"""An owner may hold this many times what is left for the others. One greedy owner then leaves a third, two leave a
fifth: whatever a few callers do, another one finds room (dynamic threshold of Choudhury and Hahne, 1998)."""
ACTIVE_S = 5.0
"""How long after its last image a caller still counts as active, seconds. Between two images of a caller who waits
for each response, another one must not fill the queue."""


class Shares:
    """Amounts of one thing, held by owners.

    Args:
        total: what all owners may hold together.
    """

    def __init__(self, total: float) -> None:
        self._total = total
        self._held: dict[str, float] = {}
        self.used = 0.0
        """what all owners hold now"""

    def take(self, owner: str | None, amount: float = 1) -> bool:
        """Return whether an owner gets an amount; give it back later.

        Args:
            owner: None is the only caller of a service without keys, who shares with nobody.
            amount: not negative.
        Returns:
            False if too little is left, or the owner would hold too much of it.
        """
        left = self._total - self.used - amount
        held = 0.0 if owner is None else self._held.get(owner, 0.0) + amount
        if left < 0 or held > max(1, GREED * left):
            return False
        self.add(owner, amount)
        return True

    def add(self, owner: str | None, amount: float) -> None:
        """Count an amount that an owner holds already, whatever is left."""
        self.used += amount
        if owner is not None:
            self._held[owner] = self._held.get(owner, 0.0) + amount

    def give_back(self, owner: str | None, amount: float = 1) -> None:
        """Take an amount from its owner."""
        self.used -= amount
        if owner is not None:
            left = self._held.pop(owner, 0.0) - amount
            if left > 0:
                self._held[owner] = left


class Turns:
    """Decides which caller's work begins next. Who is alone may have `alone` cost units running, several callers share
    `together` equally, and a caller with nothing running may always begin one piece.

    Args:
        alone: cost units.
        together: cost units.
        clock_s: a monotonic clock, seconds.
    """

    def __init__(self, alone: int, together: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._alone, self._together, self._clock_s = alone, together, clock_s
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}
        self._last_s: dict[str, float] = {}

    @asynccontextmanager
    async def turn(self, owner: str, cost: int) -> AsyncIterator[None]:
        """Wait until an owner's work may begin; the work is done in the block."""
        self._last_s[owner] = self._clock_s()
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append((cost, future))
        self._begin()
        try:
            await future
        except asyncio.CancelledError:
            # Cancelled while it waited; if its turn had come in the same moment, the turn is passed on.
            if future.done() and not future.cancelled():
                self._end(owner, cost)
            raise
        try:
            yield
        finally:
            self._end(owner, cost)

    def _end(self, owner: str, cost: int) -> None:
        self._running[owner] -= cost
        if self._running[owner] <= 0:
            del self._running[owner]
        self._begin()

    def _begin(self) -> None:
        oldest_s = self._clock_s() - ACTIVE_S
        self._last_s = {owner: at_s for owner, at_s in self._last_s.items() if at_s > oldest_s or self._running[owner]}
        active = max(1, len(self._last_s.keys() | self._waiting.keys()))
        each = self._alone if active == 1 else max(1, self._together // active)
        for owner in list(self._waiting):
            queue = self._waiting[owner]
            while queue and (not self._running[owner] or self._running[owner] + queue[0][0] <= each):
                cost, future = queue.popleft()
                if not future.done():
                    self._running[owner] += cost
                    future.set_result(None)
            if not queue:
                del self._waiting[owner]
