"""Whoever can write to the database, or to everything but the second store, cannot make a chain that `verify` accepts.

Each test does what somebody with that access can do, with SQL and files, and expects to be found out by name.
"""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem

from cluster.cli import run as run_command
from records import audit
from records.anchor import Head, write_head
from records.backup import back_up, restore
from records.errors import ConfigError, IntegrityError, UnavailableError
from records.ids import utc_now
from records.ledger import open_ledger
from records.ledger.tables import TABLES
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent

EVENTS = TABLES[AuditEvent]


def add_events(store: Store, number: int = 1) -> None:
    for at in range(number):
        with store.ledger.begin() as tx:
            audit.append(tx, actor="me", action="test.done", subject=f"thing {at}")


@pytest.fixture
def anchored(tmp_path: Path) -> Store:
    """A store with five events, whose heads are also in an append-only log."""
    (tmp_path / "mount").mkdir()
    store = open_store(RecordsSettings(home=tmp_path / "home", audit_anchor=f"file://{tmp_path}/mount"))
    add_events(store, 5)
    return store


def faults_of(store: Store) -> str:
    return "; ".join(audit.verify(store.ledger, store.home))


def anchor_faults(store: Store) -> str:
    return "; ".join(audit.verify_anchor(store.ledger)[0])


def events_of(store: Store) -> list[AuditEvent]:
    with store.ledger.read() as tx:
        return tx.find(AuditEvent, order_by=("number",))


def insert(store: Store, event: AuditEvent) -> None:
    with store.ledger.engine.begin() as connection:
        connection.execute(sa.insert(EVENTS), event.model_dump(mode="python"))


def key_of(store: Store) -> tuple[str, bytes]:
    return list(audit.read_keys(store.home.keys / "audit-key").items())[-1]


def rewrite(store: Store, events: list[AuditEvent], key_id: str | None, key: bytes | None) -> None:
    """Replace the chain by these events, with fitting numbers, links and hashes."""
    with store.ledger.engine.begin() as connection:
        connection.execute(sa.delete(EVENTS))
    previous = audit.GENESIS
    for number, event in enumerate(events, start=1):
        changed = event.model_copy(update={"number": number, "previous_hash": previous, "key_id": key_id})
        changed = changed.model_copy(update={"hash": audit.event_hash(changed, key)})
        insert(store, changed)
        previous = changed.hash


def forged(store: Store, key_id: str | None, key: bytes | None) -> AuditEvent:
    last = events_of(store)[-1]
    event = AuditEvent(
        number=last.number + 1,
        at=utc_now(),
        actor="admin",
        action="model.champion",
        subject="mine",
        previous_hash=last.hash,
        hash="",
        key_id=key_id,
    )
    return event.model_copy(update={"hash": audit.event_hash(event, key)})


def test_an_event_appended_by_sql_is_found_however_it_is_hashed(anchored: Store) -> None:
    key_id, _ = key_of(anchored)
    event_6 = r"event 6 \(model.champion mine\) "
    for event, said in (
        (forged(anchored, None, None), event_6 + "is not keyed: it was written outside Relook"),
        (forged(anchored, key_id, None), event_6 + "was altered"),
        (forged(anchored, key_id, b"a key of the attacker, of whatever length"), event_6 + "was altered"),
        (
            forged(anchored, "f" * 16, b"a key of the attacker"),
            event_6 + "is keyed with f+, which is not among the keys",
        ),
    ):
        assert not faults_of(anchored)
        insert(anchored, event)
        with pytest.raises(IntegrityError, match=said):
            raise IntegrityError(faults_of(anchored))
        with anchored.ledger.engine.begin() as connection:
            connection.execute(sa.delete(EVENTS).where(EVENTS.c.number == 6))


