"""An index of due dates: every scrape and every poll of events asks which open review items are overdue."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Add the index."""
    op.create_index("ix_review_items_state_due", "review_items", ["state", "due"])
