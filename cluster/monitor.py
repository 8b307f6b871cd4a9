"""`relook monitor`: quality of the served predictions, estimated from the random audit sample alone.

In: served predictions of the audit sample, and blind reads or outcomes of their images. Out: sensitivity and
specificity of the key class (referred or not), accuracy, and mean confidence minus accuracy, by model,
institution and device. An image weighs one over the probability with which it was drawn. Labels of doubted or
flagged images are left out: those images are no random sample.

The intervals are a confidence sequence by betting, so they stay valid however often they are read. For a share p of
weighted events x in [0, 1], the wealth of a bet against p is prod(1 + b w (x - p)), with w the weight divided by the
largest possible one; p is excluded when the mean wealth over a grid of bets reaches 1 / alpha (Ville's
inequality; Waudby-Smith and Ramdas, 2023).
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from cluster.labels import audit_labels, drawn_items
from records.arrays import BoolArray, FloatArray
from records.errors import ContractError
from records.store import Store
from records.types import LABEL_RANK, Confirmation, Decision, Image, Outcome, Prediction, ReasonCode

logger = logging.getLogger(__name__)

LEVEL = 0.95
_A_READER = LABEL_RANK[Confirmation.CONSENSUS]
_GRID = np.linspace(0.0, 1.0, 501)
_BETS = np.linspace(0.05, 0.95, 10)


class Share(BaseModel):
    """A weighted share and its interval, level 0.95."""

    model_config = ConfigDict(frozen=True)

    estimate: float | None = Field(description="empty without an image")
    interval: tuple[float, float] = Field(description="valid at all times simultaneously, level 0.95")
    images: int = Field(ge=0)


class LiveQuality(BaseModel):
    """Estimated quality of the predictions of a model, an institution or a device."""

    model_config = ConfigDict(frozen=True)

    by: str = Field(description="model | site | device | all")
    name: str
    sensitivity: Share = Field(description="of the key class: share of its cases referred, by decision or label")
    specificity: Share = Field(description="of the key class: share of all other cases not referred")
    accuracy: Share
    confidence_gap: float | None = Field(description="weighted mean confidence minus accuracy")


@dataclass(frozen=True)
class Audited:
    """A prediction of the audit sample whose true class is known."""

    prediction: Prediction
    image: Image
    truth: str
    weight: float


def monitor(store: Store, audit_share: float) -> list[LiveQuality]:
    """Estimate the quality of the served predictions.

    Args:
        store: with predictions, audit sample and labels.
        audit_share: setting `serving.audit_share`, the smallest probability of being drawn.
    Returns:
        One entry for all predictions, then one per model, institution and device.
    """
    audited = _audited(store)
    # The bound must not depend on the drawn sample, so it comes from the setting. Only images drawn under an earlier,
    # smaller setting can weigh more.
    largest = max([1 / audit_share if audit_share else 1.0, *(row.weight for row in audited)])
    groups: dict[tuple[str, str], list[Audited]] = defaultdict(list)
    for row in audited:
        for by, name in (
            ("all", "all"),
            ("model", row.prediction.model_id),
            ("site", row.image.site),
            ("device", row.image.device),
        ):
            if name:
                groups[by, name].append(row)
    key = store.taxonomy.key_class.code if store.taxonomy.key_class else None
    order = ("all", "model", "site", "device")
    return [
        _quality(*name, groups[name], key, largest) for name in sorted(groups, key=lambda g: (order.index(g[0]), g[1]))
    ]


def report(found: Sequence[LiveQuality]) -> Table:
    """Return the figures as a table for people."""
    table = Table("", "sensitivity", "specificity", "accuracy", "confidence - accuracy", "images")
    for row in found:
        name = row.by if row.by == "all" else f"{row.by} {row.name[:12]}"
        gap = "" if row.confidence_gap is None else f"{row.confidence_gap:+.3f}"
        cells = [_cell(share) for share in (row.sensitivity, row.specificity, row.accuracy)]
        table.add_row(name, *cells, gap, str(row.accuracy.images))
    return table


def _cell(share: Share) -> str:
    if share.estimate is None:
        return "no data"
    return f"{share.estimate:.3f} ({share.interval[0]:.3f} to {share.interval[1]:.3f})"


def share_of(events: Sequence[bool] | BoolArray, weights: Sequence[float], largest: float) -> Share:
    """Estimate a weighted share with an interval that is valid at all times.

    Args:
        events: [N] in the order in which they became known.
        weights: [N] positive, one over the probability of being drawn.
        largest: the largest weight that an image can have; it must not be derived from the data.
    Returns:
        The share; without an event the estimate is None and the interval (0, 1).
    Raises:
        ContractError: a weight is over `largest`.
    """
    x, w = np.asarray(events, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not len(x):
        return Share(estimate=None, interval=(0.0, 1.0), images=0)
    if w.max() > largest * (1 + 1e-9):
        raise ContractError(f"a weight is {w.max():g}, which is more than the largest possible weight, {largest:g}")
    scaled = w / largest
    # A value of p is excluded for good once the wealth against it has crossed 1 / alpha at any time, hence the maximum.
    kept = _GRID[np.log(1 / (1 - LEVEL)) > _log_wealth(x, scaled).max(axis=0)]
    estimate = float((w * x).sum() / w.sum())
    # The estimate always belongs to its interval, also where the grid is too coarse to contain it.
    ends = (float(min(kept.min(), estimate)), float(max(kept.max(), estimate))) if len(kept) else (estimate, estimate)
    return Share(estimate=estimate, interval=ends, images=len(x))


def _log_wealth(x: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the log of the mean wealth after every event, [N, grid]; half of the bets are on each side of p."""
    # Weights are scaled to at most 1, so gains are in [-1, 1] and a bet below 1 cannot lose all its wealth.
    gain = weights[:, None] * (x[:, None] - _GRID)
    paths = [np.log1p(bet * sign * gain).cumsum(axis=0) for bet in _BETS for sign in (1.0, -1.0)]
    stacked = np.stack(paths)
    # log-mean-exp: the wealth itself overflows after some hundred events.
    top = stacked.max(axis=0)
    wealth: FloatArray = top + np.log(np.exp(stacked - top).mean(axis=0))
    return wealth


