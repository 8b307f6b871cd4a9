"""Back up everything that cannot be made again: ledger, blobs, dataset versions, bundles, keys, round reports.

    ledger/TABLE.jsonl.gz   every row, from one consistent view, in a form that any database takes
    blobs/AB/ID             every blob, checked against its id
    files/...               datasets, bundles, keys, and the reports of rounds (no checkpoints, no cache)
    backup.json             written last: schema, and size and hash of every file; without it there is no backup

The service may go on answering meanwhile: blobs and bundles never change, and what comes after the view
of the ledger is not in the backup. It holds keys, so it is readable by its owner only. The database of
a local Label Studio is not in it; answers that were pulled are.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from records.audit import chain_head, head_file
from records.errors import DataError, IntegrityError
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.migrate import schema_versions
from records.ledger.tables import METADATA
from records.store import Store

MANIFEST, LEDGER, BLOBS, FILES = "backup.json", "ledger", "blobs", "files"
WHOLE_FOLDERS = ("datasets", "bundles", "keys")
REPORT_SUFFIXES = frozenset({".json", ".jsonl", ".html"})
_ROWS_AT_ONCE = 5000


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
    """Write a backup.

    Args:
        store: what is backed up.
        target: a folder that is empty or does not exist.
    Returns:
        What was written.
    Raises:
        DataError: the folder is not empty or cannot be written.
        IntegrityError: a blob was altered; it is named, and no backup is made.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(0o700)
        if any(target.iterdir()):
            raise DataError(f"{target} is not empty; give a new folder, one for each backup")
        with store.ledger.read() as tx:
            rows = {table.name: _dump(tx, table, target / LEDGER) for table in METADATA.sorted_tables}
            head = chain_head(tx)
        _copy_blobs(store, target / BLOBS)
        _copy_files(store.home.root, target / FILES)
        # The head that belongs to this view of the ledger, not the one of a moment later.
        (target / FILES / head_file(store.home).relative_to(store.home.root)).write_text(head)
        manifest = BackupManifest(
            created_at=utc_now(),
            schema_version=schema_versions(store.ledger.engine)[1],
            rows=rows,
            files={str(path.relative_to(target)): describe(path) for path in _files_under(target)},
        )
        temporary = target / f".{MANIFEST}"
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n")
        temporary.replace(target / MANIFEST)
    except OSError as error:
        raise DataError(f"the backup cannot be written to {target} ({error.strerror}); free some space") from error
    return manifest


def read_backup(source: Path) -> BackupManifest:
    """Open a backup and check every file of it.

    Args:
        source: its folder.
    Returns:
        What it holds.
    Raises:
        DataError: the folder is no backup, or one that was not finished.
        IntegrityError: a file is missing or was altered.
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
    """Write the rows of a table as lines of JSON; return how many."""
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


def _copy_blobs(store: Store, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for blob_id in store.blobs.ids():
        path = folder / blob_id[:2] / blob_id
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(store.blobs.get(blob_id))


def _copy_files(root: Path, folder: Path) -> None:
    for name in WHOLE_FOLDERS:
        # Folders and files with a leading dot are what a killed writer left.
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    for path in sorted((root / "runs").rglob("*")):
        if path.is_file() and path.suffix in REPORT_SUFFIXES:
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def _files_under(target: Path) -> Iterator[Path]:
    yield from (path for path in sorted(target.rglob("*")) if path.is_file())
