import random
import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from records.audit import event_hash
from records.errors import ContractError, RefusedError, UnavailableError, UnknownIdError
from records.ids import utc_now
from records.ledger import Ledger, open_ledger
from records.ledger.tables import LEDGER_TYPES
from records.types import Annotation, AuditEvent, Cursor, Image, Lease, Prediction, Record, ReviewItem, ReviewState

Sample = Callable[..., Any]


@pytest.mark.parametrize("record_type", LEDGER_TYPES, ids=lambda t: t.__name__)
def test_every_type_comes_back_as_it_was(ledger: Ledger, sample: Sample, record_type: type[Record]) -> None:
    records = [sample(record_type, number) for number in range(3)]
    with ledger.begin() as tx:
        tx.add(*records)
    with ledger.read() as tx:
        assert tx.find(record_type, order_by=(record_type.key,)) == sorted(
            records, key=lambda r: getattr(r, record_type.key)
        )
        assert tx.get(record_type, getattr(records[1], record_type.key)) == records[1]
        assert tx.count(record_type) == 3


def test_finding(ledger: Ledger, sample: Sample) -> None:
    items = [
        sample(ReviewItem, n, state=ReviewState.NEW if n % 2 else ReviewState.PUSHED, priority=n % 3, due=None)
        for n in range(6)
    ]
    with ledger.begin() as tx:
        tx.add(*items)
    with ledger.read() as tx:
        new = tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("-priority", "id"))
        assert new == sorted((i for i in items if i.state == "new"), key=lambda i: (-i.priority, i.id))
        assert tx.find(ReviewItem, where={"state": "new"}, order_by=("-priority", "id"), limit=1) == new[:1]
        ids = [items[0].image_id, items[5].image_id]
        assert tx.count(ReviewItem, where={"image_id": ids, "due": None}) == 2
        assert tx.count(ReviewItem, where={"image_id": set(ids) | {str(n) for n in range(100_000)}}) == 2
        assert tx.count(ReviewItem, where={"state": [ReviewState.NEW] * 5000}) == 3
        assert tx.count(ReviewItem, where={"image_id": []}) == 0
        with pytest.raises(ContractError, match="ReviewItem has no field 'color'"):
            tx.find(ReviewItem, where={"color": 1})
        with pytest.raises(ContractError, match="ReviewItem has no field 'size'"):
            tx.find(ReviewItem, order_by=("-size",))
        assert tx.get(ReviewItem, "none") is None
        with pytest.raises(UnknownIdError, match="no ReviewItem has the id 'none'"):
            tx.require(ReviewItem, "none")


def test_nothing_is_ever_overwritten(ledger: Ledger, sample: Sample) -> None:
    label = sample(Annotation)
    with ledger.begin() as tx:
        tx.add(label)
        with pytest.raises(RefusedError, match="Annotation exists already"):
            tx.add(sample(Annotation, 1), label)
        same_revision = {"server": label.server, "annotation_id": label.annotation_id, "revision": label.revision}
        with pytest.raises(RefusedError, match="Annotation exists already"):
            tx.add(sample(Annotation, 2, **same_revision))
        tx.add(sample(Annotation, 3))
    with ledger.read() as tx:
        assert {found.id for found in tx.find(Annotation)} == {label.id, sample(Annotation, 3).id}


def test_only_mutable_fields_change_and_only_to_what_fits(ledger: Ledger, sample: Sample) -> None:
    item = sample(ReviewItem)
    with ledger.begin() as tx:
        tx.add(item)
        tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED, answered_at=item.created_at, project_id=None)
        tx.update(ReviewItem, item.id)
        with pytest.raises(ContractError, match=r"ReviewItem\.image_id never changes"):
            tx.update(ReviewItem, item.id, state="answered", image_id="other")
        for wrong in ({"state": "lost"}, {"priority": float("nan")}, {"answered_at": "soon"}):
            with pytest.raises(ContractError, match="cannot become that"):
                tx.update(ReviewItem, item.id, **wrong)
        with pytest.raises(UnknownIdError, match="no ReviewItem has the id 'none'"):
            tx.update(ReviewItem, "none", state=ReviewState.WITHDRAWN)
    with ledger.read() as tx:
        changes = {"state": ReviewState.ANSWERED, "answered_at": item.created_at, "project_id": None}
        assert tx.require(ReviewItem, item.id) == item.model_copy(update=changes)
        assert Prediction.mutable == frozenset()


