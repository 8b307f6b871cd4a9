"""`relook round --watch`: start a round when enough new labels are in, or enough days have passed.

Any number of watchers may run on any number of machines. Each asks the ledger; whoever gets the lease
asks once more before it begins, so exactly one of them runs the round. A round that another process
left unfinished is gone on with.
"""

import time
from collections.abc import Callable
from datetime import timedelta
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
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.models import serving_model
from records.store import Store
from records.types import Annotation, DatasetRecord, ReviewItem, ReviewState, RoundRecord, RoundStep, SourceLabel

Tell = Callable[[str], None]


def why_due(store: Store, settings: Settings) -> str | None:
    """Say why a round should start now.

    Args:
        store: with the ledger.
        settings: `round.watch_labels` and `round.watch_days`.
    Returns:
        One sentence, or None if none should.
    """
    with store.ledger.read() as tx:
        rounds = tx.find(RoundRecord, order_by=("-number",), limit=1)
        if not rounds:
            return "no round has run yet" if tx.count(SourceLabel) else None
        new = new_labels(tx, rounds[0])
    if new >= settings.round.watch_labels:
        return f"{new} new labels are in"
    passed = utc_now() - rounds[0].started_at
    if passed >= timedelta(days=settings.round.watch_days):
        return f"{passed.total_seconds() / 86_400:.1f} days have passed"
    return None


def new_labels(tx: Transaction, last: RoundRecord | None) -> int:
    """Count the annotator labels that came after a round began.

    Args:
        tx: any transaction.
        last: the round, None to count all.
    Returns:
        Labels; deleted ones do not count.
    """
    table = TABLES[Annotation]
    query = sa.select(sa.func.count()).select_from(table).where(table.c.deleted.is_(False))
    if last is not None:
        query = query.where(table.c.created_at > last.started_at)
    return int(tx.connection.scalar(query) or 0)


def look(
    store: Store, settings: Settings, *, started_by: str, on_event: Callable[[RoundEvent], None], tell: Tell
) -> RoundOutcome | None:
    """Look once, and run a round if one is due or was left unfinished.

    Args:
        store: everything that is kept.
        settings: of the round.
        started_by: for the audit.
        on_event: told of every step of a round.
        tell: told why a round starts, or why one does not.
    Returns:
        The round that this process ran, None if it ran none.
    Raises:
        UserError: the round cannot run with this input.
    """
    _read_answers(store, settings, tell)
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
            still_wanted=lambda: why_due(store, settings) is not None,
            on_event=on_event,
        )
    except RefusedError as error:
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
    """Look again and again.

    Args:
        store: everything that is kept.
        settings: of the rounds; `round.watch_poll_s` is the time between two looks.
        started_by: for the audit.
        on_event: told of every step of a round.
        tell: told what happens between rounds.
        go_on: asked before every look.
    Returns:
        How many rounds this process ran.
    Raises:
        UserError: a round cannot run with this input.
    """
    ran = 0
    while go_on():
        try:
            ran += look(store, settings, started_by=started_by, on_event=on_event, tell=tell) is not None
        except UnavailableError as error:
            tell(f"waiting: {error}")
        time.sleep(settings.round.watch_poll_s)
    return ran


def _read_answers(store: Store, settings: Settings, tell: Tell) -> None:
    """Read new answers, so that labels count also where no `relook label sync --watch` runs."""
    try:
        client = connect(store.home, settings.labeling)
        if client is not None:
            pull(store, client, settings.labeling)
    except (UnavailableError, RefusedError) as error:
        tell(f"counting the labels that are known: {error}")


class RoundPlan(BaseModel):
    """What a round would do."""

    model_config = ConfigDict(frozen=True)

    round: int
    resumes: bool = Field(description="true if a round was left unfinished and would be gone on with")
    due: str | None = Field(description="why `--watch` would start it now; empty if it would not")
    new_labels: int = Field(ge=0, description="annotator labels since the last round began")
    trials: int = Field(ge=0, description="of the search; 0 if the last winner would be fitted")
    epochs: int = Field(ge=1, description="of the fit")
    images: int = Field(ge=0, description="in the newest dataset version")
    champion: str | None
    waiting_questions: int = Field(ge=0, description="that the push would send, without those it selects")
    steps: list[str] = Field(description="a sentence per step")
    expected_s: float | None = Field(description="median of earlier rounds, seconds")


def plan_round(store: Store, settings: Settings) -> RoundPlan:
    """Say what a round would do now.

    Args:
        store: everything that is kept.
        settings: of the round.
    Returns:
        The plan.
    """
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
    searches, why = tune_now(store, settings, number)
    trials = settings.tuning.trials if searches else 0
    steps = [
        *([f"goes on after {done[-1]}"] if done else []),
        f"collect and version: {labels} new labels over {newest[0].num_images if newest else 0} images",
        f"tune: {trials} trials ({why})" if searches else f"tune: none ({why})",
        f"fit: {settings.trainers.model.name}, {settings.trainers.epochs} epochs on {settings.trainers.workers.count} workers",
        "evaluate and gate: one audited look at each of the two splits",
        f"rollout: {'a person approves' if settings.round.approval == 'person' else 'automatic if the gate promotes'}",
        f"select: up to {settings.round.select_budget} images",
        f"push: {waiting} questions wait"
        + ("" if _has_label_studio(store, settings) else ", no Label Studio is set up"),
    ]
    return RoundPlan(
        round=number,
        resumes=unfinished is not None,
        due=why_due(store, settings),
        new_labels=labels,
        trials=trials,
        epochs=settings.trainers.epochs,
        images=newest[0].num_images if newest else 0,
        champion=champion.id if champion else None,
        waiting_questions=waiting,
        steps=steps,
        expected_s=median(durations) if durations else None,
    )


def _durations(tx: Transaction) -> list[float]:
    """Return how long earlier rounds worked, without the time that an interrupted one lay still, seconds."""
    finished = {record.id for record in tx.find(RoundRecord) if record.finished_at is not None}
    seconds = dict.fromkeys(finished, 0.0)
    for step in tx.find(RoundStep):
        if step.round_id in finished:
            seconds[step.round_id] += (step.finished_at - step.started_at).total_seconds()
    return list(seconds.values())


def _has_label_studio(store: Store, settings: Settings) -> bool:
    return settings.labeling.url is not None or LocalLabelStudio(store.home, settings.labeling).existed
