"""Events: changes to predictions after they were returned, in an order that a caller can read incrementally.

In: annotations, outcomes, due dates, rollouts and incidents in the ledger. Out: `EventRecord` rows, one per cause and
prediction, derived whenever a caller reads events. So no other module has to publish events.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import sqlalchemy as sa

from records.ids import id_after, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.types import (
    Annotation,
    AnnotationKind,
    Arm,
    EventRecord,
    IncidentPrediction,
    Outcome,
    Prediction,
    ReviewItem,
    ReviewState,
    Rollout,
    RolloutStage,
)
from serving.access.keys import Caller
from serving.schemas import Event, EventPage

MOST_AT_ONCE = 1000

_EVENT, _PREDICTION = TABLES[EventRecord].c, TABLES[Prediction].c
_LABEL, _OUTCOME, _ITEM, _ROLLOUT, _INCIDENT = (
    TABLES[t].c for t in (Annotation, Outcome, ReviewItem, Rollout, IncidentPrediction)
)


def read_events(
    store: Store, caller: Caller, after: str | None, limit: int, prediction_ids: Sequence[str] | None = None
) -> EventPage:
    """Return events of the caller's organisation, oldest first.

    Args:
        store: with the ledger.
        caller: whose organisation.
        after: id of the last event that was read, or None from the beginning.
        limit: events of the page.
        prediction_ids: only events of these predictions, or None.
    Returns:
        The page; its `next` stays the same while there are no new events.
    """
    items = events_of(store, caller.organisation, after, limit, prediction_ids)
    return EventPage(items=items, next=items[-1].id if items else after)


def events_of(
    store: Store, organisation: str, after: str | None, limit: int, prediction_ids: Sequence[str] | None = None
) -> list[Event]:
    """Return events of an organisation, oldest first; see `read_events`."""
    gather(store)
    query = sa.select(TABLES[EventRecord]).where(_EVENT.organisation == organisation)
    if after is not None:
        query = query.where(_EVENT.id > after)
    if prediction_ids is not None:
        query = query.where(_EVENT.prediction_id.in_(prediction_ids))
    with store.ledger.read() as tx:
        rows = tx.connection.execute(query.order_by(_EVENT.id).limit(limit)).mappings()
        found = [EventRecord.model_validate(dict(row)) for row in rows]
    return [Event(**event.model_dump(exclude={"organisation", "source"})) for event in found]


def last_event_id(store: Store) -> str | None:
    """Return the id of the newest event of all organisations; None if there is none."""
    gather(store)
    with store.ledger.read() as tx:
        found: str | None = tx.connection.scalar(sa.select(sa.func.max(_EVENT.id)))
    return found


def gather(store: Store) -> int:
    """Write events for changes since the last call and return their number."""
    with store.ledger.read() as tx:
        if next(_new_events(tx), None) is None:
            return 0
    # Looked for again, since another process may have written them meanwhile. Such transactions follow one another, and
    # each continues the ids after the greatest one that is stored. So no event with a smaller id appears after a caller
    # has read a greater one, whatever the clocks of the machines do.
    with store.ledger.begin() as tx:
        last, events = tx.connection.scalar(sa.select(sa.func.max(_EVENT.id))), []
        for event in islice(_new_events(tx), MOST_AT_ONCE):
            last = id_after(last)
            events.append(event.model_copy(update={"id": last}))
        tx.add(*events)
    return len(events)


def _new_events(tx: Transaction) -> Iterator[EventRecord]:
    # An annotation concerns all predictions of its image, an outcome only its own prediction.
    counts = sa.and_(_LABEL.deleted.is_(False), _LABEL.gold.is_(False))
    for row in _new_causes(tx, _LABEL, _LABEL.image_id == _PREDICTION.image_id, counts):
        details = {"label": row["label"], "kind": row["kind"], "by": "annotator"}
        if row["kind"] != AnnotationKind.CLASS:
            yield _event(row, "undecided", details)
        else:
            yield _event(row, "confirmed" if row["label"] == row["predicted"] else "amended", details)
    for row in _new_causes(tx, _OUTCOME, _OUTCOME.prediction_id == _PREDICTION.id):
        details = {"label": row["diagnosis"], "kind": "class", "by": row["confirmation"]}
        yield _event(row, "confirmed" if row["diagnosis"] == row["predicted"] else "amended", details)
    is_open = _ITEM.state.in_([ReviewState.NEW, ReviewState.PUSHED])
    for row in _new_causes(tx, _ITEM, _ITEM.prediction_id == _PREDICTION.id, _ITEM.due < tx.now(), is_open):
        yield _event(row, "overdue", {"due": row["due"].isoformat()})
    # Only what the candidate itself predicted during this rollout; the champion's predictions stay valid.
    # Predictions of earlier versions do not name their rollout, so those are told by time.
    by_time = sa.and_(_PREDICTION.rollout_id.is_(None), _PREDICTION.created_at >= _ROLLOUT.created_at)
    was_recalled = sa.and_(
        _ROLLOUT.candidate_id == _PREDICTION.model_id, sa.or_(_PREDICTION.rollout_id == _ROLLOUT.id, by_time)
    )
    rolled_back = _ROLLOUT.stage == RolloutStage.ROLLED_BACK
    for row in _new_causes(tx, _ROLLOUT, was_recalled, rolled_back, _PREDICTION.arm == Arm.CANDIDATE):
        yield _event(row, "recalled", {"model_id": row["candidate_id"], "why": row["why"]})
    for row in _new_causes(tx, _INCIDENT, _INCIDENT.prediction_id == _PREDICTION.id):
        why = "it resembles a prediction that was wrong" if row["criteria"] else "it was reported as wrong"
        yield _event(row, "recalled", {"incident_id": row["incident_id"], "why": f"{why}; annotators look at it first"})


def _new_causes(tx: Transaction, cause: Any, joined: Any, *conditions: Any) -> Iterator[dict[str, Any]]:
    """Yield pairs of a cause and a served prediction that it concerns, for which there is no event yet."""
    # An anti-join instead of a stored position: a due date passes and a rollout ends without a new row, and an image
    # may be predicted again long after its annotation.
    is_known = sa.exists().where(_EVENT.source == cause.id, _EVENT.prediction_id == _PREDICTION.id)
    columns = [column for column in cause if column.name not in ("organisation", "prediction_id")]
    query = (
        sa.select(
            *columns, _PREDICTION.id.label("prediction"), _PREDICTION.organisation, _PREDICTION.label.label("predicted")
        )
        .join(TABLES[Prediction], joined)
        .where(_PREDICTION.served.is_(True), ~is_known, *conditions)
        .order_by(cause.created_at, cause.id)
        .limit(MOST_AT_ONCE)
    )
    for row in tx.connection.execute(query).mappings():
        yield dict(row)


def _event(row: dict[str, Any], kind: str, details: dict[str, Any]) -> EventRecord:
    return EventRecord(
        id="",  # assigned in order when it is written
        created_at=utc_now(),
        organisation=row["organisation"],
        kind=kind,
        prediction_id=row["prediction"],
        source=row["id"],
        details=details,
    )
