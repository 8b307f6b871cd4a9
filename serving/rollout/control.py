"""A rollout as a record in the ledger: start, change of traffic share, promotion, rollback.

In: the ids of a rollout and its candidate, or guardrail counts. Out: the `Rollout` record. Every verb names what it
means and changes nothing if that one has ended, so a repeated or late call is harmless. Every step is one transaction
with its audit event; a running service follows within a second. Nothing here handles requests.
"""

from collections.abc import Mapping

from records import audit
from records.errors import IntegrityError, RefusedError, UnknownIdError
from records.ids import new_id, utc_now
from records.incidents import require_not_blocked
from records.ledger import Transaction
from records.models import (
    UNDER_WAY,
    advance_generation,
    current_rollout,
    registered_bundle,
    require_returnable,
    return_to,
    serve_model,
    serving_id,
    serving_model,
)
from records.store import Store
from records.types import ModelRecord, ModelStatus, Rollout, RolloutStage
from serving.rollout.guardrails import GUARDRAILS, violated_guardrail


def roll_out(
    store: Store,
    model_id: str,
    percent: int,
    *,
    actor: str,
    rollout_id: str | None = None,
    champion_id: str | None = None,
    reason: str | None = None,
) -> Rollout:
    """Start a rollout, or change or promote the one that is named.

    Args:
        store: with ledger and bundles.
        model_id: of the candidate.
        percent: traffic share by lesion; 0 is shadow (the candidate predicts and is never served), 100 promotes.
        actor: for the audit.
        rollout_id: of the rollout to change or promote; None starts one, with at most 99 %.
        champion_id: id or prefix of the model that has to serve now, to start a rollout; None is any.
        reason: required to start with a model that is not a candidate by the gate.
    Returns:
        The rollout.
    Raises:
        RefusedError: see `begin`, `move` and `promote`; or both a rollout and a champion are named.
        UnknownIdError: there is no such model or rollout.
    """
    if rollout_id is None:
        return begin(store, model_id, percent, actor=actor, champion_id=champion_id, reason=reason)
    if champion_id is not None:
        raise RefusedError("a rollout keeps the champion that it began with; name the champion only to start one")
    if percent == 100:
        return promote(store, rollout_id, model_id, actor=actor)
    return move(store, rollout_id, model_id, percent, actor=actor, reason=reason)


def begin(
    store: Store,
    model_id: str,
    percent: int,
    *,
    actor: str,
    champion_id: str | None = None,
    reason: str | None = None,
) -> Rollout:
    """Start a rollout; see `roll_out`.

    Raises RefusedError if a rollout is in progress, another model than `champion_id` serves, this one serves already,
    the gate has not passed it, or its bundle was altered or fails its golden images; UnknownIdError if the model is
    not registered or there is no champion yet.
    """
    with store.ledger.read() as tx:
        record = tx.require(ModelRecord, model_id)
        _require_startable(tx, record, percent, champion_id, reason)
    # Outside of the transaction: loading a network takes seconds, and a write transaction blocks all others.
    require_sound(store, record)
    with store.ledger.begin() as tx:
        # Read again: meanwhile a rollout may have begun, a champion been promoted, or this model been refused.
        champion = _require_startable(tx, tx.require(ModelRecord, model_id), percent, champion_id, reason)
        made = Rollout(
            id=new_id(), created_at=utc_now(), actor=actor, champion_id=champion.id, candidate_id=model_id,
            stage=_stage(percent), percent=percent,
        )  # fmt: skip
        tx.add(made)
        _record_stage(tx, made, actor, reason)
        return made


def move(
    store: Store, rollout_id: str, model_id: str, percent: int, *, actor: str, reason: str | None = None
) -> Rollout:
    """Change the traffic share (0 to 99) of a rollout; RefusedError if it has ended or has another candidate."""
    with store.ledger.begin() as tx:
        running = _require_under_way(tx, rollout_id, model_id)
        tx.update(Rollout, running.id, stage=_stage(percent), percent=percent)
        moved = tx.require(Rollout, running.id)
        _record_stage(tx, moved, actor, reason)
        return moved


