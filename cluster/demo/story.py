"""The demo's order of events. Each stage is kept when it is done, so an interrupted demo goes on.

data -> round 1 -> serve -> traffic -> experts -> round 2 under traffic -> drills -> trace -> summary
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cluster.demo.drills import harm_in_words, harmed_copy, twin
from cluster.demo.experts import answer_as_simulated, label_studio_figures, wait_for_people
from cluster.demo.summary import DemoSummary, RoundSummary, Stages, summary_path, write_json
from cluster.demo.traffic import Picture, Tally, Traffic
from cluster.demo.view import View
from cluster.gate import Verdict
from cluster.round import RoundEvent, run_round
from cluster.round_steps import judge
from cluster.session import start_ray
from cluster.settings import Settings
from labeling.connection import require
from labeling.local_server import LocalLabelStudio, ServerInfo
from labeling.pull import pull
from labeling.push import push
from records import audit
from records.bundles import Bundle, find_bundle, register, serve_model, serving_model
from records.datasets import load_dataset
from records.errors import IntegrityError, RefusedError, UnavailableError
from records.lineage import trace
from records.store import Store
from records.types import Image, ModelRecord, ModelStatus, Prediction, ReviewItem, RoundRecord
from serving.client import Client
from serving.launch import ServiceHandle, start_service
from trainers.data.audit import audit_dataset
from trainers.data.importer import import_folder
from trainers.data.stored import find_images, read_picture
from trainers.data.synth import synthesize

BACKGROUND_RATE_PER_S = 3.0
SWAP_TIMEOUT_S = 60.0

StageResult = dict[str, Any]
Expert = Literal["simulated", "human"]


@dataclass
class Demo:
    """A demo that is under way.

    Args:
        settings: of everything.
        store: everything that is kept.
        view: what shows it.
        tally: the traffic's counts.
        expert: who answers in Label Studio.
        stages: what is done already.
        seconds: how long each stage took.
    """

    settings: Settings
    store: Store
    view: View
    tally: Tally
    expert: Expert
    stages: Stages
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, title: str, why: str, work: Callable[[], StageResult]) -> StageResult:
        """Run a stage unless an earlier run of the demo finished it.

        Args:
            name: of the stage.
            title: what happens.
            why: in one sentence.
            work: does it and returns JSON values.
        Returns:
            What the stage produced, now or then.
        """
        if name in self.stages.results:
            with self.view.chapter(title, "done before; kept"):
                return self.stages.results[name]
        started = time.perf_counter()
        with self.view.chapter(title, why):
            result = work()
        result["seconds"] = round(time.perf_counter() - started, 1)
        self.stages.done(name, result)
        return result


@dataclass(frozen=True)
class Running:
    """What a finished demo still has running, for `relook demo` to show until it is left."""

    summary: DemoSummary
    service: ServiceHandle
    label_studio: ServerInfo


@contextmanager
def play(settings: Settings, store: Store, *, data: Path | None, expert: Expert) -> Generator[Running]:
    """Play the demo; service and Label Studio run until the block ends.

    Args:
        settings: of everything.
        store: the home that the demo fills.
        data: a folder in HAM10000's layout, or a folder with a table; None generates pictures.
        expert: `simulated` answers from the known truth, `human` waits for people.
    Yields:
        The summary, and what is still running.
    Raises:
        UserError: the data, a port or a setting cannot be used, or Label Studio does not come up.
    """
    stages = Stages(store.home)
    tally = Tally()
    demo = Demo(settings, store, View(tally), tally, expert, stages)
    with ExitStack() as running:
        with demo.view.shown():
            # Label Studio's first start takes a while, so it starts while pictures are read.
            starting = _start_label_studio(demo, running)
            running.enter_context(start_ray(settings))
            _require_alive(starting)
            _first_half(demo, data, starting)
            with demo.view.chapter("Service", "the model answers over HTTP, with a heat map beside every answer"):
                service = start_service(settings.serving, settings.records)
                running.callback(service.stop)
                demo.view.say(f"listening on {service.url}")
            summary = _second_half(demo, service, starting.result())
        yield Running(summary, service, starting.result())


@contextmanager
def reopen(settings: Settings, store: Store) -> Generator[Running]:
    """Bring a finished demo back: the same model answers, Label Studio holds the same tasks.

    Args:
        settings: of everything.
        store: the home that the demo filled.
    Yields:
        The summary of then, and what is running now.
    Raises:
        RefusedError: no demo was finished here.
    """
    path = summary_path(store.home)
    if not path.is_file():
        raise RefusedError(f"no finished demo is in {store.home.root}; play one with `relook demo`")
    summary = DemoSummary.model_validate_json(path.read_text())
    with ExitStack() as running:
        server = LocalLabelStudio(store.home, settings.labeling)
        running.callback(server.down)
        info = server.up()
        running.enter_context(start_ray(settings))
        service = start_service(settings.serving, settings.records)
        running.callback(service.stop)
        yield Running(summary, service, info)


def _start_label_studio(demo: Demo, running: ExitStack) -> "Future[ServerInfo]":
    server = LocalLabelStudio(demo.store.home, demo.settings.labeling)
    running.callback(server.down)  # runs after the pool below has ended, so nothing is started behind its back
    pool = running.enter_context(ThreadPoolExecutor(1, thread_name_prefix="label-studio"))
    return pool.submit(server.up)


def _require_alive(starting: "Future[ServerInfo]") -> None:
    """Raise what kept Label Studio from coming up, as soon as it is known."""
    if starting.done():
        starting.result()


def _first_half(demo: Demo, data: Path | None, starting: "Future[ServerInfo]") -> None:
    demo.stage(
        "data",
        "Pictures",
        "a model is only as honest as its split: no lesion may be on two sides",
        lambda: _data(demo, data),
    )
    _require_alive(starting)
    demo.stage(
        "round_1",
        "Round 1",
        "search, fit, evaluate and ask the gate before anybody is answered",
        lambda: _round(demo),
    )


def _second_half(demo: Demo, service: ServiceHandle, server: ServerInfo) -> DemoSummary:
    demo.stage(
        "traffic",
        "Traffic",
        "unlabelled pictures arrive; doubts go to the experts by themselves",
        lambda: _traffic(demo, service),
    )
    demo.stage(
        "experts",
        "Experts",
        "people see the doubtful pictures in Label Studio and answer",
        lambda: _experts(demo, server),
    )
    background = Traffic(
        service.url, _pictures(demo), demo.tally, requests=None, concurrency=2, rate_per_s=BACKGROUND_RATE_PER_S
    )
    background.start()
    try:
        demo.stage(
            "round_2",
            "Round 2",
            "the next model learns from what the experts said, while requests keep coming",
            lambda: _round(demo),
        )
        demo.stage(
            "gate_drill",
            "Gate drill",
            "planted: a challenger that misses the key class must be refused",
            lambda: _gate_drill(demo),
        )
        demo.stage("swap", "Swap", "a new model takes over while requests come in", lambda: _swap(demo, service))
    finally:
        background.stop()
    demo.stage(
        "trace",
        "Trace",
        "one flagged picture, from the request to the model that learned from it",
        lambda: _trace(demo),
    )
    summary = _summary(demo, server)
    write_json(summary_path(demo.store.home), summary.model_dump(mode="json"))
    return summary


def _data(demo: Demo, data: Path | None) -> StageResult:
    settings, home = demo.settings, demo.store.home
    folder = data
    if folder is None:
        folder = home.demo / "generated"
        demo.view.say(f"generating {settings.demo.synth_lesions} lesions (seed {settings.demo.seed})")
        synthesize(folder, lesions=settings.demo.synth_lesions, seed=settings.demo.seed)
    report = import_folder(
        demo.store, folder, withhold_share=settings.demo.withhold_share, side_px=(settings.trainers.side_px,)
    )
    report.withheld.to_parquet(home.demo / "truth.parquet", index=False)
    found = audit_dataset(demo.store, load_dataset(demo.store, report.dataset_id))
    demo.view.say(f"{report.images} pictures of {report.lesions} lesions; {found.leaked_lesions} lesions on two sides")
    demo.view.say(f"a random split of the pictures would have leaked {found.random_split.leaked_lesions} lesions")
    demo.view.say(f"{len(report.withheld)} training pictures keep their diagnosis to themselves: they are the traffic")
    return {
        "source": str(data) if data else "generated",
        "images": report.images,
        "lesions": report.lesions,
        "sides": found.sides,
        "leaked_lesions": found.leaked_lesions,
        "random_split_leaked_lesions": found.random_split.leaked_lesions,
        "quarantined": found.quarantined,
        "unlabelled": len(report.withheld),
    }


def _round(demo: Demo) -> StageResult:
    """Run the next round, or go on with one that an interrupted demo left."""
    with demo.store.ledger.read() as tx:
        unfinished = tx.count(RoundRecord, where={"finished_at": None}) > 0
    outcome = run_round(demo.store, demo.settings, resume=unfinished, on_event=lambda event: _show(demo.view, event))
    results = outcome.results
    test = results["evaluate"]["test"]
    key = test["key_class"] or {}
    summary = RoundSummary(
        model_id=results["fit"]["model_id"],
        dataset_id=results["version"]["dataset_id"],
        labels_from_experts=results["version"]["labels_from_experts"],
        balanced_accuracy=test["balanced_accuracy"],
        balanced_accuracy_ci=test["balanced_accuracy_ci"],
        melanoma_sensitivity=key.get("sensitivity"),
        melanoma_specificity=key.get("specificity"),
        promoted=results["rollout"]["promoted"],
        status=results["rollout"]["status"],
        why=results["gate"]["why"],
    )
    return {
        "summary": summary.model_dump(mode="json"),
        "search": results["tune"],
        "held_out": results["version"]["held_out"],
    }


def _show(view: View, event: RoundEvent) -> None:
    if event.state in ("done", "kept"):
        view.say(event.text)
    elif event.payload is not None:
        view.now(f"{event.step}: {event.payload}")
    else:
        view.now(event.text)


def _traffic(demo: Demo, service: ServiceHandle) -> StageResult:
    plan = demo.settings.demo
    traffic = Traffic(
        service.url,
        _pictures(demo),
        demo.tally,
        requests=plan.requests,
        concurrency=plan.concurrency,
        flags=plan.flags,
    )
    traffic.start()
    traffic.wait()
    with demo.store.ledger.read() as tx:
        items = tx.count(ReviewItem)
    decisions = ", ".join(f"{count} {name}" for name, count in sorted(demo.tally.decisions.items()))
    demo.view.say(f"{demo.tally.requests} requests, {demo.tally.failed} failed: {decisions}")
    demo.view.say(f"{demo.tally.flagged} answers flagged; {items} questions for experts are in the ledger")
    return {"review_items": items, "flagged_predictions": demo.tally.flagged_predictions, **demo.tally.figures()}


def _pictures(demo: Demo) -> list[Picture]:
    truth = pd.read_parquet(demo.store.home.demo / "truth.parquet")
    truth = truth.sample(n=min(len(truth), demo.settings.demo.requests), random_state=demo.settings.demo.seed)
    images = find_images(demo.store, truth["image_id"].tolist())
    return [
        Picture(image.id, image.source_id or image.id[:12], read_picture(demo.store, image), label)
        for image, label in zip(images, truth["label"], strict=True)
    ]


def _experts(demo: Demo, server: ServerInfo) -> StageResult:
    client = require(demo.store.home, demo.settings.labeling)
    with demo.store.ledger.read() as tx:
        current = serving_model(tx)
    if current is None:
        raise IntegrityError("no model answers, so there is nothing to ask experts about")
    pushed = push(demo.store, client, demo.settings.labeling, current.id)
    demo.view.say(f"{pushed.pushed} tasks pushed to Label Studio {server.version} at {server.url}")
    if demo.expert == "simulated":
        answered = answer_as_simulated(demo.store, client, demo.settings)
        demo.view.say(f"the simulated expert answered {answered} of them")
    else:
        wait_for_people(demo.store, client, server, demo.view)
    pulled = pull(demo.store, client, demo.settings.labeling)
    demo.view.say(f"{pulled.new_labels} answers read back, {pulled.cant_tell} times `can't tell`")
    return {"tasks_pushed": pushed.pushed, "new_labels": pulled.new_labels}


def _gate_drill(demo: Demo) -> StageResult:
    with demo.store.ledger.read() as tx:
        current = serving_model(tx)
        rounds = tx.find(RoundRecord, order_by=("-number",), limit=1)
    if current is None:
        raise IntegrityError("no model answers, so there is nothing to harm")
    harmed = harmed_copy(demo.store, find_bundle(demo.store, current.id))
    dataset = load_dataset(demo.store, rounds[0].dataset_id or "")
    report = judge(demo.store, demo.settings, harmed, dataset, actor="demo gate drill (planted)")
    demo.view.say(f"{harm_in_words(demo.store.taxonomy)}: {report.verdict}, {report.why}")
    return {
        "harmed_challenger_refused": report.verdict is Verdict.REFUSE,
        "planted": harm_in_words(demo.store.taxonomy),
        "why": report.why,
        "checks": [check.model_dump(mode="json") for check in report.checks],
    }


def _swap(demo: Demo, service: ServiceHandle) -> StageResult:
    """Swap to round 2's model if it was promoted, else to a copy of the model that answers."""
    failed_before, requests_before = demo.tally.failed, demo.tally.requests
    with demo.store.ledger.read() as tx:
        current = serving_model(tx)
    if current is None:
        raise IntegrityError("no model answers, so there is nothing to swap")
    promoted = demo.stages.results["round_2"]["summary"]["promoted"]
    if promoted:
        kind, target = "round 2 was promoted and took over", find_bundle(demo.store, current.id)
    else:
        kind = "drill: the same model under a new id, since round 2 was not promoted"
        target = _swap_to_twin(demo, current)
    with Client(service.url) as client:
        seconds = _wait_until_served(client, target)
    time.sleep(2.0)  # a few more requests on the new model, so that a failure would show
    failed, requests = demo.tally.failed - failed_before, demo.tally.requests - requests_before
    demo.view.say(f"{kind}; {requests} requests during the swap, {failed} failed")
    return {"kind": kind, "model_id": target.id, "requests": requests, "failed": failed, "wait_s": round(seconds, 2)}


