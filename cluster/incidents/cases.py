"""The regression set: images whose class a model once missed, and what another model decides about them.

In: cases of the ledger and a bundle. Out: one `CaseResult` per case. A case is handled if the model names its class or
sends it to an annotator, by the triage of the service and without the random audit sample.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.labels import resolved_labels
from images.decode import decode_frame
from records import audit
from records.arrays import UInt8Array
from records.bundles import Bundle
from records.context import context_of_image
from records.frames import Frame
from records.incidents import regression_cases
from records.ledger import Transaction
from records.parts import attempt, each_in_parts
from records.store import Store, find_images, read_image
from records.types import LABEL_RANK, Decision, Image, Incident, IncidentPrediction, IncidentState, Outcome
from serving.bulk import verdicts_of
from serving.settings import ServingSettings
from serving.triage import Verdict
from vision.inference.loaded import LoadedModel, load_model

_BATCH = 64


class CaseResult(BaseModel):
    """What a model decides about a case."""

    model_config = ConfigDict(frozen=True)

    incident_id: str
    image_id: str
    truth: str
    label: str | None = None
    decision: str | None = Field(default=None, description="empty if the image cannot be read or predicted")
    is_handled: bool
    error: str | None = Field(default=None, description="why there is no decision")


def add_confirmed(store: Store, actor: str) -> int:
    """Add to the regression set what was found out since: predictions like that of an incident that missed it, too.

    Args:
        store: with outcomes and annotations.
        actor: for the audit.
    Returns:
        How many cases were added; each is audited once.
    """
    with store.ledger.read() as tx:
        if not tx.find(Incident, limit=1):
            return 0
    known = _known_classes(store)
    with store.ledger.begin() as tx:
        missed = {
            one.id: one.truth for one in tx.find(Incident) if one.state is not IncidentState.WITHDRAWN and one.truth
        }
        rows = [row for row in tx.find(IncidentPrediction, where={"truth": None}) if row.incident_id in missed]
        # The class of the incident: another one would be another incident.
        confirmed = [row for row in rows if known.get(row.image_id) == missed[row.incident_id]]
        for row in confirmed:
            tx.update(IncidentPrediction, row.id, truth=missed[row.incident_id])
            details = {"prediction_id": row.prediction_id, "image_id": row.image_id}
            audit.append(tx, actor=actor, action="incident.case_added", subject=row.incident_id, details=details)
    return len(confirmed)


def judge(
    store: Store, settings: ServingSettings, bundle: Bundle, cases: Sequence[IncidentPrediction]
) -> list[CaseResult]:
    """Return what a model decides about each case, in order; an image that cannot be read is not handled."""
    if not cases:
        return []
    loaded = load_model(bundle, precision=settings.precision)
    images = {image.id: image for image in find_images(store, sorted({case.image_id for case in cases}))}
    frame = loaded.geometry.frame
    results: list[CaseResult] = []
    for at in range(0, len(cases), _BATCH):
        part = cases[at : at + _BATCH]
        read = [attempt(partial(_pixels, store, frame), images[case.image_id]) for case in part]
        usable = [
            (images[case.image_id], one) for case, one in zip(part, read, strict=True) if isinstance(one, np.ndarray)
        ]
        verdicts = iter(each_in_parts(usable, partial(_verdicts, bundle, loaded, settings)))
        found = [next(verdicts) if isinstance(one, np.ndarray) else one for one in read]
        results += [_result(case, verdict) for case, verdict in zip(part, found, strict=True)]
    return results


def judge_all(store: Store, settings: ServingSettings, bundle: Bundle, actor: str) -> list[CaseResult]:
    """Return what a model decides about the whole regression set; cases that were confirmed since are added first."""
    add_confirmed(store, actor)
    with store.ledger.read() as tx:
        cases = regression_cases(tx)
    return judge(store, settings, bundle, cases)


def in_words(result: CaseResult) -> str:
    """Name a case that was not handled, and why."""
    what = f"{result.decision} as {result.label}" if result.decision else result.error
    return f"image {result.image_id[:12]} ({result.truth}) of incident {result.incident_id}: {what}"


def _pixels(store: Store, frame: Frame, image: Image) -> UInt8Array:
    return decode_frame(read_image(store, image), frame)


def _verdicts(
    bundle: Bundle, loaded: LoadedModel, settings: ServingSettings, usable: Sequence[tuple[Image, UInt8Array]]
) -> list[Verdict]:
    pixels = np.stack([one for _, one in usable])
    sides_px = [min(image.width_px, image.height_px) for image, _ in usable]
    output = loaded.predict(pixels, context=[context_of_image(image) for image, _ in usable])
    return verdicts_of(bundle, loaded, output, pixels, sides_px, settings)


def _result(case: IncidentPrediction, verdict: Verdict | Exception) -> CaseResult:
    named = {"incident_id": case.incident_id, "image_id": case.image_id, "truth": str(case.truth)}
    if isinstance(verdict, Exception):
        return CaseResult(**named, is_handled=False, error=f"it cannot be predicted: {verdict}")
    referred = verdict.decision in (Decision.REVIEW, Decision.URGENT)
    handled = referred or verdict.label == case.truth
    return CaseResult(**named, label=verdict.label, decision=verdict.decision.value, is_handled=handled)


def _known_classes(store: Store) -> dict[str, str]:
    """Return the class of images by what annotators agreed on, or by an outcome that is at least as strong."""
    said = {one.image_id: (LABEL_RANK[one.confirmation], one.label) for one in resolved_labels(store) if one.label}
    with store.ledger.read() as tx:
        outcomes = _outcomes(tx)
    for outcome in outcomes:
        rank = LABEL_RANK[outcome.confirmation]
        if rank <= said.get(outcome.image_id, (rank, ""))[0]:
            said[outcome.image_id] = (rank, outcome.diagnosis)
    return {image_id: label for image_id, (_, label) in said.items()}


def _outcomes(tx: Transaction) -> list[Outcome]:
    return tx.find(Outcome, order_by=("created_at", "id"))
