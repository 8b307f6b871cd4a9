"""The steps of a round: idempotent functions from a `RoundContext` to a JSON result.

In: the context, with the results of earlier steps. Out: the step's result, whose `text` is shown. The order of
the steps and the recording of their results are in `cluster.round`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.gate import Verdict
from cluster.gate.report import report_page
from cluster.gate.run import run_gate
from cluster.labels import group_labelled_images, newest_annotation, resolved_labels
from cluster.selection import select_images
from cluster.session import ray_is_running
from cluster.settings import Settings
from cluster.task_cases import TaskCases
from labeling.acquisition.registry import DEFAULT_MIX, budgets_of
from labeling.connection import connect
from labeling.pull import pull
from labeling.push import push as push_items
from records import audit
from records.bundles import Bundle
from records.datasets import DatasetVersion, build_version, load_dataset
from records.durable import write_file
from records.ids import utc_now
from records.ledger import Transaction
from records.models import SERVED, current_rollout, find_bundle, serve_model, serving_id, serving_model
from records.store import Store
from records.types import DatasetRecord, ModelRecord, ModelStatus, RoundRecord, RoundStep, Split
from trainers.evaluation.evaluate import evaluate as evaluate_predictions
from trainers.evaluation.evaluate import predict_split
from trainers.fitting.refit import fit_and_register
from trainers.settings import TrainersSettings
from tuning.search import search

StepResult = dict[str, Any]


@dataclass(frozen=True)
class RoundContext:
    """The input of every step.

    Args:
        store: to work on.
        settings: of the round.
        record: the round's row in the ledger.
        run_dir: the folder of the round.
        results: results of earlier steps, by name.
        tell: reports progress as a text and a payload.
        record_with: records the step's result in a transaction of the step, for steps that must not run twice.
    """

    store: Store
    settings: Settings
    record: RoundRecord
    run_dir: Path
    results: dict[str, StepResult]
    tell: Callable[[str, Any], None] = field(default=lambda text, payload: None)
    record_with: Callable[[Transaction, StepResult], None] = field(default=lambda tx, result: None)


def collect(context: RoundContext) -> StepResult:
    """Pull new annotations, and assign groups to their images."""
    client = connect(context.store.home, context.settings.labeling)
    if client is None:
        pulled, text = 0, "no Label Studio is set up, so only known labels count"
    else:
        report = pull(context.store, client, context.settings.labeling)
        pulled, text = report.new_labels, f"{report.new_labels} new annotations pulled from Label Studio"
        text += f"; {len(report.failed)} could not be read: {report.failed[0]}" if report.failed else ""
    # Annotations that arrive later belong to the next round, even if this one is resumed after them.
    known_until = newest_annotation(context.store).isoformat()
    grouped = group_labelled_images(context.store)
    return {"pulled": pulled, "grouped": grouped, "known_until": known_until, "text": text}


def version(context: RoundContext) -> StepResult:
    """Write a dataset version from all labels known at the end of `collect`."""
    with context.store.ledger.read() as tx:
        last = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)
    known_until = context.results["collect"].get("known_until")
    report = build_version(
        context.store,
        resolved=resolved_labels(
            context.store,
            datetime.fromisoformat(known_until) if known_until else None,
            context.settings.labeling.consensus,
        ),
        round_number=context.record.number,
        parent_id=last[0].id if last else None,
    )
    new = report.version.rows
    annotations = int((new["label_source"].str.startswith("annotator:") & (new["split"] == Split.TRAIN.value)).sum())
    return {
        "dataset_id": report.version.id,
        "images": report.version.num_images,
        "groups": report.version.num_groups,
        "labels_from_annotators": annotations,
        "held_out": len(report.held_out),
        "outranked": list(report.outranked),
        "without_consent": len(report.without_consent),
        "text": f"dataset {report.version.id[:12]}: {report.version.num_images} images, "
        f"{annotations} training labels from annotators",
    }


def tune(context: RoundContext) -> StepResult:
    """Search for better training settings, or keep those of the last search."""
    wanted, why = tune_now(context.store, context.settings, context.record.number)
    start = _previous_winner(context)
    if not wanted:
        # The settings are part of the result, so `fit` and a replay do not depend on what later rounds find.
        return {"searched": False, "settings": start.model_dump(mode="json"), "text": f"no search: {why}"}
    configured = context.settings.trainers
    result = search(
        context.store,
        context.settings.tuning,
        configured,
        _dataset(context),
        enqueued=[start] if start != configured else [],
        run_dir=context.run_dir / "search",  # with the journal from which a killed search is resumed
        on_event=lambda event: context.tell("search", event),
    )
    return {
        "searched": True,
        "settings": result.settings.model_dump(mode="json"),
        "trials": len(result.trials),
        "best": {"overrides": result.best.overrides, "score": result.best.score, "number": result.best.number},
        "text": f"{len(result.trials)} trials; the best reached {result.best.score:.3f} on validation ({why})",
    }


def fit(context: RoundContext) -> StepResult:
    """Train with the winning settings and write the calibrated bundle."""
    settings = TrainersSettings.model_validate(context.results["tune"]["settings"])
    # A bundle's id is the hash of its content: running this step again registers the same model, not a second one.
    bundle = fit_and_register(
        context.store,
        settings,
        _dataset(context),
        run_dir=context.run_dir / "fit",  # with the checkpoints from which a killed fit is resumed
        use_ray=ray_is_running(),
        on_epoch=lambda report: context.tell("epoch", report),
        on_step=lambda done, step, steps: context.tell("step", f"epoch {done + 1}, step {step}/{steps}"),
        round_number=context.record.number,
    )
    return {
        "model_id": bundle.id,
        "validation_balanced_accuracy": bundle.document.measured[1]["balanced_accuracy"],
        "text": f"model {bundle.id[:12]} ({bundle.document.architecture.name}) is fitted",
    }


def evaluate(context: RoundContext) -> StepResult:
    """Evaluate the new model on the test split; no decision depends on it."""
    bundle = _new_bundle(context)
    predictions = predict_split(context.store, bundle, _dataset(context), Split.TEST, actor=_actor(context))
    document = bundle.document
    evaluation = evaluate_predictions(
        predictions, context.store.taxonomy, document.operating, priors=document.calibration.priors
    )
    write_file(context.run_dir / "evaluation.json", evaluation.model_dump_json(indent=2) + "\n")
    text = f"balanced accuracy {evaluation.balanced_accuracy:.3f} on {evaluation.lesions} test lesions"
    return {"test": evaluation.model_dump(mode="json"), "text": text}


def gate(context: RoundContext) -> StepResult:
    """Compare the new model with the floors, the champion and the best champion ever."""
    # Read before the comparison: what serves when the verdict is applied has to be what it was compared with.
    with context.store.ledger.read() as tx:
        served_id = serving_id(tx)
    report = run_gate(context.store, context.settings, _new_bundle(context), _dataset(context), actor=_actor(context))
    write_file(context.run_dir / "gate.json", report.model_dump_json(indent=2) + "\n")
    write_file(context.run_dir / "gate.html", report_page(report, context.store.taxonomy))
    return {**report.model_dump(mode="json"), "served_id": served_id, "text": f"{report.verdict}: {report.why}"}


def rollout(context: RoundContext) -> StepResult:
    """Set the new model's status by the verdict; the service polls the ledger and loads the model that serves."""
    verdict = Verdict(context.results["gate"]["verdict"])
    model_id = context.results["fit"]["model_id"]
    with context.store.ledger.begin() as tx:
        before, current = tx.require(ModelRecord, model_id).status, serving_model(tx)
        status = _status_after(verdict, current, context.settings.round.approval, model_id)
        begins = status in SERVED and (current is None or current.id != model_id)
        waits = _why_it_waits(tx, context.results["gate"]) if begins else None
        if waits:
            status = ModelStatus.CANDIDATE
        if begins and not waits:
            serve_model(tx, model_id, status, replaces=current.id if current else None)
        else:
            tx.update(ModelRecord, model_id, status=status, status_changed_at=utc_now())
        if status != before:
            figure = context.results["gate"]["balanced_accuracy"]
            details = {"verdict": verdict, "before": before, "balanced_accuracy": figure}
            audit.append(tx, actor=_actor(context), action=f"model.{status}", subject=model_id, details=details)
        served = status in SERVED
        result = {
            "status": status,
            "served": served,
            "promoted": status == ModelStatus.CHAMPION,
            "text": f"model {model_id[:12]} is {status}"
            + (" and serves" if served else "; the current model keeps serving")
            + (f", because {waits}" if waits else ""),
        }
        # The result is recorded in the transaction of the change. With two transactions, a kill in between would make
        # the step run again on resume, which could undo a promotion that a person made meanwhile.
        context.record_with(tx, result)
    return result


