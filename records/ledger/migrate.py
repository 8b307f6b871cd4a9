"""Migrate a ledger's schema to the version of this program (Alembic), under the write lock, before anything uses it.

A newer schema is accepted if its `schema_floor` says that this program can still use it: machines that share a ledger
can then be upgraded one after the other.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from records.errors import ConfigError
from records.ledger.engine import WRITE_OPTION
from records.ledger.tables import SCHEMA_FLOOR

if TYPE_CHECKING:
    from alembic.config import Config

_FOLDER = Path(__file__).parent / "migrations"
HEAD = max(file.stem for file in (_FOLDER / "versions").glob("[0-9]*.py")).partition("_")[0]
"""The schema version that this program writes. Read from the files' names, since importing Alembic takes a third of a
second and most processes open a ledger that has this version."""

_VERSION = sa.table("alembic_version", sa.column("version_num", sa.String))
"""Alembic's own table: one row, the schema version of the database."""


def alembic_config() -> Config:
    """Return Alembic's configuration; the caller passes the connection in `attributes`."""
    from alembic.config import Config

    config = Config()
    # Alembic interpolates its options: a per cent sign in the path would start a placeholder.
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config


def schema_versions(engine: sa.Engine) -> tuple[str | None, str]:
    """Return (the schema version of the database, the version that this program writes)."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(_VERSION.name):
            return None, HEAD
        return connection.scalar(sa.select(_VERSION.c.version_num)), HEAD


def refuse_newer(current: str | None) -> None:
    """Raise ConfigError for a schema version that this program does not know; None, an empty database, is fine."""
    if current is not None and current not in _known_revisions():
        raise ConfigError(
            f"the ledger's schema {current!r} is newer than this program knows ({HEAD!r}); install the newer version"
        )


def is_newer_and_usable(engine: sa.Engine, current: str | None) -> bool:
    """Return whether a database has a newer schema, only added to, that this program can still use."""
    known = _known_revisions()
    if current is None or current in known:
        return False
    with engine.connect() as connection:
        # A schema without the table makes no statement, so it is refused.
        if not sa.inspect(connection).has_table(SCHEMA_FLOOR.name):
            return False
        return connection.scalar(sa.select(SCHEMA_FLOOR.c.oldest)) in known


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}


def upgrade(engine: sa.Engine) -> None:
    """Run the missing migrations. A newer schema that this program can still use is left as it is.

    A newer schema that it cannot use raises ConfigError, and so does one with other tables than its version has.
    """
    current, head = schema_versions(engine)
    if current == head or is_newer_and_usable(engine, current):
        return
    refuse_newer(current)
    from alembic import command

    config = alembic_config()
    with engine.connect() as connection:
        connection = connection.execution_options(**{WRITE_OPTION: True})
        # The write lock serializes processes that start together; Alembic finds nothing left to do in the second.
        with connection.begin():
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except sa.exc.DBAPIError as error:
                if not _is_about_schema(error):
                    raise
                raise ConfigError(
                    f"the ledger says that its schema is {current!r}, and its tables are others ({error.orig}); "
                    "nothing was migrated: restore a backup, or use the program that changed them"
                ) from error


def _is_about_schema(error: sa.exc.DBAPIError) -> bool:
    """Return whether a statement does not fit the tables, as opposed to a database that is busy, full or gone."""
    is_sqlite = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    return is_sqlite or isinstance(error, sa.exc.ProgrammingError)
