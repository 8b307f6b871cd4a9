"""The stages of the demo: what each does, in functions that return JSON values for later stages and the summary.

In: a `Demo`. Out: the stage's result. Everything is done through the functions that the product itself
uses. Which stage follows which is in `cluster.demo.run`.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cluster.demo.annotators import annotate_as_simulated, label_studio_figures, wait_for_people
from cluster.demo.faults import harm_in_words, harmed_copy, twin
from cluster.demo.state import DemoSummary, RoundSummary, Stages
from cluster.demo.traffic import Tally, Traffic, TrafficImage
from cluster.demo.view import View
from cluster.gate import Verdict
from cluster.gate.run import run_gate
from cluster.round import RoundEvent, run_round
from cluster.settings import Settings
from images.audit import audit_dataset
from images.importer import import_folder
from images.synth import synthesize
from labeling.connection import require
from labeling.local_server import ServerInfo
from labeling.pull import pull
from labeling.push import push
from records import audit
from records.bundles import Bundle
from records.datasets import load_dataset
from records.errors import IntegrityError, UnavailableError
from records.lineage import trace
from records.models import find_bundle, register, serve_model, serving_model
from records.store import Store, find_images, read_image
from records.types import Consent, Image, ModelRecord, ModelStatus, Prediction, ReviewItem, RoundRecord
from serving.client import Client
from trainers.fitting.epoch_report import EpochReport
from tuning.trials import SearchEvent

SWAP_TIMEOUT_S = 60.0

StageResult = dict[str, Any]
AnnotatorKind = Literal["simulated", "human"]


@dataclass
class Demo:
    """A demo that is running.

    Args:
        settings: of everything.
        store: the home that the demo fills.
        view: shows progress.
        tally: counts of the traffic.
        annotator: who annotates in Label Studio.
        stages: results of the finished stages.
    """

    settings: Settings
    store: Store
    view: View
    tally: Tally
    annotator: AnnotatorKind
    stages: Stages

    def stage(self, name: str, title: str, why: str, work: Callable[[], StageResult]) -> StageResult:
        """Run a stage, unless an interrupted run of this demo has finished it already.

        Args:
            name: key of the result in `stages` and of the seconds in the summary.
            title: shown; what happens.
            why: shown; one sentence.
            work: does it.
        Returns:
            The result of the stage, with its `seconds`.
        """
        if name in self.stages.results:
            with self.view.stage(title, "done before; kept"):
                return self.stages.results[name]
        started = time.perf_counter()
        with self.view.stage(title, why):
            result = work()
        result["seconds"] = round(time.perf_counter() - started, 1)
        self.stages.done(name, result)
        return result


def gather_data(demo: Demo, data: Path | None, columns: Mapping[str, str] | None) -> StageResult:
    """Import or generate images, withhold some diagnoses for the annotators to find, and audit the split."""
    settings, home = demo.settings, demo.store.home
    folder = data
    if folder is None:
        folder = home.demo / "generated"
        demo.view.say(f"generating {settings.demo.synth_lesions} lesions (seed {settings.demo.seed})")
        synthesize(folder, lesions=settings.demo.synth_lesions, seed=settings.demo.seed)
    report = import_folder(
        demo.store,
        folder,
        columns=columns,
        withhold_share=settings.demo.withhold_share,
        frames=(settings.trainers.model.frame,),
        # Nobody is in a generated image; what others agreed to is theirs to say.
        consent=Consent.DISPLAY if data is None else Consent.TRAINING,
    )
    # The truth stays outside the ledger, where no stage but the simulated annotator and the traffic reads it.
    report.withheld.to_parquet(home.demo / "truth.parquet", index=False)
    found = audit_dataset(demo.store, load_dataset(demo.store, report.dataset_id))
    demo.view.say(f"{report.images} images of {report.lesions} lesions; {found.leaked_lesions} lesions in two splits")
    demo.view.say(f"a random split of the images would have leaked {found.random_split.leaked_lesions} lesions")
    demo.view.say(f"{len(report.withheld)} training images without their diagnosis: they are sent as traffic")
    return {
        "source": str(data) if data else "generated",
        "images": report.images,
        "lesions": report.lesions,
        "splits": found.splits,
        "leaked_lesions": found.leaked_lesions,
        "random_split_leaked_lesions": found.random_split.leaked_lesions,
        "quarantined": found.quarantined,
        "unlabelled": len(report.withheld),
    }


def run_next_round(demo: Demo) -> StageResult:
    """Run the next round, or resume the one that an interrupted demo left unfinished."""
    with demo.store.ledger.read() as tx:
        unfinished = tx.count(RoundRecord, where={"finished_at": None}) > 0
    # Derived from the finished data stage: a resumed round needs the very settings that it began with.
    settings = limit_epochs(demo.settings, demo.stages.results["data"]["splits"]["train"])
    outcome = run_round(demo.store, settings, resume=unfinished, on_event=lambda event: _show(demo.view, event))
    results = outcome.results
    test = results["evaluate"]["test"]
    key = test["key_class"] or {}
    summary = RoundSummary(
        model_id=results["fit"]["model_id"],
        dataset_id=results["version"]["dataset_id"],
        labels_from_annotators=results["version"]["labels_from_annotators"],
        balanced_accuracy=test["balanced_accuracy"],
        balanced_accuracy_ci=test["balanced_accuracy_ci"],
        key_class=key.get("name"),
        key_class_sensitivity=key.get("sensitivity"),
        key_class_specificity=key.get("specificity"),
        promoted=results["rollout"]["promoted"],
        status=results["rollout"]["status"],
        why=results["gate"]["why"],
    )
    return {
        "summary": summary.model_dump(mode="json"),
        "search": results["tune"],
        "held_out": results["version"]["held_out"],
    }


def limit_epochs(settings: Settings, train_images: int) -> Settings:
    """Reduce the epochs so that one fit shows about `demo.fit_images` images; at least one epoch stays.

    The demo then takes minutes on any data set. `train_images` is the size of the train split.
    """
    epochs = max(1, min(settings.trainers.epochs, settings.demo.fit_images // max(1, train_images)))
    tuning = settings.tuning.model_copy(update={"trial_epochs": min(settings.tuning.trial_epochs, epochs)})
    trainers = settings.trainers.model_copy(update={"epochs": epochs})
    return settings.model_copy(update={"trainers": trainers, "tuning": tuning})


def _show(view: View, event: RoundEvent) -> None:
    if event.state in ("done", "kept"):
        view.say(event.text)
    elif isinstance(event.payload, EpochReport):
        report = event.payload
        view.now(
            f"fit, epoch {report.epoch}: validation balanced accuracy {report.val_balanced_accuracy:.3f}, "
            f"{report.images_per_s:.0f} images/s"
        )
    elif isinstance(event.payload, SearchEvent):
        found = event.payload
        best = f", best so far {found.best.score:.3f}" if found.best and found.best.score is not None else ""
        view.now(f"search: {found.trials_done} of {found.trials_total} trials done{best}")
    elif event.text != "step":  # epochs of the demo take seconds
        view.now(event.text)


def send_traffic(demo: Demo, service_url: str) -> StageResult:
    """Send unlabelled images as HTTP requests and flag predictions that look wrong."""
    plan = demo.settings.demo
    traffic = Traffic(
        service_url,
        withheld_images(demo),
        demo.tally,
        requests=plan.requests,
        concurrency=plan.concurrency,
        flags=plan.flags,
        retry_s=plan.retry_s,
    )
    traffic.start()
    traffic.wait()
    with demo.store.ledger.read() as tx:
        items = tx.count(ReviewItem)
    decisions = ", ".join(f"{count} {name}" for name, count in sorted(demo.tally.decisions.items()))
    demo.view.say(f"{demo.tally.requests} requests, {demo.tally.failed} failed: {decisions}")
    demo.view.say(f"{demo.tally.flagged} predictions flagged; {items} review items are in the ledger")
    return {"review_items": items, "flagged_predictions": demo.tally.flagged_predictions, **demo.tally.figures()}


def withheld_images(demo: Demo) -> list[TrafficImage]:
    """Return the images whose diagnosis was withheld, in a seeded order; they are the traffic."""
    truth = pd.read_parquet(demo.store.home.demo / "truth.parquet")
    truth = truth.sample(n=min(len(truth), demo.settings.demo.requests), random_state=demo.settings.demo.seed)
    images = find_images(demo.store, truth["image_id"].tolist())
    return [
        TrafficImage(image.id, image.source_id or image.id[:12], read_image(demo.store, image), label)
        for image, label in zip(images, truth["label"], strict=True)
    ]


def annotate_tasks(demo: Demo, server: ServerInfo) -> StageResult:
    """Push the review items to Label Studio, have them annotated there, and pull the annotations."""
    client = require(demo.store.home, demo.settings.labeling)
    current = _serving(demo, "so no review item can be pushed")
    pushed = push(demo.store, client, demo.settings.labeling, current.id)
    demo.view.say(f"{pushed.pushed} tasks pushed to Label Studio {server.version} at {server.url}")
    if demo.annotator == "simulated":
        made = annotate_as_simulated(demo.store, client, demo.settings)
        demo.view.say(f"the simulated annotator annotated {made} of them")
    else:
        wait_for_people(demo.store, client, server, demo.view)
    pulled = pull(demo.store, client, demo.settings.labeling)
    demo.view.say(f"{pulled.new_labels} annotations pulled, {pulled.cant_tell} of them `can't tell`")
    return {"tasks_pushed": pushed.pushed, "new_labels": pulled.new_labels}


def gate_fault(demo: Demo) -> StageResult:
    """Ask the gate about a copy of the model that was harmed on purpose."""
    current = _serving(demo, "so there is none to harm")
    with demo.store.ledger.read() as tx:
        rounds = tx.find(RoundRecord, order_by=("-number",), limit=1)
    harmed = harmed_copy(demo.store, find_bundle(demo.store, current.id))
    dataset = load_dataset(demo.store, rounds[0].dataset_id or "")
    report = run_gate(demo.store, demo.settings, harmed, dataset, actor="demo (injected fault)")
    demo.view.say(f"{harm_in_words(demo.store.taxonomy)}: {report.verdict}, {report.why}")
    return {
        "harmed_challenger_refused": report.verdict is Verdict.REFUSE,
        "fault": harm_in_words(demo.store.taxonomy),
        "why": report.why,
        "checks": [check.model_dump(mode="json") for check in report.checks],
    }


def swap(demo: Demo, service_url: str) -> StageResult:
    """Swap to round 2's model if it was promoted, else to a copy of the model that serves."""
    failed_before, requests_before = demo.tally.failed, demo.tally.requests
    current = _serving(demo, "so there is none to swap")
    if demo.stages.results["round_2"]["summary"]["promoted"]:
        kind, target = "round 2's model was promoted and serves now", find_bundle(demo.store, current.id)
    else:
        kind = "round 2's model was not promoted, so a copy of the champion under a new id serves now"
        target = _swap_to_twin(demo, current)
    with Client(service_url) as client:
        seconds = _wait_until_served(client, target)
    # A failure caused by the swap shows in the first requests to the new model, so some more have to arrive.
    time.sleep(2.0)
    failed, requests = demo.tally.failed - failed_before, demo.tally.requests - requests_before
    demo.view.say(f"{kind}; {requests} requests during the swap, {failed} failed")
    return {"kind": kind, "model_id": target.id, "requests": requests, "failed": failed, "wait_s": round(seconds, 2)}


