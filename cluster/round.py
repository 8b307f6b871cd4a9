"""The round: runs its steps in order, records each result, and resumes after a kill.

    collect -> version -> tune -> fit -> evaluate -> gate -> rollout -> select -> push

The steps are functions in `cluster.round_steps`. The result of a step is recorded when the step ends. A killed round
is resumed with the same settings after its last recorded step, and ends with the same result. A step that was killed
before its result was recorded runs again. Most steps are idempotent; a step that must not run twice records its result
in the transaction of its last write.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from cluster import round_steps
from cluster.gate import GateReport
from cluster.notify import notifying
from cluster.promotion import require_key_to_start
from cluster.provenance import complete_manifest, manifest_file, round_folder, write_change_record, write_manifest
from cluster.round_steps import RoundContext, StepResult
from cluster.settings import Settings, settings_hash
from records import audit, tracing
from records.errors import RefusedError
from records.ids import new_id, utc_now
from records.lease import LEASE_S, hold
from records.ledger import Transaction
from records.models import find_bundle
from records.store import Store
from records.types import RoundRecord, RoundStep
from trainers.evaluation.figures import Evaluation
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.fit import METRICS_FILE
from trainers.settings import flat_values
from trainers.tracking.server import Tracked
from tuning.search import track_trial
from tuning.trials import SearchEvent


@dataclass(frozen=True)
class RoundEvent:
    """Progress of a round.

    Args:
        round_number: of the round.
        step: name of the step.
        state: `started`, `progress`, `done`, or `kept` for a step that an earlier run finished.
        text: one sentence.
        payload: the result of a finished step; a report or event of the engine for `progress`.
    """

    round_number: int
    step: str
    state: str
    text: str
    payload: Any = None


@dataclass(frozen=True)
class RoundOutcome:
    """A finished round, and the results of its steps by name."""

    record: RoundRecord
    results: dict[str, StepResult]


STEPS: tuple[tuple[str, Callable[[RoundContext], StepResult]], ...] = (
    ("collect", round_steps.collect),
    ("version", round_steps.version),
    ("tune", round_steps.tune),
    ("fit", round_steps.fit),
    ("evaluate", round_steps.evaluate),
    ("gate", round_steps.gate),
    ("rollout", round_steps.rollout),
    ("select", round_steps.select),
    ("push", round_steps.push),
)


def run_round(
    store: Store,
    settings: Settings,
    *,
    resume: bool = False,
    started_by: str = "unknown",
    still_wanted: Callable[[], bool] = lambda: True,
    on_event: Callable[[RoundEvent], None] = lambda event: None,
) -> RoundOutcome:
    """Run a round, or resume the one that was interrupted.

    Args:
        store: to work on.
        settings: of the round; a resumed round must have the ones it began with.
        resume: resume the unfinished round instead of starting one.
        started_by: for the audit; with `round.approval=person` another person has to approve the model.
        still_wanted: is called after the lease is acquired; if it returns false, the round is not started.
        on_event: is called with every event.
    Returns:
        The finished round and the results of its steps.
    Raises:
        RefusedError: a round is unfinished and `resume` is false; no round is unfinished and `resume` is true;
            another process runs a round; the settings of a resumed round changed; or `still_wanted` returns false.
    """
    # A killed process cannot release its lease, so `resume` waits until the lease expires.
    with hold(store.ledger, "round", wait_s=LEASE_S if resume else 0.0):
        # Called under the lease, because what a watcher read before it had the lease may be out of date.
        if not resume and not still_wanted():
            raise RefusedError("another process ran the round meanwhile")
        record = _resume(store, settings) if resume else _start(store, settings, started_by)
        run_dir = round_folder(store.home, record.number)
        write_manifest(run_dir, record, settings)
        context = RoundContext(store, settings, record, run_dir, _recorded_results(store, record))
        tracked = Tracked(settings.tracking, "round", f"{run_dir.name}-{record.id[-8:]}", {"round": record.number})
        with notifying(settings.round, record.number) as notify_end, tracked, _traced(record, resume):
            for name, step in STEPS:
                _run_step(context, name, step, _tracking(tracked, on_event))
                _track(tracked, context, name)
            finished = _finish(context)
        notify_end(finished, context.results)
        return RoundOutcome(finished, context.results)


def _traced(record: RoundRecord, resume: bool) -> AbstractContextManager[object]:
    """Return the first span of the round's trace; one that is resumed has it, unless the kill came before its end."""
    begin = tracing.span if resume else tracing.trace
    return begin("resumed round" if resume else "round", record.id, number=record.number)


def _tracking(tracked: Tracked, on_event: Callable[[RoundEvent], None]) -> Callable[[RoundEvent], None]:
    """Record epochs and trials in MLflow as they end, and pass every event on."""

    def listen(event: RoundEvent) -> None:
        if isinstance(event.payload, EpochReport):
            tracked.epoch(event.payload)
        elif isinstance(event.payload, SearchEvent):
            track_trial(tracked, event.payload)
        on_event(event)

    return listen


