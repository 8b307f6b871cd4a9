"""A trigger marks review items that changed since their task was sent; see `labeling.reads.stale_items`."""

import json

import sqlalchemy as sa
from alembic import op

from records.ids import hash_of

revision = "0012"
down_revision = "0011"

_SHOWN = ("priority", "reasons", "comment", "suggested_label")
_EVENT = f"UPDATE OF {', '.join(_SHOWN)} ON review_items FOR EACH ROW"


def upgrade() -> None:
    """Mark the items that changed until now, which their hash tells, and add the trigger and an index of the marks."""
    connection = op.get_bind()
    rows = connection.exec_driver_sql(
        f"SELECT id, sent_hash, {', '.join(_SHOWN)} FROM review_items WHERE state = 'pushed' AND sent_hash IS NOT NULL"
    )
    changed = [row[0] for row in rows if hash_of([row[2], _parsed(row[3]), row[4], row[5]])[:16] != row[1]]
    mark = sa.text("UPDATE review_items SET sent_hash = 'changed' WHERE id = :id")
    if changed:
        connection.execute(mark, [{"id": item_id} for item_id in changed])
    op.create_index("ix_review_items_state_sent_hash", "review_items", ["state", "sent_hash"])
    op.create_index("ix_annotations_created_at", "annotations", ["created_at"])
    _add_trigger(is_sqlite=connection.dialect.name == "sqlite")


def _parsed(reasons: object) -> object:
    return json.loads(reasons) if isinstance(reasons, str) else reasons


def _add_trigger(*, is_sqlite: bool) -> None:
    differs = "IS NOT" if is_sqlite else "IS DISTINCT FROM"
    changed = " OR ".join(f"CAST(OLD.{name} AS TEXT) {differs} CAST(NEW.{name} AS TEXT)" for name in _SHOWN)
    # The task of an erased image is gone, and one that was not sent yet is sent as it is then.
    condition = f"OLD.sent_hash IS NOT NULL AND OLD.sent_hash <> 'erased' AND ({changed})"
    if is_sqlite:
        marked = "UPDATE review_items SET sent_hash = 'changed' WHERE id = NEW.id"
        op.execute(f"CREATE TRIGGER mark_changed_task AFTER {_EVENT} WHEN {condition} BEGIN {marked}; END")
        return
    body = f"BEGIN IF {condition} THEN NEW.sent_hash := 'changed'; END IF; RETURN NEW; END"
    op.execute(f"CREATE FUNCTION mark_changed_task() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
    op.execute(f"CREATE TRIGGER mark_changed_task BEFORE {_EVENT} EXECUTE FUNCTION mark_changed_task()")
