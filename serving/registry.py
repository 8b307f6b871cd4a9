"""What is known of models and rounds, read from ledger and bundles for whoever asks. Nothing is computed anew.

In: a store. Out: bodies of `serving.schemas`, and the report that lies beside a bundle. Figures of the test
split are those that a round wrote down; showing them again is no new look at its images.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from records.bundles import BundleDocument, read_bundle
from records.errors import UnknownIdError
from records.models import bundle_folder
from records.store import Store
from records.types import ModelRecord, RoundRecord, RoundStep
from serving.responses import model_body
from serving.schemas import ClassInfo, ModelDetails, RoundInfo, RoundList, ScoreBand
from serving.words import status_text
from vision.calibration.operating import exact_interval

REPORT = Path("report") / "report.html"


def model_details(store: Store, model_id: str) -> ModelDetails:
    """Return a registered model with what was measured of it.

    Args:
        store: with the ledger.
        model_id: 64 hex characters.
    Returns:
        The body.
    Raises:
        UnknownIdError: there is no such model.
        IntegrityError: its bundle was altered.
    """
    record = _record(store, model_id)
    document = _document(bundle_folder(store, record), record.id)
    operating = document.operating
    refer = {code: point.threshold for code, point in operating.refer.items()}
    if operating.refer_malignant is not None:
        refer["malignant"] = operating.refer_malignant.threshold
    return ModelDetails(
        **model_body(record).model_dump(),
        status_text=status_text(record.status),
        classes=[ClassInfo(code=c.code, name=c.name, malignant=c.malignant) for c in document.taxonomy.classes],
        scores=_bands(document),
        promise=operating.conformal_promise,
        pooled_classes=operating.pooled_classes,
        refer=refer,
        metrics=document.metrics,
        faithfulness=document.explanation.get("faithfulness"),
        has_report=(bundle_folder(store, record) / REPORT).is_file(),
    )


def report_html(store: Store, model_id: str) -> str:
    """Return the report that was written beside a model.

    Args:
        store: with the ledger.
        model_id: 64 hex characters.
    Returns:
        A page that needs nothing else.
    Raises:
        UnknownIdError: there is no such model, or no report of it.
    """
    record = _record(store, model_id)
    try:
        return (bundle_folder(store, record) / REPORT).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UnknownIdError(
            f"no report lies beside model {model_id[:12]}; `relook evaluate {model_id[:12]}` makes one"
        ) from error


def rounds_body(store: Store) -> RoundList:
    """Return all rounds with what they were made of and what came of them, oldest first."""
    with store.ledger.read() as tx:
        rounds = tx.find(RoundRecord, order_by=("number",))
        steps = tx.find(RoundStep, where={"step": ["version", "evaluate"]})
    results = {(step.round_id, step.step): step.result for step in steps}
    return RoundList(items=[_round(r, results.get((r.id, "version")), results.get((r.id, "evaluate"))) for r in rounds])


def _round(record: RoundRecord, version: dict[str, Any] | None, evaluated: dict[str, Any] | None) -> RoundInfo:
    version, test = version or {}, (evaluated or {}).get("test") or {}
    return RoundInfo(
        **record.model_dump(include={"number", "started_at", "finished_at", "verdict", "why", "model_id"}),
        dataset_id=record.dataset_id or version.get("dataset_id"),
        images=version.get("images"),
        labels_from_annotators=version.get("labels_from_annotators"),
        lesions=test.get("lesions"),
        balanced_accuracy=test.get("balanced_accuracy"),
        balanced_accuracy_ci=test.get("balanced_accuracy_ci"),
        key_class=test.get("key_class"),
    )


def _bands(document: BundleDocument) -> list[ScoreBand]:
    found = document.metrics.get("calibration", {}).get("scores", [])
    return [ScoreBand(**band, right_ci=exact_interval(band["right"], band["lesions"])) for band in found]


def _record(store: Store, model_id: str) -> ModelRecord:
    with store.ledger.read() as tx:
        record = tx.get(ModelRecord, model_id)
    if record is None:
        raise UnknownIdError(f"no model has the id {model_id!r}")
    return record


@lru_cache(maxsize=32)
def _document(folder: Path, model_id: str) -> BundleDocument:
    """Read a bundle's document once; a bundle never changes."""
    return read_bundle(folder, expected_id=model_id).document
