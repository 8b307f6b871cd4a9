"""Registered models: which bundles the ledger knows, which of them serves, and lookup by name.

What the files of a bundle hold is in `records.bundles`.
"""

from pathlib import Path

from records.bundles import DOCUMENT, Bundle, read_bundle
from records.cursors import set_position
from records.errors import ContractError, IntegrityError, RefusedError, UnknownIdError
from records.ids import utc_now
from records.incidents import require_not_blocked
from records.ledger import Transaction
from records.store import Store
from records.types import Cursor, ModelRecord, ModelStatus, Rollout, RolloutStage

SERVED = (ModelStatus.CHAMPION, ModelStatus.PROVISIONAL)
UNDER_WAY = (RolloutStage.SHADOW, RolloutStage.CANARY)
ROLES = ("champion", "candidate")
_GENERATION = "serving.generation"


def register(
    tx: Transaction, bundle: Bundle, *, status: ModelStatus = ModelStatus.REGISTERED, round_number: int | None = None
) -> None:
    """Add a bundle to the ledger, in a write transaction; one that is registered already stays as it is.

    `round_number` is the round that made it, None if no round did.
    """
    if tx.get(ModelRecord, bundle.id) is not None:
        return
    now = utc_now()
    tx.add(
        ModelRecord(
            id=bundle.id,
            created_at=now,
            status=status,
            status_changed_at=now,
            path=str(bundle.path),
            architecture=bundle.document.architecture.name,
            dataset_id=bundle.document.dataset_id,
            taxonomy_hash=bundle.document.taxonomy_hash,
            round=round_number,
        )
    )


def serving_model(tx: Transaction) -> ModelRecord | None:
    """Return the model that serves, champion or provisional; None before the first promotion.

    IntegrityError is raised if more than one model has such a status.
    """
    found = tx.find(ModelRecord, where={"status": SERVED})
    if len(found) > 1:
        names = ", ".join(record.id[:12] for record in found)
        raise IntegrityError(f"{len(found)} models have the status of a serving model ({names}); promote one of them")
    return found[0] if found else None


def serving_id(tx: Transaction) -> str | None:
    """Return the id of the model that serves, or None; of any one if several have such a status."""
    found = tx.find(ModelRecord, where={"status": SERVED}, order_by=("id",), limit=1)
    return found[0].id if found else None


def current_rollout(tx: Transaction) -> Rollout | None:
    """Return the rollout in progress, or None."""
    found = tx.find(Rollout, where={"stage": list(UNDER_WAY)}, order_by=("-id",), limit=1)
    return found[0] if found else None


def generation(tx: Transaction) -> int:
    """Return the number of changes so far of which model serves and of a rollout's stage or traffic share.

    Replicas that follow the ledger compare it: clocks of machines differ, and a model may serve a second time.
    """
    found = tx.get(Cursor, _GENERATION)
    return 0 if found is None else int(found.position["number"])


def advance_generation(tx: Transaction) -> None:
    """Count a change, in the write transaction that makes it."""
    before = generation(tx)
    position = {"number": before + 1}
    set_position(tx, _GENERATION, position)


def serve_model(tx: Transaction, model_id: str, status: ModelStatus, *, replaces: str | None) -> None:
    """Make a registered model the one that serves and retire the one before, in one write transaction.

    Args:
        tx: a write transaction.
        model_id: id of a registered model.
        status: champion, or provisional for one below the sensitivity floors.
        replaces: id of the model that the caller decided to replace; None if none served then.
    Raises:
        ContractError: the status is not one that serves.
        RefusedError: another model than `replaces` serves, a rollout is in progress, or an incident blocks the model.
        UnknownIdError: the model is not registered.
    """
    if status not in SERVED:
        raise ContractError(f"a model that is {status} does not serve; use champion or provisional")
    _require_no_rollout(tx)
    require_not_blocked(tx, model_id)
    now = utc_now()
    served = tx.find(ModelRecord, where={"status": SERVED})
    # What the caller compared with may have been replaced meanwhile: gates and loading take seconds to minutes.
    serves_as_expected = any(record.id == replaces for record in served) if served else replaces is None
    if not serves_as_expected:
        raise RefusedError(f"{_serves(served)}, and not the model that {model_id[:12]} was to replace; look again")
    changes: dict[str, object] = {}
    if all(before.id != model_id for before in served):
        before = next((record for record in served if record.id == replaces), None)
        changes = {"replaced_id": replaces, "replaced_status": before.status if before else None}
    # In the same transaction, so there is never a moment with two serving models or none.
    for record in served:
        if record.id != model_id:
            tx.update(ModelRecord, record.id, status=ModelStatus.RETIRED, status_changed_at=now)
    tx.update(ModelRecord, model_id, status=status, status_changed_at=now, **changes)
    advance_generation(tx)