def test_values_that_are_not_json_are_refused(ledger: Ledger) -> None:
    with ledger.begin() as tx:
        for value in (float("nan"), utc_now()):
            with pytest.raises(ContractError, match="Cursor cannot be stored"):
                tx.add(Cursor(name="x", position={"value": value}))
        assert tx.count(Cursor) == 0


def test_an_error_rolls_everything_back(ledger: Ledger, sample: Sample) -> None:
    def write_and_stop() -> None:
        with ledger.begin() as tx:
            tx.add(sample(Cursor), sample(Image))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    with ledger.read() as tx:
        assert (tx.count(Cursor), tx.count(Image)) == (0, 0)


def test_what_follows_a_commit_runs_once_and_only_then(ledger: Ledger, sample: Sample) -> None:
    seen: list[int] = []

    def look(committed: Ledger) -> None:
        with committed.read() as tx:
            seen.append(tx.count(Cursor))

    with ledger.begin() as tx:
        tx.after_commit.extend([look, look])
        tx.add(sample(Cursor))
        assert seen == []
    assert seen == [1]

    def fail() -> None:
        with ledger.begin() as tx:
            tx.after_commit.append(look)
            raise ContractError("no")

    with pytest.raises(ContractError):
        fail()
    assert seen == [1]


def test_a_read_transaction_cannot_write(ledger: Ledger, sample: Sample) -> None:
    with ledger.read() as tx:
        with pytest.raises(ContractError, match="cannot write"):
            tx.add(sample(Cursor))
        with pytest.raises(ContractError, match="cannot write"):
            tx.update(Cursor, "x", position={})


def test_a_reader_is_not_blocked_and_sees_one_view(ledger: Ledger, sample: Sample) -> None:
    with ledger.begin() as writer:
        writer.add(sample(Cursor, 0))
        began = time.monotonic()
        with ledger.read() as reader:
            assert reader.count(Cursor) == 0
        assert time.monotonic() - began < 1
    with ledger.read() as reader:
        assert reader.count(Cursor) == 1
        with ledger.begin() as writer:
            writer.add(sample(Cursor, 1))
        assert reader.count(Cursor) == 1
    with ledger.read() as reader:
        assert reader.count(Cursor) == 2


def test_a_writer_that_waits_too_long_says_so(tmp_path: Path) -> None:
    impatient = open_ledger(f"sqlite:///{tmp_path}/ledger.db", busy_timeout_s=0.2)
    with (
        impatient.begin(),
        pytest.raises(UnavailableError, match=r"ledger sqlite:.* does not respond: database is locked"),
        impatient.begin(),
    ):
        pass
    impatient.close()


def test_what_is_no_database_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(UnavailableError, match="does not respond: unable to open database file"):
        open_ledger(f"sqlite:///{tmp_path}/ledger.db")


def test_a_connection_that_a_thread_still_uses_is_closed_when_it_comes_back(ledger: Ledger) -> None:
    with ledger.read() as tx:
        used: Any = tx.connection.connection.dbapi_connection
        ledger.close()
        assert not tx.find(Image)
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        used.execute("SELECT 1")
    with ledger.read() as tx:  # a ledger that is closed connects anew
        assert not tx.find(Image)


