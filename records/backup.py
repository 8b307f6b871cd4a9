"""Back up everything that cannot be made again, and restore it into an empty home.

    ledger/TABLE.jsonl.gz   every row, from one consistent view, in a form that any database takes
    blobs/AB/ID             every blob, checked against its id
    files/...               datasets, bundles, keys, and the reports of rounds (no checkpoints, no cache)
    backup.json             written last: schema, and size and hash of every file; without it there is no backup

The service may keep running during a backup: blobs and bundles never change, and rows added after the view was
opened are not in it. A backup holds keys, so only its owner can read it. The database of a local Label Studio is
not included; annotations that were pulled are. Restoring works across kinds of database and blob store.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from records.audit import chain_head, head_file, verify
from records.blobs import open_blobs
from records.durable import sync_folder, sync_tree, write_file
from records.erasure import (
    BACKUPS,
    ERASED_LIST,
    RECORDS_PLACES,
    bury,
    delete_quarantined_rows,
    erase_images,
    erased_ids,
    read_erased,
)
from records.errors import DataError, IntegrityError, RefusedError, UnknownIdError
from records.home import open_home
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.engine import WRITE_OPTION, make_engine
from records.ledger.ledger import reachable
from records.ledger.migrate import alembic_config, refuse_newer, schema_versions
from records.ledger.tables import METADATA
from records.redaction import without_secrets
from records.settings import RecordsSettings
from records.store import Store, database_url, open_store
from records.types import Cursor

MANIFEST, LEDGER, BLOBS, FILES = "backup.json", "ledger", "blobs", "files"
WHOLE_FOLDERS = ("datasets", "bundles", "keys")
REPORT_SUFFIXES = frozenset({".json", ".jsonl", ".html"})
_ROWS_AT_ONCE = 5000
_ROWS_PER_INSERT = 1000
_IMAGE_ID_LENGTH = 64


class BackupFile(BaseModel):
    """A file of a backup."""

    model_config = ConfigDict(frozen=True)

    bytes: int = Field(ge=0)
    sha256: str


class BackupManifest(BaseModel):
    """backup.json."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    created_at: datetime
    schema_version: str
    rows: dict[str, int] = Field(description="by table")
    files: dict[str, BackupFile] = Field(description="by path within the backup")


def back_up(store: Store, target: Path) -> BackupManifest:
    """Write a backup of the store to a folder that is empty or does not exist.

    A folder that is not empty or cannot be written raises DataError; an altered blob raises IntegrityError, which
    names it, and no backup is made.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(0o700)
        if any(target.iterdir()):
            raise DataError(f"{target} is not empty; give a new folder, one for each backup")
        _remember(store, target)
        with store.ledger.read() as tx:
            gone = erased_ids(tx)
            rows = {table.name: _dump(tx, table, target / LEDGER) for table in METADATA.sorted_tables}
            head = chain_head(tx)
        _copy_blobs(store, target / BLOBS, gone)
        _copy_files(store.home.root, target / FILES)
        # The file in the home may already point past this view: the backup gets the head of the rows it holds.
        write_file(target / FILES / head_file(store.home).relative_to(store.home.root), head)
        manifest = BackupManifest(
            created_at=utc_now(),
            schema_version=schema_versions(store.ledger.engine)[1],
            rows=rows,
            files={str(path.relative_to(target)): describe(path) for path in _files_under(target)},
        )
        # The manifest marks a backup as finished, so it appears last, when everything else is on disk.
        sync_tree(target)
        write_file(target / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        sync_folder(target.parent)
    except OSError as error:
        raise DataError(f"the backup cannot be written to {target} ({error.strerror}); free some space") from error
    return manifest


def _remember(store: Store, target: Path) -> None:
    """Note where the backup is, before its view is opened: an erasure from then on is added to its list."""
    folder = str(target.absolute())
    with store.ledger.begin() as tx:
        cursor = tx.get(Cursor, BACKUPS)
        if cursor is None:
            tx.add(Cursor(name=BACKUPS, position={"folders": [folder]}))
        else:
            # A backup that was deleted needs no list; one on a disk that is not mounted now may come back.
            tx.update(Cursor, BACKUPS, position={"folders": sorted({*cursor.position["folders"], folder})})


def read_backup(source: Path) -> BackupManifest:
    """Return the manifest of a backup after checking every file against it.

    A folder that is no finished backup raises DataError; a missing or altered file raises IntegrityError.
    """
    try:
        manifest = BackupManifest.model_validate_json((source / MANIFEST).read_text())
    except OSError as error:
        raise DataError(f"{source} is not a finished backup: it has no {MANIFEST}") from error
    except ValidationError as error:
        raise IntegrityError(f"{source / MANIFEST} cannot be read; use another backup") from error
    if manifest.format_version != 1:
        raise DataError(f"{source} has format {manifest.format_version}, and this program reads 1; install a newer one")
    for name, expected in manifest.files.items():
        if not (source / name).is_file():
            raise IntegrityError(f"{name} is missing in the backup {source}; use another backup")
        if describe(source / name) != expected:
            raise IntegrityError(f"{name} in the backup {source} was altered; use another backup")
    return manifest


def describe(path: Path) -> BackupFile:
    """Return size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return BackupFile(bytes=path.stat().st_size, sha256=digest)


