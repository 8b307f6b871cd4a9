"""What several ingress replicas count together: units of keys, slots, the newest generation, and metrics.

`SharedCounts` is the one place where they are counted; on Ray it is a small deployment of its own. `SharedLimits` is
its member in an ingress. A member sends one call at a time, with all slots that it holds, so a call that was lost, or
counts that began anew after a crash, are put right by the next call. While the counts do not respond, each ingress
applies its own limits: a prediction is worth more than an exact limit.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from records.errors import AccessError, UnavailableError
from serving.access.limits import Limits, RateLimit, Slot, too_many_units
from serving.access.shares import Shares
from serving.metrics import Metrics, Samples, added
from serving.settings import ServingSettings

logger = logging.getLogger(__name__)

SLOTS: tuple[Slot, ...] = ("images", "maps")
REPORT_S = 0.5
"""How often a member reports its metrics if they changed, seconds."""
ALIVE_S = 10.0
"""A member that was silent for this long holds nothing any more, seconds."""
ASK_TIMEOUT_S = 1.0
"""How long the counts may take to respond, and are then not asked, seconds."""
MAX_DEPARTED = 50
"""Members that are gone and whose metrics are still kept one by one."""

Held = dict[tuple[Slot, str | None], int]
"""(slot, owner) -> amount"""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request needs: units of a key, or slots."""

    what: Slot | Literal["units"]
    owner: str | None
    amount: int


class Shared(Protocol):
    """`SharedCounts`, in this process or in another replica."""

    async def ask(self, member: str, held: Held, asks: Sequence[Ask]) -> tuple[int, list[bool]]:
        """Return the newest generation, and which asks are granted."""
        ...

    async def saw(self, generation: int) -> None:
        """Remember a generation that a caller is about to see."""
        ...

    async def report(self, member: str, samples: Samples) -> None:
        """Keep the metrics of a member."""
        ...

    async def parts(self) -> list[Samples]:
        """Return the metrics of all members."""
        ...


@dataclass(slots=True)
class _Member:
    seen_s: float
    held: Held = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)


