"""A rollout as a record in the ledger: start, change of traffic share, promotion, rollback.

In: the id of a candidate, or guardrail counts. Out: the `Rollout` record. Every step is one transaction with its
audit event; a running service follows within a second. Nothing here handles requests.
"""

from collections.abc import Mapping

from records import audit
from records.errors import IntegrityError, RefusedError, UnknownIdError
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.models import registered_bundle, serve_model, serving_model
from records.store import Store
from records.types import ModelRecord, ModelStatus, Rollout, RolloutStage
from serving.rollout.guardrails import GUARDRAILS, violated_guardrail

UNDER_WAY = (RolloutStage.SHADOW, RolloutStage.CANARY)


def current_rollout(tx: Transaction) -> Rollout | None:
    """Return the rollout in progress, or None."""
    found = tx.find(Rollout, where={"stage": list(UNDER_WAY)}, order_by=("-id",), limit=1)
    return found[0] if found else None


def begin(store: Store, model_id: str, percent: int, *, actor: str, reason: str | None = None) -> Rollout:
    """Start a rollout, or change the traffic share of the current one of the same candidate.

    Args:
        store: with ledger and bundles.
        model_id: of the candidate.
        percent: traffic share by lesion, 0 to 99; 0 is shadow: the candidate predicts and is never served.
        actor: for the audit.
        reason: required for a model that is not a candidate by the gate.
    Returns:
        The rollout.
    Raises:
        RefusedError: another rollout is in progress, the model serves already, the gate has not passed it, or its
            bundle was altered or fails its golden images.
        UnknownIdError: the model is not registered, or there is no champion yet.
    """
    with store.ledger.read() as tx:
        record = tx.require(ModelRecord, model_id)
        running = current_rollout(tx)
    if running is None:
        # Outside of the transaction: loading a network takes seconds, and a write transaction blocks all others.
        _require_sound(store, record)
    stage = RolloutStage.CANARY if percent else RolloutStage.SHADOW
    with store.ledger.begin() as tx:
        # Read again: another process may have started a rollout while the network was loaded.
        running = current_rollout(tx)
        if running is not None and running.candidate_id != model_id:
            name = running.candidate_id[:12]
            raise RefusedError(f"the rollout of model {name} is in progress; promote it or roll it back first")
        if running is None:
            running = _new(tx, record, stage, percent, actor, reason)
        tx.update(Rollout, running.id, stage=stage, percent=percent)
        details = {"rollout": running.id, "percent": percent, "reason": reason}
        audit.append(tx, actor=actor, action=f"rollout.{stage}", subject=model_id, details=details)
        return tx.require(Rollout, running.id)


def _require_sound(store: Store, record: ModelRecord) -> None:
    from vision.inference.loaded import load_model  # imports torch, which the ingress otherwise does without

    try:
        bundle = registered_bundle(store, record)
        load_model(bundle).check_golden()
    except IntegrityError as error:
        # Reported as the caller's error (409): the bundle is at fault, not the service.
        raise RefusedError(f"model {record.id[:12]} may not take traffic: {error}") from error
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {record.id[:12]}")


def promote(store: Store, *, actor: str) -> Rollout:
    """Make the candidate of the current rollout champion; UnknownIdError if there is none."""
    with store.ledger.begin() as tx:
        running = _require(tx)
        serve_model(tx, running.candidate_id, ModelStatus.CHAMPION)
        tx.update(Rollout, running.id, stage=RolloutStage.PROMOTED, percent=100, ended_at=utc_now(), why="promoted")
        audit.append(tx, actor=actor, action="model.champion", subject=running.candidate_id)
        return tx.require(Rollout, running.id)


