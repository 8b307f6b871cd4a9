"""Let a model answer by hand: through the gate, or plainly as provisional."""

from typing import Any

from cluster.gate import Verdict
from cluster.judging import judge
from cluster.settings import Settings
from records import audit
from records.bundles import find_bundle, register, serve_model
from records.datasets import load_dataset
from records.errors import RefusedError
from records.store import Store
from records.types import DatasetRecord, ModelStatus


def promote_model(store: Store, settings: Settings, name: str, *, provisional: bool) -> dict[str, Any]:
    """Let a model answer; a running service takes it up within seconds.

    Args:
        store: with ledger and bundles.
        settings: with the gate's margins.
        name: id prefix, bundle path or `candidate`.
        provisional: serve it without asking the gate; API and page say `provisional`.
    Returns:
        `model_id`, `status` and, if the gate was asked, its report.
    Raises:
        RefusedError: the gate does not promote it.
        UnknownIdError: there is no such model.
    """
    bundle = find_bundle(store, name)
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {bundle.id[:12]}")
    report = None
    if not provisional:
        with store.ledger.read() as tx:
            newest = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)
        if not newest:
            raise RefusedError("the gate needs a dataset version to judge on; import one, or use --provisional")
        report = judge(store, settings, bundle, load_dataset(store, newest[0].id), actor="relook promote")
        if report.verdict is not Verdict.PROMOTE:
            raise RefusedError(f"the gate says {report.verdict}: {report.why}")
    status = ModelStatus.PROVISIONAL if provisional else ModelStatus.CHAMPION
    with store.ledger.begin() as tx:
        register(tx, bundle)
        serve_model(tx, bundle.id, status)
        audit.append(tx, actor="relook promote", action=f"model.{status}", subject=bundle.id)
    return {"model_id": bundle.id, "status": status, "gate": report.model_dump(mode="json") if report else None}
