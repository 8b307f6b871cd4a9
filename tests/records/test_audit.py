import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from records import audit
from records.errors import ContractError, UnavailableError
from records.ids import utc_now
from records.ledger.tables import TABLES
from records.store import Store
from records.types import AuditEvent, Cursor

EVENTS = TABLES[AuditEvent]


@pytest.fixture
def chain(store: Store) -> Store:
    """A store with six audit events."""
    for number in range(1, 7):
        with store.ledger.begin() as tx:
            audit.append(tx, actor="me", action="test.read", subject=f"model {number}", details={"ü": [number, 0.1]})
    return store


def _change(store: Store, *statements: sa.Executable) -> None:
    """Do what somebody with a SQL shell can do."""
    with store.ledger.begin() as tx:
        for statement in statements:
            tx.connection.execute(statement)


def _faults(store: Store) -> list[str]:
    return audit.verify(store.ledger, store.home)


def test_a_chain_is_whole_and_anchored_by_itself(chain: Store) -> None:
    assert _faults(chain) == []
    with chain.ledger.read() as tx:
        events = tx.find(AuditEvent, order_by=("number",))
    assert [e.number for e in events] == [1, 2, 3, 4, 5, 6]
    assert events[0].previous_hash == audit.GENESIS
    assert all(later.previous_hash == earlier.hash for earlier, later in itertools.pairwise(events))
    assert audit.head_file(chain.home).read_text() == f"6 {events[-1].hash}\n"


def test_an_empty_chain_is_whole_and_has_its_head_from_the_start(store: Store) -> None:
    assert _faults(store) == []
    assert audit.head_file(store.home).read_text() == f"0 {audit.GENESIS}\n"


def test_an_event_exists_exactly_if_its_action_does(chain: Store) -> None:
    def fail() -> None:
        with chain.ledger.begin() as tx:
            tx.add(Cursor(name="x", position={}))
            audit.append(tx, actor="me", action="a", subject="s")
            raise ContractError("no")

    with pytest.raises(ContractError, match=r"^no$"):
        fail()
    with chain.ledger.read() as tx:
        assert (tx.count(AuditEvent), tx.count(Cursor)) == (6, 0)
    assert _faults(chain) == []


def test_several_events_in_one_transaction_follow_one_another(chain: Store) -> None:
    with chain.ledger.begin() as tx:
        first = audit.append(tx, actor="me", action="a", subject="s")
        second = audit.append(tx, actor="me", action="b", subject="s")
    with chain.ledger.read() as tx:
        assert tx.require(AuditEvent, 8).previous_hash == tx.require(AuditEvent, 7).hash == first
    assert audit.head_file(chain.home).read_text() == f"8 {second}\n"
    assert _faults(chain) == []


@pytest.mark.parametrize("column", ["actor", "action", "subject"])
def test_an_altered_event_is_named(chain: Store, column: str) -> None:
    _change(chain, sa.update(EVENTS).where(EVENTS.c.number == 3).values(**{column: "x"}))
    (fault,) = _faults(chain)
    assert fault.startswith("event 3 (")
    assert fault.endswith("was altered")


def test_an_altered_event_with_a_fitting_hash_breaks_the_next_link(chain: Store) -> None:
    with chain.ledger.read() as tx:
        forged = tx.require(AuditEvent, 3).model_copy(update={"actor": "somebody else"})
    values = {"actor": forged.actor, "hash": audit.event_hash(forged)}
    _change(chain, sa.update(EVENTS).where(EVENTS.c.number == 3).values(**values))
    assert _faults(chain) == [
        "event 3 (test.read model 3) was altered",
        "event 4 does not follow the one before it: altered, removed or reordered",
    ]
    # Also with the key, for the operator who has it.
    (key,) = audit.read_keys(chain.home.keys / "audit-key").values()
    _change(chain, sa.update(EVENTS).where(EVENTS.c.number == 3).values(hash=audit.event_hash(forged, key)))
    assert _faults(chain) == ["event 4 does not follow the one before it: altered, removed or reordered"]


@pytest.mark.parametrize("column", ["details", "at"])
def test_an_event_that_cannot_even_be_read_is_named(chain: Store, column: str) -> None:
    _change(chain, sa.text(f"UPDATE audit_events SET {column} = 'rubbish' WHERE number = 6"))
    assert _faults(chain) == ["event 6 was altered: it cannot even be read"]
    with chain.ledger.begin() as tx:
        audit.append(tx, actor="me", action="a", subject="life goes on")
    assert _faults(chain) == ["event 6 was altered: it cannot even be read"]


@pytest.mark.parametrize(
    ("gone", "said"), [([3], "events 3 to 3"), ([1], "events 1 to 1"), ([2, 3, 4], "events 2 to 4")]
)
def test_removed_events_are_named(chain: Store, gone: list[int], said: str) -> None:
    _change(chain, sa.delete(EVENTS).where(EVENTS.c.number.in_(gone)))
    assert _faults(chain) == [f"{said} are missing"]


