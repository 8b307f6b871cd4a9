"""Bodies about models and rounds, read from ledger and bundles. Nothing is computed anew.

In: a store. Out: bodies of `serving.schemas`, and the report of a bundle. Test figures are those that a round has
stored; reading them again does not touch the images of the test split.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from records.bundles import BundleDocument, read_bundle
from records.errors import UnknownIdError
from records.models import bundle_folder
from records.store import Store
from records.types import ModelRecord, RoundRecord, RoundStep
from serving.context import context_info
from serving.responses import model_body
from serving.schemas import ClassInfo, ModelDetails, RoundInfo, RoundList, ScoreBand
from serving.words import status_text
from vision.calibration.operating import exact_interval

REPORT = Path("report") / "report.html"


def model_details(store: Store, model_id: str) -> ModelDetails:
    """Return a registered model with its measured figures; UnknownIdError if there is none."""
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
        rule=operating.decision.rule,
        point=operating.decision.point,
        promise=operating.conformal_promise,
        pooled_classes=operating.pooled_classes,
        refer=refer,
        metrics=document.metrics,
        faithfulness=document.explanation.get("faithfulness"),
        crop=document.geometry.crop,
        has_report=(bundle_folder(store, record) / REPORT).is_file(),
        context=context_info(document),
        views=document.views,
    )


def report_html(store: Store, model_id: str) -> str:
    """Return the HTML report of a model; UnknownIdError if there is no such model or no report."""
    record = _record(store, model_id)
    try:
        return (bundle_folder(store, record) / REPORT).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UnknownIdError(
            f"there is no report of model {model_id[:12]}; `relook evaluate {model_id[:12]}` makes one"
        ) from error


def rounds_body(store: Store) -> RoundList:
    """Return all rounds with their inputs and results, oldest first."""
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
    """Read a bundle's document; cached, since a bundle is immutable."""
    return read_bundle(folder, expected_id=model_id).document
