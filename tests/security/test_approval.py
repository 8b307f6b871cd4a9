"""A second person is somebody with another key: not another user name, not another name of the same key."""

from typing import Any

import numpy as np
import pytest

from cluster.cli import run as run_command
from cluster.promotion import caller_of, name_of, promote_model
from cluster.round import run_round
from cluster.settings import RoundSettings, Settings
from records import audit
from records.bundles import Bundle, BundleDocument, write_bundle
from records.errors import AccessError, RefusedError
from records.ids import new_id, utc_now
from records.models import register
from records.store import Store
from records.types import AuditEvent, RoundRecord, Scope
from serving.access.keys import LOCAL, admin_token, create_key, revoke_key
from tests.records.conftest import arrays, document

__all__ = ["arrays", "document"]

CLINICAL = Settings(round=RoundSettings(approval="person"))


def make_key(store: Store, name: str, *scopes: Scope, actor: str = "relook keys") -> tuple[str, str]:
    key, token = create_key(store, name=name, organisation="clinic", scopes=scopes, actor=actor)
    return key.id, token


@pytest.fixture
def requester(store: Store) -> tuple[str, str]:
    """Id and token of the key that starts rounds; its bearer may approve, too, but not their own."""
    return make_key(store, "anna", Scope.ADMIN, Scope.APPROVE)


@pytest.fixture
def bundle(
    store: Store,
    requester: tuple[str, str],
    document: BundleDocument,
    arrays: dict[str, dict[str, np.ndarray[Any, Any]]],
) -> Bundle:
    """A model of round 1, which the requester's key started."""
    made = write_bundle(store, document, arrays["weights"], arrays["golden"])
    record = RoundRecord(id=new_id(), number=1, started_at=utc_now(), seed=0, settings_hash="")
    with store.ledger.begin() as tx:
        register(tx, made, round_number=1)
        tx.add(record)
        audit.append(tx, actor=f"key {requester[0]}", action="round.started", subject=record.id)
    return made


def approve(store: Store, bundle: Bundle, token: str | None) -> dict[str, Any]:
    return promote_model(store, CLINICAL, bundle.id, provisional=True, caller=caller_of(store, token))


def test_another_user_name_approves_nothing(store: Store, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ben", "root", "key 0123456789abcdef"):
        for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.setenv(variable, name)
        with pytest.raises(RefusedError, match="needs somebody's key with the scope approve in RELOOK_KEY"):
            approve(store, bundle, None)
    with pytest.raises(AccessError, match="approve"):
        promote_model(store, CLINICAL, bundle.id, provisional=True, caller=LOCAL)


def test_the_key_that_started_the_round_does_not_approve_it_under_any_name(
    store: Store, bundle: Bundle, requester: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ben")
    with pytest.raises(RefusedError, match=rf"key {requester[0]} started the round .* somebody else has to promote"):
        approve(store, bundle, requester[1])
    # A second key that the requester made for the purpose is theirs.
    _, own = make_key(store, "ben", Scope.APPROVE, actor=f"key {requester[0]}")
    with pytest.raises(RefusedError, match="with a key that is their own"):
        approve(store, bundle, own)


def test_who_holds_a_key_without_the_scope_or_one_that_ended_does_not_approve(store: Store, bundle: Bundle) -> None:
    for scopes in ((Scope.PREDICT, Scope.FLAG), (Scope.REVIEW, Scope.AUDIT)):
        _, token = make_key(store, "carl", *scopes)
        with pytest.raises(AccessError, match="approve"):
            approve(store, bundle, token)
    revoked, token = make_key(store, "dora", Scope.APPROVE)
    revoke_key(store, revoked, actor="test")
    with pytest.raises(AccessError, match="unknown, expired or revoked"):
        approve(store, bundle, token)
    with pytest.raises(AccessError, match="unknown, expired or revoked"):
        approve(store, bundle, f"rlk_{revoked}_guessed")
    # The administrator's key of the home can be read by whoever runs rounds on this machine.
    with pytest.raises(RefusedError, match="needs somebody's key"):
        approve(store, bundle, admin_token(store.home))


def test_somebody_with_another_key_approves_and_is_recorded_by_it(store: Store, bundle: Bundle) -> None:
    key_id, token = make_key(store, "ben", Scope.APPROVE)
    assert approve(store, bundle, token)["by"] == f"key {key_id}"
    with store.ledger.read() as tx:
        (event,) = tx.find(AuditEvent, where={"action": "model.provisional"})
    assert event.actor == f"key {key_id}"
    assert audit.verify(store.ledger, store.home) == []


def test_a_round_that_needs_a_second_person_is_started_with_a_key(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RefusedError, match="a round is started with a key; put one into RELOOK_KEY"):
        run_round(store, CLINICAL, started_by="anna")
    monkeypatch.setenv("RELOOK_HOME", str(store.home.root))
    monkeypatch.delenv("RELOOK_KEY", raising=False)
    monkeypatch.setenv("LOGNAME", "key 0123456789abcdef")
    for arguments in (["round"], ["round", "--watch"]):
        assert run_command([*arguments, "--preset", "clinical"]) == 2
        assert "a round is started with a key" in capsys.readouterr().err


def test_the_actor_without_a_key_is_the_user_of_the_process_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = set()
    for name in ("ben", "carl"):
        monkeypatch.setenv("LOGNAME", name)
        monkeypatch.setenv("USER", name)
        names.add(name_of(None))
    assert len(names) == 1
    assert not names & {"ben", "carl"}
