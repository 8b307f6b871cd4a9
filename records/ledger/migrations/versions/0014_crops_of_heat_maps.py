"""Review items keep which part of the image their heat map covers."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the column."""
    op.add_column("review_items", sa.Column("crop", sa.Text(), nullable=False, server_default="center"))