def test_a_connection_that_is_lost_while_the_ledger_closes_raises_nothing_more(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        ledger.close()
        connection.invalidate()
    with ledger.read() as tx:
        assert not tx.find(Image)


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    def write(thread: int) -> None:
        for number in range(20):
            with ledger.begin() as tx:
                tx.add(Cursor(name=f"{thread} {number}", position={}))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ledger.read() as tx:
        assert tx.count(Cursor) == 160


COUNT_UP = """
import sys
from records.ledger import open_ledger
from records.types import Cursor
ledger, me = open_ledger(sys.argv[1]), sys.argv[2]
print(ledger.lease("alone", me, 600.0))
for number in range(50):
    with ledger.begin() as tx:
        shared = tx.require(Cursor, "shared")
        tx.update(Cursor, "shared", position={"sum": shared.position["sum"] + 1})
        tx.add(Cursor(name=f"{me} {number}", position={}))
"""


def test_four_processes_lose_nothing_and_one_gets_the_lease(ledger: Ledger, run_python: Callable[..., Any]) -> None:
    with ledger.begin() as tx:
        tx.add(Cursor(name="shared", position={"sum": 0}))
    started = [run_python(COUNT_UP, ledger.url, n) for n in range(4)]
    said = [process.communicate(timeout=600) for process in started]
    assert [complaint for _, complaint in said] == ["", "", "", ""]
    assert sorted(answer.strip() for answer, _ in said) == ["False", "False", "False", "True"]
    with ledger.read() as tx:
        assert tx.require(Cursor, "shared").position == {"sum": 200}
        assert tx.count(Cursor) == 201


WRITE_PAIRS = """
import sys
from records import audit
from records.ledger import open_ledger
from records.types import Cursor
ledger = open_ledger(sys.argv[1])
with ledger.read() as tx:
    number = tx.count(Cursor)
while True:
    with ledger.begin() as tx:
        tx.add(Cursor(name=str(number), position={}))
        audit.append(tx, actor="test", action="written", subject=str(number))
    number += 1
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_whole_transactions(ledger: Ledger, run_python: Callable[..., Any]) -> None:
    rng, acknowledged = random.Random(20260501), 0
    for _ in range(3):
        process = run_python(WRITE_PAIRS, ledger.url)
        said = [process.stdout.readline()]
        time.sleep(rng.uniform(0.01, 0.2))
        process.kill()
        rest, complaint = process.communicate()
        said += [line for line in rest.splitlines() if line]
        acknowledged = int(said[-1])
        assert acknowledged > 0, complaint
        with ledger.read() as tx:
            events = tx.find(AuditEvent, order_by=("number",))
            assert {e.subject for e in events} == {c.name for c in tx.find(Cursor)}
            assert len(events) in (acknowledged, acknowledged + 1)
            assert all(event_hash(event) == event.hash for event in events)
            assert tx.connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_a_lease_is_renewed_expires_and_is_released(ledger: Ledger) -> None:
    assert ledger.lease("round", "a", 30)
    assert not ledger.lease("round", "b", 30)
    assert ledger.lease("sync", "b", 30)
    assert ledger.lease("round", "a", 60)
    with ledger.read() as tx:
        assert tx.require(Lease, "round").expires_at > utc_now() + timedelta(seconds=50)
    ledger.release("round", "b")
    assert not ledger.lease("round", "b", 30)
    ledger.release("round", "a")
    assert ledger.lease("round", "b", 0.05)
    time.sleep(0.06)
    assert ledger.lease("round", "c", 30)
    ledger.release("unknown", "a")


def test_a_checkpoint_copies_the_log_beside_readers_and_a_writer(tmp_path: Path, sample: Sample) -> None:
    file, log = tmp_path / "ledger.db", tmp_path / "ledger.db-wal"
    ledger = open_ledger(f"sqlite:///{file}")
    ledger.checkpoint()
    before = file.stat().st_size
    number = 0
    # More than the 1,000 pages after which SQLite would make a commit copy them.
    while log.stat().st_size < 1500 * 4096:
        with ledger.begin() as tx:
            tx.add(*(sample(Image, number + n) for n in range(200)))
        number += 200
    assert file.stat().st_size == before
    with ledger.read() as reading, ledger.begin() as writing:
        writing.add(sample(Image, number))
        ledger.checkpoint()
        assert file.stat().st_size > before
        assert reading.count(Image) == number
    with ledger.read() as tx:
        assert tx.count(Image) == number + 1
    ledger.close()
