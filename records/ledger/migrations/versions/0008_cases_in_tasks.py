"""Review items keep which confirmed cases their task shows."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column."""
    op.add_column("review_items", sa.Column("cases", sa.JSON(), nullable=True))
