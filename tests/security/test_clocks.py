"""Clocks that differ or are set: what is held, told and counted does not depend on them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import records
from cluster import schedule
from cluster.labels import newest_annotation, resolved_labels
from cluster.settings import RoundSettings, Settings
from labeling.consensus import current
from records import lease
from records.errors import RefusedError, UnavailableError
from records.ids import CLOCK_VARIABLE, id_after, new_id, utc_now
from records.ledger import FENCES, Ledger, Transaction, open_ledger
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    AnnotationKind,
    Arm,
    Confirmation,
    Cursor,
    DatasetRecord,
    Decision,
    Lease,
    Outcome,
    Prediction,
    Rollout,
    RolloutStage,
    RoundRecord,
)
from serving.access.keys import LOCAL
from serving.events import read_events

YEAR_S = 365 * 86_400
STEPS_S = (-2, -60, 31, 60, -3600, 3600, YEAR_S, -YEAR_S)
"""By how much a clock is set: what the time service corrects, another machine's error, an hour of DST, a wrong year."""

SetClock = Callable[[float], None]


@pytest.fixture
def set_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Set this process's clock ahead by seconds."""
    file = tmp_path / "offset"
    file.write_text("0")
    monkeypatch.setenv(CLOCK_VARIABLE, str(file))

    def step(seconds: float) -> None:
        file.write_text(str(seconds))

    return step


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path, new_database: Callable[..., str]) -> str:
    """The URL of a database of each kind, which holds nothing."""
    return new_database() if request.param == "postgresql" else f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def ledger(database: str) -> Iterator[Ledger]:
    opened = open_ledger(database)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path / "home"))
    yield opened
    opened.close()


# Leases


@pytest.mark.parametrize("step_s", STEPS_S)
def test_a_machine_whose_clock_differs_does_not_take_a_lease_that_is_held(
    ledger: Ledger, set_clock: SetClock, step_s: float
) -> None:
    with lease.hold(ledger, "round"):
        set_clock(step_s)
        with pytest.raises(RefusedError, match="another process holds the round lease"), lease.hold(ledger, "round"):
            pass
        assert not ledger.lease("round", "another machine", 30)


