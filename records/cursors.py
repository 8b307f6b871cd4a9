"""Positions of readers and small states, each kept under a name in the ledger."""

from typing import Any

from records.ledger import Transaction
from records.types import Cursor


def set_position(tx: Transaction, name: str, position: dict[str, Any]) -> None:
    """Write the position of a cursor, which is made at first use.

    Args:
        tx: a write transaction.
        name: of the cursor.
        position: replaces the one before.
    """
    if tx.get(Cursor, name) is None:
        tx.add(Cursor(name=name, position=position))
    else:
        tx.update(Cursor, name, position=position)
