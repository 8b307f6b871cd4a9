"""Annotations keep the outline of the lesion that was painted."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column."""
    op.add_column("annotations", sa.Column("outline", sa.Text(), nullable=True))
