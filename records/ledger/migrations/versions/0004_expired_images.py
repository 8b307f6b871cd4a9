"""Images that are gone because their time was over, and not because somebody asked for it."""

import sqlalchemy as sa
from alembic import op

from records.ledger.tables import UtcTime

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add a column; what was erased until now was erased on request."""
    op.add_column("images", sa.Column("expired_at", UtcTime(), nullable=True))