@pytest.fixture
def set_database_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Set the clock that the database reads, for this process."""
    plain, ahead = Transaction.now, [0.0]
    monkeypatch.setattr(Transaction, "now", lambda tx: plain(tx) + timedelta(seconds=ahead[0]))
    return lambda seconds: ahead.__setitem__(0, seconds)


@pytest.mark.parametrize("step_s", [60, 3600, YEAR_S])
def test_a_database_clock_that_is_set_forward_leaves_the_lease_with_its_holder(
    store: Store, set_database_clock: SetClock, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 3.0)
    with lease.hold(store.ledger, "round"):
        set_database_clock(step_s)
        with pytest.raises(RefusedError, match="another process holds"), lease.hold(store.ledger, "round", wait_s=4):
            pass
        with store.ledger.begin() as tx:
            tx.add(Cursor(name="written", position={}))


@pytest.mark.parametrize("step_s", [-2 * 3600, -YEAR_S])
def test_a_killed_holder_does_not_keep_its_lease_until_a_wrong_clock_is_reached(
    ledger: Ledger, set_database_clock: SetClock, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    assert ledger.lease("round", "killed on another machine", 30)
    set_database_clock(step_s)
    with lease.hold(ledger, "round"):
        pass


def test_a_holder_that_lost_its_lease_commits_nothing_more(ledger: Ledger) -> None:
    committed, refused = [], []

    def work() -> None:
        with lease.hold(ledger, "round") as holder:
            for name, touches in (("before", None), ("after", None), ("after too", ["a row"])):
                with ledger.begin(touches) as tx:
                    tx.add(Cursor(name=name, position={}))
                committed.append(name)
                ledger.release("round", holder)
                assert ledger.lease("round", "another", 30)

    def go_on_after_a_refusal() -> None:
        # A lease within a lease: both are checked.
        with lease.hold(ledger, "sync") as holder, lease.hold(ledger, "inner"):
            ledger.release("sync", holder)
            assert ledger.lease("sync", "another", 30)
            for touches in (None, ["a row"]):
                try:
                    with ledger.begin(touches) as tx:
                        tx.add(Cursor(name=f"{touches}", position={}))
                except RefusedError as error:
                    refused.append(str(error))

    with pytest.raises(RefusedError, match="another process took the round lease while this ran"):
        work()
    assert committed == ["before"]
    with pytest.raises(RefusedError, match="another process took the sync lease while this ran"):
        go_on_after_a_refusal()
    assert len(refused) == 2
    assert FENCES.get() == ()
    with ledger.begin() as tx:  # outside of the block nothing is refused
        assert [cursor.name for cursor in tx.find(Cursor)] == ["before"]
        assert tx.require(Lease, "round").fence == 2


def test_a_program_without_fences_that_took_the_lease_is_noticed(store: Store) -> None:
    def work() -> None:
        with lease.hold(store.ledger, "round"):
            with store.ledger.engine.begin() as connection:
                connection.exec_driver_sql("UPDATE leases SET holder = 'an earlier release'")
            with store.ledger.begin():
                pass

    with pytest.raises(RefusedError, match="took the round lease"):
        work()


def test_other_ledgers_and_other_threads_are_not_held_to_a_lease_that_was_lost(ledger: Ledger, tmp_path: Path) -> None:
    other = open_ledger(f"sqlite:///{tmp_path}/other.db")

    def write(name: str) -> None:
        with ledger.begin() as tx:
            tx.add(Cursor(name=name, position={}))

    def lose() -> None:
        with lease.hold(ledger, "round") as holder:
            ledger.release("round", holder)
            assert ledger.lease("round", "another", 30)
            with other.begin() as tx:
                tx.add(Cursor(name="elsewhere", position={}))
            thread = threading.Thread(target=write, args=("a request of the same service",))
            thread.start()
            thread.join()
            write("the holder itself")

    with pytest.raises(RefusedError, match="took the round lease"):
        lose()
    with ledger.read() as tx:
        assert [cursor.name for cursor in tx.find(Cursor)] == ["a request of the same service"]
    other.close()


WRITE_UNDER_LEASE = """
import sys, time
from records import lease
from records.errors import RefusedError, UnavailableError
from records.ledger import FENCES, open_ledger
from records.types import Cursor
lease.LEASE_S = 1.0
ledger, number = open_ledger(sys.argv[1]), 0
try:
    with lease.hold(ledger, "round", wait_s=60):
        fence = FENCES.get()[0].number
        while True:
            with ledger.begin() as tx:
                count = tx.count(Cursor)
                tx.add(Cursor(name=f"{count:06d}", position={"fence": fence}))
            print(count, flush=True)
            time.sleep(0.02)
except RefusedError as error:
    print("refused", error, flush=True)
"""


@contextmanager
def another_process(code: str, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    root = Path(records.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=root, env={**os.environ, **variables},
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def stop_between_transactions(process: subprocess.Popen[str], ledger: Ledger) -> None:
    """Stop a process that writes. In the middle of a transaction it would hold the database's lock for ever."""
    while True:
        process.send_signal(signal.SIGSTOP)
        writer = threading.Thread(target=ledger.release, args=("no lease", "nobody"))  # a write transaction
        writer.start()
        writer.join(2)
        if not writer.is_alive():
            return
        process.send_signal(signal.SIGCONT)
        writer.join()


def test_of_two_processes_one_of_which_stood_still_only_one_goes_on(ledger: Ledger, database: str) -> None:
    """A real holder is stopped for longer than its lease lasts, and continued when another one works."""
    with another_process(WRITE_UNDER_LEASE, database) as first, another_process(WRITE_UNDER_LEASE, database) as second:
        streams = {process: process.stdout for process in (first, second) if process.stdout is not None}
        while True:  # whichever got the lease writes
            with ledger.read() as tx:
                if tx.count(Cursor) > 3:
                    holder_pid = tx.require(Lease, "round").holder.rpartition(":")[0].rpartition(":")[2]
                    break
            time.sleep(0.05)
        stopped, other = (first, second) if int(holder_pid) == first.pid else (second, first)
        stop_between_transactions(stopped, ledger)
        assert streams[other].readline().strip().isdigit()
        stopped.send_signal(signal.SIGCONT)
        *_, said = streams[stopped]
        assert said.startswith("refused another process took the round lease")
    with ledger.read() as tx:
        fences = [cursor.position["fence"] for cursor in tx.find(Cursor, order_by=("name",))]
    assert fences == sorted(fences)
    assert set(fences) == {1, 2}


# Events


