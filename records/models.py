"""Registered models: which bundles the ledger knows, which of them serves, and lookup by name.

What the files of a bundle hold is in `records.bundles`.
"""

from pathlib import Path

from records.bundles import DOCUMENT, Bundle, read_bundle
from records.errors import ContractError, IntegrityError, UnknownIdError
from records.ids import utc_now
from records.ledger import Transaction
from records.store import Store
from records.types import ModelRecord, ModelStatus

SERVED = (ModelStatus.CHAMPION, ModelStatus.PROVISIONAL)


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


def serve_model(tx: Transaction, model_id: str, status: ModelStatus) -> None:
    """Make a registered model the one that serves and retire the one before, in one write transaction.

    Args:
        tx: a write transaction.
        model_id: id of a registered model.
        status: champion, or provisional for one below the sensitivity floors.
    Raises:
        ContractError: the status is not one that serves.
        UnknownIdError: the model is not registered.
    """
    if status not in SERVED:
        raise ContractError(f"a model that is {status} does not serve; use champion or provisional")
    now = utc_now()
    # In the same transaction, so there is never a moment with two serving models or none.
    for before in tx.find(ModelRecord, where={"status": SERVED}):
        if before.id != model_id:
            tx.update(ModelRecord, before.id, status=ModelStatus.RETIRED, status_changed_at=now)
    tx.update(ModelRecord, model_id, status=status, status_changed_at=now)


def find_bundle(store: Store, name: str) -> Bundle:
    """Return the bundle that a user named: `champion`, `candidate`, an id prefix of 8 or more characters, or a path.

    A name that fits nothing, or more than one bundle, raises UnknownIdError; an altered bundle IntegrityError.
    """
    if "/" in name or (Path(name) / DOCUMENT).is_file():
        return read_bundle(Path(name))
    return registered_bundle(store, find_model(store, name))


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