def promote(store: Store, rollout_id: str, model_id: str, *, actor: str) -> Rollout:
    """Make the candidate of a rollout champion; a second call changes nothing.

    Args:
        store: with the ledger.
        rollout_id: of the rollout.
        model_id: of its candidate.
        actor: for the audit.
    Returns:
        The rollout.
    Raises:
        RefusedError: it was rolled back, has another candidate, or its champion no longer serves.
        UnknownIdError: there is no such rollout.
    """
    with store.ledger.begin() as tx:
        named = _require_rollout(tx, rollout_id)
        if named.stage is RolloutStage.PROMOTED and named.candidate_id == model_id == serving_id(tx):
            return named
        running = _require_under_way(tx, rollout_id, model_id)
        # Ended first: `serve_model` changes no champion under a rollout that is in progress.
        tx.update(Rollout, running.id, stage=RolloutStage.PROMOTED, percent=100, ended_at=utc_now(), why="promoted")
        serve_model(tx, model_id, ModelStatus.CHAMPION, replaces=running.champion_id)
        details = {"rollout": running.id, "replaces": running.champion_id}
        audit.append(tx, actor=actor, action="model.champion", subject=model_id, details=details)
        return tx.require(Rollout, running.id)


def roll_back(store: Store, rollout_id: str, *, actor: str, why: str) -> Rollout:
    """End a rollout that is in progress; one that was rolled back already is returned as it is.

    Args:
        store: with the ledger.
        rollout_id: of the rollout.
        actor: for the audit; `service` for a guardrail.
        why: one sentence, kept in the record.
    Returns:
        The rollout.
    Raises:
        RefusedError: it was promoted; taking a champion away is `undo_promotion`.
        UnknownIdError: there is no such rollout.
    """
    with store.ledger.begin() as tx:
        return roll_back_in(tx, rollout_id, actor, why)


def undo_promotion(store: Store, model_id: str, back_to: str, *, actor: str, why: str) -> ModelRecord:
    """Take the serving model away and let the model that it replaced serve again, however it was promoted.

    For persons only: no guardrail, schedule or repeated request calls this.

    Args:
        store: with ledger and bundles.
        model_id: of the model that serves.
        back_to: id of the model that it replaced.
        actor: for the audit.
        why: one sentence, for the audit and the rollout that promoted it.
    Returns:
        The model that serves again.
    Raises:
        RefusedError: see `records.models.require_returnable`; or the bundle of `back_to` fails its golden images.
        UnknownIdError: a model is not registered.
    """
    with store.ledger.read() as tx:
        require_returnable(tx, model_id, back_to)
        before = tx.require(ModelRecord, back_to)
    require_sound(store, before)
    with store.ledger.begin() as tx:
        return undo_promotion_in(tx, model_id, back_to, actor=actor, why=why)


def undo_promotion_in(tx: Transaction, model_id: str, back_to: str, *, actor: str, why: str) -> ModelRecord:
    """Do what `undo_promotion` does in the caller's write transaction, which checked the bundle of `back_to`."""
    return_to(tx, model_id, back_to)
    named = {"stage": RolloutStage.PROMOTED, "candidate_id": model_id, "champion_id": back_to}
    for promoted in tx.find(Rollout, where=named):
        # Callers hear that what it predicted as a candidate is recalled.
        tx.update(Rollout, promoted.id, stage=RolloutStage.ROLLED_BACK, percent=0, ended_at=utc_now(), why=why)
    details = {"back_to": back_to, "why": why}
    audit.append(tx, actor=actor, action="model.promotion_undone", subject=model_id, details=details)
    return tx.require(ModelRecord, back_to)


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
        # A rollout that ended meanwhile keeps its counts; nothing more happens to it or to the champion.
        violated = violated_guardrail(counts) if running.stage in UNDER_WAY else None
        if violated is None:
            return tx.require(Rollout, rollout_id)
        observations, events = counts[violated.name]
        why = f"{events} of {observations} {violated.text}; {100 * violated.limit:g} % are tolerated"
        return roll_back_in(tx, rollout_id, "service", why)


def under_way_text(tx: Transaction) -> str:
    """Say which rollout is in progress, for a verb that named another one or none."""
    running = current_rollout(tx)
    if running is None:
        return "no rollout is in progress"
    name, model = running.id, running.candidate_id[:12]
    return f"rollout {name} of model {model} is in progress ({running.stage}, {running.percent} %)"


def _stage(percent: int) -> RolloutStage:
    return RolloutStage.CANARY if percent else RolloutStage.SHADOW


