"""What must hold after `bench.drills.two_services`, by the ledger and by what its threads sent and saw."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.drills.service_process import COUNT, COUNTED
from records.models import serving_model
from records.store import Store
from records.types import Arm, AuditEvent, Cursor, EventRecord, Outcome, Prediction, Rollout, RolloutStage

ENDED = (RolloutStage.PROMOTED, RolloutStage.ROLLED_BACK)


@dataclass
class Record:
    """What the threads of the drill sent and saw."""

    sent: list[str] = field(default_factory=list)
    """idempotency keys"""
    predicted: list[tuple[str, set[str]]] = field(default_factory=list)
    """(key, ids of all responses)"""
    reported: list[str] = field(default_factory=list)
    """predictions whose outcome was accepted"""
    told: dict[int, list[str]] = field(default_factory=dict)
    """event ids by reader"""
    begun: list[str] = field(default_factory=list)
    """rollouts whose start was confirmed"""
    asked: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """how a rollout was asked to end, before it was sent"""
    ended: list[tuple[str, str]] = field(default_factory=list)
    """(rollout, how it ended) by the responses"""
    errors: list[str] = field(default_factory=list)


def violations(store: Store, record: Record) -> tuple[list[str], dict[str, int]]:
    """Return one sentence for each thing that does not hold, and how much was done."""
    with store.ledger.read() as tx:
        counted = [cursor.position for cursor in tx.find(Cursor) if cursor.name.startswith(f"{COUNTED} ")]
        total = tx.get(Cursor, COUNT)
        served = tx.find(Prediction, where={"served": True})
        outcomes, events = tx.find(Outcome), tx.find(EventRecord, order_by=("id",))
        rollouts, serving = tx.find(Rollout), serving_model(tx)
        champions = tx.find(AuditEvent, where={"action": "model.champion"}, order_by=("number",))
    last = serving.id if serving else None
    found = [
        *record.errors,
        *_leases(counted, total),
        *_predictions(record, served),
        *_events(record, served, outcomes, events, rollouts),
        *_rollouts(record, rollouts),
    ]
    if champions and champions[-1].subject != last:
        found.append(f"model {champions[-1].subject[:12]} was promoted last and {str(last)[:12]} serves")
    counts = {
        "predictions": len(record.predicted),
        "events": len(events),
        "lease_holders": len({row["fence"] for row in counted}),
        "lease_writes": len(counted),
        "rollouts": len(rollouts),
        "promoted": sum(rollout.stage is RolloutStage.PROMOTED for rollout in rollouts),
        "recalled": sum(event.kind == "recalled" for event in events),
    }
    found += [f"nothing was done: no {name}" for name in ("predictions", "events", "lease_writes") if not counts[name]]
    return found, counts


def _leases(counted: list[dict[str, int]], total: Cursor | None) -> Iterator[str]:
    counted = sorted(counted, key=lambda row: row["order"])
    numbers = [row["number"] for row in counted]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"the count under the lease is not 1 to {len(numbers)} in order: two holders counted at a time"
    if total is not None and total.position["number"] != len(numbers):
        yield f"{len(numbers)} counts were committed and the sum is {total.position['number']}"
    fences = [row["fence"] for row in counted]
    if fences != sorted(fences):
        yield "a holder wrote after a later one had the lease"
    if len({(row["fence"], row["holder"]) for row in counted}) != len(set(fences)):
        yield "two holders had one fence number"


def _predictions(record: Record, served: list[Prediction]) -> Iterator[str]:
    by_key: defaultdict[str | None, set[str]] = defaultdict(set)
    for prediction in served:
        by_key[prediction.idempotency_key].add(prediction.id)
    for key, ids in record.predicted:
        if len(ids) != 1:
            yield f"key {key} got {len(ids)} predictions"
        if not ids <= by_key[key]:
            yield f"a prediction of key {key} is lost"
    for key in record.sent:
        if len(by_key[key]) > 1:
            yield f"key {key} is stored {len(by_key[key])} times"


def _events(
    record: Record,
    served: list[Prediction],
    outcomes: list[Outcome],
    events: list[EventRecord],
    rollouts: list[Rollout],
) -> Iterator[str]:
    ids = [event.id for event in events]
    for reader, told in record.told.items():
        if told != ids:
            missing, twice = len(set(ids) - set(told)), len(told) - len(set(told))
            order = "in order" if told == sorted(told) else "not in order"
            yield f"reader {reader}: {len(told)} of {len(ids)} events, {missing} missing, {twice} twice, {order}"
    causes = Counter((event.source, event.prediction_id) for event in events)
    wanted = {(outcome.id, outcome.prediction_id) for outcome in outcomes}
    back = {rollout.id for rollout in rollouts if rollout.stage is RolloutStage.ROLLED_BACK}
    wanted |= {(str(p.rollout_id), p.id) for p in served if p.arm is Arm.CANDIDATE and p.rollout_id in back}
    if set(causes) != wanted or max(causes.values(), default=1) > 1:
        yield f"{len(wanted - set(causes))} events are lost, {len(set(causes) - wanted)} have no cause"
    reported, stored = set(record.reported), Counter(outcome.prediction_id for outcome in outcomes)
    if reported - set(stored):
        yield f"{len(reported - set(stored))} outcomes are lost"
    if max(stored.values(), default=1) > 1:
        yield "an outcome is stored twice"


def _rollouts(record: Record, rollouts: list[Rollout]) -> Iterator[str]:
    by_id = {rollout.id: rollout for rollout in rollouts}
    if set(record.begun) - set(by_id):
        yield "a rollout that began is lost"
    if sum(rollout.stage not in ENDED for rollout in rollouts) > 1:
        yield "two rollouts are in progress"
    for rollout in rollouts:
        # A guardrail may end it, too: whoever set it asked for that.
        by_guardrail = "are tolerated" in (rollout.why or "")
        if rollout.stage in ENDED and rollout.stage not in record.asked[rollout.id] and not by_guardrail:
            yield f"rollout {rollout.id} is {rollout.stage} and nobody asked for that: {rollout.why}"
    for rollout_id, stage in record.ended:
        if by_id[rollout_id].stage != stage:
            yield f"rollout {rollout_id} was confirmed as {stage} and is {by_id[rollout_id].stage}"
