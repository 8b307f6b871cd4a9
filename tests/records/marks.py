"""What the triggers of the database mark, on SQLite and on PostgreSQL."""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from records.ledger.tables import TABLES
from records.store import Store
from records.types import ReviewItem, ReviewState

_CHANGES: dict[str, dict[str, Any]] = {
    "priority": {"priority": 77.5},
    "reasons": {"reasons": ["flagged"]},
    "comment": {"comment": "it grows"},
    "no comment": {"comment": None},
    "suggested": {"suggested_label": "bcc"},
    "state": {"state": ReviewState.ANSWERED, "task_id": 5},
    "same": {"priority": 3.0, "comment": "small"},
}
"""What changes about an item of priority 3 with the comment `small`, whose task was sent."""
MARKED = {name: "current" if name in ("state", "same") else "changed" for name in _CHANGES} | {
    "new": None, "erased": "erased"
}  # fmt: skip
"""By item, what `marks_after_changes` has to return."""


def marks_after_changes(store: Store, sample: Callable[..., Any]) -> dict[str, str | None]:
    """Change review items by statements of SQL, and return how each is marked."""
    before = {"priority": 3.0, "comment": "small", "suggested_label": None, "reasons": ["refer"]}
    table = TABLES[ReviewItem]
    with store.ledger.begin() as tx:
        for name in _CHANGES:
            tx.add(sample(ReviewItem, id=name, sent_hash="current", state=ReviewState.PUSHED, **before))
        tx.add(sample(ReviewItem, id="new", sent_hash=None, state=ReviewState.NEW, **before))
        tx.add(sample(ReviewItem, id="erased", sent_hash="erased", state=ReviewState.PUSHED, **before))
        for name, values in [*_CHANGES.items(), ("new", {"priority": 9.0}), ("erased", {"comment": None})]:
            tx.connection.execute(sa.update(table).where(table.c.id == name).values(**values))
    with store.ledger.read() as tx:
        return {item.id: item.sent_hash for item in tx.find(ReviewItem)}
