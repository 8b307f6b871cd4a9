"""When a round is due, what it would do, and that exactly one of several watchers runs it."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

import cluster.round as round_room
from cluster import schedule
from cluster.round_steps import RoundContext
from cluster.schedule import plan_round
from cluster.settings import RoundSettings, Settings
from images.importer import import_folder
from images.synth import synthesize
from labeling.environment import DATABASE
from labeling.settings import LabelingSettings
from records.frames import Frame
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    AnnotationKind,
    AuditEvent,
    Confirmation,
    RoundRecord,
    RoundStep,
    SourceLabel,
)
from tests.ports import free_port

SETTINGS = Settings(round=RoundSettings(watch_labels=3, watch_days=5, watch_poll_s=0.05))


def add_labels(tx: Transaction, count: int, images: Sequence[str] = ()) -> None:
    start = tx.count(Annotation)
    for number in range(start, start + count):
        tx.add(
            Annotation(
                id=new_id(),
                created_at=utc_now(),
                review_item_id=f"item {number}",
                image_id=images[number] if images else f"image {number}",
                kind=AnnotationKind.CLASS,
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
    assert schedule.why_due(store, SETTINGS) is None  # nothing was imported
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
    assert schedule.why_due(store, SETTINGS) == "no round has run yet"
    with store.ledger.begin() as tx:
        add_labels(tx, 2)
        add_round(tx, days_ago=0)
        add_labels(tx, 2)
    assert schedule.why_due(store, SETTINGS) is None
    with store.ledger.begin() as tx:
        add_labels(tx, 1)
    assert schedule.why_due(store, SETTINGS) == "3 new labels are in"
    with store.ledger.begin() as tx:
        add_round(tx, days_ago=6)
    patient = Settings(round=RoundSettings(watch_labels=100, watch_days=5))
    assert schedule.why_due(store, patient) == "6.0 days have passed"


STEP_RESULTS: dict[str, dict[str, Any]] = {
    "version": {"dataset_id": "d" * 64},
    "tune": {"settings": {}},
    "fit": {"model_id": "m" * 64},
    "evaluate": {"test": {}},
    "gate": {"verdict": "refuse", "why": "this is a test"},
}


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the steps by ones that take no time; order, lease, second check and records stay real."""
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
    stop, names = threading.Event(), [f"watcher {n}" for n in range(4)]
    polls: Counter[str] = Counter()
    said: list[str] = []

    def run(name: str) -> None:
        def go_on() -> bool:
            polls[name] += 1
            return not stop.is_set()

        own = open_store(RecordsSettings(home=store.home.root))
        schedule.watch(
            own, SETTINGS, started_by=name, on_event=lambda event: None, tell=said.append, go_on=go_on
        )  # fmt: skip
        own.close()

    def rounds() -> int:
        with store.ledger.read() as tx:
            return tx.count(RoundRecord) - tx.count(RoundRecord, where={"finished_at": None})

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        assert short_steps == []
        with store.ledger.begin() as tx:
            add_labels(tx, 3)
        assert wait_until(lambda: rounds() == 2, 120), said
        # Each has looked again since, and found nothing to do.
        seen = Counter(polls)
        assert wait_until(lambda: all(polls[name] > seen[name] + 1 for name in names), 120), said
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert short_steps == list(STEP_RESULTS), said
    with store.ledger.read() as tx:
        assert tx.count(RoundRecord) == 2
        (started,) = tx.find(AuditEvent, where={"action": "round.started"})
    assert started.actor.startswith("watcher")


def test_a_watcher_goes_on_without_a_label_studio(store: Store) -> None:
    external = LabelingSettings(url=f"http://127.0.0.1:{free_port()}", token=SecretStr("t"))
    said: list[str] = []

    def look(settings: Settings) -> None:
        schedule.look(store, settings, started_by="watcher", on_event=lambda event: None, tell=said.append)

    look(SETTINGS.model_copy(update={"labeling": external}))
    assert said == [], "nothing was pushed, so nothing is asked"
    (store.home.label_studio / DATABASE).write_bytes(b"of a server that was stopped")
    look(SETTINGS)
    assert said == [
        "Label Studio was not read, counting known labels: the local Label Studio is down; start it with "
        "`relook label up`"
    ]