def select(context: RoundContext) -> StepResult:
    """Select the unlabelled images that annotators should see next."""
    with context.store.ledger.read() as tx:
        current = serving_model(tx)
    if current is None or context.settings.round.select_budget == 0:
        return {"selected": 0, "text": "nothing is selected"}
    bundle = find_bundle(context.store, current.id)

    def result(selected: int) -> StepResult:
        return {"selected": selected, "text": f"{selected} images selected for annotators"}

    # The result is recorded in the transaction that writes the review items. Otherwise, a round that is killed between
    # the two would select as many images again when it is resumed.
    return result(
        select_images(
            context.store,
            bundle,
            budgets_of(DEFAULT_MIX, context.settings.round.select_budget),
            prevalence=context.settings.labeling.prevalence,
            within=lambda tx, selected: context.record_with(tx, result(selected)),
        )
    )


def push(context: RoundContext) -> StepResult:
    """Push waiting review items to Label Studio."""
    client = connect(context.store.home, context.settings.labeling)
    with context.store.ledger.read() as tx:
        current = serving_model(tx)
    if client is None or current is None:
        return {"pushed": 0, "text": "no Label Studio is set up; the review items wait in the ledger"}
    # Can be repeated: a push adopts tasks that a killed push imported without recording them.
    labeling = context.settings.labeling
    cases = TaskCases(context.store, context.settings.serving, labeling.cases_shown)
    report = push_items(context.store, client, labeling, current.id, cases=cases)
    text = f"{report.pushed} tasks pushed to Label Studio"
    text += f"; {len(report.unreadable)} could not be sent: {report.unreadable[0]}" if report.unreadable else ""
    return {"pushed": report.pushed, "text": text}


