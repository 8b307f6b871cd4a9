"""Back up, destroy, restore: every row and byte is there again, also on another kind of database."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from records import audit
from records.backup import back_up, restore, rows_of
from records.errors import ConfigError, DataError, IntegrityError, RefusedError
from records.ledger.tables import LEDGER_TYPES, METADATA
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, Record


@pytest.fixture
def filled(store: Store, sample: Callable[..., Any]) -> Store:
    """A store with two records of every type, an audit chain, blobs, files and a report."""
    with store.ledger.begin() as tx:
        for record_type in LEDGER_TYPES:
            if record_type is not AuditEvent:
                tx.add(*(sample(record_type, number) for number in range(2)))
        for number in range(3):
            audit.append(tx, actor="test", action="gate.read", subject=str(number), details={"ü": None})
    for number in range(3):
        store.blobs.put(f"image {number}".encode())
    (store.home.keys / "patient-key").write_text("secret")
    (store.home.datasets / "abc").mkdir()
    (store.home.datasets / "abc" / "manifest.parquet").write_bytes(b"rows")
    (store.home.runs / "round-0001").mkdir()
    (store.home.runs / "round-0001" / "gate.json").write_text("{}")
    (store.home.runs / "round-0001" / "checkpoint.pt").write_bytes(b"large")
    (store.home.cache / "pixels").write_bytes(b"can be made again")
    return store


def everything(store: Store) -> dict[str, list[Record]]:
    with store.ledger.read() as tx:
        return {t.table: tx.find(t, order_by=(t.key,)) for t in LEDGER_TYPES}


def test_what_was_destroyed_is_there_again(filled: Store, tmp_path: Path) -> None:
    manifest = back_up(filled, tmp_path / "backup")
    before, blobs, home = everything(filled), list(filled.blobs.ids()), filled.home.root
    filled.close()
    shutil.rmtree(home)
    assert restore(tmp_path / "backup", RecordsSettings(home=home)) == manifest
    restored = open_store(RecordsSettings(home=home))
    assert everything(restored) == before
    assert list(restored.blobs.ids()) == blobs
    assert [restored.blobs.get(blob_id) for blob_id in blobs]
    assert audit.verify(restored.ledger, restored.home) == []
    assert (home / "keys" / "patient-key").read_text() == "secret"
    assert (home / "keys" / "patient-key").stat().st_mode & 0o077 == 0
    assert (home / "datasets" / "abc" / "manifest.parquet").is_file()
    assert (home / "runs" / "round-0001" / "gate.json").is_file()
    assert not list((home / "runs").rglob("*.pt"))
    assert not list((home / "cache").iterdir())
    restored.close()


def test_events_after_the_view_are_not_missed_after_a_restore(filled: Store, tmp_path: Path) -> None:
    back_up(filled, tmp_path / "backup")
    with filled.ledger.begin() as tx:
        audit.append(tx, actor="test", action="gate.read", subject="later")
    restore(tmp_path / "backup", RecordsSettings(home=tmp_path / "other"))
    other = open_store(RecordsSettings(home=tmp_path / "other"))
    assert audit.verify(other.ledger, other.home) == []
    other.close()


def test_empty_json_stays_empty(filled: Store, tmp_path: Path) -> None:
    """A column that is empty must not come back as the JSON value null."""
    table = METADATA.tables["predictions"]
    with filled.ledger.begin() as tx:
        tx.connection.execute(sa.update(table).values(probabilities=None))
    back_up(filled, tmp_path / "backup")
    restore(tmp_path / "backup", RecordsSettings(home=tmp_path / "other"))
    other = open_store(RecordsSettings(home=tmp_path / "other"))
    with other.ledger.read() as tx:
        empty = tx.connection.scalar(
            sa.text("SELECT count(*) FROM predictions WHERE probabilities IS NULL AND context IS NOT NULL")
        )
    other.close()
    assert empty == 2
    assert len(list(rows_of(tmp_path / "backup", "predictions"))) == 2


@pytest.mark.parametrize("fault", ["altered", "missing", "unfinished"])
def test_a_damaged_backup_is_refused_before_anything_is_written(filled: Store, tmp_path: Path, fault: str) -> None:
    back_up(filled, tmp_path / "backup")
    blob = next(path for path in (tmp_path / "backup" / "blobs").rglob("*") if path.is_file())
    if fault == "altered":
        blob.write_bytes(b"something else")
    elif fault == "missing":
        blob.unlink()
    else:
        (tmp_path / "backup" / "backup.json").unlink()
    said = {"altered": "was altered", "missing": "is missing", "unfinished": "is not a finished backup"}[fault]
    with pytest.raises((DataError, IntegrityError), match=said):
        restore(tmp_path / "backup", RecordsSettings(home=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_nothing_that_exists_is_overwritten(filled: Store, tmp_path: Path) -> None:
    back_up(filled, tmp_path / "backup")
    with pytest.raises(DataError, match="is not empty; give a new folder"):
        back_up(filled, tmp_path / "backup")
    with pytest.raises(RefusedError, match=r"there is a ledger in .* already"):
        restore(tmp_path / "backup", filled.settings)


def test_a_backup_of_a_newer_program_is_refused(filled: Store, tmp_path: Path) -> None:
    back_up(filled, tmp_path / "backup")
    path = tmp_path / "backup" / "backup.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": "9999"}))
    with pytest.raises(ConfigError, match="'9999' is newer than this program knows"):
        restore(tmp_path / "backup", RecordsSettings(home=tmp_path / "other"))


def test_a_blob_that_was_altered_stops_the_backup(filled: Store, tmp_path: Path) -> None:
    blob_id = next(filled.blobs.ids())
    (filled.home.blobs / blob_id[:2] / blob_id).write_bytes(b"x")
    with pytest.raises(IntegrityError, match=f"blob {blob_id[:12]}"):
        back_up(filled, tmp_path / "backup")
    assert not (tmp_path / "backup" / "backup.json").exists()