def test_events_that_follow_a_forged_one_do_not_hide_it(anchored: Store) -> None:
    insert(anchored, forged(anchored, None, None))
    add_events(anchored, 3)
    assert "event 6 (model.champion mine) is not keyed" in faults_of(anchored)
    # A forged rotation would put the attacker's key in force: nothing is appended then, and the reason is said.
    key_id, _ = key_of(anchored)
    insert(anchored, forged(anchored, key_id, None).model_copy(update={"action": audit.ROTATED, "subject": "e" * 16}))
    with pytest.raises(ConfigError, match="needs the key eeeeeeeeeeeeeeee, which is not in"):
        add_events(anchored)


def test_a_replaced_middle_and_a_replaced_chain_with_plain_hashes_are_found(anchored: Store) -> None:
    events = events_of(anchored)
    with anchored.ledger.engine.begin() as connection:
        for number in (3, 4, 5):
            connection.execute(sa.delete(EVENTS).where(EVENTS.c.number == number))
    insert(anchored, forged(anchored, None, None))
    assert "event 3 (model.champion mine) is not keyed" in faults_of(anchored)
    rewrite(anchored, [*events[:2], events[4]], None, None)
    found = faults_of(anchored)
    assert "events up to 3 are not keyed and no event vouches for them" in found
    assert "event 5, anchored outside the database, is missing" in found


def test_events_put_into_the_database_of_a_new_home_are_never_vouched_for(tmp_path: Path) -> None:
    settings = RecordsSettings(home=tmp_path)
    with closing(open_store(settings)) as store:
        first = AuditEvent(
            number=1, at=utc_now(), actor="a", action="a", subject="s", previous_hash=audit.GENESIS, hash=""
        )
        insert(store, first.model_copy(update={"hash": audit.event_hash(first)}))
        assert "events up to 1 are not keyed" in faults_of(store)
    for _ in range(2):
        with closing(open_store(settings)) as store:
            assert "events up to 1 are not keyed" in faults_of(store)
            add_events(store)
            assert "events up to 1 are not keyed" in faults_of(store)


def test_a_chain_from_before_there_were_keys_still_verifies_and_is_said_to_be_unkeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RecordsSettings(home=tmp_path)
    with closing(open_ledger(sa.URL.create("sqlite", database=str(tmp_path / "ledger.db")))) as old:
        for at in range(4):
            with old.begin() as tx:
                digest = audit.append(tx, actor="me", action="old", subject=str(at))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "audit-head").write_text(f"4 {digest}\n")
    with closing(open_store(settings)) as store:
        assert not faults_of(store)
        assert [event.action for event in events_of(store)] == ["old"] * 4 + [audit.KEYED]
        assert audit.num_unkeyed(store.ledger) == 4
        add_events(store)
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path))
    assert run_command(["audit", "verify"]) == 0
    assert "unkeyed up to event 4" in capsys.readouterr().out
    with closing(open_store(settings)) as store:
        assert len(events_of(store)) == 6  # opening again vouches for nothing more
        with store.ledger.engine.begin() as connection:
            connection.execute(sa.update(EVENTS).where(EVENTS.c.number == 2).values(actor="somebody"))
        assert "event 2 (old 1) was altered" in faults_of(store)


def test_a_rotated_key_is_recorded_and_earlier_events_still_verify(anchored: Store) -> None:
    before, _ = key_of(anchored)
    after = audit.rotate_key(anchored.ledger, actor="uid 0")
    add_events(anchored, 2)
    assert (anchored.home.keys / "audit-key").stat().st_mode & 0o777 == 0o600
    assert [event.key_id for event in events_of(anchored)] == [before] * 6 + [after] * 2
    assert not faults_of(anchored)
    assert not anchor_faults(anchored)
    # The old key is out of force: an event under it is found.
    insert(anchored, forged(anchored, before, audit.read_keys(anchored.home.keys / "audit-key")[before]))
    assert f"is keyed with {before}, and {after} was in force" in faults_of(anchored)


