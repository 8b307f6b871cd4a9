"""Promotion by a person: through the gate, as provisional without it, or against it with a reason.

The actor is the bearer of the key in RELOOK_KEY, else the user of this machine. With `round.approval` set to
`person`, a model is promoted with a key that has the scope `approve` and is another one than the round was started
with: the name of a user proves nothing, since the environment may set it. Every promotion is audited and writes a
change record.
"""

import os
import pwd
from typing import Any

from cluster.gate import GateReport, Verdict
from cluster.gate.run import run_gate
from cluster.provenance import write_change_record
from cluster.settings import Settings
from records import audit
from records.bundles import Bundle
from records.datasets import load_dataset
from records.errors import RefusedError
from records.ledger import Transaction
from records.models import named_bundle, register, serve_model, serving_id
from records.store import Store
from records.types import AuditEvent, DatasetRecord, ModelRecord, ModelStatus, RoundRecord, Scope
from serving.access.keys import ADMIN_ID, Caller, KeyRing
from trainers.tracking.server import Tracked

KEY_VARIABLE = "RELOOK_KEY"


def promote_model(
    store: Store,
    settings: Settings,
    name: str,
    *,
    provisional: bool = False,
    forced_because: str | None = None,
    caller: Caller | None = None,
) -> dict[str, Any]:
    """Let a model serve; a running service loads it within seconds.

    Args:
        store: with ledger and bundles.
        settings: `gate` has the margins, `round.approval` says who may promote.
        name: id prefix or bundle path.
        provisional: serve it without running the gate; API and page say `provisional`.
        forced_because: promote it against the gate, for this reason.
        caller: the bearer of a key; forcing needs one with the scope `admin`, `round.approval: person` one with
            `approve`.
    Returns:
        `model_id`, `status`, `replaces`, `by`, `forced`, and of the gate, if it was run, its report and `dataset_id`.
    Raises:
        RefusedError: the gate does not promote it, the reason is empty, a second person is needed, another model
            began to serve meanwhile, or a rollout is in progress.
        AccessError: it is forced without the scope `admin`, or approved without the scope `approve`.
        UnknownIdError: there is no such model.
    """
    person = name_of(caller)
    bundle = named_bundle(store, name)
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {bundle.id[:12]}")
    if forced_because is not None:
        _require_right_to_force(forced_because, caller)
    # Also for provisional and forced promotions: otherwise they would be a way around the second person.
    if settings.round.approval == "person":
        _require_second_person(store, bundle, caller)
    # Before the gate, which takes minutes: the model to replace is the one that it compares with.
    with store.ledger.read() as tx:
        replaces = serving_id(tx)
    dataset_id = None if provisional else _newest_dataset(store)
    report = None if dataset_id is None else _run_gate(store, settings, bundle, dataset_id)
    if report is not None and report.verdict is not Verdict.PROMOTE and forced_because is None:
        raise RefusedError(f"the gate says {report.verdict}: {report.why}")
    status = ModelStatus.PROVISIONAL if provisional else ModelStatus.CHAMPION
    details: dict[str, Any] = {"replaces": replaces, "dataset_id": dataset_id}
    if report is not None:
        details |= {"verdict": report.verdict, "balanced_accuracy": report.balanced_accuracy}
    if forced_because is not None:
        details["forced_because"] = forced_because
    # One transaction: the service must not see a promotion that the audit does not have.
    with store.ledger.begin() as tx:
        register(tx, bundle)
        serve_model(tx, bundle.id, status, replaces=replaces)
        audit.append(tx, actor=person, action=f"model.{status}", subject=bundle.id, details=details)
    # After the commit: a record without its promotion would be wrong, a missing one can be written again.
    write_change_record(store, bundle.id, report, person, forced_because=forced_because)
    track_aliases(store, settings, bundle.id)
    gate = report.model_dump(mode="json") if report else None
    facts = {"model_id": bundle.id, "status": status, "replaces": replaces, "dataset_id": dataset_id}
    return {**facts, "by": person, "forced": forced_because is not None, "gate": gate}


def track_aliases(store: Store, settings: Settings, model_id: str) -> None:
    """Let MLflow's aliases follow a promotion of a model, or its end."""
    with Tracked(settings.tracking, "promote", f"promote-{model_id[:12]}", {}) as tracked:
        tracked.aliases(store)


def caller_of(store: Store, token: str | None) -> Caller | None:
    """Return the bearer of a key, None without one; AccessError if the key is unknown, expired or revoked."""
    return KeyRing(store).caller(f"Bearer {token}") if token else None


def name_of(caller: Caller | None) -> str:
    """Return the actor for the audit: the key's id, else the user of this machine."""
    if caller is not None:
        return f"key {caller.id}"
    try:
        # Not getpass, which believes the environment.
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"  # a container may run as a user that has no name


def require_key_to_start(settings: Settings, started_by: str) -> None:
    """Refuse to start a round without a key where a second person has to approve: nobody could tell who the first is.

    RefusedError is raised if `round.approval` is `person` and `started_by` is no key, see `name_of`.
    """
    if settings.round.approval == "person" and not started_by.startswith("key "):
        raise RefusedError(
            f"round.approval is person, so a round is started with a key; put one into {KEY_VARIABLE} "
            "(`relook keys create` makes it)"
        )


def _newest_dataset(store: Store) -> str:
    with store.ledger.read() as tx:
        newest = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)
    if not newest:
        raise RefusedError("the gate needs a dataset version; import one, or use --provisional")
    return newest[0].id


def _run_gate(store: Store, settings: Settings, bundle: Bundle, dataset_id: str) -> GateReport:
    return run_gate(store, settings, bundle, load_dataset(store, dataset_id), actor="relook promote")


def _require_right_to_force(reason: str, caller: Caller | None) -> None:
    if not reason.strip():
        raise RefusedError("a forced promotion needs a reason for the audit; give --reason")
    # The user of the machine proves nothing about rights; a key with a scope does.
    if caller is None:
        raise RefusedError(f"a forced promotion needs a key with the scope admin; put it into {KEY_VARIABLE}")
    caller.require(Scope.ADMIN)


def _require_second_person(store: Store, bundle: Bundle, caller: Caller | None) -> None:
    # The home's own administrator key lies in a file of this machine: whoever runs rounds here can read it.
    if caller is None or caller.id == ADMIN_ID:
        raise RefusedError(
            f"round.approval is person, so a promotion needs somebody's key with the scope approve in {KEY_VARIABLE} "
            "(`relook keys create --scope approve` makes one)"
        )
    caller.require(Scope.APPROVE)
    with store.ledger.read() as tx:
        started_by = _started_by(tx, bundle)
        made = tx.find(AuditEvent, where={"action": "key.created", "subject": caller.id})
    if started_by is not None and started_by in (name_of(caller), *(event.actor for event in made)):
        raise RefusedError(
            f"{started_by} started the round that made model {bundle.id[:12]}, and round.approval is person; "
            "somebody else has to promote it, with a key that is their own"
        )


def _started_by(tx: Transaction, bundle: Bundle) -> str | None:
    """Return who started the round that made a model, None if no round did."""
    model = tx.get(ModelRecord, bundle.id)
    if model is None or model.round is None:
        return None
    rounds = tx.find(RoundRecord, where={"number": model.round}, limit=1)
    started = tx.find(AuditEvent, where={"action": "round.started", "subject": rounds[0].id}) if rounds else []
    return started[0].actor if started else None