def roll_back(store: Store, *, actor: str, why: str) -> Rollout:
    """Roll the current rollout back; without one, return to the champion before the last promotion.

    Args:
        store: with the ledger.
        actor: for the audit; `service` for a guardrail.
        why: one sentence, kept in the record.
    Returns:
        The rollout.
    Raises:
        UnknownIdError: there is nothing to roll back.
    """
    with store.ledger.begin() as tx:
        running = current_rollout(tx) or _last_promoted(tx)
        if running.stage is RolloutStage.PROMOTED:
            serve_model(tx, running.champion_id, ModelStatus.CHAMPION)
        # A model that is refused can only be rolled out again with a reason, see `_new`.
        candidate = tx.require(ModelRecord, running.candidate_id)
        if candidate.status is ModelStatus.CANDIDATE or running.stage is RolloutStage.PROMOTED:
            tx.update(ModelRecord, candidate.id, status=ModelStatus.REFUSED, status_changed_at=utc_now())
        tx.update(Rollout, running.id, stage=RolloutStage.ROLLED_BACK, percent=0, ended_at=utc_now(), why=why)
        audit.append(tx, actor=actor, action="rollout.rolled_back", subject=candidate.id, details={"why": why})
        return tx.require(Rollout, running.id)


def add_counts(store: Store, rollout_id: str, added: Mapping[str, tuple[int, int]]) -> Rollout:
    """Add guardrail counts, and roll the candidate back if a guardrail is violated.

    Args:
        store: with the ledger.
        rollout_id: of the rollout that the counts belong to.
        added: guardrail -> (observations, events).
    Returns:
        The rollout as it is now.
    """
    with store.ledger.begin() as tx:
        running = tx.require(Rollout, rollout_id)
        # Read and added in one write transaction: several replicas count into the same record.
        before = {name: tuple(running.evidence.get(name, (0, 0))) for name in GUARDRAILS}
        new = {name: added.get(name, (0, 0)) for name in GUARDRAILS}
        counts = {name: (before[name][0] + new[name][0], before[name][1] + new[name][1]) for name in GUARDRAILS}
        tx.update(Rollout, rollout_id, evidence={name: list(pair) for name, pair in counts.items()})
        running = tx.require(Rollout, rollout_id)
    # A rollout that ended meanwhile keeps its counts, but must not be rolled back a second time.
    violated = violated_guardrail(counts) if running.stage in UNDER_WAY else None
    if violated is None:
        return running
    observations, events = counts[violated.name]
    why = f"{events} of {observations} {violated.text}; {100 * violated.limit:g} % are tolerated"
    return roll_back(store, actor="service", why=why)


def _new(
    tx: Transaction, record: ModelRecord, stage: RolloutStage, percent: int, actor: str, reason: str | None
) -> Rollout:
    champion = serving_model(tx)
    if champion is None:
        raise UnknownIdError("there is no champion yet to compare with; `relook promote` makes one")
    if champion.id == record.id:
        raise RefusedError(f"model {record.id[:12]} already serves")
    if record.status is not ModelStatus.CANDIDATE and not reason:
        raise RefusedError(
            f"model {record.id[:12]} is {record.status} and not a candidate: the gate has not passed it; "
            "give a reason to roll it out anyway"
        )
    now = utc_now()
    made = Rollout(
        id=new_id(), created_at=now, actor=actor, champion_id=champion.id, candidate_id=record.id, stage=stage,
        percent=percent,
    )  # fmt: skip
    tx.add(made)
    return made


def _require(tx: Transaction) -> Rollout:
    running = current_rollout(tx)
    if running is None:
        raise UnknownIdError("no rollout is in progress; `relook rollout MODEL` starts one")
    return running


def _last_promoted(tx: Transaction) -> Rollout:
    # Only while the promoted model still serves: another one may have been promoted directly since.
    found = tx.find(Rollout, where={"stage": RolloutStage.PROMOTED}, order_by=("-id",), limit=1)
    served = serving_model(tx)
    if not found or served is None or served.id != found[0].candidate_id:
        raise UnknownIdError(
            "no rollout is in progress and none promoted the serving model, so there is nothing to roll back"
        )
    return found[0]
