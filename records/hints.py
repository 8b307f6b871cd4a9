"""A bell between rooms: Label Studio told the service that something changed there, and whoever watches looks now.

A hint carries nothing and may be lost; the reconciling poll finds everything without it, only later.
"""

from records.ids import new_id
from records.ledger import Ledger
from records.types import Cursor

WEBHOOK_PATH = "/v1/webhooks/label-studio"
SECRET_HEADER = "X-Relook-Webhook-Secret"
SECRET_FILE = "webhook-secret"
_BELL = "labeling.hint"


def ring(ledger: Ledger) -> None:
    """Say that something changed in Label Studio."""
    position = {"rung": new_id()}
    with ledger.begin(touches=[_BELL]) as tx:
        if tx.get(Cursor, _BELL) is None:
            tx.add(Cursor(name=_BELL, position=position))
        else:
            tx.update(Cursor, _BELL, position=position)


def last_ring(ledger: Ledger) -> str | None:
    """Return a text that changes with every ring; None if it never rang."""
    with ledger.read() as tx:
        bell = tx.get(Cursor, _BELL)
    return None if bell is None else str(bell.position["rung"])