class SharedCounts:
    """Counts for all ingress replicas. It belongs to one event loop.

    Args:
        settings: how much there is.
        clock_s: a monotonic clock, seconds.
    """

    def __init__(self, settings: ServingSettings, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._rates = RateLimit(settings.rate_limit_per_minute, clock_s)
        self._shares = {"images": Shares(settings.max_in_flight), "maps": Shares(settings.max_explaining)}
        self._clock_s = clock_s
        self._generation = 0
        self._members: dict[str, _Member] = {}
        self._departed: Samples = {}

    async def ask(self, member: str, held: Held, asks: Sequence[Ask]) -> tuple[int, list[bool]]:
        """Return the newest generation, and which asks are granted.

        Args:
            member: who asks.
            held: all slots that it holds, without those asked for now.
            asks: in the order in which they are granted.
        Returns:
            The generation, and one truth value per ask.
        """
        self._forget_silent()
        known = self._member(member)
        self._hold(known, held)
        return self._generation, [self._granted(known, ask) for ask in asks]

    async def saw(self, generation: int) -> None:
        """Remember a generation that a caller is about to see."""
        self._generation = max(self._generation, generation)

    async def report(self, member: str, samples: Samples) -> None:
        """Keep the metrics of a member."""
        self._member(member).samples = samples

    async def parts(self) -> list[Samples]:
        """Return the metrics of all members, also of those that are gone: what they counted has happened."""
        self._forget_silent()
        return [self._departed, *(known.samples for known in self._members.values())]

    def _member(self, name: str) -> _Member:
        known = self._members.setdefault(name, _Member(self._clock_s()))
        known.seen_s = self._clock_s()
        return known

    def _granted(self, member: _Member, ask: Ask) -> bool:
        if ask.what == "units":
            try:
                self._rates.take(str(ask.owner), ask.amount)
            except AccessError:
                return False
            return True
        granted = self._shares[ask.what].take(ask.owner, ask.amount)
        if granted:
            key = (ask.what, ask.owner)
            member.held[key] = member.held.get(key, 0) + ask.amount
        return granted

    def _hold(self, member: _Member, held: Held) -> None:
        for (slot, owner), amount in member.held.items():
            self._shares[slot].give_back(owner, amount)
        for (slot, owner), amount in held.items():
            self._shares[slot].add(owner, amount)
        member.held = dict(held)

    def _forget_silent(self) -> None:
        """Free what a killed member held, and drop its gauges."""
        oldest_s = self._clock_s() - ALIVE_S
        gone = [name for name, known in self._members.items() if known.seen_s < oldest_s]
        for name in gone:
            known = self._members[name]
            self._hold(known, {})
            known.samples = {key: value for key, value in known.samples.items() if key.counts}
        for name in gone[:-MAX_DEPARTED]:
            self._departed = added([self._departed, self._members.pop(name).samples])


class SharedLimits(Limits):
    """The limits of one of several ingress replicas. It belongs to one event loop.

    Args:
        settings: how much there is for all of them.
        shared: where they count together.
        member: name of this ingress.
    """

    def __init__(self, settings: ServingSettings, shared: Shared, member: str) -> None:
        super().__init__(settings)
        self._per_minute = settings.rate_limit_per_minute
        self._shared = shared
        self._member = member
        self._granted: Counter[tuple[Slot, str | None]] = Counter()
        # Taken while the counts did not respond, so they know nothing of them.
        self._own: Counter[tuple[Slot, str | None]] = Counter()
        self._waiting: list[tuple[Ask | None, asyncio.Future[bool | None]]] = []
        self._freed = False
        self._calling: asyncio.Task[None] | None = None
        self._silent_until_s = float("-inf")
        self.generation = 0
        """the newest that any ingress has returned, as of the last call"""

    async def charge(self, key_id: str, units: int) -> None:
        """Charge a key for work; AccessError (`rate_limited`) if it has used too much this minute."""
        granted = await self._asked(Ask("units", key_id, units))
        if granted is None:
            await super().charge(key_id, units)
        elif not granted:
            raise too_many_units(self._per_minute)

    async def take(self, slot: Slot, owner: str | None, amount: int = 1) -> bool:
        """Return whether an owner gets slots, here and among all ingress replicas; give them back later."""
        if not await super().take(slot, owner, amount):
            return False
        try:
            granted = await self._asked(Ask(slot, owner, amount))
        except asyncio.CancelledError:
            super().give_back(slot, owner, amount)
            raise
        if granted is False:
            super().give_back(slot, owner, amount)
            return False
        if granted is None:
            self._own[slot, owner] += amount
        return True

    def give_back(self, slot: Slot, owner: str | None, amount: int = 1) -> None:
        """Take slots from their owner."""
        super().give_back(slot, owner, amount)
        own = min(amount, self._own[slot, owner])
        self._own[slot, owner] -= own
        if amount > own:
            self._granted[slot, owner] -= amount - own
            self._freed = True
            self._call()

    async def newest_generation(self) -> int:
        """Return the newest generation that any ingress has returned."""
        await self._asked(None)
        return self.generation

    async def saw(self, generation: int) -> None:
        """Tell all ingress replicas of a generation, before a caller here sees it."""
        if generation > self.generation:
            self.generation = generation
            with contextlib.suppress(UnavailableError, TimeoutError):
                await asyncio.wait_for(self._shared.saw(generation), ASK_TIMEOUT_S)

    async def _asked(self, ask: Ask | None) -> bool | None:
        """Return whether an ask is granted; None if nobody responds."""
        if time.monotonic() < self._silent_until_s:
            return None
        future: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ask, future))
        self._call()
        return await future

    def _call(self) -> None:
        if self._calling is None:
            self._calling = asyncio.create_task(self._call_until_done())

    async def _call_until_done(self) -> None:
        try:
            while self._waiting or self._freed:
                waiting, self._waiting, self._freed = self._waiting, [], False
                await self._call_once(waiting)
        finally:
            self._calling = None

    async def _call_once(self, waiting: list[tuple[Ask | None, "asyncio.Future[bool | None]"]]) -> None:
        asks = [ask for ask, _ in waiting if ask is not None]
        held = {key: amount for key, amount in self._granted.items() if amount}
        self._granted = Counter(held)
        granted: Sequence[bool | None] = [None] * len(asks)
        try:
            call = self._shared.ask(self._member, held, asks)
            generation, granted = await asyncio.wait_for(call, ASK_TIMEOUT_S)
            self.generation = max(self.generation, generation)
        except (UnavailableError, TimeoutError) as error:
            logger.warning("the shared counts do not respond: %s", error)
            self._silent_until_s = time.monotonic() + ASK_TIMEOUT_S
        said = iter(granted)
        for ask, future in waiting:
            found = None if ask is None else next(said)
            if future.done():
                # Its request was cancelled; what it got is not held, which the next call says.
                self._freed = self._freed or bool(found)
                continue
            if ask is not None and ask.what != "units" and found:
                self._granted[ask.what, ask.owner] += ask.amount
            future.set_result(found)


class Reports:
    """Reports the metrics of one of several ingress replicas.

    Args:
        metrics: of this ingress; from then on they read what all of them counted.
        shared: where they count together.
        member: name of this ingress.
    """

    def __init__(self, metrics: Metrics, shared: Shared, member: str) -> None:
        self._metrics, self._shared, self._member = metrics, shared, member
        # One report at a time: an older one must not arrive after a newer one.
        self._reporting = asyncio.Lock()
        metrics.parts = self.parts

    async def parts(self) -> list[Samples]:
        """Return the metrics of all ingress replicas, this one's as they are now."""
        # Whoever is asked, what was shown once is shown again: a counter that falls looks like a restart.
        await self._report()
        return await self._shared.parts()

    async def run(self) -> None:
        """Report whenever they changed, and now and then without, to be known as alive."""
        last: Samples | None = None
        reported_s = float("-inf")
        while True:
            if self._metrics.samples() != last or time.monotonic() - reported_s > ALIVE_S / 3:
                try:
                    last = await self._report()
                    reported_s = time.monotonic()
                except UnavailableError as error:
                    logger.warning("metrics were not reported: %s", error)
            await asyncio.sleep(REPORT_S)

    async def _report(self) -> Samples:
        async with self._reporting:
            now = self._metrics.samples()
            await self._shared.report(self._member, now)
            return now
