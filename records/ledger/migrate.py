"""Bring a ledger's schema up to date (Alembic), under a lock, before anything uses it."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from records.errors import ConfigError
from records.ledger.engine import WRITE_OPTION
from records.ledger.tables import SCHEMA_FLOOR


def alembic_config() -> Config:
    """Return Alembic's configuration; the connection is passed in `attributes`."""
    config = Config()
    # Alembic reads a per cent sign as the start of a placeholder.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def schema_versions(engine: sa.Engine) -> tuple[str | None, str]:
    """Return (the schema version of the database, the version that this program writes)."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision(), head


def refuse_newer(current: str | None) -> None:
    """Refuse a schema that this program does not know.

    Args:
        current: schema version of a database, None for an empty one.
    Raises:
        ConfigError: the database was written by a newer program.
    """
    scripts = ScriptDirectory.from_config(alembic_config())
    if current is not None and current not in _known_revisions():
        raise ConfigError(
            f"the ledger's schema {current!r} is newer than this program knows ({scripts.get_current_head()!r}); "
            "install the newer version"
        )


def is_newer_and_usable(engine: sa.Engine, current: str | None) -> bool:
    """Return whether a database has a newer schema that still takes this program.

    Args:
        engine: of the ledger.
        current: its schema version.
    Returns:
        True if the schema is unknown here and its migrations only added to what this program knows.
    """
    known = _known_revisions()
    if current is None or current in known:
        return False
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(SCHEMA_FLOOR.name):
            return False
        return connection.scalar(sa.select(SCHEMA_FLOOR.c.oldest)) in known


def _known_revisions() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}


def upgrade(engine: sa.Engine) -> None:
    """Run the migrations that are missing. A newer schema that still takes this program is left as it is.

    Args:
        engine: of the ledger.
    Raises:
        ConfigError: the database was written by a newer program, and changed so that this one cannot use it.
    """
    current, head = schema_versions(engine)
    if current == head or is_newer_and_usable(engine, current):
        return
    refuse_newer(current)
    config = alembic_config()
    with engine.connect() as connection:
        connection = connection.execution_options(**{WRITE_OPTION: True})
        # As a writer it waits for others; a process that comes second finds nothing left to do.
        with connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