def _swap_to_twin(demo: Demo, current: ModelRecord) -> Bundle:
    target = twin(demo.store, find_bundle(demo.store, current.id))
    with demo.store.ledger.begin() as tx:
        register(tx, target, round_number=current.round)
        serve_model(tx, target.id, ModelStatus(current.status))
        audit.append(
            tx, actor="demo", action=f"model.{current.status}", subject=target.id, details={"swap_drill": True}
        )
    return target


def _wait_until_served(client: Client, target: Bundle) -> float:
    started = time.perf_counter()
    while client.model().id != target.id:
        if time.perf_counter() - started > SWAP_TIMEOUT_S:
            raise UnavailableError(f"the service did not take up model {target.id[:12]} within {SWAP_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
    return time.perf_counter() - started


def _trace(demo: Demo) -> StageResult:
    """Follow a flagged prediction whose picture the next model learned from."""
    second = demo.stages.results["round_2"]["summary"]
    learned = load_dataset(demo.store, second["dataset_id"]).rows
    learned_ids = set(learned.loc[learned["label_source"].str.startswith("expert:"), "image_id"])
    flagged = demo.stages.results["traffic"]["flagged_predictions"]
    with demo.store.ledger.read() as tx:
        predictions = tx.find(Prediction, where={"id": flagged}, order_by=("id",))
        chosen = next((p for p in predictions if p.image_id in learned_ids), None)
        name = tx.require(Image, chosen.image_id).source_id if chosen else None
    if chosen is None:
        return {"complete": False, "why": "no flagged picture got a diagnosis from the experts", "steps": []}
    found = trace(demo.store, chosen.id)
    steps = [step.model_dump(mode="json") for step in found.steps]
    for step in found.steps:
        demo.view.say(f"{step.kind}: {step.text}")
    complete = any(step.kind == "model" and step.id == second["model_id"] for step in found.steps)
    return {"complete": complete, "prediction_id": chosen.id, "picture": name, "steps": steps}


def _summary(demo: Demo, server: ServerInfo) -> DemoSummary:
    results = demo.stages.results
    rounds = [RoundSummary.model_validate(results[name]["summary"]) for name in ("round_1", "round_2")]
    search = results["round_1"]["search"]
    with demo.store.ledger.read() as tx:
        served = {
            **demo.tally.figures(),
            "in_ledger": tx.count(Prediction),
            "review_items": tx.count(ReviewItem),
        }
    figures = label_studio_figures(demo.store, require(demo.store.home, demo.settings.labeling), rounds[1].dataset_id)
    return DemoSummary(
        data={key: value for key, value in results["data"].items() if key != "seconds"},
        search={"trials": search["trials"], "best": search["best"]},
        rounds=rounds,
        served=served,
        label_studio={"version": server.version, **figures},
        gate={key: value for key, value in results["gate_drill"].items() if key != "seconds"},
        swap={key: value for key, value in results["swap"].items() if key != "seconds"},
        trace={key: value for key, value in results["trace"].items() if key != "seconds"},
        seconds={name: result["seconds"] for name, result in results.items()},
    )
