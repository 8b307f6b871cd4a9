"""Classification metrics on arrays, for one evaluation or for a stack of bootstrap resamples.

In: labels [N] and probabilities [N, C], or confusion matrices [..., C, C] whose rows are the truth, or the counts per
class that are all that these metrics need of a confusion matrix.
Out: arrays in which NaN means "undefined, because there is no such case"; `trainers.evaluation.evaluate` turns NaN
into null with a reason.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from records.arrays import BoolArray, FloatArray, IntArray
from records.errors import ContractError

ECE_BINS = 15
SCORE_BANDS = 10


@dataclass(frozen=True)
class ClassCounts:
    """Cases per class, each [..., C]: of a thousand resamples and hundreds of classes, matrices would fill the memory.

    Args:
        hits: predicted correctly.
        cases: of the class.
        predicted: as the class.
    """

    hits: FloatArray
    cases: FloatArray
    predicted: FloatArray


Confusion = NDArray[np.floating] | IntArray | ClassCounts


@dataclass(frozen=True)
class Rates:
    """Per-class rates, each [..., C]; NaN where the denominator is zero."""

    sensitivity: FloatArray
    specificity: FloatArray
    precision: FloatArray
    f1: FloatArray


def check_probabilities(probabilities: FloatArray, num_classes: int | None = None) -> None:
    """Refuse probabilities that are not a distribution per row.

    Args:
        probabilities: [N, C], rows sum to 1 within 1e-6.
        num_classes: C, if it is known.
    Raises:
        ContractError: wrong shape, a value that is not finite or negative, or a sum that is not 1 (names the row).
    """
    if probabilities.ndim != 2 or (num_classes is not None and probabilities.shape[1] != num_classes):
        raise ContractError(f"probabilities must be [N, {num_classes or 'C'}], got {list(probabilities.shape)}")
    # Comparisons with NaN are false, so a row that is not finite counts as bad.
    with np.errstate(invalid="ignore"):
        bad = ~((np.abs(probabilities.sum(axis=1) - 1.0) <= 1e-6) & (probabilities >= 0).all(axis=1))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ContractError(f"row {row} of {len(bad)} is not a probability distribution: {probabilities[row].tolist()}")


def confusion_matrix(labels: IntArray, predicted: IntArray, num_classes: int) -> IntArray:
    """Count cases by true and predicted class.

    Args:
        labels: [N] class indices, 0 to C - 1.
        predicted: [N] class indices, 0 to C - 1.
        num_classes: C.
    Returns:
        [C, C]; row = true class, column = predicted class.
    """
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_counts(confusion: Confusion) -> ClassCounts:
    """Return the counts per class of confusion matrices [..., C, C]; counts are returned as they are."""
    if isinstance(confusion, ClassCounts):
        return confusion
    counts = np.asarray(confusion, dtype=np.float64)
    return ClassCounts(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2))


def class_rates(confusion: Confusion) -> Rates:
    """Compute sensitivity TP/(TP+FN), specificity TN/(TN+FP), precision TP/(TP+FP) and F1 of every class.

    Args:
        confusion: [..., C, C]; row = true class, column = predicted class; or counts.
    Returns:
        The rates, one class against the rest.

    >>> class_rates(np.array([[8, 2], [1, 9]])).sensitivity.tolist()
    [0.8, 0.9]
    """
    counts = class_counts(confusion)
    hits, cases, predicted = counts.hits, counts.cases, counts.predicted
    others = cases.sum(axis=-1)[..., None] - cases
    return Rates(
        sensitivity=_ratio(hits, cases),
        specificity=_ratio(others - (predicted - hits), others),
        precision=_ratio(hits, predicted),
        f1=_ratio(2.0 * hits, cases + predicted),
    )


def balanced_accuracy(confusion: Confusion) -> FloatArray:
    """Average the sensitivity over the classes that have cases.

    Args:
        confusion: [..., C, C]; row = true class, column = predicted class; or counts.
    Returns:
        [...] in [0, 1]; NaN if there are no cases at all.
    """
    sensitivity = class_rates(confusion).sensitivity
    present = ~np.isnan(sensitivity)
    return _ratio(np.where(present, sensitivity, 0.0).sum(axis=-1), present.sum(axis=-1).astype(np.float64))


def accuracy_of(confusion: Confusion) -> FloatArray:
    """Return the share of correct predictions, [...], of confusion matrices [..., C, C]; NaN if there are no cases."""
    counts = class_counts(confusion)
    return _ratio(counts.hits.sum(axis=-1), counts.cases.sum(axis=-1))


def macro_f1(confusion: Confusion) -> FloatArray:
    """Average F1 = 2 TP / (2 TP + FP + FN) over the classes that have cases.

    Args:
        confusion: [..., C, C]; row = true class, column = predicted class; or counts.
    Returns:
        [...] in [0, 1]; NaN if there are no cases at all.
    """
    counts = class_counts(confusion)
    present = counts.cases > 0
    # An absent class has F1 0 if it was predicted, else NaN; neither may enter the mean.
    f1 = np.where(present, np.nan_to_num(class_rates(counts).f1), 0.0)
    return _ratio(f1.sum(axis=-1), present.sum(axis=-1).astype(np.float64))


def one_vs_rest_auc(labels: IntArray, probabilities: FloatArray) -> FloatArray:
    """Compute the area under each class's ROC curve (Mann-Whitney U, ties count one half).

    Args:
        labels: [N] class indices.
        probabilities: [N, C].
    Returns:
        [C]; NaN for a class without cases or without other cases.
    """
    ranks = pd.DataFrame(probabilities).rank().to_numpy()
    is_class = labels[:, None] == np.arange(probabilities.shape[1])
    cases = is_class.sum(axis=0).astype(np.float64)
    others = len(labels) - cases
    # The cases' rank sum minus its smallest possible value is Mann-Whitney's U; mean ranks count a tie as one half.
    rank_sum = (ranks * is_class).sum(axis=0)
    return _ratio(rank_sum - cases * (cases + 1) / 2, cases * others)


def expected_calibration_error(labels: IntArray, probabilities: FloatArray, num_bins: int = ECE_BINS) -> float:
    """Average the gap between confidence and accuracy over equal-width bins of confidence.

    Bins are (i/B, (i+1)/B], weighted by their share of the cases (Guo et al. 2017).

    Args:
        labels: [N] class indices, N >= 1.
        probabilities: [N, C]; confidence is the largest of a row.
        num_bins: B.
    Returns:
        A number in [0, 1].
    """
    confidence, correct, bins = _binned(labels, probabilities, num_bins)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def reliability_bins(
    labels: IntArray, probabilities: FloatArray, num_bins: int = ECE_BINS
) -> list[tuple[float, float, int]]:
    """Gather cases of about the same confidence.

    Args:
        labels: [N] class indices.
        probabilities: [N, C]; confidence is the largest of a row.
        num_bins: B, of equal width.
    Returns:
        (mean confidence, accuracy, cases) of every bin that holds any, by rising confidence.
    """
    confidence, correct, bins = _binned(labels, probabilities, num_bins)
    return [
        # Sorted, so that the sum does not depend on the order of the cases.
        (
            float(np.sort(confidence[bins == index]).mean()),
            float(correct[bins == index].mean()),
            int((bins == index).sum()),
        )
        for index in np.unique(bins)
    ]


def score_bands(
    probabilities: FloatArray, labels: IntArray, predicted: IntArray | None = None, num_bands: int = SCORE_BANDS
) -> list[dict[str, Any]]:
    """Count correct predictions by confidence, on images that neither training nor calibration saw.

    Args:
        probabilities: [L, C] calibrated, a distribution per row.
        labels: [L] class indices.
        predicted: [L] class indices, whose probability is the confidence; default: the most probable class.
        num_bands: of equal width over 0 to 1; a band holds its lower end, the last one both.
    Returns:
        `low`, `high`, `lesions` and `right` of every band that holds a lesion, by rising confidence.
    Raises:
        ContractError: a row is not a distribution.
    """
    check_probabilities(probabilities)
    chosen = probabilities.argmax(axis=1) if predicted is None else predicted
    right = chosen == labels
    confidence = probabilities[np.arange(len(chosen)), chosen]
    bands = np.minimum((confidence * num_bands).astype(np.int64), num_bands - 1)
    return [
        {
            "low": int(band) / num_bands,
            "high": (int(band) + 1) / num_bands,
            "lesions": int((bands == band).sum()),
            "right": int(right[bands == band].sum()),
        }
        for band in np.unique(bands)
    ]


def mean_by_unit(values: FloatArray, unit_index: IntArray) -> FloatArray:
    """Average the rows that belong to one unit, for example the images of one lesion.

    Args:
        values: [N] or [N, C].
        unit_index: [N], 0 to U - 1, every unit at least once.
    Returns:
        [U] or [U, C].
    """
    # bincount sums in C, for one column at a time; np.add.at over [N, C] is many times slower.
    sizes = np.bincount(unit_index)
    if values.ndim == 1:
        return np.asarray(np.bincount(unit_index, weights=values) / sizes)
    sums = np.stack([np.bincount(unit_index, weights=column) for column in values.T], axis=1)
    return np.asarray(sums / sizes[:, None], dtype=np.float64)


def _binned(labels: IntArray, probabilities: FloatArray, num_bins: int) -> tuple[FloatArray, BoolArray, IntArray]:
    """Return confidence, correctness and bin index of every case, each [N]."""
    confidence = probabilities.max(axis=1)
    # ceil - 1 puts a confidence on a border into the lower bin, as (i/B, (i+1)/B] says; clip catches a confidence of 0.
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    return confidence, probabilities.argmax(axis=1) == labels, bins


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    defined = denominator > 0
    undefined = np.full(np.shape(numerator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=defined))
