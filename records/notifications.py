"""Notifications between processes: Label Studio's webhook tells the service that something changed there.

The service writes the notification to the ledger, and `relook label sync --watch` polls for it. A notification
carries no content and may be lost: the reconciling poll finds every change without it, only later.
"""

from records.cursors import set_position
from records.ids import new_id
from records.ledger import Ledger
from records.types import Cursor

WEBHOOK_PATH = "/v1/webhooks/label-studio"
SECRET_HEADER = "X-Relook-Webhook-Secret"
SECRET_FILE = "webhook-secret"
_CURSOR = "labeling.notification"


def notify(ledger: Ledger) -> None:
    """Record that something changed in Label Studio."""
    position = {"id": new_id()}
    # Only this cursor is touched, so that on PostgreSQL a webhook does not wait for unrelated writers.
    with ledger.begin(touches=[_CURSOR]) as tx:
        set_position(tx, _CURSOR, position)


def last_notification(ledger: Ledger) -> str | None:
    """Return the id of the newest notification; None if there was none yet."""
    with ledger.read() as tx:
        cursor = tx.get(Cursor, _CURSOR)
    return None if cursor is None else str(cursor.position["id"])