def _dump(tx: Transaction, table: sa.Table, folder: Path) -> int:
    """Write the rows of a table as lines of JSON and return their number."""
    folder.mkdir(exist_ok=True)
    count = 0
    key = next(iter(table.primary_key.columns))
    query = sa.select(table).order_by(key).execution_options(yield_per=_ROWS_AT_ONCE)
    with gzip.open(folder / f"{table.name}.jsonl.gz", "wt", encoding="utf-8", compresslevel=3) as file:
        for row in tx.connection.execute(query).mappings():
            file.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
            count += 1
    return count


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.value if isinstance(value, StrEnum) else value


def _copy_blobs(store: Store, folder: Path, gone: Collection[str]) -> None:
    folder.mkdir(exist_ok=True)
    for blob_id in store.blobs.ids():
        if blob_id in gone:
            continue
        try:
            data = store.blobs.get(blob_id)
        except UnknownIdError:
            continue  # erased or expired since the blobs were listed
        path = folder / blob_id[:2] / blob_id
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def _copy_files(root: Path, folder: Path) -> None:
    for name in WHOLE_FOLDERS:
        # Names with a leading dot are temporary: a writer is still busy with them, or was killed.
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    for path in sorted((root / "runs").rglob("*")):
        if path.is_file() and path.suffix in REPORT_SUFFIXES:
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def _files_under(target: Path) -> Iterator[Path]:
    yield from (path for path in sorted(target.rglob("*")) if path.is_file() and path.name != ERASED_LIST)