def predict(store: Store, image: str, **changes: Any) -> Prediction:
    made = Prediction(
        id=new_id(), request_id="r", created_at=utc_now(), caller="local", image_id=image, model_id="m",
        model_status="champion", engine="torch", precision="fp32", num_threads=1, settings_hash="s", label="nv",
        decision=Decision.ANSWERED, latency_ms=1,
    ).model_copy(update=changes)  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(made)
    return made


def report(store: Store, prediction: Prediction) -> str:
    outcome = Outcome(
        id=new_id(), created_at=utc_now(), prediction_id=prediction.id, image_id=prediction.image_id, caller="local",
        diagnosis="nv", confirmation=Confirmation.FOLLOW_UP, observed_at=utc_now(),
    )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(outcome)
    return prediction.id


@pytest.mark.parametrize("step_s", STEPS_S)
def test_every_event_is_told_once_and_in_order_though_the_clock_is_set(
    store: Store, set_clock: SetClock, step_s: float
) -> None:
    predictions = [predict(store, f"image {n}") for n in range(9)]
    wanted, told, after = [], [], None
    for number, offset in enumerate((0, 0, step_s, step_s, 0, -step_s, 0, step_s, 0)):
        set_clock(offset)
        wanted.append(report(store, predictions[number]))
        page = read_events(store, LOCAL, after, 50)
        told += [event.prediction_id for event in page.items]
        after = page.next
    assert told == wanted
    assert read_events(store, LOCAL, after, 50).items == []
    everything = read_events(store, LOCAL, None, 50).items
    assert [event.prediction_id for event in everything] == wanted


GATHER = """
import sys
from records.settings import RecordsSettings
from records.store import open_store
from serving.events import gather
store = open_store(RecordsSettings(home=sys.argv[1], database=sys.argv[2]))
print("ready", flush=True)
while True:
    gather(store)
"""


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)], indirect=True)
def test_two_services_whose_clocks_differ_tell_every_event_once_and_in_order(database: str, tmp_path: Path) -> None:
    """One gathers 31 s ahead, one 60 s behind; a reader that follows misses none and sees none twice."""
    home = tmp_path / "shared"
    shared = open_store(RecordsSettings(home=home, database=database))
    offsets = {tmp_path / "ahead": "31", tmp_path / "behind": "-60"}
    for file, offset in offsets.items():
        file.write_text(offset)
    one, other = (another_process(GATHER, str(home), database, **{CLOCK_VARIABLE: str(file)}) for file in offsets)
    wanted, told, after = [], [], None
    with one as first, other as second:
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
        for number in range(60):
            wanted.append(report(shared, predict(shared, f"image {number}")))
            page = read_events(shared, LOCAL, after, 7)
            told += [event.id for event in page.items]
            after = page.next
        deadline = time.monotonic() + 600
        while len(told) < len(wanted) and time.monotonic() < deadline:
            page = read_events(shared, LOCAL, after, 7)
            told += [event.id for event in page.items]
            after = page.next
    everything = read_events(shared, LOCAL, None, 200).items
    shared.close()
    assert told == [event.id for event in everything] == sorted(told)
    assert sorted(event.prediction_id for event in everything) == sorted(wanted)


def test_a_cursor_of_an_earlier_version_still_says_where_its_reader_is(store: Store) -> None:
    first, second = (predict(store, image) for image in ("image 1", "image 2"))
    report(store, first)
    (event,) = read_events(store, LOCAL, None, 50).items
    # Ids of an earlier version are the time and chance as well, so the old cursor lies between old and new events.
    report(store, second)
    assert [e.prediction_id for e in read_events(store, LOCAL, event.id, 50).items] == [second.id]
    assert read_events(store, LOCAL, "f" * 32, 50).items == []
    assert id_after("0" * 11 + "1" + "f" * 20) > "0" * 11 + "1" + "f" * 20


def test_a_prediction_is_recalled_though_its_machine_was_behind_when_the_rollout_began(store: Store) -> None:
    rollout = Rollout(
        id=new_id(), created_at=utc_now(), actor="a", champion_id="c", candidate_id="m", stage=RolloutStage.ROLLED_BACK,
        why="tried",
    )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(rollout)
    before = rollout.created_at - timedelta(seconds=31)
    behind = predict(store, "image 1", created_at=before, arm=Arm.CANDIDATE, rollout_id=rollout.id)
    predict(store, "image 2", arm=Arm.CANDIDATE, rollout_id="another rollout of this model")
    predict(store, "image 3", created_at=before, arm=Arm.CANDIDATE)  # of an earlier version, before the rollout
    old = predict(store, "image 4", arm=Arm.CANDIDATE)
    told = read_events(store, LOCAL, None, 50).items
    assert {(event.kind, event.prediction_id) for event in told} == {("recalled", p.id) for p in (behind, old)}


