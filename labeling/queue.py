"""The queue: review items that wait for a push, the most urgent first, read in pages, since there may be a million.

Which project an item goes to follows from whether it is blind and who its reader is. So the items of a project are
found in the database by these two, without reading the others.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import sqlalchemy as sa

from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.types import ReviewItem, ReviewState

_ITEM = TABLES[ReviewItem].c
_WAITS = _ITEM.state == ReviewState.NEW


class Read(NamedTuple):
    """What decides the project of a review item."""

    blind: bool
    reader: str | None


def waiting_reads(tx: Transaction) -> dict[Read, int]:
    """Return how many review items wait, by what decides their project."""
    query = sa.select(_ITEM.blind, _ITEM.reader, sa.func.count()).where(_WAITS).group_by(_ITEM.blind, _ITEM.reader)
    return {Read(bool(blind), reader): count for blind, reader, count in tx.connection.execute(query)}


def first_waiting(
    tx: Transaction, reads: Collection[Read], limit: int, after: ReviewItem | None = None
) -> list[ReviewItem]:
    """Return the most urgent waiting items of some reads, at most `limit`, that come after an item in that order."""
    of_reads = sa.or_(*(sa.and_(_ITEM.blind.is_(r.blind), _ITEM.reader.is_not_distinct_from(r.reader)) for r in reads))
    query = sa.select(TABLES[ReviewItem]).where(_WAITS, of_reads).order_by(_ITEM.priority.desc(), _ITEM.id)
    if after is not None:
        # Twice: only the first is a range of the index.
        query = query.where(_ITEM.priority <= after.priority)
        query = query.where(sa.or_(_ITEM.priority < after.priority, _ITEM.id > after.id))
    return [ReviewItem.model_validate(dict(row)) for row in tx.connection.execute(query.limit(limit)).mappings()]


def waiting_pages(store: Store, reads: Collection[Read], size: int) -> Iterator[list[ReviewItem]]:
    """Yield the waiting items of some reads, the most urgent first, each page read when it is asked for."""
    last: ReviewItem | None = None
    while reads:
        with store.ledger.read() as tx:
            page = first_waiting(tx, reads, size, last)
        if page:
            yield page
        if len(page) < size:
            return
        last = page[-1]