def _quality(by: str, name: str, rows: Sequence[Audited], key: str | None, largest: float) -> LiveQuality:
    cases = [row for row in rows if row.truth == key]
    others = [row for row in rows if row.truth != key]
    labelled = [row for row in rows if row.prediction.label is not None and row.prediction.confidence is not None]
    right = [row.prediction.label == row.truth for row in labelled]
    weights = np.array([row.weight for row in labelled])
    gap = None
    if labelled:
        stated = np.array([row.prediction.confidence for row in labelled], dtype=np.float64)
        gap = float((weights * (stated - np.array(right))).sum() / weights.sum())
    return LiveQuality(
        by=by,
        name=name,
        sensitivity=share_of([_referred(row.prediction, key) for row in cases], _weights(cases), largest),
        specificity=share_of([not _referred(row.prediction, key) for row in others], _weights(others), largest),
        accuracy=share_of(right, _weights(labelled), largest),
        confidence_gap=gap,
    )


def _weights(rows: Iterable[Audited]) -> list[float]:
    return [row.weight for row in rows]


def _referred(prediction: Prediction, key: str | None) -> bool:
    """Return whether the case was referred for the key class; being drawn for the audit is no referral."""
    reasons = set(prediction.reasons) - {ReasonCode.AUDIT_SAMPLE}
    return prediction.label == key or (prediction.decision is not Decision.ANSWERED and bool(reasons))


def _truth(store: Store, image_ids: set[str]) -> dict[str, str]:
    """Return the true class by image: from blind readers, or from an outcome with stronger evidence."""
    with store.ledger.read() as tx:
        outcomes = tx.find(Outcome, where={"image_id": image_ids}, order_by=("created_at", "id"))
    said = {label.image_id: label.label for label in audit_labels(store) if label.label is not None}
    known = [o for o in outcomes if o.diagnosis in store.taxonomy.codes and LABEL_RANK[o.confirmation] < _A_READER]
    # Later entries overwrite earlier ones, so the strongest outcome comes last, and of equal ones the newest.
    ranked = sorted(known, key=lambda outcome: -LABEL_RANK[outcome.confirmation])
    return {**said, **{outcome.image_id: outcome.diagnosis for outcome in ranked}}


def _audited(store: Store) -> list[Audited]:
    """Return the served predictions of the audit sample whose true class is known, oldest first."""
    with store.ledger.read() as tx:
        items = [item for item in drawn_items(tx) if item.selection_probability and item.prediction_id]
        predictions = {p.id: p for p in tx.find(Prediction, where={"id": {i.prediction_id for i in items}})}
    truth = _truth(store, {item.image_id for item in items})
    known = [item for item in items if item.image_id in truth and item.prediction_id in predictions]
    with store.ledger.read() as tx:
        images = {image.id: image for image in tx.find(Image, where={"id": {item.image_id for item in known}})}
    if lost := {item.image_id for item in known} - images.keys():
        # A lost row must not end the monitoring of all others.
        logger.warning("%d audited images have no row in the ledger and are left out: %s", len(lost), sorted(lost)[0])
    rows = [
        Audited(
            predictions[str(item.prediction_id)],
            images[item.image_id],
            truth[item.image_id],
            1 / (item.selection_probability or 1),
        )
        for item in known
        if item.image_id in images
    ]
    served = (row for row in rows if row.prediction.served)
    return sorted(served, key=lambda row: (row.prediction.created_at, row.prediction.id))
