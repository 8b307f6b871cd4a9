"""A table that keeps the consensus of each annotated image, and triggers that mark what has to be computed again."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"

_MARK = (
    "INSERT INTO consensus (image_id, stale) VALUES ({row}.image_id, TRUE) "
    "ON CONFLICT (image_id) DO UPDATE SET stale = TRUE, resolved = NULL"
)
_ANSWERED = "EXISTS (SELECT 1 FROM annotations WHERE review_item_id = NEW.id)"
_OTHER = "CAST(OLD.reasons AS TEXT) {differs} CAST(NEW.reasons AS TEXT) OR OLD.blind {differs} NEW.blind"
# Name of the trigger, event, condition, and the row whose image is marked.
_TRIGGERS = (
    ("added", "INSERT ON annotations", "TRUE", "NEW"),
    ("changed", "UPDATE ON annotations", "TRUE", "NEW"),
    ("removed", "DELETE ON annotations", "TRUE", "OLD"),
    ("item", "UPDATE OF reasons, blind ON review_items", f"({_OTHER}) AND {_ANSWERED}", "NEW"),
)


def upgrade() -> None:
    """Add the table, with every annotated image marked, and the triggers."""
    op.create_table(
        "consensus",
        sa.Column("image_id", sa.Text(), primary_key=True),
        sa.Column("stale", sa.Boolean(), nullable=False),
        sa.Column("resolved", sa.JSON(none_as_null=True), nullable=True),
    )
    op.create_index("ix_consensus_stale", "consensus", ["stale"])
    op.execute("INSERT INTO consensus (image_id, stale) SELECT DISTINCT image_id, TRUE FROM annotations")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    differs = "IS NOT" if is_sqlite else "IS DISTINCT FROM"
    for name, event, when, row in _TRIGGERS:
        condition, mark = when.format(differs=differs), _MARK.format(row=row)
        if is_sqlite:
            op.execute(f"CREATE TRIGGER consensus_{name} AFTER {event} FOR EACH ROW WHEN {condition} BEGIN {mark}; END")
            continue
        body = f"BEGIN IF {condition} THEN {mark}; END IF; RETURN NULL; END"
        op.execute(f"CREATE FUNCTION consensus_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
        op.execute(f"CREATE TRIGGER consensus_{name} AFTER {event} FOR EACH ROW EXECUTE FUNCTION consensus_{name}()")