def test_ids_of_a_process_sort_in_the_order_of_their_making(set_clock: SetClock) -> None:
    made = []
    for step_s in (0, 60, 0, -60, -YEAR_S, 0, 2):
        set_clock(step_s)
        made.append(new_id()[:12])
    assert made == sorted(made)


# What is newest


def annotate(store: Store, label: str, revision: str, *, annotation_id: int = 1) -> Annotation:
    with store.ledger.begin() as tx:
        made = Annotation(
            id=new_id(), created_at=tx.now_after(Annotation), review_item_id="item", image_id=f"image {annotation_id}",
            kind=AnnotationKind.CLASS, label=label, annotator="anna", annotated_at=datetime(2026, 5, 1, tzinfo=UTC),
            server="http://127.0.0.1", project_id=1, task_id=1, annotation_id=annotation_id, revision=revision,
        )  # fmt: skip
        tx.add(made)
    return made


@pytest.mark.parametrize("step_s", [-2, -60, -3600, -YEAR_S])
def test_the_last_edit_of_an_annotation_counts_though_the_clock_was_set_back(
    store: Store, set_database_clock: SetClock, step_s: float
) -> None:
    for number, label in enumerate(("nv", "mel", "bcc")):
        set_database_clock(number * step_s)
        last = annotate(store, label, str(number))
    with store.ledger.read() as tx:
        assert [row.label for row in current(tx.find(Annotation))] == ["bcc"]
    assert [row.label for row in resolved_labels(store)] == ["bcc"]
    assert newest_annotation(store) == last.created_at


def test_a_round_sees_every_annotation_and_the_next_is_due_by_those_after_it(
    store: Store, set_database_clock: SetClock
) -> None:
    set_database_clock(60)
    annotate(store, "nv", "1")
    set_database_clock(0)
    until = newest_annotation(store)
    assert [row.label for row in resolved_labels(store, until)] == ["nv"]
    later = annotate(store, "mel", "1", annotation_id=2)
    assert later.created_at > until
    assert len(resolved_labels(store, until)) == 1


@pytest.mark.parametrize("step_s", [-2, -60, -YEAR_S])
def test_the_newest_dataset_version_is_the_one_written_last(
    store: Store, set_database_clock: SetClock, step_s: float
) -> None:
    for number in range(3):
        set_database_clock(number * step_s)
        with store.ledger.begin() as tx:
            tx.add(
                DatasetRecord(
                    id=f"version {number}", created_at=tx.now_after(DatasetRecord), taxonomy_hash="t", num_images=1,
                    num_groups=1, round=number,
                )
            )  # fmt: skip
    with store.ledger.read() as tx:
        assert tx.find(DatasetRecord, order_by=("-created_at",), limit=1)[0].id == "version 2"


@pytest.mark.parametrize(("started_ago", "due"), [(60, False), (-60, False), (6 * 86_400, True), (-YEAR_S, True)])
def test_a_round_becomes_due_again_though_the_last_one_began_in_a_wrong_year(
    store: Store, started_ago: int, due: bool
) -> None:
    with store.ledger.begin() as tx:
        started_at = tx.now() - timedelta(seconds=started_ago)
        tx.add(RoundRecord(id="r", number=1, started_at=started_at, finished_at=started_at, seed=1, settings_hash="s"))
    settings = Settings(round=RoundSettings(watch_labels=100, watch_days=5))
    assert (schedule.why_due(store, settings) is not None) is due


def test_a_holder_that_stands_still_in_a_transaction_does_not_stop_all_writers(
    postgresql: sa.URL,
) -> None:
    """The server ends such a transaction; its process is told, and nothing of it is written."""
    ledger = open_ledger(postgresql, busy_timeout_s=3)

    def stand_still(touches: list[str] | None) -> None:
        with ledger.begin(touches) as tx:
            tx.add(Cursor(name="half", position={}))
            time.sleep(2)
            tx.add(Cursor(name="other half", position={}))

    for touches in (None, ["a row"]):
        with pytest.raises(UnavailableError, match="idle-in-transaction timeout"):
            stand_still(touches)
    with ledger.begin() as tx:
        assert tx.count(Cursor) == 0
    ledger.close()