def _status_after(verdict: Verdict, current: ModelRecord | None, approval: str, model_id: str) -> ModelStatus:
    """Return the status of a model after its verdict.

    If no model serves yet, a model that was not promoted serves as provisional, which every response states.
    """
    if current is not None and current.id == model_id:
        return current.status
    if verdict is Verdict.PROMOTE:
        return ModelStatus.CHAMPION if approval == "automatic" else ModelStatus.CANDIDATE
    if current is None:
        return ModelStatus.PROVISIONAL
    return ModelStatus.REFUSED if verdict is Verdict.REFUSE else ModelStatus.CANDIDATE


def _why_it_waits(tx: Transaction, gate_result: StepResult) -> str | None:
    """Return why a model that passed may not serve at once: what it was compared with is no longer what serves."""
    current, running = serving_id(tx), current_rollout(tx)
    # Rounds that an earlier release began recorded no id.
    if current != gate_result.get("served_id", current):
        return f"the gate compared with another model than {str(current)[:12]}, which serves now"
    if running is not None:
        return f"rollout {running.id} of model {running.candidate_id[:12]} is in progress"
    return None


def tune_now(store: Store, settings: Settings, number: int) -> tuple[bool, str]:
    """Return whether round `number` searches, by `round.tune` and earlier rounds, and why."""
    mode = settings.round.tune
    with store.ledger.read() as tx:
        searched = any(step.result.get("searched") for step in tx.find(RoundStep, where={"step": "tune"}))
        fits = tx.find(RoundStep, where={"step": "fit"}, order_by=("finished_at",))
    if mode == "never":
        return False, "round.tune is never"
    if not searched:
        return True, "there is no earlier search"
    if mode == "always":
        return True, "round.tune is always"
    if mode == "every_n":
        due = (number - 1) % settings.round.tune_every == 0
        return due, f"every {settings.round.tune_every} rounds"
    scores = [
        step.result["validation_balanced_accuracy"] for step in fits if "validation_balanced_accuracy" in step.result
    ]
    # Against the best earlier round, not the last one: small drops in a row would never add up to a search.
    dropped = len(scores) >= 2 and max(scores[:-1]) - scores[-1] > settings.round.tune_drop
    return dropped, "validation dropped" if dropped else "validation did not drop"


def _previous_winner(context: RoundContext) -> TrainersSettings:
    """Return the settings to start from: the winner of the last search, else the configured ones."""
    with context.store.ledger.read() as tx:
        steps = tx.find(RoundStep, where={"step": "tune"}, order_by=("-finished_at",))
    winners = [step.result["settings"] for step in steps if step.result.get("searched")]
    return TrainersSettings.model_validate(winners[0]) if winners else context.settings.trainers


def _dataset(context: RoundContext) -> DatasetVersion:
    return load_dataset(context.store, context.results["version"]["dataset_id"])


def _new_bundle(context: RoundContext) -> Bundle:
    return find_bundle(context.store, context.results["fit"]["model_id"])


def _actor(context: RoundContext) -> str:
    return f"round {context.record.number}"
