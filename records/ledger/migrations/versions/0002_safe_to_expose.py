"""What a service that strangers can reach needs: columns and tables added to the first release."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns and tables."""
    _what_a_model_replaced()
    _order_without_clocks()
    _consent_taken_back()
    _keyed_audit_chain()


def _what_a_model_replaced() -> None:
    op.add_column("models", sa.Column("replaced_id", sa.Text(), nullable=True))
    op.add_column("models", sa.Column("replaced_status", sa.Text(), nullable=True))


def _order_without_clocks() -> None:
    op.add_column("leases", sa.Column("fence", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("predictions", sa.Column("rollout_id", sa.Text(), nullable=True))


def _consent_taken_back() -> None:
    op.add_column("images", sa.Column("consent_lowered_at", sa.DateTime(timezone=True), nullable=True))


def _keyed_audit_chain() -> None:
    op.add_column("audit_events", sa.Column("key_id", sa.Text(), nullable=True))
