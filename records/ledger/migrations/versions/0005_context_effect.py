"""Predictions keep what the context of their image changed."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column."""
    op.add_column("predictions", sa.Column("context_effect", sa.JSON(), nullable=True))
