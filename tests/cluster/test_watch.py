"""When a round is due, and that of several watchers exactly one runs it."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

import cluster.round as round_room
from cluster import watch
from cluster.plan import plan_round
from cluster.round_steps import RoundContext
from cluster.settings import RoundSettings, Settings
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    AnswerKind,
    AuditEvent,
    Confirmation,
    ExpertLabel,
    RoundRecord,
    SourceLabel,
)

SETTINGS = Settings(round=RoundSettings(watch_labels=3, watch_days=5, watch_poll_s=0.05))


def add_labels(tx: Transaction, count: int) -> None:
    start = tx.count(ExpertLabel)
    for number in range(start, start + count):
        tx.add(
            ExpertLabel(
                id=new_id(),
                created_at=utc_now(),
                review_item_id=f"item {number}",
                image_id=f"image {number}",
                answer=AnswerKind.CLASS,
                label="nv",
                annotator="anna",
                annotated_at=utc_now(),
                server="http://127.0.0.1",
                project_id=1,
                task_id=number,
                annotation_id=number,
                revision="1",
            )
        )


def add_round(tx: Transaction, *, days_ago: float = 1.0, finished: bool = True) -> None:
    began = utc_now() - timedelta(days=days_ago)
    number = tx.count(RoundRecord) + 1
    tx.add(
        RoundRecord(
            id=new_id(),
            number=number,
            started_at=began,
            finished_at=began if finished else None,
            seed=0,
            settings_hash="",
        )
    )


def test_a_round_is_due_by_labels_or_by_days(store: Store) -> None:
    assert watch.why_due(store, SETTINGS) is None  # nothing was imported
    with store.ledger.begin() as tx:
        tx.add(
            SourceLabel(
                id="1",
                image_id="1",
                label="nv",
                confirmation=Confirmation.CONSENSUS,
                source="import:1",
                created_at=utc_now(),
            )
        )
    assert watch.why_due(store, SETTINGS) == "no round has run yet"
    with store.ledger.begin() as tx:
        add_labels(tx, 2)
        add_round(tx, days_ago=0)
        add_labels(tx, 2)
    assert watch.why_due(store, SETTINGS) is None
    with store.ledger.begin() as tx:
        add_labels(tx, 1)
    assert watch.why_due(store, SETTINGS) == "3 new labels are in"
    with store.ledger.begin() as tx:
        add_round(tx, days_ago=6)
    patient = Settings(round=RoundSettings(watch_labels=100, watch_days=5))
    assert watch.why_due(store, patient) == "6.0 days have passed"


STEP_RESULTS: dict[str, dict[str, Any]] = {
    "version": {"dataset_id": "d" * 64},
    "tune": {"settings": {}},
    "fit": {"model_id": "m" * 64},
    "evaluate": {"test": {}},
    "gate": {"verdict": "refuse", "why": "it was only a test"},
}


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that take no time; order, lease, second look and records stay real."""
    ran: list[str] = []

    def step(name: str) -> Callable[[RoundContext], dict[str, Any]]:
        def run(context: RoundContext) -> dict[str, Any]:
            ran.append(name)
            return {**STEP_RESULTS[name], "text": name}

        return run

    monkeypatch.setattr(round_room, "STEPS", tuple((name, step(name)) for name in STEP_RESULTS))
    return ran


def test_of_four_watchers_exactly_one_runs_the_round(store: Store, short_steps: list[str]) -> None:
    with store.ledger.begin() as tx:
        add_round(tx)
    stop = threading.Event()
    said: list[str] = []

    def run(name: str) -> None:
        own = open_store(RecordsSettings(home=store.home.root))
        watch.watch(
            own,
            SETTINGS,
            started_by=name,
            on_event=lambda event: None,
            tell=said.append,
            go_on=lambda: not stop.is_set(),
        )
        own.close()

    threads = [threading.Thread(target=run, args=(f"watcher {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    assert short_steps == []
    with store.ledger.begin() as tx:
        add_labels(tx, 3)
    threading.Event().wait(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert short_steps == list(STEP_RESULTS), said
    with store.ledger.read() as tx:
        assert tx.count(RoundRecord) == 2
        (started,) = tx.find(AuditEvent, where={"action": "round.started"})
    assert started.actor.startswith("watcher")


def test_the_plan_says_what_a_round_would_do_and_changes_nothing(store: Store) -> None:
    with store.ledger.begin() as tx:
        add_round(tx)
        add_labels(tx, 4)
    plan = plan_round(store, SETTINGS)
    assert (plan.round, plan.resumes, plan.new_labels, plan.due) == (2, False, 4, "4 new labels are in")
    assert plan.trials == SETTINGS.tuning.trials  # nothing has been searched before
    assert len(plan.steps) == 7
    with store.ledger.begin() as tx:
        add_round(tx, finished=False)
    assert plan_round(store, SETTINGS).resumes
    with store.ledger.read() as tx:
        assert tx.count(RoundRecord) == 2
