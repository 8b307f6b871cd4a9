"""When a round is due, what it would do, and the loop that starts it: `relook round --watch` and `--dry-run`.

Any number of watchers may run on any number of machines. Each polls the ledger; the one that gets the lease
checks again before it begins, so exactly one runs the round. An unfinished round of a process that ended is
resumed. `--dry-run` changes nothing; the duration that it shows is the median of earlier rounds.
"""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from statistics import median

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from cluster.round import RoundEvent, RoundOutcome, run_round
from cluster.round_steps import tune_now
from cluster.settings import Settings
from labeling.connection import connect
from labeling.local_server import LocalLabelStudio
from labeling.pull import pull
from records.errors import RefusedError, UnavailableError
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.models import serving_model
from records.store import Store
from records.types import Annotation, DatasetRecord, ReviewItem, ReviewState, RoundRecord, RoundStep, SourceLabel

Tell = Callable[[str], None]


def why_due(store: Store, settings: Settings) -> str | None:
    """Return why a round should start now, by `round.watch_labels` and `round.watch_days`; None if none should."""
    with store.ledger.read() as tx:
        rounds = tx.find(RoundRecord, order_by=("-number",), limit=1)
        if not rounds:
            return "no round has run yet" if tx.count(SourceLabel) else None
        new, now = new_labels(tx, rounds[0]), tx.now()
    if new >= settings.round.watch_labels:
        return f"{new} new labels are in"
    # A start that lies as far in the future was written before the clock was set back.
    passed = abs(now - rounds[0].started_at)
    if passed >= timedelta(days=settings.round.watch_days):
        return f"{passed.total_seconds() / 86_400:.1f} days have passed"
    return None


def new_labels(tx: Transaction, last: RoundRecord | None) -> int:
    """Count the annotations, without deleted ones, that a round did not see; None counts all."""
    table = TABLES[Annotation]
    query = sa.select(sa.func.count()).select_from(table).where(table.c.deleted.is_(False))
    if last is not None:
        # Compared with the newest annotation that the round saw, since `started_at` is of another machine's clock.
        collected = tx.find(RoundStep, where={"round_id": last.id, "step": "collect"}, limit=1)
        until = collected[0].result.get("known_until") if collected else None
        query = query.where(table.c.created_at > (datetime.fromisoformat(until) if until else last.started_at))
    return int(tx.connection.scalar(query) or 0)


def look(
    store: Store, settings: Settings, *, started_by: str, on_event: Callable[[RoundEvent], None], tell: Tell
) -> RoundOutcome | None:
    """Check once, and run a round if one is due or unfinished; None if this process ran none.

    `tell` gets the reason why a round starts or does not. Raises UserError if the round cannot run with this input.
    """
    # Before counting: labels are due for a round when they are in Label Studio, not only when they were pulled.
    _pull_annotations(store, settings, tell)
    with store.ledger.read() as tx:
        unfinished = tx.find(RoundRecord, where={"finished_at": None}, limit=1)
    reason = f"round {unfinished[0].number} was left unfinished" if unfinished else why_due(store, settings)
    if reason is None:
        return None
    tell(f"a round is due: {reason}")
    try:
        return run_round(
            store,
            settings,
            resume=bool(unfinished),
            started_by=started_by,
            # Two watchers may see the same labels. The second one gets the lease when the first has ended its round.
            still_wanted=lambda: why_due(store, settings) is not None,
            on_event=on_event,
        )
    except RefusedError as error:
        # Another watcher has the lease or has just run the round: no error, it is polled again.
        tell(f"not here: {error}")
        return None


