"""Bring a ledger's schema up to date (Alembic), under a lock, before anything uses it."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from records.errors import ConfigError
from records.ledger.engine import WRITE_OPTION


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
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        raise ConfigError(
            f"the ledger's schema {current!r} is newer than this program knows ({scripts.get_current_head()!r}); "
            "install the newer version"
        )


def upgrade(engine: sa.Engine) -> None:
    """Run the migrations that are missing.

    Args:
        engine: of the ledger.
    Raises:
        ConfigError: the database was written by a newer program.
    """
    current, head = schema_versions(engine)
    if current == head:
        return
    refuse_newer(current)
    config = alembic_config()
    with engine.connect() as connection:
        connection = connection.execution_options(**{WRITE_OPTION: True})
        # As a writer it waits for others; a process that comes second finds nothing left to do.
        with connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