def _track(tracked: Tracked, context: RoundContext, name: str) -> None:
    """Record the result of a step in MLflow; also of a step that an earlier process finished, which changes nothing."""
    if not tracked.is_on:
        return
    result = context.results[name]
    if name == "fit":
        settings = context.results["tune"]["settings"]
        tracked.settings(flat_values(settings))
        tracked.fitted(find_bundle(context.store, result["model_id"]), context.run_dir / "fit" / METRICS_FILE)
    elif name == "evaluate":
        tracked.evaluation(Evaluation.model_validate(result["test"]))
    elif name == "gate":
        tracked.tags({"relook.verdict": str(result["verdict"]), "relook.why": str(result["why"])})
        tracked.file(context.run_dir / "gate.json")
    elif name == "rollout":
        tracked.aliases(context.store)


def _run_step(
    context: RoundContext,
    name: str,
    step: Callable[[RoundContext], StepResult],
    on_event: Callable[[RoundEvent], None],
) -> None:
    number = context.record.number
    if name in context.results:
        on_event(RoundEvent(number, name, "kept", f"{name}: already done", context.results[name]))
        return
    on_event(RoundEvent(number, name, "started", f"{name} started"))
    started_at = utc_now()

    def tell(text: str, payload: Any) -> None:
        on_event(RoundEvent(number, name, "progress", text, payload))

    # A step may record its result itself, in the transaction of its last write (see `RoundContext.record_with`).
    recorded = False

    def record(tx: Transaction, result: StepResult) -> None:
        nonlocal recorded
        recorded = True
        tx.add(_step_record(context, name, started_at, result))

    with tracing.span(name, context.record.id):
        result = step(replace(context, tell=tell, record_with=record))
    # If the process is killed before this commit, the step runs again when the round is resumed. A step that must not
    # run twice has recorded its result already.
    if not recorded:
        with context.store.ledger.begin() as tx:
            tx.add(_step_record(context, name, started_at, result))
    context.results[name] = result
    on_event(RoundEvent(number, name, "done", str(result.get("text", f"{name} done")), result))


def _step_record(context: RoundContext, name: str, started_at: datetime, result: StepResult) -> RoundStep:
    return RoundStep(
        id=new_id(), round_id=context.record.id, step=name, started_at=started_at, finished_at=utc_now(), result=result
    )


def _start(store: Store, settings: Settings, started_by: str) -> RoundRecord:
    require_key_to_start(settings, started_by)
    with store.ledger.begin() as tx:
        unfinished = tx.find(RoundRecord, where={"finished_at": None}, limit=1)
        if unfinished:
            raise RefusedError(f"round {unfinished[0].number} is unfinished; resume it with `relook round --resume`")
        record = RoundRecord(
            id=new_id(),
            number=tx.count(RoundRecord) + 1,
            started_at=tx.now(),
            seed=settings.round.seed,
            settings_hash=settings_hash(settings),
        )
        tx.add(record)
        details = {"number": record.number, "settings_hash": record.settings_hash}
        audit.append(tx, actor=started_by, action="round.started", subject=record.id, details=details)
    return record


def _resume(store: Store, settings: Settings) -> RoundRecord:
    with store.ledger.read() as tx:
        unfinished = tx.find(RoundRecord, where={"finished_at": None}, limit=1)
    if not unfinished:
        raise RefusedError("no round is unfinished; start one with `relook round`")
    # Other settings would mix results of two configurations in one round, and its manifest would be wrong.
    if unfinished[0].settings_hash != settings_hash(settings):
        manifest = manifest_file(round_folder(store.home, unfinished[0].number))
        raise RefusedError(
            f"round {unfinished[0].number} began with other settings; resume it with those that {manifest} lists"
        )
    return unfinished[0]


def _recorded_results(store: Store, record: RoundRecord) -> dict[str, StepResult]:
    with store.ledger.read() as tx:
        return {step.step: step.result for step in tx.find(RoundStep, where={"round_id": record.id})}


def _finish(context: RoundContext) -> RoundRecord:
    # The files are written first and `finished_at` last. After a kill in between the round is still unfinished;
    # resuming it finds all steps recorded and only writes the same files again.
    complete_manifest(context.run_dir, context.results)
    if context.results.get("rollout", {}).get("promoted"):
        report = GateReport.model_validate(context.results["gate"])
        write_change_record(context.store, report.challenger, report, f"round {context.record.number}")
    gate = context.results["gate"]
    changes = {
        "finished_at": utc_now(),
        "verdict": gate["verdict"],
        "why": gate["why"],
        "model_id": context.results["fit"]["model_id"],
        "dataset_id": context.results["version"]["dataset_id"],
    }
    with context.store.ledger.begin() as tx:
        tx.update(RoundRecord, context.record.id, **changes)
        return tx.require(RoundRecord, context.record.id)
