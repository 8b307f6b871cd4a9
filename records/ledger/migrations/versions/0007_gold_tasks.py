"""Annotations of gold tasks are marked."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the column."""
    op.add_column("annotations", sa.Column("gold", sa.Boolean(), nullable=False, server_default=sa.false()))