def _serving(demo: Demo, consequence: str) -> ModelRecord:
    with demo.store.ledger.read() as tx:
        current = serving_model(tx)
    if current is None:
        raise IntegrityError(f"no model serves, {consequence}")
    return current


def _swap_to_twin(demo: Demo, current: ModelRecord) -> Bundle:
    target = twin(demo.store, find_bundle(demo.store, current.id))
    # The service polls the ledger, so this transaction is all that it needs to switch. The copy takes over the status.
    with demo.store.ledger.begin() as tx:
        register(tx, target, round_number=current.round)
        serve_model(tx, target.id, ModelStatus(current.status), replaces=current.id)
        audit.append(tx, actor="demo", action=f"model.{current.status}", subject=target.id, details={"demo_swap": True})
    return target


def _wait_until_served(client: Client, target: Bundle) -> float:
    started = time.perf_counter()
    while client.model().id != target.id:
        if time.perf_counter() - started > SWAP_TIMEOUT_S:
            raise UnavailableError(f"the service did not load model {target.id[:12]} within {SWAP_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
    return time.perf_counter() - started


def trace_one(demo: Demo) -> StageResult:
    """Trace a prediction whose image the next model was trained on: a flagged one, if there is one."""
    second = demo.stages.results["round_2"]["summary"]
    learned = load_dataset(demo.store, second["dataset_id"]).rows
    learned_ids = learned.loc[learned["label_source"].str.startswith("annotator:"), "image_id"].tolist()
    flagged = demo.stages.results["traffic"]["flagged_predictions"]
    with demo.store.ledger.read() as tx:
        predictions = tx.find(Prediction, where={"image_id": learned_ids}, order_by=("id",))
        # A model that was right about all of them leaves nothing to flag; the path of the others is the same.
        chosen = min(predictions, key=lambda one: one.id not in flagged, default=None)
        name = tx.require(Image, chosen.image_id).source_id if chosen else None
    if chosen is None:
        return {"complete": False, "why": "no image that was sent got a label from the annotators", "steps": []}
    found = trace(demo.store, chosen.id)
    steps = [step.model_dump(mode="json") for step in found.steps]
    # A small data set is sent again and again: equal steps are one line with their count.
    for line, times in Counter(f"{step.kind}: {step.text}" for step in found.steps).items():
        demo.view.say(line if times == 1 else f"{line} ({times} times)")
    complete = any(step.kind == "model" and step.id == second["model_id"] for step in found.steps)
    return {"complete": complete, "prediction_id": chosen.id, "image": name, "steps": steps}


def summarise(demo: Demo, server: ServerInfo) -> DemoSummary:
    """Collect the results of all stages, compared with Label Studio and the ledger."""
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
        data=_without_seconds(results["data"]),
        search={"trials": search["trials"], "best": search["best"]},
        rounds=rounds,
        served=served,
        label_studio={"version": server.version, **figures},
        gate=_without_seconds(results["gate_fault"]),
        swap=_without_seconds(results["swap"]),
        trace=_without_seconds(results["trace"]),
        seconds={name: result["seconds"] for name, result in results.items()},
    )


def _without_seconds(result: StageResult) -> StageResult:
    return {key: value for key, value in result.items() if key != "seconds"}
