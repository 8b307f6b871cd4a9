"""What changed in the ledger since a dataset version was read, so that the next one is made from it and its changes.

Triggers of the database note the image of every label, consent, erasure, group and split that changes, as a row of
`dataset_changes` without a version. A build claims these rows before it reads the ledger and deletes them when its
version is the base of the next build. So the rows are always those that the base does not know, at times a few more:
examining an image again does no harm.
"""

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from records.cursors import set_position
from records.ids import new_id
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.types import Cursor, DatasetChange

MOST = 20_000
"""Changed images beyond which a version is made from everything, and its own changes are not written down."""
NAME = "datasets.noted"  # the triggers name it, too: without this cursor they note nothing
_RULES = 1  # raised when labels, ranks or consents begin to count otherwise, so that no earlier version is a base
_ROWS = TABLES[DatasetChange]


@dataclass(frozen=True)
class Claim:
    """What a build may start from.

    Args:
        number: of this claim; later claims have larger ones.
        token: stands in its rows of `dataset_changes` instead of a version.
        base: id of the version of which all changes since are known; None if there is none.
        images: those that changed since, and the labelled ones that it left out; None if they are very many.
    """

    number: int
    token: str
    base: str | None = None
    images: frozenset[str] | None = frozenset()


def claim(tx: Transaction) -> Claim:
    """Begin a build, in a write transaction that touches everything; the ledger is read after it."""
    # No other write transaction is in progress, so whoever changes something after this sees the cursor and notes it.
    cursor = tx.get(Cursor, NAME)
    position = dict(cursor.position) if cursor is not None else {}
    number, token = int(position.get("claims", 0)) + 1, new_id()
    set_position(tx, NAME, {**position, "claims": number, "token": token})
    # Also those of the last claim, if they are there still: its build was killed, or is in progress and began before.
    noted = _ROWS.c.dataset_id.in_(["", position.get("token", "")])
    tx.connection.execute(sa.update(_ROWS).where(noted).values(dataset_id=token))
    found = sa.select(_ROWS.c.image_id).where(_ROWS.c.dataset_id == token).distinct().limit(MOST + 1)
    images = frozenset(tx.connection.execute(found).scalars())
    if position.get("rules") != _RULES:
        return Claim(number, token)
    return Claim(number, token, position["base"], images.union(position["left_out"]) if len(images) <= MOST else None)


def settle(tx: Transaction, claimed: Claim, version_id: str, left_out: Collection[str]) -> None:
    """Make a version the base of the next build, in the transaction that records it.

    Args:
        tx: a write transaction.
        claimed: from `claim`, before the ledger was read for it.
        version_id: of the version.
        left_out: the labelled images that are not in it.
    """
    cursor = tx.get(Cursor, NAME)
    position = dict(cursor.position) if cursor is not None else {}
    # A build that began later may be finished: then it has deleted rows that this one does not know.
    if cursor is None or int(position.get("claim", 0)) > claimed.number:
        return
    claims = {"claims": position["claims"], "token": position["token"], "claim": claimed.number}
    base = {"base": version_id, "rules": _RULES, "left_out": sorted(left_out)}
    set_position(tx, NAME, {**claims, **base} if len(left_out) <= MOST else claims)
    tx.connection.execute(sa.delete(_ROWS).where(_ROWS.c.dataset_id == claimed.token))


def forget(tx: Transaction) -> None:
    """Delete all changes, those of versions as well, and the base."""
    tx.connection.execute(sa.delete(TABLES[Cursor]).where(TABLES[Cursor].c.name == NAME))
    tx.connection.execute(sa.delete(_ROWS))
