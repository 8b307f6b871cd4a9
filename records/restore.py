"""Restore a backup into an empty home, also on another kind of database or blob store.

Everything is checked before anything is written. The ledger comes last and in one transaction: a
restore that was killed leaves no ledger, and is run again. A backup of an older schema is brought up
to date on the way.
"""

import gzip
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.migration import MigrationContext

from records import audit
from records.backup import BLOBS, FILES, LEDGER, BackupManifest, read_backup
from records.blobs import open_blobs
from records.errors import IntegrityError, RefusedError
from records.home import open_home
from records.ledger.engine import WRITE_OPTION, make_engine
from records.ledger.ledger import reachable
from records.ledger.migrate import alembic_config, refuse_newer
from records.settings import RecordsSettings
from records.store import database_url, open_store

_ROWS_AT_ONCE = 1000


def restore(source: Path, settings: RecordsSettings) -> BackupManifest:
    """Restore a backup.

    Args:
        source: folder of the backup.
        settings: where to: a home and a database that hold nothing yet.
    Returns:
        What was restored.
    Raises:
        DataError: the folder is no backup.
        IntegrityError: the backup was altered, or its audit chain does not hold.
        RefusedError: there is a ledger already.
        ConfigError: the backup was written by a newer program.
        UnavailableError: the database or the blob store does not answer.
    """
    manifest = read_backup(source)
    refuse_newer(manifest.schema_version)
    home = open_home(settings.home)
    url = database_url(settings, home)
    engine = make_engine(url, durability=settings.durability, busy_timeout_s=settings.busy_timeout_s)
    shown = engine.url.render_as_string(hide_password=True)
    try:
        with reachable(shown):
            _refuse_filled(engine, shown)
            _put_files(source, home.root)
            blobs = open_blobs(settings.blobs or str(home.blobs))
            for path in sorted((source / BLOBS).rglob("*")):
                if path.is_file():
                    blobs.put(path.read_bytes())
            _fill_ledger(engine, manifest, source / LEDGER)
    finally:
        engine.dispose()
    store = open_store(settings)
    faults = audit.verify(store.ledger, store.home)
    store.close()
    if faults:
        raise IntegrityError("the backup was restored, and its audit chain is broken: " + "; ".join(faults))
    return manifest


def _refuse_filled(engine: sa.Engine, shown: str) -> None:
    with engine.connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() is not None:
            raise RefusedError(f"there is a ledger in {shown} already; restore into an empty home and database")


def _put_files(source: Path, root: Path) -> None:
    shutil.copytree(source / FILES, root, dirs_exist_ok=True)
    (root / "keys").chmod(0o700)
    for path in (root / "keys").iterdir():
        path.chmod(0o600)


def _fill_ledger(engine: sa.Engine, manifest: BackupManifest, folder: Path) -> None:
    with engine.connect() as connection:
        connection = connection.execution_options(**{WRITE_OPTION: True})
        with connection.begin():
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, manifest.schema_version)
            tables = sa.MetaData()
            tables.reflect(connection)
            for name in manifest.rows:
                _fill_table(connection, tables.tables[name], folder / f"{name}.jsonl.gz")
            command.upgrade(config, "head")


def _fill_table(connection: sa.Connection, table: sa.Table, path: Path) -> None:
    for column in table.columns:
        if isinstance(column.type, sa.JSON):
            column.type.none_as_null = True
    times = {c.name for c in table.columns if isinstance(c.type, sa.DateTime)}
    naive = connection.dialect.name == "sqlite"

    def row(line: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(line)
        for name in times & values.keys():
            values[name] = _time(values[name], naive=naive)
        return values

    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = map(row, file)
        while part := list(islice(rows, _ROWS_AT_ONCE)):
            connection.execute(sa.insert(table), part)


def _time(text: str | None, *, naive: bool) -> datetime | None:
    if text is None:
        return None
    value = datetime.fromisoformat(text).astimezone(UTC)
    return value.replace(tzinfo=None) if naive else value


def rows_of(folder: Path, table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as a backup holds them, for programs that are not Relook."""
    with gzip.open(folder / LEDGER / f"{table}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