def return_to(tx: Transaction, model_id: str, back_to: str) -> None:
    """Refuse the model that serves and let the one that it replaced serve again; see `require_returnable`."""
    served, now = require_returnable(tx, model_id, back_to), utc_now()
    tx.update(ModelRecord, model_id, status=ModelStatus.REFUSED, status_changed_at=now)
    tx.update(ModelRecord, back_to, status=served.replaced_status, status_changed_at=now)
    advance_generation(tx)


def require_returnable(tx: Transaction, model_id: str, back_to: str) -> ModelRecord:
    """Return the model that serves if the one that it replaced may serve again.

    Args:
        tx: any transaction.
        model_id: id of the model to take away.
        back_to: id of the model that it replaced.
    Returns:
        The record of `model_id`.
    Raises:
        RefusedError: another model serves, it replaced another model or none, that model's status has changed since,
            or a rollout is in progress.
        UnknownIdError: `back_to` is not registered.
    """
    _require_no_rollout(tx)
    served = serving_model(tx)
    if served is None or served.id != model_id:
        raise RefusedError(f"{_serves([served] if served else [])}, and not {model_id[:12]}; nothing was undone")
    if served.replaced_id is None or served.replaced_status is None:
        raise RefusedError(
            f"model {model_id[:12]} replaced no model, so there is none to return to; promote another one"
        )
    if served.replaced_id != back_to:
        raise RefusedError(f"model {model_id[:12]} replaced {served.replaced_id[:12]}, and not {back_to[:12]}")
    before = tx.require(ModelRecord, back_to)
    require_not_blocked(tx, back_to)
    # Refused by a later undo, or a candidate again: then it has to pass the gate like any other model.
    if before.status is not ModelStatus.RETIRED:
        raise RefusedError(f"model {back_to[:12]} is {before.status} by now; promote it with `relook promote`")
    return served


def _require_no_rollout(tx: Transaction) -> None:
    # Its guardrails compare the candidate with the champion that it began with.
    running = current_rollout(tx)
    if running is not None:
        raise RefusedError(
            f"rollout {running.id} of model {running.candidate_id[:12]} is in progress; promote or roll it back first"
        )


def _serves(served: list[ModelRecord]) -> str:
    return f"model {served[0].id[:12]} serves now" if served else "no model serves now"


def find_bundle(store: Store, name: str) -> Bundle:
    """Return the bundle that a user named: `champion`, `candidate`, an id prefix of 8 or more characters, or a path.

    A name that fits nothing, or more than one bundle, raises UnknownIdError; an altered bundle IntegrityError.
    """
    if "/" in name or (Path(name) / DOCUMENT).is_file():
        return read_bundle(Path(name))
    return registered_bundle(store, find_model(store, name))


def named_bundle(store: Store, name: str) -> Bundle:
    """Return the bundle that a user named, for verbs that change which model serves; see `find_bundle`.

    A role raises RefusedError: which model has it may change between a look and the verb.
    """
    _refuse_role(store, name)
    return find_bundle(store, name)


def named_model(store: Store, name: str) -> ModelRecord:
    """Return the registered model that a user named by its id; a role is refused, as by `named_bundle`."""
    _refuse_role(store, name)
    return find_model(store, name)


def _refuse_role(store: Store, name: str) -> None:
    if name in ROLES:
        found = find_model(store, name)
        raise RefusedError(f"{name} is model {found.id[:12]} now, and soon perhaps another; name the model by its id")


def find_model(store: Store, name: str) -> ModelRecord:
    """Return the registered model that a user named: `champion`, `candidate`, or an id prefix of 8 or more characters.

    Its bundle is not opened. A name that fits nothing, or more than one model, raises UnknownIdError.
    """
    with store.ledger.read() as tx:
        if name == "champion":
            current = serving_model(tx)
            found = [current] if current else []
        elif name == "candidate":
            found = tx.find(ModelRecord, where={"status": ModelStatus.CANDIDATE})
        else:
            found = [r for r in tx.find(ModelRecord) if len(name) >= 8 and r.id.startswith(name)]
    if len(found) != 1:
        problem = "no model is" if not found else f"{len(found)} models are"
        raise UnknownIdError(
            f"{problem} called {name!r}; give an id prefix of 8 or more characters, a bundle's path, "
            "champion or candidate (`relook models` lists them)"
        )
    return found[0]


def registered_bundle(store: Store, record: ModelRecord) -> Bundle:
    """Open the bundle of a registered model and check it; see `read_bundle`."""
    return read_bundle(bundle_folder(store, record), expected_id=record.id)


def bundle_folder(store: Store, record: ModelRecord) -> Path:
    """Return the folder of a registered model: in the home if it is there, else where it was written."""
    # A home that was moved or restored elsewhere brought its bundles along, and the recorded path is stale.
    at_home = store.home.bundles / record.id
    return at_home if at_home.is_dir() else Path(record.path)
