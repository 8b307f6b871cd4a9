"""Lineage: what happened to an image, a prediction or a model, as dated steps in both directions.

Steps are the image, its predictions, flags, outcomes, review items, tasks, annotations, the dataset versions it is in
and the models trained on them. This module only reads.
"""

from collections.abc import Iterator
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from records.datasets import find_in_manifest
from records.errors import UnknownIdError
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.types import (
    Annotation,
    DatasetChange,
    DatasetRecord,
    Flag,
    Image,
    Incident,
    IncidentPrediction,
    ManifestRow,
    ModelRecord,
    Outcome,
    Prediction,
    ReviewItem,
)

_COUNTED = 10_000


class TraceStep(BaseModel):
    """One step of a trace."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    at: datetime
    kind: str
    id: str
    text: str


class Trace(BaseModel):
    """All steps that concern one id, oldest first."""

    model_config = ConfigDict(frozen=True)

    subject: str
    kind: str
    steps: list[TraceStep]


def trace(store: Store, subject: str) -> Trace:
    """Return the steps that lead to an id and follow from it.

    Args:
        store: its records are read.
        subject: id of a prediction, an image or a model, or a prefix of at least 8 characters.
    Returns:
        The trace.
    Raises:
        UnknownIdError: nothing, or more than one thing, has that id.
        IntegrityError: the manifest of a dataset version is missing or cannot be read.
    """
    with store.ledger.read() as tx:
        kind, full_id = _resolve(tx, subject)
        if kind == "model":
            steps = list(_model_steps(tx, tx.require(ModelRecord, full_id)))
        else:
            image_id = tx.require(Prediction, full_id).image_id if kind == "prediction" else full_id
            steps = list(_image_steps(store, tx, image_id))
    # The sort is stable, so steps of one transaction, which have one time, keep the causal order they were made in.
    return Trace(subject=full_id, kind=kind, steps=sorted(steps, key=lambda step: step.at))


def _resolve(tx: Transaction, subject: str) -> tuple[str, str]:
    if len(subject) < 8:
        raise UnknownIdError(f"{subject!r} is too short; give at least 8 characters of an id")
    found: list[tuple[str, str]] = []
    for kind, record_type in (("prediction", Prediction), ("image", Image), ("model", ModelRecord)):
        column = TABLES[record_type].c.id
        # A range on the index, which `LIKE` would not use; ids are hex, so "g" sorts behind every id with the prefix.
        upper = subject + "g"
        rows = tx.connection.execute(
            column.table.select().with_only_columns(column).where(column.between(subject, upper))
        )
        found.extend((kind, row[0]) for row in rows)
    if len(found) != 1:
        problem = "nothing has" if not found else f"{len(found)} things share"
        raise UnknownIdError(f"{problem} the id {subject!r}; give the id of a prediction, an image or a model")
    return found[0]


def _image_steps(store: Store, tx: Transaction, image_id: str) -> Iterator[TraceStep]:
    image = tx.require(Image, image_id)
    name = f" ({image.source_id})" if image.source_id else ""
    yield TraceStep(at=image.created_at, kind="image", id=image.id, text=f"image{name} stored, {image.provenance}")
    if image.erased_at is not None:
        why = "erased on request" if image.expired_at is None else "kept as long as configured"
        yield TraceStep(at=image.erased_at, kind="gone", id=image.id, text=f"image deleted: {why}")
    yield from _prediction_steps(tx, image_id)
    yield from _incident_steps(tx, image_id)
    yield from _review_steps(tx, image_id)
    yield from _dataset_steps(store, tx, image_id)


def _prediction_steps(tx: Transaction, image_id: str) -> Iterator[TraceStep]:
    predictions = tx.find(Prediction, where={"image_id": image_id})
    for prediction in predictions:
        text = f"{prediction.decision} by model {prediction.model_id[:12]} ({prediction.model_status}): "
        text += _prediction_text(prediction)
        yield TraceStep(at=prediction.created_at, kind="prediction", id=prediction.id, text=text)
    about = {"prediction_id": [prediction.id for prediction in predictions]}
    for flag in tx.find(Flag, where=about):
        suggested = f", suggests {flag.suggested_label}" if flag.suggested_label else ""
        text = f"flagged {flag.reason} by {flag.caller}{suggested}"
        yield TraceStep(at=flag.created_at, kind="flag", id=flag.id, text=text)
    for outcome in tx.find(Outcome, where=about):
        text = f"turned out to be {outcome.diagnosis} ({outcome.confirmation})"
        yield TraceStep(at=outcome.created_at, kind="outcome", id=outcome.id, text=text)


def _incident_steps(tx: Transaction, image_id: str) -> Iterator[TraceStep]:
    for row in tx.find(IncidentPrediction, where={"image_id": image_id}, order_by=("id",)):
        incident = tx.require(Incident, row.incident_id)
        text = "incident opened" if incident.prediction_id == row.prediction_id else "recalled, since it resembles one"
        text = f"{text} of model {incident.model_id[:12]}"
        yield TraceStep(at=row.created_at, kind="incident", id=incident.id, text=text)
        if incident.closed_at is not None:
            yield TraceStep(at=incident.closed_at, kind="incident", id=incident.id, text=f"incident {incident.state}")


def _prediction_text(prediction: Prediction) -> str:
    if prediction.label is None or prediction.confidence is None:
        return "no label"
    return f"{prediction.label} at {prediction.confidence:.2f}"


def _review_steps(tx: Transaction, image_id: str) -> Iterator[TraceStep]:
    for item in tx.find(ReviewItem, where={"image_id": image_id}):
        reasons = ", ".join(item.reasons)
        yield TraceStep(at=item.created_at, kind="review_item", id=item.id, text=f"sent to annotators: {reasons}")
        if item.pushed_at is not None and item.task_id is not None:
            text = f"task {item.task_id} in project {item.project_id} of Label Studio"
            yield TraceStep(at=item.pushed_at, kind="task", id=f"{item.project_id}/{item.task_id}", text=text)
    for label in tx.find(Annotation, where={"image_id": image_id}):
        said = "deleted the annotation" if label.deleted else f"said {label.label or label.other_text or label.kind}"
        yield TraceStep(at=label.created_at, kind="annotator", id=label.id, text=f"{label.annotator} {said}")


def _dataset_steps(store: Store, tx: Transaction, image_id: str) -> Iterator[TraceStep]:
    changed = {change.dataset_id for change in tx.find(DatasetChange, where={"image_id": image_id})}
    rows: dict[str, ManifestRow | None] = {}
    for dataset in tx.find(DatasetRecord, order_by=("created_at",)):
        # Of two versions in a row the second mostly has the same row, and the ledger knows where it does not. Opening
        # the manifests of hundreds of versions would take seconds.
        if dataset.num_changes is not None and dataset.parent_id in rows and dataset.id not in changed:
            rows[dataset.id] = rows[dataset.parent_id]
        else:
            rows[dataset.id] = find_in_manifest(store, dataset.id, image_id)
        row = rows[dataset.id]
        if row is not None:
            text = f"in dataset {dataset.id[:12]} as {row.label} on split {row.split} ({row.label_source})"
            yield TraceStep(at=dataset.created_at, kind="dataset", id=dataset.id, text=text)
    for model in tx.find(ModelRecord, where={"dataset_id": [id_ for id_, row in rows.items() if row is not None]}):
        yield TraceStep(at=model.created_at, kind="model", id=model.id, text=_model_text(model))


def _model_steps(tx: Transaction, model: ModelRecord) -> Iterator[TraceStep]:
    dataset = tx.require(DatasetRecord, model.dataset_id)
    text = f"dataset {dataset.id[:12]}: {dataset.num_images} images in {dataset.num_groups} groups"
    yield TraceStep(at=dataset.created_at, kind="dataset", id=dataset.id, text=text)
    yield TraceStep(at=model.created_at, kind="model", id=model.id, text=_model_text(model))
    # Bounded, since a model that served for months has millions.
    predictions = tx.count(Prediction, where={"model_id": model.id}, at_most=_COUNTED + 1)
    if predictions:
        how_many = str(predictions) if predictions <= _COUNTED else f"more than {_COUNTED}"
        text = f"made {how_many} predictions; status {model.status} since then"
        yield TraceStep(at=model.status_changed_at, kind="prediction", id=model.id, text=text)


def _model_text(model: ModelRecord) -> str:
    made = f" in round {model.round}" if model.round is not None else ""
    return (
        f"model {model.id[:12]} ({model.architecture}) trained on dataset {model.dataset_id[:12]}{made}, {model.status}"
    )
