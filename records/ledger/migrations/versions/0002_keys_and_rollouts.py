"""Keys of the API, rollouts, what is wrong with an image, and what caused an event."""

import sqlalchemy as sa
from alembic import op

from records.ledger.tables import UtcTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add two tables and two columns."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("organisation", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("scopes", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("secret_hash", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("sandbox", sa.Boolean(), autoincrement=False, nullable=False),
        sa.Column("default_consent", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("expires_at", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("revoked_at", UtcTime(), autoincrement=False, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("actor", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("champion_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("candidate_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("stage", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("percent", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("evidence", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("ended_at", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("why", sa.Text(), autoincrement=False, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("rollouts", schema=None) as batch_op:
        batch_op.create_index("ix_rollouts_stage", ["stage"], unique=False)
    with op.batch_alter_table("predictions", schema=None) as batch_op:
        batch_op.add_column(sa.Column("quality_reason", sa.Text(), autoincrement=False, nullable=True))
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.add_column(sa.Column("source", sa.Text(), autoincrement=False, nullable=True))
        batch_op.create_index("ux_events_source_prediction_id", ["source", "prediction_id"], unique=True)
