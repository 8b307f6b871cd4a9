"""A rollout in the ledger: begun, widened, promoted, taken back. A running service follows within a second.

In: the id of a candidate, or counts of harm. Out: the `Rollout` record. Every step is one transaction with its
audit event. It computes nothing but golden images and knows nothing of requests.
"""

from collections.abc import Mapping

from records import audit
from records.errors import IntegrityError, RefusedError, UnknownIdError
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.models import registered_bundle, serve_model, serving_model
from records.store import Store
from records.types import ModelRecord, ModelStatus, Rollout, RolloutStage
from serving.rollout.harms import HARMS, found_harm

UNDER_WAY = (RolloutStage.SHADOW, RolloutStage.CANARY)


def current_rollout(tx: Transaction) -> Rollout | None:
    """Return the rollout that is under way, or None."""
    found = tx.find(Rollout, where={"stage": list(UNDER_WAY)}, order_by=("-id",), limit=1)
    return found[0] if found else None


def begin(store: Store, model_id: str, percent: int, *, actor: str, reason: str | None = None) -> Rollout:
    """Begin a rollout, or widen or narrow the one under way of the same candidate.

    Args:
        store: with ledger and bundles.
        model_id: of the candidate.
        percent: share of lesions that it answers beside the champion; 0 mirrors without answering.
        actor: who does it.
        reason: needed for a model that the gate did not make a candidate.
    Returns:
        The rollout.
    Raises:
        RefusedError: another candidate is under way, the model already answers, the gate has not passed it, or its
            bundle is altered or does not answer its golden images.
        UnknownIdError: the model is not registered, or no model answers yet.
    """
    with store.ledger.read() as tx:
        record = tx.require(ModelRecord, model_id)
        running = current_rollout(tx)
    if running is None:
        _require_sound(store, record)
    stage = RolloutStage.CANARY if percent else RolloutStage.SHADOW
    with store.ledger.begin() as tx:
        running = current_rollout(tx)
        if running is not None and running.candidate_id != model_id:
            raise RefusedError(f"model {running.candidate_id[:12]} is under way; promote it or roll it back first")
        if running is None:
            running = _new(tx, record, stage, percent, actor, reason)
        tx.update(Rollout, running.id, stage=stage, percent=percent)
        details = {"rollout": running.id, "percent": percent, "reason": reason}
        audit.append(tx, actor=actor, action=f"rollout.{stage}", subject=model_id, details=details)
        return tx.require(Rollout, running.id)


def _require_sound(store: Store, record: ModelRecord) -> None:
    from vision.inference.loaded import load_model  # torch, which the API needs for nothing else

    try:
        bundle = registered_bundle(store, record)
        load_model(bundle).check_golden()
    except IntegrityError as error:
        # The fault is the candidate's, not the service's: whoever asked for it is told.
        raise RefusedError(f"model {record.id[:12]} may not take traffic: {error}") from error
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {record.id[:12]}")


def promote(store: Store, *, actor: str) -> Rollout:
    """Let the candidate under way answer everything.

    Args:
        store: with the ledger.
        actor: who does it.
    Returns:
        The rollout, ended.
    Raises:
        UnknownIdError: no rollout is under way.
    """
    with store.ledger.begin() as tx:
        running = _require(tx)
        serve_model(tx, running.candidate_id, ModelStatus.CHAMPION)
        tx.update(Rollout, running.id, stage=RolloutStage.PROMOTED, percent=100, ended_at=utc_now(), why="promoted")
        audit.append(tx, actor=actor, action="model.champion", subject=running.candidate_id)
        return tx.require(Rollout, running.id)


def roll_back(store: Store, *, actor: str, why: str) -> Rollout:
    """Take the candidate under way back; without one, return to the model before the last promotion.

    Args:
        store: with the ledger.
        actor: who does it; `service` if harm was found.
        why: one sentence.
    Returns:
        The rollout.
    Raises:
        UnknownIdError: there is nothing to go back to.
    """
    with store.ledger.begin() as tx:
        running = current_rollout(tx) or _last_promoted(tx)
        if running.stage is RolloutStage.PROMOTED:
            serve_model(tx, running.champion_id, ModelStatus.CHAMPION)
        candidate = tx.require(ModelRecord, running.candidate_id)
        if candidate.status is ModelStatus.CANDIDATE or running.stage is RolloutStage.PROMOTED:
            tx.update(ModelRecord, candidate.id, status=ModelStatus.REFUSED, status_changed_at=utc_now())
        tx.update(Rollout, running.id, stage=RolloutStage.ROLLED_BACK, percent=0, ended_at=utc_now(), why=why)
        audit.append(tx, actor=actor, action="rollout.rolled_back", subject=candidate.id, details={"why": why})
        return tx.require(Rollout, running.id)


def tally(store: Store, rollout_id: str, seen: Mapping[str, tuple[int, int]]) -> Rollout:
    """Add what was seen of a candidate, and take it back if that proves harm.

    Args:
        store: with the ledger.
        rollout_id: of the rollout that the counts belong to.
        seen: kind of harm to (how often looked, how often seen).
    Returns:
        The rollout as it is now.
    """
    with store.ledger.begin() as tx:
        running = tx.require(Rollout, rollout_id)
        before = {name: tuple(running.evidence.get(name, (0, 0))) for name in HARMS}
        counts = {
            name: (before[name][0] + seen.get(name, (0, 0))[0], before[name][1] + seen.get(name, (0, 0))[1])
            for name in HARMS
        }
        tx.update(Rollout, rollout_id, evidence={name: list(pair) for name, pair in counts.items()})
        running = tx.require(Rollout, rollout_id)
    harm = found_harm(counts) if running.stage in UNDER_WAY else None
    if harm is None:
        return running
    looked, harmed = counts[harm.name]
    why = f"{harmed} of {looked} {harm.text}; {100 * harm.tolerated:g} % are tolerated"
    return roll_back(store, actor="service", why=why)


def _new(
    tx: Transaction, record: ModelRecord, stage: RolloutStage, percent: int, actor: str, reason: str | None
) -> Rollout:
    champion = serving_model(tx)
    if champion is None:
        raise UnknownIdError("no model answers yet, so there is nothing to roll out beside; `relook promote` makes one")
    if champion.id == record.id:
        raise RefusedError(f"model {record.id[:12]} already answers")
    if record.status is not ModelStatus.CANDIDATE and not reason:
        raise RefusedError(
            f"model {record.id[:12]} is {record.status} and not a candidate: the gate has not passed it; "
            "give a reason to roll it out all the same"
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
        raise UnknownIdError("no rollout is under way; `relook rollout MODEL` begins one")
    return running


def _last_promoted(tx: Transaction) -> Rollout:
    found = tx.find(Rollout, where={"stage": RolloutStage.PROMOTED}, order_by=("-id",), limit=1)
    served = serving_model(tx)
    if not found or served is None or served.id != found[0].candidate_id:
        raise UnknownIdError("no rollout is under way and none was promoted last, so there is nothing to roll back")
    return found[0]
