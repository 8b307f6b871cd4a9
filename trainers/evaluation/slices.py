"""Metrics by slice: age, sex, body site, confirmation, skin tone.

A slice with fewer than `MIN_IMAGES` images is named and not reported. Intervals are resampled within the slice and
are not corrected for multiple comparisons.
"""

from collections.abc import Iterable
from dataclasses import fields, replace

import numpy as np

from records.arrays import IntArray
from records.bundles import BundleDocument, OperatingPoints
from records.taxonomy import Taxonomy
from trainers.evaluation.context import context_report
from trainers.evaluation.evaluate import SplitPredictions, evaluate
from trainers.evaluation.figures import Evaluation, SliceReport
from trainers.evaluation.images import Traits
from vision.calibration.decision import labels_of
from vision.metrics.metrics import balanced_accuracy, confusion_matrix

MIN_IMAGES = 20

SKIN_NOTE = "estimated from the skin around the lesion (ITA), outside its mask where there is one, else the outer ring"


def with_slices(
    evaluation: Evaluation, predictions: SplitPredictions, taxonomy: Taxonomy, operating: OperatingPoints | None
) -> Evaluation:
    """Return the evaluation with `slices` and `slice_notes`; unchanged if the predictions have no traits."""
    traits = predictions.traits
    if traits is None:
        return evaluation
    slices: dict[str, dict[str, SliceReport]] = {}
    notes: dict[str, str] = {}
    for field in fields(Traits):
        values = np.array([getattr(one, field.name) or "" for one in traits], dtype=object)
        reports, small = {}, []
        for value in sorted({str(value) for value in values} - {""}, key=_order):
            index = np.flatnonzero(values == value)
            if len(index) < MIN_IMAGES:
                small.append(f"{value} ({len(index)})")
            else:
                reports[value] = _report(subset(predictions, index), taxonomy, operating)
        if reports:
            slices[field.name] = reports
        notes |= _note(field.name, small, int((values == "").sum()), bool(reports))
    return evaluation.model_copy(update={"slices": slices, "slice_notes": notes})


def with_context(evaluation: Evaluation, predictions: SplitPredictions, document: BundleDocument) -> Evaluation:
    """Return the evaluation with `context`; unchanged if the model uses none."""
    head, without, known = document.context, predictions.without_context, predictions.known
    if head is None or without is None or known is None:
        return evaluation
    report = context_report(predictions.labels, predictions.probabilities, without, known, document, head)
    return evaluation.model_copy(update={"context": report})


def subset(predictions: SplitPredictions, index: IntArray) -> SplitPredictions:
    """Return the predictions of some images, by index, without `images`, whose positions no longer fit."""
    return replace(
        predictions,
        image_ids=[predictions.image_ids[i] for i in index],
        group_ids=[predictions.group_ids[i] for i in index],
        lesion_ids=[predictions.lesion_ids[i] for i in index],
        labels=predictions.labels[index],
        logits=predictions.logits[index],
        probabilities=predictions.probabilities[index],
        without_context=None if predictions.without_context is None else predictions.without_context[index],
        known=None if predictions.known is None else [predictions.known[i] for i in index],
        seen=None if predictions.seen is None else predictions.seen[index],
        traits=None if predictions.traits is None else [predictions.traits[i] for i in index],
        images=None,
    )


def _report(predictions: SplitPredictions, taxonomy: Taxonomy, operating: OperatingPoints | None) -> SliceReport:
    # The whole evaluation again, so that groups are resampled within the slice and not within the split.
    part = evaluate(predictions, taxonomy, operating)
    key = part.key_class
    return SliceReport(
        images=part.images,
        lesions=part.lesions,
        classes=sum(report.support > 0 for report in part.per_class.values()),
        accuracy=part.accuracy,
        accuracy_ci=part.accuracy_ci,
        balanced_accuracy=part.balanced_accuracy,
        balanced_accuracy_ci=part.balanced_accuracy_ci,
        balanced_accuracy_without_context=_without_context(predictions, taxonomy, operating),
        **({} if key is None else {f"key_class_{name}": getattr(key, name) for name in _KEY_FIGURES}),
        answered_share=part.answered_share,
    )


def _without_context(
    predictions: SplitPredictions, taxonomy: Taxonomy, operating: OperatingPoints | None
) -> float | None:
    if predictions.without_context is None:
        return None
    found = labels_of(predictions.without_context, (operating or OperatingPoints()).decision)
    return float(balanced_accuracy(confusion_matrix(predictions.labels, found, len(taxonomy.codes))))


def _note(name: str, small: Iterable[str], num_unknown: int, has_reports: bool) -> dict[str, str]:
    parts = [SKIN_NOTE] if name == "skin_tone" and has_reports else []
    left_out = ", ".join(small)
    if left_out:
        parts.append(f"fewer than {MIN_IMAGES} images: {left_out}")
    if num_unknown:
        parts.append(f"not known: {num_unknown} images")
    return {name: "; ".join(parts)} if parts else {}


_KEY_FIGURES = ("lesions", "sensitivity", "sensitivity_ci", "specificity", "specificity_ci")
_TONE_ORDER = ("very light", "light", "intermediate", "tan", "brown", "dark")


def _order(value: str) -> tuple[int, str]:
    if value in _TONE_ORDER:
        return _TONE_ORDER.index(value), value
    # "under 20" precedes "20 to 39"; text order would reverse them.
    return (-1 if value.startswith("under") else 0), value