def test_removed_events_with_the_gap_closed_are_noticed(chain: Store) -> None:
    move_up = sa.update(EVENTS).where(EVENTS.c.number > 3).values(number=EVENTS.c.number - 1)
    _change(chain, sa.delete(EVENTS).where(EVENTS.c.number == 3), move_up)
    faults = _faults(chain)
    assert "event 3 does not follow the one before it: altered, removed or reordered" in faults
    assert [f for f in faults if f.startswith("event 3 (") and f.endswith("altered")]
    assert faults[-1].startswith("the chain was cut off: event 6")


def test_swapped_events_are_both_named(chain: Store) -> None:
    moves = [
        sa.update(EVENTS).where(EVENTS.c.number == old).values(number=new) for old, new in ((2, 99), (3, 2), (99, 3))
    ]
    _change(chain, *moves)
    faults = _faults(chain)
    assert [f[:8] for f in faults if f.endswith("was altered")] == ["event 2 ", "event 3 "]
    assert [f[:8] for f in faults if "does not follow" in f] == ["event 2 ", "event 3 ", "event 4 "]


def test_a_cut_off_end_is_named_and_never_forgotten(chain: Store) -> None:
    _change(chain, sa.delete(EVENTS).where(EVENTS.c.number >= 5))
    cut = ["the chain was cut off: event 6, anchored outside the database, is missing"]
    assert _faults(chain) == cut
    with chain.ledger.begin() as tx:
        audit.append(tx, actor="me", action="a", subject="s")
    assert _faults(chain) == cut
    for _ in range(3):
        with chain.ledger.begin() as tx:
            audit.append(tx, actor="me", action="a", subject="s")
    assert _faults(chain) == ["event 6 is not the one anchored outside the database"]


def test_everything_cut_off_is_named(chain: Store) -> None:
    _change(chain, sa.delete(EVENTS))
    assert _faults(chain) == ["the chain was cut off: event 6, anchored outside the database, is missing"]


def test_a_lost_or_broken_head_is_named(chain: Store) -> None:
    head = audit.head_file(chain.home)
    head.write_text("rubbish")
    assert "anchored outside the database" in _faults(chain)[0]
    head.unlink()
    assert "is missing, so a cut-off end cannot be ruled out" in _faults(chain)[0]
    audit.open_chain(chain.ledger)
    assert "is missing" in _faults(chain)[0]
    audit.write_head(chain.ledger)
    assert _faults(chain) == []


def test_a_head_that_lags_after_a_crash_is_no_fault_and_catches_up(chain: Store) -> None:
    head = audit.head_file(chain.home)
    with chain.ledger.read() as tx:
        head.write_text(f"5 {tx.require(AuditEvent, 5).hash}\n")
    assert _faults(chain) == []
    audit.write_head(chain.ledger)
    assert head.read_text().startswith("6 ")


def test_a_head_that_cannot_be_written_is_an_error_and_the_event_stays(chain: Store) -> None:
    head = audit.head_file(chain.home)
    head.unlink()
    head.mkdir()
    with pytest.raises(UnavailableError, match="its events are recorded"), chain.ledger.begin() as tx:
        audit.append(tx, actor="me", action="a", subject="s")
    with chain.ledger.read() as tx:
        assert tx.count(AuditEvent) == 7


def test_details_have_to_be_json(chain: Store) -> None:
    with chain.ledger.begin() as tx:
        with pytest.raises(ContractError, match="cannot be stored"):
            audit.append(tx, actor="me", action="a", subject="s", details={"x": float("nan")})
        with pytest.raises(ContractError, match="cannot be stored"):
            audit.append(tx, actor="me", action="a", subject="s", details={"at": utc_now()})
    with pytest.raises(ContractError, match="cannot write"), chain.ledger.read() as tx:
        audit.append(tx, actor="me", action="a", subject="s")
    assert _faults(chain) == []


APPEND = """
import sys
from pathlib import Path
from records import audit
from records.settings import RecordsSettings
from records.store import open_store
store = open_store(RecordsSettings(home=Path(sys.argv[1])))
for number in range(40):
    with store.ledger.begin() as tx:
        audit.append(tx, actor=sys.argv[2], action="a", subject=str(number))
"""


def test_several_processes_make_one_chain_with_the_head_at_its_end(
    store: Store, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    started = [run_python(APPEND, store.home.root, n) for n in range(2)]
    while any(process.poll() is None for process in started):
        assert _faults(store) == []
        time.sleep(0.1)
    assert [process.communicate()[1] for process in started] == ["", ""]
    assert _faults(store) == []
    assert audit.head_file(store.home).read_text().startswith("80 ")
