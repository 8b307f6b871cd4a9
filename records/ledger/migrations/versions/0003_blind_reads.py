"""Questions may be blind and belong to one reader, and remember what their task says."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add three columns; questions that exist are neither blind nor anybody's own."""
    op.add_column("review_items", sa.Column("blind", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("review_items", sa.Column("reader", sa.Text(), nullable=True))
    op.add_column("review_items", sa.Column("sent_hash", sa.Text(), nullable=True))
