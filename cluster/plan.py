"""`relook round --dry-run`: what a round would do now and what it would cost; nothing is changed.

In: an open store and settings. Out: a `RoundPlan`. Times come from earlier rounds of this ledger, and
are left out where there are none.
"""

from statistics import median

from pydantic import BaseModel, ConfigDict, Field

from cluster.round_steps import tune_now
from cluster.settings import Settings
from cluster.watch import new_labels, why_due
from labeling.local_server import LocalLabelStudio
from records.ledger import Transaction
from records.models import serving_model
from records.store import Store
from records.types import DatasetRecord, ReviewItem, ReviewState, RoundRecord, RoundStep


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
        f"fit: {settings.trainers.model}, {settings.trainers.epochs} epochs on {settings.trainers.num_workers} workers",
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
