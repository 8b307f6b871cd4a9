"""Review items keep their heat map as numbers, and no drawn file."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column("review_items", sa.Column("heat_map", sa.JSON(), nullable=True))
