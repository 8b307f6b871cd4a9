"""Alembic's entry: runs the migrations on the connection that `records.ledger.migrate` passes."""

from alembic import context

from records.ledger.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transaction_per_migration=False,
    render_as_batch=True,
)
context.run_migrations()
