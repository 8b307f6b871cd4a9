"""Indexes for listings, retention and monitoring of millions of rows, and one from an image to dataset versions."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_INDEXES = (
    ("predictions", ("organisation", "id")),
    ("predictions", ("decision", "id")),
    ("predictions", ("created_at", "id")),
    ("images", ("provenance", "created_at")),
    ("review_items", ("project_id", "task_id")),
    ("review_items", ("selection_probability",)),
    ("outcomes", ("image_id",)),
    ("events", ("prediction_id",)),
    ("models", ("dataset_id",)),
)


def upgrade() -> None:
    """Add the table, the column and the indexes; drop an index that no query uses any more."""
    op.create_table(
        "dataset_changes",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("dataset_id", sa.Text(), nullable=False),
        sa.Column("image_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.add_column("datasets", sa.Column("num_changes", sa.BigInteger(), nullable=True))
    op.drop_index("ix_predictions_organisation_created_at", "predictions")
    for table, columns in (*_INDEXES, ("dataset_changes", ("image_id",)), ("dataset_changes", ("dataset_id",))):
        op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))
