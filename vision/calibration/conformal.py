"""Prediction sets with guaranteed coverage: class-conditional split-conformal thresholds.

For every class, the set holds the true class with at least the promised probability, however good the network is
(Vovk 2012), as long as new images are drawn like the calibration lesions. Classes with too few lesions share one
threshold, and the guarantee then holds for them together, not for each.

In: 1 - p(true class) of one image per calibration lesion. Out: thresholds q; a class is in the
set if 1 - p <= q. Pure array work.
"""

from collections.abc import Sequence

import numpy as np

from records.arrays import BoolArray, FloatArray, IntArray
from records.bundles import OperatingPoints
from records.taxonomy import Taxonomy

CONFORMAL_PROMISE = 0.90
MIN_CLASS_LESIONS = 19
"""With fewer calibration lesions than this, a class shares the pooled threshold."""


def conformal_quantile(nonconformity: FloatArray, promise: float = CONFORMAL_PROMISE) -> float:
    """Return the split-conformal quantile: the ceil((n + 1) * promise)-th smallest score.

    Args:
        nonconformity: [n] 1 - p(true class), one per lesion.
        promise: coverage, 0 to 1.
    Returns:
        q in [0, 1]; 1 (everything is in the set) if n is too small for the promise.
    """
    # 1e-9: (n + 1) * promise is a whole number for round promises, and rounding must not lift it to the next rank.
    rank = int(np.ceil((len(nonconformity) + 1) * promise - 1e-9))
    return float(np.sort(nonconformity)[rank - 1]) if 1 <= rank <= len(nonconformity) else 1.0


def conformal_thresholds(
    nonconformity: FloatArray,
    labels: IntArray,
    codes: Sequence[str],
    promise: float = CONFORMAL_PROMISE,
    min_lesions: int = MIN_CLASS_LESIONS,
) -> tuple[dict[str, float], list[str]]:
    """Fit class-conditional split-conformal thresholds; small classes share one.

    Args:
        nonconformity: [L] 1 - p(true class), one per lesion.
        labels: [L] class indices.
        codes: [C] class codes in class order.
        promise: coverage that is promised.
        min_lesions: classes with fewer lesions are pooled with one another.
    Returns:
        Class code to q (the class is in the set if 1 - p <= q), and the codes of the pooled classes.
    """
    counts = np.bincount(labels, minlength=len(codes))
    is_small = counts < min_lesions
    # Pooled over the small classes only: large classes would dominate the shared threshold.
    pooled_quantile = conformal_quantile(nonconformity[is_small[labels]], promise)
    thresholds = {
        code: pooled_quantile if is_small[index] else conformal_quantile(nonconformity[labels == index], promise)
        for index, code in enumerate(codes)
    }
    return thresholds, [code for index, code in enumerate(codes) if is_small[index]]


def prediction_set(probabilities: FloatArray, thresholds: FloatArray) -> BoolArray:
    """Return which classes cannot be excluded.

    Args:
        probabilities: [N, C].
        thresholds: [C] conformal thresholds q in class order, see `thresholds_in_order`.
    Returns:
        [N, C]: 1 - p <= q. A row may be empty, if the image is unlike any of calibration; a row that is not finite
        holds every class.
    """
    # 1e-12: the threshold is a rounded 1 - p itself, and must include the lesion that it was taken from.
    inside = 1.0 - probabilities <= thresholds + 1e-12
    inside[~np.isfinite(probabilities).all(axis=1)] = True
    return np.asarray(inside, dtype=np.bool_)


def thresholds_in_order(operating: OperatingPoints, taxonomy: Taxonomy) -> FloatArray:
    """Return the conformal thresholds in class order, [C]; 1 for a class that has none."""
    return np.array([operating.conformal_thresholds.get(code, 1.0) for code in taxonomy.codes])
