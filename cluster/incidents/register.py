"""Opening and closing incidents. All that is found out comes first; what is written is one transaction.

In: the prediction or image that somebody names, and its true class. Out: the `Incident`, with urgent review items for
the predictions like it; their callers find `recalled` in `/v1/events`.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

from cluster.incidents.affected import find_affected
from cluster.incidents.cases import CaseResult, add_confirmed, in_words, judge
from cluster.incidents.evidence import examine
from cluster.settings import Settings
from records import audit
from records.errors import DataError, RefusedError, UnknownIdError
from records.ids import new_id
from records.incidents import find_incident, predictions_of
from records.ledger import Transaction
from records.models import current_rollout, registered_bundle, require_returnable, serving_model
from records.store import Store
from records.types import (
    Consent,
    Image,
    Incident,
    IncidentPrediction,
    IncidentState,
    ModelAction,
    ModelRecord,
    ModelStatus,
    Prediction,
    ReasonCode,
    ReviewItem,
    Scope,
)
from records.types.base import LINES
from serving.access.keys import Caller
from serving.outbox import merge_items, probabilities_of
from serving.rollout.control import require_sound, roll_back_in, undo_promotion_in
from serving.triage import priority_of

Then = Literal["keep", "block", "roll-back"]
"""What happens to the model of an incident."""


def open_incident(
    store: Store,
    settings: Settings,
    *,
    prediction: str | None,
    image: str | None,
    truth: str,
    then: Then = "keep",
    note: str | None = None,
    actor: str,
) -> Incident:
    """Open an incident about a prediction that missed the true class.

    Args:
        store: with the prediction, its image and its model.
        settings: rules of triage, and when urgent review items are due.
        prediction: its id; or
        image: id of an image, whose newest served prediction it is about.
        truth: class code.
        then: `block` keeps the model from being served again, `roll-back` takes it away from serving.
        note: for those who read the incident.
        actor: for the audit.
    Returns:
        The incident.
    Raises:
        UnknownIdError: there is no such prediction or image, or the model's bundle is gone.
        TaxonomyError: the true class is none.
        RefusedError: it has an incident already, its image was erased, it missed nothing, or the model cannot be
            blocked or rolled back.
    """
    if (prediction is None) == (image is None):
        raise DataError("name either a prediction (--prediction) or an image (--image)")
    store.taxonomy.index_of(truth)
    said = None if note is None else _note(note)
    with store.ledger.read() as tx:
        case = _case(tx, prediction, image)
        _require_new(tx, case, truth)
        _require_action(tx, case.model_id, then)
    seen = examine(store, settings.serving, case, truth)
    affected, looked_at, total = find_affected(store, case, truth, seen)
    if then == "roll-back":
        _require_sound_return(store, case.model_id)
    evidence = seen.evidence.model_copy(update={"looked_at": looked_at, "looked_at_of": total})
    with store.ledger.begin() as tx:
        # Looked at again: meanwhile somebody else may have opened it, or the image been erased.
        _require_still(tx, case, truth, then)
        incident = Incident(
            id=new_id(), created_at=tx.now_after(Incident), actor=actor, prediction_id=case.id, image_id=case.image_id,
            model_id=case.model_id, truth=truth, note=said, action=_ACTIONS[then],
            evidence=evidence.model_dump(mode="json"),
        )  # fmt: skip
        rows = [_row(incident, case, (), truth), *(_row(incident, one.prediction, one.criteria) for one in affected)]
        tx.add(incident, *rows)
        asked = _ask(tx, store, incident, [case, *(one.prediction for one in affected)], settings)
        _act(tx, incident, then, actor)
        # Without the true class: it is a finding about a person, and the chain keeps its events for ever.
        details = {"prediction_id": case.id, "model_id": case.model_id, "then": then, "asked": asked}
        audit.append(tx, actor=actor, action="incident.opened", subject=incident.id, details=details)
    return incident


def close_incident(
    store: Store, settings: Settings, name: str, *, actor: str, caller: Caller | None = None, because: str | None = None
) -> Incident:
    """Close an incident: with the proof that the champion handles all its cases, or without one for a reason.

    Args:
        store: with the champion.
        settings: rules of triage.
        name: id of the incident, or a prefix.
        actor: for the audit.
        caller: the bearer of a key; closing without proof needs one with the scope `admin`.
        because: close without proof, for this reason; its cases leave the regression set.
    Returns:
        The incident.
    Raises:
        UnknownIdError: there is no such incident.
        RefusedError: it is closed, no other champion serves than the model that missed it, or a case is not handled.
        AccessError: the key lacks the scope.
    """
    with store.ledger.read() as tx:
        incident = find_incident(tx, name)
    _require_open(incident)
    if because is not None:
        return _withdraw(store, incident, _note(because), actor, caller)
    add_confirmed(store, actor)
    with store.ledger.read() as tx:
        champion = _next_champion(tx, incident)
        cases = [row for row in predictions_of(tx, incident.id) if row.truth]
    if not cases:
        raise RefusedError(
            f"the images of incident {incident.id} were erased, so nothing can prove it; "
            "an administrator closes it with --without-proof REASON"
        )
    results = judge(store, settings.serving, registered_bundle(store, champion), cases)
    if missed := [one for one in results if not one.is_handled]:
        raise RefusedError(
            f"model {champion.id[:12]} misses {len(missed)} of {len(results)} cases: {in_words(missed[0])}; "
            "the incident stays open until a champion classifies or refers every one"
        )
    with store.ledger.begin() as tx:
        _require_open(tx.require(Incident, incident.id))
        if _next_champion(tx, incident).id != champion.id:
            raise RefusedError(f"another model than {champion.id[:12]} began to serve meanwhile; close it again")
        now = tx.now_after(Incident)
        tx.update(
            Incident, incident.id, state=IncidentState.CLOSED, closed_at=now, closed_by=actor,
            proof=_proof(champion.id, results),
        )  # fmt: skip
        details = {"model_id": champion.id, "cases": len(results)}
        audit.append(tx, actor=actor, action="incident.closed", subject=incident.id, details=details)
        return tx.require(Incident, incident.id)


_ACTIONS: dict[Then, ModelAction] = {
    "keep": ModelAction.NONE, "block": ModelAction.BLOCKED, "roll-back": ModelAction.ROLLED_BACK,
}  # fmt: skip


def _note(text: str) -> str:
    try:
        checked = LINES.check(text).strip()
    except ValueError as error:
        raise DataError(f"the note cannot be stored: {error}") from error
    if not checked:
        raise DataError("the note or reason is empty; say in a sentence what happened, or leave it out")
    return checked


def _case(tx: Transaction, prediction: str | None, image: str | None) -> Prediction:
    """Return the prediction that an incident is about."""
    if prediction is not None:
        found = tx.get(Prediction, prediction)
        if found is None or not found.served:
            raise UnknownIdError(f"no served prediction has the id {prediction!r}; give all 32 characters of one")
        return found
    newest = tx.find(Prediction, {"image_id": image, "served": True}, order_by=("-created_at", "-id"), limit=1)
    if newest:
        return newest[0]
    known = tx.get(Image, str(image)) is not None
    raise UnknownIdError(
        f"no prediction about image {str(image)[:12]} was served, so none missed it; give --prediction"
        if known
        else f"no image has the id {image!r}; give all 64 characters of one that was predicted"
    )


def _require_new(tx: Transaction, case: Prediction, truth: str) -> None:
    before = tx.find(Incident, where={"prediction_id": case.id}, order_by=("-id",))
    before += tx.find(Incident, where={"image_id": case.image_id, "state": IncidentState.OPEN}, order_by=("-id",))
    standing = [one for one in before if one.state is not IncidentState.WITHDRAWN]
    if standing:
        one = standing[0]
        raise RefusedError(
            f"incident {one.id} about this image is {one.state} since "
            f"{one.closed_at or one.created_at:%Y-%m-%d %H:%M}; `relook incident show {one.id}`"
        )
    if case.label == truth:
        raise RefusedError(f"prediction {case.id} says {truth} itself ({case.decision}), so it missed nothing")


def _require_still(tx: Transaction, case: Prediction, truth: str, then: Then) -> None:
    _require_new(tx, case, truth)
    _require_action(tx, case.model_id, then)
    image = tx.get(Image, case.image_id)
    if image is None or image.erased_at is not None:
        raise RefusedError(f"image {case.image_id[:12]} was erased meanwhile; no incident is opened")


def _require_action(tx: Transaction, model_id: str, then: Then) -> None:
    """Refuse what cannot be done to the model, before anything is computed or written."""
    served, running = serving_model(tx), current_rollout(tx)
    serves = served is not None and served.id == model_id
    under_way = running is not None and running.candidate_id == model_id
    if then == "block" and (serves or under_way):
        raise RefusedError(
            f"model {model_id[:12]} serves now; --then roll-back takes it away and keeps it from serving again"
        )
    if then == "roll-back" and serves and served is not None:
        if served.replaced_id is None:
            raise RefusedError(
                f"model {model_id[:12]} replaced no model, so there is none to return to; promote another"
            )
        require_returnable(tx, model_id, served.replaced_id)
    elif then == "roll-back" and not under_way:
        raise RefusedError(f"model {model_id[:12]} does not serve now; --then block keeps it from serving again")


def _require_sound_return(store: Store, model_id: str) -> None:
    with store.ledger.read() as tx:
        served = serving_model(tx)
        back = served.replaced_id if served is not None and served.id == model_id else None
        before = None if back is None else tx.require(ModelRecord, back)
    if before is not None:
        require_sound(store, before)


def _act(tx: Transaction, incident: Incident, then: Then, actor: str) -> None:
    why = f"incident {incident.id}"
    if then != "roll-back":
        return
    running = current_rollout(tx)
    if running is not None and running.candidate_id == incident.model_id:
        roll_back_in(tx, running.id, actor, why)
        return
    served = tx.require(ModelRecord, incident.model_id)
    undo_promotion_in(tx, served.id, str(served.replaced_id), actor=actor, why=why)


def _row(
    incident: Incident, prediction: Prediction, criteria: Sequence[Any], truth: str | None = None
) -> IncidentPrediction:
    return IncidentPrediction(
        id=new_id(), created_at=incident.created_at, incident_id=incident.id, prediction_id=prediction.id,
        image_id=prediction.image_id, criteria=list(criteria), truth=truth,
    )  # fmt: skip


def _ask(
    tx: Transaction, store: Store, incident: Incident, predictions: Sequence[Prediction], settings: Settings
) -> int:
    """Put the images into the review queue as urgent, once each, and return how many; erased ones cannot be shown."""
    due = incident.created_at + timedelta(hours=settings.serving.urgent_due_h)
    by_image = {one.image_id: one for one in reversed(predictions) if one.consent is not Consent.NONE}
    stored = {image.id for image in tx.find(Image, where={"id": list(by_image)}) if image.erased_at is None}
    heat_map = incident.evidence["maps"].get(incident.evidence["label"])
    proposed = [
        ReviewItem(
            id=new_id(), created_at=incident.created_at, prediction_id=one.id, image_id=image_id,
            reasons=[ReasonCode.INCIDENT],
            priority=priority_of((ReasonCode.INCIDENT,), probabilities_of(one, store.taxonomy), store.taxonomy),
            due=due, heat_map=heat_map if one.id == incident.prediction_id else None,
            crop=incident.evidence.get("crop", "center"),
        )
        for image_id, one in by_image.items()
        if image_id in stored
    ]  # fmt: skip
    _, new = merge_items(tx, proposed)
    tx.add(*new)
    return len(proposed)


def _next_champion(tx: Transaction, incident: Incident) -> ModelRecord:
    served = serving_model(tx)
    if served is None or served.id == incident.model_id or served.status is not ModelStatus.CHAMPION:
        now = "no model serves" if served is None else f"model {served.id[:12]} serves as {served.status}"
        raise RefusedError(
            f"{now}; an incident is closed by a champion other than {incident.model_id[:12]}, which missed the case"
        )
    return served


def _require_open(incident: Incident) -> None:
    if incident.state is not IncidentState.OPEN:
        raise RefusedError(f"incident {incident.id} is {incident.state} since {incident.closed_at:%Y-%m-%d %H:%M}")


def _withdraw(store: Store, incident: Incident, because: str, actor: str, caller: Caller | None) -> Incident:
    # As a forced promotion: the user of the machine proves nothing about rights.
    if caller is None:
        raise RefusedError("closing without proof needs a key with the scope admin; put it into RELOOK_KEY")
    caller.require(Scope.ADMIN)
    with store.ledger.begin() as tx:
        _require_open(tx.require(Incident, incident.id))
        tx.update(
            Incident, incident.id, state=IncidentState.WITHDRAWN, closed_at=tx.now_after(Incident), closed_by=actor,
            why=because,
        )  # fmt: skip
        audit.append(tx, actor=actor, action="incident.withdrawn", subject=incident.id)
        return tx.require(Incident, incident.id)


def _proof(model_id: str, results: Sequence[CaseResult]) -> dict[str, Any]:
    shown = {"image_id", "label", "decision"}
    return {"model_id": model_id, "cases": [one.model_dump(mode="json", include=shown) for one in results]}