def test_the_plan_shows_what_a_round_would_do_and_changes_nothing(store: Store) -> None:
    with store.ledger.begin() as tx:
        add_round(tx)
        add_labels(tx, 4)
    plan = plan_round(store, SETTINGS)
    assert (plan.round, plan.resumes, plan.new_labels, plan.due) == (2, False, 4, "4 new labels are in")
    assert plan.trials == SETTINGS.tuning.trials  # there is no earlier search
    assert len(plan.steps) == 7
    assert plan.expected_s == 0.0, "the steps of the round that ended are not kept"
    with store.ledger.begin() as tx:
        add_round(tx, finished=False)
    with store.ledger.begin() as tx:
        began = utc_now()
        for record, seconds in zip(tx.find(RoundRecord, order_by=("number",)), (90, 5), strict=True):
            tx.add(
                RoundStep(
                    id=new_id(), round_id=record.id, step="collect", started_at=began,
                    finished_at=began + timedelta(seconds=seconds), result={},
                )
            )  # fmt: skip
    plan = plan_round(store, SETTINGS)
    assert plan.resumes
    assert plan.steps[0] == "resumes after collect"
    assert plan.expected_s == 90.0, "of rounds that ended"
    with store.ledger.read() as tx:
        assert tx.count(RoundRecord) == 2


SMALL_ROUND = {
    "RELOOK_TRAINERS__MODEL__NAME": "custom_cnn",
    "RELOOK_TRAINERS__MODEL__SIDE_PX": "32",
    "RELOOK_TRAINERS__EPOCHS": "1",
    "RELOOK_TRAINERS__WORKERS__THREADS": "1",
    "RELOOK_ROUND__TUNE": "never",
    "RELOOK_ROUND__SELECT_BUDGET": "0",
    "RELOOK_ROUND__WATCH_LABELS": "3",
    "RELOOK_ROUND__WATCH_POLL_S": "0.5",
}


def wait_until(met: Callable[[], bool], timeout_s: float = 500.0) -> bool:
    end = time.monotonic() + timeout_s
    while not met() and time.monotonic() < end:
        time.sleep(0.2)
    return met()


@pytest.mark.slow
@pytest.mark.soak
def test_two_watching_commands_run_one_round_when_the_labels_are_in(store: Store, tmp_path: Path) -> None:
    synthesize(tmp_path / "images", lesions=140, seed=3, width_px=96)
    withheld = import_folder(store, tmp_path / "images", withhold_share=0.3, frames=(Frame(32),)).withheld
    with store.ledger.begin() as tx:
        add_round(tx)

    def finished() -> bool:
        with store.ledger.read() as tx:
            return tx.count(RoundRecord, where={"finished_at": None}) == 0 and tx.count(RoundRecord) == 2

    environment = {**os.environ, **SMALL_ROUND, "RELOOK_HOME": str(store.home.root)}
    command = [sys.executable, "-m", "cluster.cli", "round", "--watch"]
    logs = [tmp_path / f"watcher-{number}.log" for number in range(2)]
    watchers = []
    for log in logs:
        with log.open("w") as file:
            watchers.append(psutil.Popen(command, env=environment, stdout=file, stderr=file))
    try:
        # A watcher polls once its Ray has started.
        for watcher in watchers:
            assert wait_until(lambda w=watcher: any("raylet" in c.name() for c in w.children(recursive=True)))
        with store.ledger.begin() as tx:
            add_labels(tx, 3, withheld["image_id"].tolist())
        assert wait_until(finished), [log.read_text() for log in logs]
        time.sleep(3.0)  # six more polls of each
    finally:
        for watcher in watchers:
            # Ray may ignore a Ctrl-C while it starts.
            while watcher.is_running() and watcher.poll() is None:
                watcher.send_signal(signal.SIGINT)
                with contextlib.suppress(psutil.TimeoutExpired):
                    watcher.wait(20)
    said = [log.read_text() for log in logs]
    assert sum("✓ push" in text for text in said) == 1, said
    assert any("a round is due: 3 new labels are in" in text for text in said), said
    with store.ledger.read() as tx:
        assert [record.number for record in tx.find(RoundRecord, order_by=("number",))] == [1, 2]
        assert tx.count(AuditEvent, where={"action": "round.started"}) == 1
        assert tx.count(RoundStep) == len(round_room.STEPS)
        (version,) = tx.find(RoundStep, where={"step": "version"})
    assert version.result["labels_from_annotators"] == 3