def _record_stage(tx: Transaction, rollout: Rollout, actor: str, reason: str | None) -> None:
    advance_generation(tx)
    details = {"rollout": rollout.id, "percent": rollout.percent, "reason": reason}
    audit.append(tx, actor=actor, action=f"rollout.{rollout.stage}", subject=rollout.candidate_id, details=details)


def _require_champion(tx: Transaction, champion_id: str | None) -> None:
    served = serving_id(tx)
    if champion_id is not None and not (served or "").startswith(champion_id):
        raise RefusedError(f"model {(served or 'none')[:12]} serves now, and not {champion_id[:12]}; look again")


def _require_startable(
    tx: Transaction, record: ModelRecord, percent: int, champion_id: str | None, reason: str | None
) -> ModelRecord:
    """Return the champion that a rollout of this model would begin with."""
    if current_rollout(tx) is not None:
        raise RefusedError(f"{under_way_text(tx)}; name it to change it, or end it first")
    champion = serving_model(tx)
    if champion is None:
        raise UnknownIdError("there is no champion yet to compare with; `relook promote` makes one")
    _require_champion(tx, champion_id)
    if champion.id == record.id:
        raise RefusedError(f"model {record.id[:12]} already serves")
    require_not_blocked(tx, record.id)
    if record.status is not ModelStatus.CANDIDATE and not reason:
        raise RefusedError(
            f"model {record.id[:12]} is {record.status} and not a candidate: the gate has not passed it; "
            "give a reason to roll it out anyway"
        )
    if percent > 99:
        raise RefusedError("a rollout starts with at most 99 %; once it is in progress, 100 % with its id promotes it")
    return champion


def _require_rollout(tx: Transaction, rollout_id: str) -> Rollout:
    found = tx.get(Rollout, rollout_id)
    if found is None:
        raise UnknownIdError(f"no rollout has the id {rollout_id!r}; {under_way_text(tx)}")
    return found


def _require_under_way(tx: Transaction, rollout_id: str, model_id: str) -> Rollout:
    running = _require_rollout(tx, rollout_id)
    if running.candidate_id != model_id:
        raise RefusedError(
            f"rollout {rollout_id} is of model {running.candidate_id[:12]}, and not of {model_id[:12]}; "
            "nothing was changed"
        )
    if running.stage not in UNDER_WAY:
        raise RefusedError(f"rollout {rollout_id} has ended ({running.stage}: {running.why}); {under_way_text(tx)}")
    return running


def roll_back_in(tx: Transaction, rollout_id: str, actor: str, why: str) -> Rollout:
    """Do what `roll_back` does in the caller's write transaction."""
    running = _require_rollout(tx, rollout_id)
    if running.stage is RolloutStage.ROLLED_BACK:
        return running
    if running.stage is RolloutStage.PROMOTED:
        candidate, champion = running.candidate_id[:12], running.champion_id[:12]
        raise RefusedError(
            f"rollout {rollout_id} has ended: model {candidate} was promoted; "
            f"`relook models undo-promotion {candidate} --back-to {champion}` takes it away"
        )
    # A model that is refused can only be rolled out again with a reason.
    candidate_record = tx.require(ModelRecord, running.candidate_id)
    if candidate_record.status is ModelStatus.CANDIDATE:
        tx.update(ModelRecord, candidate_record.id, status=ModelStatus.REFUSED, status_changed_at=utc_now())
    tx.update(Rollout, running.id, stage=RolloutStage.ROLLED_BACK, percent=0, ended_at=utc_now(), why=why)
    advance_generation(tx)
    details = {"rollout": running.id, "why": why}
    audit.append(tx, actor=actor, action="rollout.rolled_back", subject=running.candidate_id, details=details)
    return tx.require(Rollout, running.id)


def require_sound(store: Store, record: ModelRecord) -> None:
    """Raise RefusedError for a registered model whose bundle was altered or fails its golden images."""
    from vision.inference.loaded import load_model  # imports torch, which the ingress otherwise does without

    try:
        bundle = registered_bundle(store, record)
        load_model(bundle).check_golden()
    except IntegrityError as error:
        # Reported as the caller's error (409): the bundle is at fault, not the service.
        raise RefusedError(f"model {record.id[:12]} may not take traffic: {error}") from error
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {record.id[:12]}")