def test_a_rotation_that_was_killed_or_prepared_by_hand_is_finished_by_the_next(anchored: Store) -> None:
    keys = anchored.home.keys / "audit-key"
    with keys.open("a") as file:
        file.write("0123456789abcdef" * 4 + "\n")
    add_events(anchored)
    assert not faults_of(anchored)  # nothing changes before the rotation is recorded
    waiting = list(audit.read_keys(keys))[-1]
    assert audit.rotate_key(anchored.ledger, actor="uid 0") == waiting
    add_events(anchored)
    assert events_of(anchored)[-1].key_id == waiting
    assert len(audit.read_keys(keys)) == 2
    assert not faults_of(anchored)


def test_without_its_key_nothing_is_recorded_and_the_other_home_is_named(anchored: Store, tmp_path: Path) -> None:
    other = RecordsSettings(home=tmp_path / "other", database=anchored.ledger.url)
    named = r"needs the key [0-9a-f]{16}, which is not in .*records.audit_key_file"
    with closing(open_store(other)) as second, pytest.raises(ConfigError, match=named):
        add_events(second)
    shared = other.model_copy(update={"audit_key_file": anchored.home.keys / "audit-key"})
    with closing(open_store(shared)) as second:
        add_events(second)
    assert not faults_of(anchored)
    (anchored.home.keys / "audit-key").write_text("short\n")
    with pytest.raises(ConfigError, match="at least 32 characters"):
        add_events(anchored)


def rewritten_end(store: Store) -> None:
    """The operator, who has key and head, takes two events back."""
    rewrite(store, events_of(store)[:3], *key_of(store))


def changed_middle(store: Store) -> None:
    events = events_of(store)
    events[2] = events[2].model_copy(update={"actor": "somebody else"})
    rewrite(store, events, *key_of(store))


def swapped(store: Store) -> None:
    with store.ledger.engine.begin() as connection:
        for old, new in ((2, 99), (3, 2), (99, 3)):
            connection.execute(sa.update(EVENTS).where(EVENTS.c.number == old).values(number=new))


def rekeyed(store: Store) -> None:
    (store.home.keys / "audit-key").write_text("a new key of the operator, 64 characters or so" + "\n")
    rewrite(store, events_of(store), *key_of(store))


