"""What happened to answers after they were given, in an order that a caller can read on from.

In: annotator labels, outcomes, deadlines and rollouts in the ledger. Out: `EventRecord` rows, written the first
time that somebody asks, each once per cause and answer. Nobody else has to know that events exist.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.types import (
    Annotation,
    AnnotationKind,
    Arm,
    EventRecord,
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

_EVENT, _ANSWER = TABLES[EventRecord].c, TABLES[Prediction].c
_LABEL, _OUTCOME, _ITEM, _ROLLOUT = (TABLES[t].c for t in (Annotation, Outcome, ReviewItem, Rollout))


def read_events(
    store: Store, caller: Caller, after: str | None, limit: int, prediction_ids: Sequence[str] | None = None
) -> EventPage:
    """Return events of the caller's organisation, oldest first.

    Args:
        store: with the ledger.
        caller: who asks.
        after: id of the last event that was read, or None from the beginning.
        limit: at most so many.
        prediction_ids: only events of these answers, or None.
    Returns:
        The page; its `next` stays the same while nothing happens.
    """
    gather(store)
    query = sa.select(TABLES[EventRecord]).where(_EVENT.organisation == caller.organisation)
    if after is not None:
        query = query.where(_EVENT.id > after)
    if prediction_ids is not None:
        query = query.where(_EVENT.prediction_id.in_(prediction_ids))
    with store.ledger.read() as tx:
        rows = tx.connection.execute(query.order_by(_EVENT.id).limit(limit)).mappings()
        found = [EventRecord.model_validate(dict(row)) for row in rows]
    items = [Event(**event.model_dump(exclude={"organisation", "source"})) for event in found]
    return EventPage(items=items, next=items[-1].id if items else after)


def gather(store: Store) -> int:
    """Write down what happened since the last time.

    Args:
        store: with the ledger.
    Returns:
        How many events are new.
    """
    with store.ledger.read() as tx:
        if next(_new_events(tx), None) is None:
            return 0
    # Write transactions follow one another and ids sort by time, so a later reader never misses an earlier id.
    with store.ledger.begin() as tx:
        events = list(_new_events(tx))[:MOST_AT_ONCE]
        tx.add(*events)
    return len(events)


def _new_events(tx: Transaction) -> Iterator[EventRecord]:
    for row in _unheard(tx, _LABEL, _LABEL.image_id == _ANSWER.image_id, _LABEL.deleted.is_(False)):
        details = {"label": row["label"], "answer": row["kind"], "by": "annotator"}
        if row["kind"] != AnnotationKind.CLASS:
            yield _event(row, "undecided", details)
        else:
            yield _event(row, "confirmed" if row["label"] == row["predicted"] else "amended", details)
    for row in _unheard(tx, _OUTCOME, _OUTCOME.prediction_id == _ANSWER.id):
        details = {"label": row["diagnosis"], "answer": "class", "by": row["confirmation"]}
        yield _event(row, "confirmed" if row["diagnosis"] == row["predicted"] else "amended", details)
    is_open = _ITEM.state.in_([ReviewState.NEW, ReviewState.PUSHED])
    for row in _unheard(tx, _ITEM, _ITEM.prediction_id == _ANSWER.id, _ITEM.due < utc_now(), is_open):
        yield _event(row, "overdue", {"due": row["due"].isoformat()})
    was_recalled = sa.and_(_ROLLOUT.candidate_id == _ANSWER.model_id, _ANSWER.created_at >= _ROLLOUT.created_at)
    rolled_back = _ROLLOUT.stage == RolloutStage.ROLLED_BACK
    for row in _unheard(tx, _ROLLOUT, was_recalled, rolled_back, _ANSWER.arm == Arm.CANDIDATE):
        yield _event(row, "recalled", {"model_id": row["candidate_id"], "why": row["why"]})


def _unheard(tx: Transaction, cause: Any, joined: Any, *conditions: Any) -> Iterator[dict[str, Any]]:
    """Yield causes with the served answers that they concern, as far as no event tells of the pair."""
    told = sa.exists().where(_EVENT.source == cause.id, _EVENT.prediction_id == _ANSWER.id)
    columns = [column for column in cause if column.name not in ("organisation", "prediction_id")]
    query = (
        sa.select(*columns, _ANSWER.id.label("prediction"), _ANSWER.organisation, _ANSWER.label.label("predicted"))
        .join(TABLES[Prediction], joined)
        .where(_ANSWER.served.is_(True), ~told, *conditions)
        .order_by(cause.id)
        .limit(MOST_AT_ONCE)
    )
    for row in tx.connection.execute(query).mappings():
        yield dict(row)


def _event(row: dict[str, Any], kind: str, details: dict[str, Any]) -> EventRecord:
    return EventRecord(
        id=new_id(),
        created_at=utc_now(),
        organisation=row["organisation"],
        kind=kind,
        prediction_id=row["prediction"],
        source=row["id"],
        details=details,
    )
