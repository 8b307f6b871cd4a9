"""The same store on a real PostgreSQL (and, where RELOOK_TEST_S3 names one, on an S3 endpoint)."""

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from records import audit
from records.backup import back_up, restore
from records.blobs import open_blobs
from records.datasets import build_version
from records.erasure import BACKUPS
from records.errors import ConfigError, RefusedError, UnavailableError
from records.lease import hold
from records.ledger import open_ledger
from records.ledger.tables import LEDGER_TYPES, SCHEMA_FLOOR, TABLES
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, Consent, Cursor, Group, Image, Lease, Prediction, SourceLabel
from tests.records.marks import MARKED, marks_after_changes
from tests.records.plans import full_scans

_LABELS, _IMAGES, _GROUPS = (TABLES[t] for t in (SourceLabel, Image, Group))
_FIRST = sa.select(sa.func.min(_IMAGES.c.id)).scalar_subquery()
_GROUP = sa.select(sa.func.max(_GROUPS.c.id)).scalar_subquery()
CHANGES = (
    sa.update(_LABELS).where(_LABELS.c.image_id == _FIRST).values(label="bcc"),
    sa.update(_IMAGES).where(_IMAGES.c.id == _FIRST).values(group_id=_GROUP),
    sa.update(_GROUPS).where(_GROUPS.c.id == _GROUP).values(split="gate"),
    sa.update(_GROUPS).where(_GROUPS.c.id == _GROUP).values(split="val"),
    sa.update(_IMAGES).where(_IMAGES.c.id == _FIRST).values(consent=Consent.REVIEW),
    sa.delete(_LABELS).where(_LABELS.c.image_id == sa.select(sa.func.max(_IMAGES.c.id)).scalar_subquery()),
)


@pytest.fixture
def database(new_database: Callable[..., str]) -> str:
    """The URL of a database of its own, which holds nothing."""
    return new_database()


@pytest.fixture
def pg_store(database: str, tmp_path: Path) -> Iterator[Store]:
    """A store whose ledger is the PostgreSQL."""
    opened = open_store(RecordsSettings(home=tmp_path / "pg-home", database=database))
    yield opened
    opened.close()


def test_every_type_comes_back_as_it_went_in(pg_store: Store, sample: Callable[..., Any]) -> None:
    records = [sample(record_type) for record_type in LEDGER_TYPES]
    with pg_store.ledger.begin() as tx:
        tx.add(*records)
    with pg_store.ledger.read() as tx:
        assert [tx.get(type(r), getattr(r, r.key)) for r in records] == records
        assert tx.find(Prediction, where={"id": [str(n) for n in range(3000)]}) == []
    with pytest.raises(RefusedError, match="Prediction exists already"), pg_store.ledger.begin() as tx:
        tx.add(next(r for r in records if isinstance(r, Prediction)))


def test_nothing_that_runs_over_millions_of_rows_scans_a_table(pg_store: Store, sample: Callable[..., Any]) -> None:
    assert full_scans(pg_store, sample) == []