def watch(
    store: Store,
    settings: Settings,
    *,
    started_by: str,
    on_event: Callable[[RoundEvent], None],
    tell: Tell,
    go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Poll until `go_on` returns false, and run the rounds that become due.

    Args:
        store: to work on.
        settings: of the rounds; `round.watch_poll_s` is the time between two polls.
        started_by: for the audit.
        on_event: is called with every event of a round.
        tell: is called with a sentence on what happens between rounds.
        go_on: is called before every poll.
    Returns:
        How many rounds this process ran.
    Raises:
        UserError: a round cannot run with this input.
    """
    ran = 0
    while go_on():
        try:
            ran += look(store, settings, started_by=started_by, on_event=on_event, tell=tell) is not None
        # A database or cluster that is down for a while must not end the watcher; the next poll tries again.
        except UnavailableError as error:
            tell(f"waiting: {error}")
        time.sleep(settings.round.watch_poll_s)
    return ran


def _pull_annotations(store: Store, settings: Settings, tell: Tell) -> None:
    """Pull annotations, so that they are counted even if no `relook label sync --watch` runs."""
    try:
        client = connect(store.home, settings.labeling)
        if client is not None:
            pull(store, client, settings.labeling)
    except (UnavailableError, RefusedError) as error:
        tell(f"Label Studio was not read, counting known labels: {error}")


class RoundPlan(BaseModel):
    """What a round would do and how long it would take."""

    model_config = ConfigDict(frozen=True)

    round: int
    resumes: bool = Field(description="true if an unfinished round would be resumed")
    due: str | None = Field(description="why `--watch` would start it now; empty if it would not")
    new_labels: int = Field(ge=0, description="annotations since the last round began")
    trials: int = Field(ge=0, description="trials of the search; 0 if the last winner would be fitted")
    epochs: int = Field(ge=1, description="of the fit")
    images: int = Field(ge=0, description="in the newest dataset version")
    champion: str | None
    waiting_items: int = Field(ge=0, description="review items that the push would send, without newly selected ones")
    steps: list[str] = Field(description="a sentence per step")
    expected_s: float | None = Field(description="median of earlier rounds, seconds; null without any")


def plan_round(store: Store, settings: Settings) -> RoundPlan:
    """Return what a round would do now; nothing is changed."""
    with store.ledger.read() as tx:
        rounds = tx.find(RoundRecord, order_by=("-number",))
        unfinished = next((record for record in rounds if record.finished_at is None), None)
        number = unfinished.number if unfinished else len(rounds) + 1
        before = next((record for record in rounds if record is not unfinished), None)
        labels = new_labels(tx, before)
        newest = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)
        champion = serving_model(tx)
        waiting = tx.count(ReviewItem, where={"state": ReviewState.NEW})
        durations = _durations(tx)
        done = [s.step for s in tx.find(RoundStep, where={"round_id": unfinished.id})] if unfinished else []
    # The rule of the step itself, so that a plan and its round cannot differ.
    searches, why = tune_now(store, settings, number)
    trials, trainers = settings.tuning.trials if searches else 0, settings.trainers
    steps = [
        *([f"resumes after {done[-1]}"] if done else []),
        f"collect and version: {labels} new labels over {newest[0].num_images if newest else 0} images",
        f"tune: {trials} trials ({why})" if searches else f"tune: none ({why})",
        f"fit: {trainers.model.name}, {trainers.epochs} epochs on {trainers.workers.count} workers",
        "evaluate and gate: read the test and the gate split, audited",
        f"rollout: {'a person approves' if settings.round.approval == 'person' else 'automatic if the gate promotes'}",
        f"select: up to {settings.round.select_budget} images",
        f"push: {waiting} review items wait"
        + ("" if _has_label_studio(store, settings) else ", no Label Studio is set up"),
    ]
    return RoundPlan(
        round=number,
        resumes=unfinished is not None,
        due=why_due(store, settings),
        new_labels=labels,
        trials=trials,
        epochs=trainers.epochs,
        images=newest[0].num_images if newest else 0,
        champion=champion.id if champion else None,
        waiting_items=waiting,
        steps=steps,
        expected_s=median(durations) if durations else None,
    )


def _durations(tx: Transaction) -> list[float]:
    """Return how long the steps of each finished round took, seconds."""
    # Summed over steps: the time in which an interrupted round waited for its resumption does not count.
    finished = {record.id for record in tx.find(RoundRecord) if record.finished_at is not None}
    seconds = dict.fromkeys(finished, 0.0)
    for step in tx.find(RoundStep):
        if step.round_id in finished:
            seconds[step.round_id] += (step.finished_at - step.started_at).total_seconds()
    return list(seconds.values())


def _has_label_studio(store: Store, settings: Settings) -> bool:
    return settings.labeling.url is not None or LocalLabelStudio(store.home, settings.labeling).existed