def forked(store: Store) -> None:
    rewrite(store, events_of(store)[:4], *key_of(store))
    (store.home.keys / "audit-head").unlink()
    audit.write_head(store.ledger)
    add_events(store)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (rewritten_end, "the chain ends at event 3, and event 5 is anchored: its end was cut off"),
        (changed_middle, "event 3 (and 2 more) was replaced: it is not the event that was anchored"),
        (swapped, "event 2 (and 1 more) was reordered: the anchored event now has the number 3"),
        (rekeyed, "event 1 (and 4 more) was re-keyed: it was keyed with"),
        (forked, "the chain was forked: 2 heads with the number 5 are anchored"),
    ],
)
def test_what_an_operator_with_key_and_head_does_is_found_by_the_anchor(
    anchored: Store, does: Callable[[Store], None], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert not anchor_faults(anchored)
    does(anchored)
    (anchored.home.keys / "audit-head").unlink()
    audit.write_head(anchored.ledger)
    if does is not swapped:  # of which the chain itself knows
        assert not faults_of(anchored)
    assert said in anchor_faults(anchored)
    monkeypatch.setenv("RELOOK_HOME", str(anchored.home.root))
    monkeypatch.setenv("RELOOK_RECORDS__AUDIT_ANCHOR", str(anchored.settings.audit_anchor))
    assert run_command(["audit", "verify", "--anchor", "--json"]) == 1
    assert said in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_restored_backup_is_whole_and_the_anchor_knows_what_it_lost(anchored: Store, tmp_path: Path) -> None:
    back_up(anchored, tmp_path / "backup")
    add_events(anchored, 2)
    settings = anchored.settings.model_copy(update={"home": tmp_path / "restored"})
    restore(tmp_path / "backup", settings)
    with closing(open_store(settings)) as restored:
        assert not faults_of(restored)
        assert "the chain ends at event 5, and event 7 is anchored" in anchor_faults(restored)
        assert "older backup was restored" in anchor_faults(restored)


def test_heads_in_an_object_store_are_objects_that_are_never_written_again(tmp_path: Path) -> None:
    url = "memory://locked/relook"
    with closing(open_store(RecordsSettings(home=tmp_path, audit_anchor=url))) as store:
        try:
            add_events(store, 3)
            assert len(MemoryFileSystem().find("/locked/relook")) == 3
            with store.ledger.read() as tx:
                last = tx.require(AuditEvent, 3)
            before = MemoryFileSystem().modified(MemoryFileSystem().find("/locked/relook")[-1])
            write_head(url, Head(3, last.hash, last.key_id))
            assert MemoryFileSystem().modified(MemoryFileSystem().find("/locked/relook")[-1]) == before
            assert audit.verify_anchor(store.ledger) == ([], 3)
            rewritten_end(store)
            with store.ledger.engine.begin() as connection:
                connection.execute(sa.delete(EVENTS).where(EVENTS.c.number == 3))
            assert "event 3 is anchored" in anchor_faults(store)
        finally:
            MemoryFileSystem.store.clear()


def test_an_append_only_log_takes_heads_and_gives_none_up(anchored: Store, tmp_path: Path) -> None:
    log = tmp_path / "mount" / "relook-audit-heads.log"
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+a", log], capture_output=True, check=False).returncode
    ):
        pytest.skip("no append-only files here: chattr +a needs root and a file system that has them")
    try:
        add_events(anchored)
        assert audit.verify_anchor(anchored.ledger) == ([], 6)
        heads = log.read_bytes()
        attacks: list[Callable[[], object]] = [
            log.unlink, lambda: log.write_bytes(b""), lambda: os.truncate(log, 9), lambda: log.rename(tmp_path / "x"),
        ]  # fmt: skip
        for attack in attacks:
            with pytest.raises(PermissionError):
                attack()
        assert log.read_bytes() == heads
    finally:
        subprocess.run(["chattr", "-a", log], check=True)


def test_an_anchor_that_is_away_delays_nothing_and_is_caught_up(
    anchored: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = tmp_path / "mount"
    mount.rename(tmp_path / "unplugged")
    mount.write_text("")
    (tmp_path / "mount").unlink()
    (tmp_path / "mount").symlink_to("/nowhere/at/all")
    with caplog.at_level(logging.WARNING):
        add_events(anchored)
    assert "event 6 of the audit chain is not anchored" in caplog.text
    mount.unlink()
    (tmp_path / "unplugged").rename(mount)
    log = mount / "relook-audit-heads.log"
    log.write_bytes(log.read_bytes() + b"6 0123ab")  # a line that a power cut tore
    add_events(anchored)
    assert audit.verify_anchor(anchored.ledger) == ([], 7)
    log.write_text(log.read_text() + "all is well\n")
    assert "is not a head: somebody else wrote to it" in anchor_faults(anchored)
    log.unlink()
    assert "no head is anchored" in anchor_faults(anchored)


def test_the_anchor_has_to_be_named_and_a_relative_key_file_is_refused(tmp_path: Path) -> None:
    with closing(open_store(RecordsSettings(home=tmp_path))) as store, pytest.raises(ConfigError, match="audit_anchor"):
        audit.verify_anchor(store.ledger)
    with pytest.raises(ValueError, match="is a relative path; use an absolute one"):
        RecordsSettings(audit_key_file=Path("keys.txt"))
    nowhere = RecordsSettings(home=tmp_path / "home", audit_key_file=tmp_path / "no" / "key")
    with pytest.raises(UnavailableError, match="see that its folder is there"):
        open_store(nowhere)