def restore(source: Path, settings: RecordsSettings, erased: Collection[str] = ()) -> BackupManifest:
    """Restore a backup into an empty home and database.

    Every file is checked before anything is written. The ledger is filled last, in one transaction, so a restore that
    was killed leaves no ledger and can be run again. A backup of an older schema is migrated on the way.

    Args:
        source: folder of the backup.
        settings: home, database and blob store to restore into.
        erased: ids of images and quarantined rows that were erased since, besides those in the backup's own list.
            They are left out: no moment comes in which they could be read.
    Returns:
        The manifest of the backup.
    Raises:
        DataError: the folder is no backup.
        IntegrityError: the backup was altered, or its audit chain does not hold.
        RefusedError: there is a ledger already.
        ConfigError: the backup was written by a newer program.
        UnavailableError: the database or the blob store does not respond.
    """
    manifest = read_backup(source)
    refuse_newer(manifest.schema_version)
    listed = {*erased, *read_erased(source / ERASED_LIST)}
    gone = {one for one in listed if len(one) == _IMAGE_ID_LENGTH}
    hidden = gone | {str(row["overlay_blob"]) for row in rows_of(source, "review_items") if row["image_id"] in gone}
    home = open_home(settings.home)
    url = database_url(settings, home)
    engine = make_engine(url, durability=settings.durability, busy_timeout_s=settings.busy_timeout_s)
    shown = without_secrets(engine.url.render_as_string(hide_password=True))
    try:
        with reachable(shown):
            _refuse_filled(engine, shown)
            _put_files(source, home.root)
            blobs = open_blobs(settings.blobs or str(home.blobs), sync=True)
            for path in sorted((source / BLOBS).rglob("*")):
                if path.is_file() and path.name not in hidden:
                    blobs.put(path.read_bytes())
            uris = {image_id: blobs.uri(image_id) for image_id in gone}
            _fill_ledger(engine, manifest, source / LEDGER, uris, listed - gone)
    finally:
        engine.dispose()
    store = open_store(settings)
    faults = verify(store.ledger, store.home)
    if not faults and gone:
        # The rows are blank already; this adds the events of the audit, and the erasers of the home's files.
        erase_images(store, sorted(gone), actor="relook restore", places=RECORDS_PLACES)
    store.close()
    if faults:
        raise IntegrityError("the backup was restored, but its audit chain is broken: " + "; ".join(faults))
    return manifest


def _refuse_filled(engine: sa.Engine, shown: str) -> None:
    if schema_versions(engine)[0] is not None:
        raise RefusedError(f"there is a ledger in {shown} already; restore into an empty home and database")


def _put_files(source: Path, root: Path) -> None:
    shutil.copytree(source / FILES, root, dirs_exist_ok=True)
    (root / "keys").chmod(0o700)
    for path in (root / "keys").iterdir():
        path.chmod(0o600)
    for path in (source / FILES).iterdir():
        sync_tree(root / path.name)


def _fill_ledger(
    engine: sa.Engine, manifest: BackupManifest, folder: Path, erased: Mapping[str, str], quarantined: Collection[str]
) -> None:
    """Write all rows in one transaction, without what was erased since: URIs of images by id, quarantined rows."""
    from alembic import command

    with engine.connect() as connection:
        connection = connection.execution_options(**{WRITE_OPTION: True})
        with connection.begin():
            config = alembic_config()
            config.attributes["connection"] = connection
            # First the schema that the rows were written with, then the newer migrations, which may also change rows.
            command.upgrade(config, manifest.schema_version)
            # Reflected, since the tables of this program are those of the newest schema.
            tables = sa.MetaData()
            tables.reflect(connection)
            for name in manifest.rows:
                _fill_table(connection, tables.tables[name], folder / f"{name}.jsonl.gz")
            command.upgrade(config, "head")
            tx = Transaction(connection)
            for image_id, uri in erased.items():
                bury(tx, image_id, uri)
            delete_quarantined_rows(tx, quarantined)


def _fill_table(connection: sa.Connection, table: sa.Table, path: Path) -> None:
    for column in table.columns:
        # Reflection does not know that None is stored as SQL NULL here, not as the JSON value null.
        if isinstance(column.type, sa.JSON):
            column.type.none_as_null = True
    times = {c.name for c in table.columns if isinstance(c.type, sa.DateTime)}
    # The reflected column type is plain DateTime, so this repeats what `UtcTime` does: SQLite keeps no zone.
    naive = connection.dialect.name == "sqlite"

    def row(line: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(line)
        for name in times & values.keys():
            values[name] = _time(values[name], naive=naive)
        return values

    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = map(row, file)
        while part := list(islice(rows, _ROWS_PER_INSERT)):
            connection.execute(sa.insert(table), part)


def _time(text: str | None, *, naive: bool) -> datetime | None:
    if text is None:
        return None
    value = datetime.fromisoformat(text).astimezone(UTC)
    return value.replace(tzinfo=None) if naive else value


def rows_of(folder: Path, table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table from a backup as plain values, for programs other than Relook."""
    with gzip.open(folder / LEDGER / f"{table}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
