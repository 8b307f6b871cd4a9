"""What the context of the images changed: figures with and without it, and classes that the image hardly decides.

In: probabilities with context and of the images alone. Out: the part `context` of an evaluation.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import softmax

from records.arrays import FloatArray, IntArray
from records.bundles import BundleDocument
from records.context import ContextHead, Known
from vision.calibration.context import context_logits
from vision.calibration.decision import labels_of
from vision.metrics.metrics import balanced_accuracy, confusion_matrix, one_vs_rest_auc

MIN_IMAGES = 10
"""Images of a class, and images labelled as it, from which on is said what decides it."""


class ContextReport(BaseModel):
    """The same images with and without their context."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    images: int = Field(ge=0, description="with at least one column that counted")
    columns: dict[str, int] = Field(description="column to the number of images where it counted")
    balanced_accuracy_without: float = Field(description="of the images alone, by the same decision rule")
    macro_auc_without: float | None = Field(description="of the images alone")
    changed_labels: float = Field(ge=0, le=1, description="share of images whose label the context changed")
    auc_without: dict[str, float | None] = Field(description="class to its AUC by the image alone")
    auc_of_context: dict[str, float | None] = Field(
        description="class to its AUC by the context alone, without the image"
    )
    label_by_context: dict[str, float | None] = Field(
        description="class to the share of its labels that another class would have without context"
    )
    decided_by_context: list[str] = Field(
        description="classes that the context alone tells better than the image alone, or whose labels mostly need it; "
        f"of classes with {MIN_IMAGES} images or labels"
    )


def context_report(
    labels: IntArray,
    probabilities: FloatArray,
    without: FloatArray,
    known: Sequence[Known],
    document: BundleDocument,
    head: ContextHead,
) -> ContextReport:
    """Compare predictions with those of the images alone.

    Args:
        labels: [N] class indices.
        probabilities: [N, C], with context.
        without: [N, C], of the images alone.
        known: [N] the context.
        document: of the bundle.
        head: of the same bundle.
    Returns:
        The comparison.
    """
    codes = document.taxonomy.codes
    added, uses = context_logits(head, known, len(codes))
    rule = document.operating.decision
    found, alone = labels_of(probabilities, rule), labels_of(without, rule)
    # The logits of the context hold its weight; the order of the images within a class does not depend on it much.
    shares = np.array([document.class_priors[code] for code in codes])
    of_context = softmax(np.log(np.maximum(shares, 1e-12)) + added / max(head.weight, 1e-12), axis=1)
    by_image, by_context = one_vs_rest_auc(labels, without), one_vs_rest_auc(labels, of_context)
    share = _by_context(found, alone, len(codes))
    counts = np.bincount(labels, minlength=len(codes))
    told_better = (counts >= MIN_IMAGES) & (by_context > by_image)  # NaN is never larger
    decided = told_better | (share > 0.5)
    return ContextReport(
        images=sum(bool(use.used) for use in uses),
        columns={part.name: sum(part.name in use.used for use in uses) for part in head.columns},
        balanced_accuracy_without=float(balanced_accuracy(confusion_matrix(labels, alone, len(codes)))),
        macro_auc_without=float(np.nanmean(by_image)) if np.isfinite(by_image).any() else None,
        changed_labels=float((found != alone).mean()),
        auc_without=_finite(codes, by_image),
        auc_of_context=_finite(codes, by_context),
        label_by_context=_finite(codes, share),
        decided_by_context=[code for code, is_decided in zip(codes, decided, strict=True) if is_decided],
    )


def _by_context(found: IntArray, alone: IntArray, num_classes: int) -> FloatArray:
    """Return [C]: the share of the labels of a class that are another class's without context; NaN if they are few."""
    shares = np.full(num_classes, np.nan)
    for index in range(num_classes):
        own = found == index
        if own.sum() >= MIN_IMAGES:
            shares[index] = float((alone[own] != index).mean())
    return shares


def _finite(codes: tuple[str, ...], values: FloatArray) -> dict[str, float | None]:
    return {code: float(value) if np.isfinite(value) else None for code, value in zip(codes, values, strict=True)}
