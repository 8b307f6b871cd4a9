"""Requests that wait until annotators have looked at an image.

In: a review item. Out: nothing, once it is no longer open, the time is over, or nobody needs the response any more.
However many requests wait, one query each half second reads the state of all of them; they hold no slot of predictions.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from records.errors import AccessError
from records.ledger.tables import TABLES, unindexed
from records.store import Store
from records.types import ReviewItem
from serving.access.shares import Shares
from serving.outbox import OPEN_STATES

POLL_S = 0.5


class ReviewWaits:
    """The requests of one ingress that wait. It belongs to one event loop.

    Args:
        store: with the ledger.
        most: requests that may wait at the same time.
    """

    def __init__(self, store: Store, most: int) -> None:
        self._store = store
        self._waiting: Counter[str] = Counter()
        self._shares = Shares(most)
        self._open: frozenset[str] = frozenset()
        self._looked_s = float("-inf")
        self._looking = asyncio.Lock()

    async def until_closed(self, item: ReviewItem, owner: str | None, wait_s: float, state: Mapping[str, Any]) -> None:
        """Wait until a review item is no longer open.

        Args:
            item: an open one.
            owner: whose share of the waiting requests it takes; None is the only user of a service without keys.
            wait_s: at most, seconds.
            state: of the request, into which the listener writes that the caller has gone or that it stops.
        Raises:
            AccessError: too many requests wait already.
        """
        if not self._shares.take(owner):
            raise AccessError("as many requests wait for a review as the service accepts; ask without `wait`", "busy")
        self._waiting[item.id] += 1
        until_s = time.monotonic() + wait_s
        try:
            while (left_s := until_s - time.monotonic()) > 0 and not {"ended", "stopping"} & state.keys():
                await asyncio.sleep(min(POLL_S, left_s))
                if left_s > POLL_S and not await self._is_open(item.id):
                    break
        finally:
            self._waiting -= Counter([item.id])
            self._shares.give_back(owner)

    async def _is_open(self, item_id: str) -> bool:
        async with self._looking:
            # A look this young began after the item was added: its request has slept for as long.
            if time.monotonic() - self._looked_s >= POLL_S:
                began_s = time.monotonic()
                self._open = await run_in_threadpool(self._look, list(self._waiting))
                self._looked_s = began_s
            return item_id in self._open

    def _look(self, item_ids: list[str]) -> frozenset[str]:
        column = TABLES[ReviewItem].c
        with self._store.ledger.read() as tx:
            is_open = unindexed(column.state, tx.connection.dialect).in_(OPEN_STATES)
            query = sa.select(column.id).where(column.id.in_(item_ids), is_open)
            return frozenset(tx.connection.scalars(query))