def test_equal_knowledge_gives_the_dataset_id_of_sqlite(
    pg_store: Store, store: Store, add_labelled: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = []
    for each in (pg_store, store):
        add_labelled(each, range(40), "nv")
        add_labelled(each, range(40, 60), "mel")
        versions.append(build_version(each).version.id)
    assert versions[0] == versions[1]
    # The next ones are made from these and from what the triggers of either database note.
    monkeypatch.delattr("records.datasets._from_all")
    for number, step in enumerate(CHANGES, start=1):
        found = []
        for each in (pg_store, store):
            with each.ledger.begin() as tx:
                tx.connection.execute(step)
            found.append(build_version(each, round_number=number, parent_id=versions[-1]).version.id)
        assert found[0] == found[1] not in versions
        versions.append(found[0])


def test_writers_follow_one_another(pg_store: Store, database: str) -> None:
    """Four writers with a connection each: the audit chain is whole and one of them gets the lease."""
    won: list[str] = []

    def write(name: str) -> None:
        ledger = open_ledger(database, audit=pg_store.ledger.audit)
        for number in range(10):
            with ledger.begin() as tx:
                audit.append(tx, actor=name, action="gate.read", subject=str(number))
        if ledger.lease("round", name, 60):
            won.append(name)
        ledger.close()

    threads = [threading.Thread(target=write, args=(f"writer {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.write_head(pg_store.ledger)
    assert audit.verify(pg_store.ledger, pg_store.home) == []
    with pg_store.ledger.read() as tx:
        assert tx.count(AuditEvent) == 40
        assert len(won) == tx.count(Lease) == 1
    with pytest.raises(RefusedError, match="another process holds the round lease"), hold(pg_store.ledger, "round"):
        pass


def test_writers_that_touch_other_things_do_not_wait(pg_store: Store, database: str) -> None:
    inside, go_on, done = threading.Event(), threading.Event(), []

    def write(name: str, touches: set[str] | None) -> None:
        ledger = open_ledger(database)
        with ledger.begin(touches) as tx:
            if name == "first":
                inside.set()
                go_on.wait(600)
            tx.add(Cursor(name=name, position={}))
        done.append(name)
        ledger.close()

    threads = [threading.Thread(target=write, args=("first", {"a", "b"}))]
    threads[0].start()
    assert inside.wait(600)
    write("other", {"c"})
    assert done == ["other"], "who touches something else is not held up"
    threads += [
        threading.Thread(target=write, args=("same", {"b", "d"})),
        threading.Thread(target=write, args=("all", None)),
    ]
    for thread in threads[1:]:
        thread.start()
        thread.join(0.5)
    assert done == ["other"], "who touches the same, and who touches everything, waits"
    go_on.set()
    for thread in threads:
        thread.join(600)
    assert sorted(done) == ["all", "first", "other", "same"]
    with pg_store.ledger.read() as tx:
        assert tx.count(Cursor) == 4


def test_a_laptop_moves_to_a_cluster_and_back(
    store: Store, new_database: Callable[..., str], tmp_path: Path, sample: Callable[..., Any]
) -> None:
    """A backup of SQLite is restored into PostgreSQL, and a backup of that into SQLite."""
    with store.ledger.begin() as tx:
        tx.add(*(sample(t) for t in LEDGER_TYPES if t is not AuditEvent))
        audit.append(tx, actor="test", action="gate.read", subject="x")
    back_up(store, tmp_path / "one")
    database = new_database(empty=True)
    restore(tmp_path / "one", RecordsSettings(home=tmp_path / "cluster", database=database))
    cluster = open_store(RecordsSettings(home=tmp_path / "cluster", database=database))
    back_up(cluster, tmp_path / "two")
    restore(tmp_path / "two", RecordsSettings(home=tmp_path / "back"))
    back = open_store(RecordsSettings(home=tmp_path / "back"))
    for record_type in LEDGER_TYPES:
        found = []
        for each in (store, cluster, back):
            with each.ledger.read() as tx:
                found.append(tx.find(record_type, order_by=(record_type.key,)))
        if record_type is Cursor:
            found = [[row for row in rows if row.name != BACKUPS] for rows in found]
        assert found[0] == found[1] == found[2]
    cluster.close()
    back.close()


def test_a_newer_schema_and_a_missing_database_are_refused(pg_store: Store, postgresql: sa.URL, database: str) -> None:
    with pg_store.ledger.begin() as tx:
        tx.add(Cursor(name="x", position={}))
        tx.connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    open_ledger(database).close()  # a newer schema that was only added to
    with pg_store.ledger.begin() as tx:
        tx.connection.execute(sa.update(SCHEMA_FLOOR).values(oldest="9999"))
    with pytest.raises(ConfigError, match="'9999' is newer than this program knows"):
        open_ledger(database)
    nowhere = postgresql.set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(UnavailableError, match=r'does not respond: .*database "nowhere" does not exist'):
        open_ledger(nowhere)


@pytest.mark.skipif("RELOOK_TEST_S3" not in os.environ, reason="RELOOK_TEST_S3 names no bucket")
def test_blobs_in_object_storage() -> None:
    base, _, query = os.environ["RELOOK_TEST_S3"].partition("?")
    blobs = open_blobs(f"{base}/{uuid.uuid4().hex}?{query}")
    ids = sorted(blobs.put(f"image {n}".encode()) for n in range(3))
    assert list(blobs.ids()) == ids
    assert blobs.put(b"image 0") in ids
    assert blobs.get(ids[0]).startswith(b"image")
    assert blobs.has(ids[0])
    assert blobs.uri(ids[0]).startswith("s3://")
    assert blobs.uri(ids[0]).endswith(ids[0])
    blobs.delete(ids[0])
    assert not blobs.has(ids[0])
    with pytest.raises(UnavailableError, match="cannot be written"):
        open_blobs(f"s3://no-such-bucket-{uuid.uuid4().hex[:8]}/blobs?{query}")


def test_an_item_is_marked_by_whatever_changes_what_its_task_shows(pg_store: Store, sample: Callable[..., Any]) -> None:
    assert marks_after_changes(pg_store, sample) == MARKED


def test_a_connection_that_a_thread_still_uses_is_closed_when_it_comes_back(database: str) -> None:
    ledger = open_ledger(database)
    with ledger.read() as tx:
        used: Any = tx.connection.connection.dbapi_connection
        ledger.close()
        assert not tx.find(Image)
    assert used.closed
    with ledger.read() as tx:  # a ledger that is closed connects anew
        assert not tx.find(Image)
    ledger.close()
