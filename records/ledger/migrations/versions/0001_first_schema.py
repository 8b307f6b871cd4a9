"""First schema."""

import sqlalchemy as sa
from alembic import op

from records.ledger.tables import UtcTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table of the first release."""
    op.create_table(
        "audit_events",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("actor", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("action", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("subject", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("details", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("previous_hash", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("hash", sa.Text(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "cursors",
        sa.Column("name", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("position", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "datasets",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("parent_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("taxonomy_hash", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("num_images", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("num_groups", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("round", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("organisation", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("prediction_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("details", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index("ix_events_organisation_id", ["organisation", "id"], unique=False)

    op.create_table(
        "annotations",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("review_item_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("image_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("answer", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("label", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("other_text", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("image_quality", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("comment", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("annotator", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("annotated_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("lead_time_s", sa.Double(), autoincrement=False, nullable=True),
        sa.Column("blind", sa.Boolean(), autoincrement=False, nullable=False),
        sa.Column("server", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("project_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("annotation_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("revision", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("deleted", sa.Boolean(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("annotations", schema=None) as batch_op:
        batch_op.create_index("ix_annotations_image_id", ["image_id"], unique=False)
        batch_op.create_index("ix_annotations_review_item_id", ["review_item_id"], unique=False)
        batch_op.create_index(
            "ux_annotations_server_annotation_id_revision", ["server", "annotation_id", "revision"], unique=True
        )

    op.create_table(
        "flags",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("prediction_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("caller", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("organisation", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("reason", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("suggested_label", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("comment", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("review_item_id", sa.Text(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("flags", schema=None) as batch_op:
        batch_op.create_index("ix_flags_prediction_id", ["prediction_id"], unique=False)

    op.create_table(
        "groups",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("split", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("drawn_by", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("drawn_at", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("merged_into", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "images",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("source_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("uri", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("format", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("width_px", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("height_px", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("lesion_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("patient_hash", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("age_years", sa.Double(), autoincrement=False, nullable=True),
        sa.Column("sex", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("localization", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("device", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("site", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("acquired_at", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("provenance", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("consent", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("perceptual_hash", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("group_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("erased_at", UtcTime(), autoincrement=False, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("images", schema=None) as batch_op:
        batch_op.create_index("ix_images_group_id", ["group_id"], unique=False)
        batch_op.create_index("ix_images_lesion_id", ["lesion_id"], unique=False)
        batch_op.create_index("ix_images_source_id", ["source_id"], unique=False)

    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("holder", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("expires_at", UtcTime(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("status", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("status_changed_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("path", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("architecture", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("dataset_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("taxonomy_hash", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("round", sa.BigInteger(), autoincrement=False, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("models", schema=None) as batch_op:
        batch_op.create_index("ix_models_status", ["status"], unique=False)

    op.create_table(
        "outcomes",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("prediction_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("image_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("caller", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("diagnosis", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("confirmation", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("observed_at", UtcTime(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("outcomes", schema=None) as batch_op:
        batch_op.create_index("ix_outcomes_prediction_id", ["prediction_id"], unique=False)

    op.create_table(
        "predictions",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("caller", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("organisation", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("idempotency_key", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("image_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("consent", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("context", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("model_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("model_status", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("arm", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("served", sa.Boolean(), autoincrement=False, nullable=False),
        sa.Column("engine", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("precision", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("num_threads", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("settings_hash", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("label", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("confidence", sa.Double(), autoincrement=False, nullable=True),
        sa.Column("probabilities", sa.JSON(none_as_null=True), autoincrement=False, nullable=True),
        sa.Column("prediction_set", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("out_of_distribution_score", sa.Double(), autoincrement=False, nullable=True),
        sa.Column("quality_score", sa.Double(), autoincrement=False, nullable=True),
        sa.Column("decision", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("reasons", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("latency_ms", sa.Double(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("predictions", schema=None) as batch_op:
        batch_op.create_index("ix_predictions_image_id", ["image_id"], unique=False)
        batch_op.create_index("ix_predictions_model_id_created_at", ["model_id", "created_at"], unique=False)
        batch_op.create_index("ix_predictions_organisation_created_at", ["organisation", "created_at"], unique=False)
        batch_op.create_index("ix_predictions_request_id", ["request_id"], unique=False)
        batch_op.create_index(
            "ux_predictions_caller_idempotency_key_arm", ["caller", "idempotency_key", "arm"], unique=True
        )

    op.create_table(
        "quarantine",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("import_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("source_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("code", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("reason", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("quarantine", schema=None) as batch_op:
        batch_op.create_index("ix_quarantine_import_id", ["import_id"], unique=False)

    op.create_table(
        "review_items",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("prediction_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("image_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("reasons", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.Column("priority", sa.Double(), autoincrement=False, nullable=False),
        sa.Column("due", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("selection_probability", sa.Double(), autoincrement=False, nullable=True),
        sa.Column("overlay_blob", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("comment", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("suggested_label", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("state", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("project_id", sa.BigInteger(), autoincrement=False, nullable=True),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=True),
        sa.Column("pushed_at", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("answered_at", UtcTime(), autoincrement=False, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("review_items", schema=None) as batch_op:
        batch_op.create_index("ix_review_items_image_id", ["image_id"], unique=False)
        batch_op.create_index("ix_review_items_prediction_id", ["prediction_id"], unique=False)
        batch_op.create_index("ix_review_items_state_priority", ["state", "priority"], unique=False)

    op.create_table(
        "round_steps",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("round_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("started_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("finished_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("round_steps", schema=None) as batch_op:
        batch_op.create_index("ix_round_steps_round_id", ["round_id"], unique=False)
        batch_op.create_index("ux_round_steps_round_id_step", ["round_id", "step"], unique=True)

    op.create_table(
        "rounds",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("started_at", UtcTime(), autoincrement=False, nullable=False),
        sa.Column("finished_at", UtcTime(), autoincrement=False, nullable=True),
        sa.Column("seed", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("settings_hash", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("dataset_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("model_id", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("verdict", sa.Text(), autoincrement=False, nullable=True),
        sa.Column("why", sa.Text(), autoincrement=False, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "source_labels",
        sa.Column("id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("image_id", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("label", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("confirmation", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("source", sa.Text(), autoincrement=False, nullable=False),
        sa.Column("created_at", UtcTime(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("source_labels", schema=None) as batch_op:
        batch_op.create_index("ix_source_labels_image_id", ["image_id"], unique=False)
        batch_op.create_index(
            "ux_source_labels_image_id_source_label_confirmation",
            ["image_id", "source", "label", "confirmation"],
            unique=True,
        )
