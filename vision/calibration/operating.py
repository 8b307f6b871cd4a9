"""Operating points: thresholds of referral and of urgency.

Everything is measured on the calibration split, per lesion, on calibrated probabilities, in pure array work. A
lesion's probability is the mean over its images. Where the lesions are too few to prove a floor, the point says so
(`proven: false`). Rules about an image's quality or novelty are not here; serving adds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from records.arrays import BoolArray, FloatArray, IntArray
from records.bundles import DecisionRule, OperatingPoints, PointName, ReferPoint, ReferPoints
from records.errors import ContractError
from records.taxonomy import Taxonomy
from vision.calibration.conformal import CONFORMAL_PROMISE, conformal_thresholds
from vision.calibration.decision import TARGET_SENSITIVITY, labels_of, sets_of
from vision.metrics.metrics import check_probabilities, mean_by_unit

LEVEL = 0.95
MIN_URGENT_LESIONS = 10
MALIGNANT_FLOOR = 0.90
"""Sensitivity floor of p(malignant) for a taxonomy that declares no key class."""


@dataclass(frozen=True)
class Lesions:
    """The images of one split, grouped by lesion."""

    probabilities: FloatArray
    """[L, C] mean over each lesion's images"""
    labels: IntArray
    """[L] class indices"""
    first_image_index: IntArray
    """[L]: the image that represents each lesion where one is needed, by smallest image id"""
    lesion_index: IntArray
    """[N]: the lesion of each image"""

    def __len__(self) -> int:
        return len(self.labels)


def gather_lesions(
    image_ids: Sequence[str], lesion_ids: Sequence[str | None], labels: IntArray, probabilities: FloatArray
) -> Lesions:
    """Group images by lesion; an image without a lesion id is a lesion of its own.

    Args:
        image_ids: [N]; ids are hashes, so the smallest of a lesion is a fair draw.
        lesion_ids: [N].
        labels: [N] class indices; images of one lesion with different labels count as two lesions.
        probabilities: [N, C], a distribution per row.
    Returns:
        L lesions.
    Raises:
        ContractError: lengths differ, or a row is not a distribution.
    """
    check_probabilities(probabilities)
    if not len(image_ids) == len(lesion_ids) == len(labels) == len(probabilities):
        raise ContractError("image ids, lesion ids, labels and probabilities must have one length")
    names = [
        f"lesion:{lesion}:{label}" if lesion else f"image:{image}"
        for image, lesion, label in zip(image_ids, lesion_ids, labels.tolist(), strict=True)
    ]
    _, lesion_index = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    # By lesion, then image id: the first of each run has the smallest id.
    order = np.lexsort((np.array(image_ids, dtype=str), lesion_index))
    starts = np.flatnonzero(np.diff(lesion_index[order], prepend=-1))
    first = order[starts]
    return Lesions(mean_by_unit(probabilities, lesion_index), labels[first], first, lesion_index)


def no_lesions(num_classes: int) -> Lesions:
    """Return an empty set of lesions."""
    none = np.zeros(0, dtype=np.int64)
    return Lesions(np.zeros((0, num_classes)), none, none, none)


def exact_interval(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Return both ends of the two-sided Clopper-Pearson interval of a proportion, at least one trial."""
    tail = (1.0 - level) / 2
    low = exact_lower_bound(successes, trials, 1.0 - tail)
    return low, 1.0 - exact_lower_bound(trials - successes, trials, 1.0 - tail)


def exact_lower_bound(successes: int, trials: int, level: float = LEVEL) -> float:
    """Compute the one-sided Clopper-Pearson lower bound of a proportion.

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
        level: confidence, 0 to 1.
    Returns:
        The largest p that `successes` or more of `trials` refute at this level.

    >>> [round(exact_lower_bound(n - misses, n), 3) for misses, n in ((0, 29), (2, 61), (4, 89))]
    [0.902, 0.9, 0.9]
    """
    if successes == 0:
        return 0.0
    # scipy.stats.binomtest gives the same bound to 5e-13, but solves for it in milliseconds: `refer_point` evaluates
    # one bound per lesion, and serving would import scipy.stats for it.
    return float(betaincinv(successes, trials - successes + 1, 1.0 - level))


def refer_point(
    scores: FloatArray, is_case: BoolArray, floor: float, level: float = LEVEL, *, prove: bool = True
) -> ReferPoint:
    """Find the highest threshold at which the sensitivity floor is proven, or only reached.

    Proven means that the exact one-sided lower bound reaches the floor. If not even catching every
    case proves it, the highest threshold whose point estimate reaches the floor is used and
    `proven` is false. Without any case the threshold is 0: everything is referred.

    Args:
        scores: [L] probability of the class, per lesion; a lesion at or above the threshold is referred.
        is_case: [L].
        floor: sensitivity, 0 to 1.
        level: confidence of the bound.
        prove: false: the point estimate is all that has to reach the floor.
    Returns:
        The point with what was measured.
    """
    case_scores = np.sort(scores[is_case])[::-1]
    num_cases = len(case_scores)
    if num_cases == 0:
        return ReferPoint(
            threshold=0.0, sensitivity_floor=floor, proven=False, sensitivity=None,
            sensitivity_lower_bound=None, specificity=_share(scores[~is_case] < 0.0), lesions=0,
        )  # fmt: skip
    # Sensitivity at the k-th highest case score is k / n: the fewest hits that prove the floor give the threshold.
    proving = range(1, num_cases + 1) if prove else ()
    wanted = [hits for hits in proving if exact_lower_bound(hits, num_cases, level) >= floor]
    fallback = max(1, int(np.ceil(floor * num_cases - 1e-9)))
    threshold = float(case_scores[(wanted[0] if wanted else fallback) - 1])
    hits = int((case_scores >= threshold).sum())
    bound = exact_lower_bound(hits, num_cases, level)
    return ReferPoint(
        threshold=threshold,
        sensitivity_floor=floor,
        proven=bound >= floor,
        sensitivity=hits / num_cases,
        sensitivity_lower_bound=bound,
        specificity=_share(scores[~is_case] < threshold),
        lesions=num_cases,
    )


def urgent_threshold(
    scores: FloatArray, is_case: BoolArray, predictive_value: float, min_lesions: int = MIN_URGENT_LESIONS
) -> float | None:
    """Find the lowest threshold above which the share of cases reaches a predictive value.

    Args:
        scores: [L] p(malignant), per lesion.
        is_case: [L].
        predictive_value: wanted share of cases among the lesions at or above the threshold, 0 to 1.
        min_lesions: fewest lesions at or above it for which the share counts.
    Returns:
        The threshold; None if none reaches the value: no lesion is urgent then.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    counts = np.arange(1, len(ranked) + 1)
    shares = np.cumsum(is_case[order]) / np.maximum(counts, 1)
    # Equal scores are taken together, so only the last of each run can be a threshold.
    is_last = np.append(ranked[1:] < ranked[:-1], True) if len(ranked) else np.zeros(0, dtype=bool)
    fits = np.flatnonzero(is_last & (counts >= min_lesions) & (shares >= predictive_value))
    return float(ranked[fits[-1]]) if len(fits) else None


def fit_operating_points(
    lesions: Lesions,
    image_probabilities: FloatArray,
    taxonomy: Taxonomy,
    *,
    urgent_predictive_value: float = 0.5,
    promise: float = CONFORMAL_PROMISE,
    decision: DecisionRule | None = None,
    val: Lesions | None = None,
    target_sensitivity: float = TARGET_SENSITIVITY,
) -> OperatingPoints:
    """Fit all thresholds of triage on the calibration split.

    Args:
        lesions: of the calibration split.
        image_probabilities: [N, C] of its images; one image of each lesion enters the conformal
            sets, because a prediction is about one image.
        taxonomy: key classes with their floors, malignant classes.
        urgent_predictive_value: share of malignant lesions wanted among the urgent ones, 0 to 1.
        promise: coverage of the prediction sets, per class.
        decision: rule of the label, and operating point; default: `natural`, and the proven one.
        val: further lesions, for the point `target`, or none (`no_lesions`); None leaves that point out.
        target_sensitivity: of the point `target`; a class whose floor is higher takes its floor.
    Returns:
        The operating points.
    Raises:
        ContractError: the point `target` is chosen, and there are no lesions of val.
    """
    chosen = decision or DecisionRule()
    points = {"proven": _refer_points(lesions.probabilities, lesions.labels, taxonomy)}
    if val is not None:
        probabilities = np.concatenate([lesions.probabilities, val.probabilities])
        labels = np.concatenate([lesions.labels, val.labels])
        points["target"] = _refer_points(probabilities, labels, taxonomy, target_sensitivity)
    elif chosen.point == "target":
        raise ContractError("the operating point `target` is estimated on calibration and val; there is no val")
    other = points.get("proven" if chosen.point == "target" else "target")
    is_malignant = np.array([c.malignant for c in taxonomy.classes])
    urgent = None
    if is_malignant.any():
        scores, cases = _malignant_scores(lesions.probabilities, is_malignant), is_malignant[lesions.labels]
        urgent = urgent_threshold(scores, cases, urgent_predictive_value)
    true_p = image_probabilities[lesions.first_image_index, lesions.labels]
    thresholds, pooled = conformal_thresholds(1.0 - true_p, lesions.labels, taxonomy.codes, promise)
    return OperatingPoints(
        refer=points[chosen.point].refer,
        refer_malignant=points[chosen.point].refer_malignant,
        urgent_threshold=urgent,
        conformal_promise=promise,
        conformal_thresholds=thresholds,
        pooled_classes=pooled,
        decision=chosen.model_copy(update={"other": other}),
    )


def _refer_points(
    probabilities: FloatArray, labels: IntArray, taxonomy: Taxonomy, target: float | None = None
) -> ReferPoints:
    """Fit the thresholds of referral of lesions [L, C]; with a target it has to be reached, not proven."""
    prove, least = target is None, target or 0.0
    refer = {}
    for key in taxonomy.key_classes:
        # Each key class has its own floor, so each gets a threshold of its own.
        index = taxonomy.index_of(key.code)
        floor = max(least, key.sensitivity_floor)
        refer[key.code] = refer_point(probabilities[:, index], labels == index, floor, prove=prove)
    is_malignant = np.array([c.malignant for c in taxonomy.classes])
    refer_malignant = None
    if is_malignant.any():
        floor = max(least, taxonomy.key_class.sensitivity_floor if taxonomy.key_class else MALIGNANT_FLOOR)
        scores = _malignant_scores(probabilities, is_malignant)
        refer_malignant = refer_point(scores, is_malignant[labels], floor, prove=prove)
    return ReferPoints(refer=refer, refer_malignant=refer_malignant)


def _malignant_scores(probabilities: FloatArray, is_malignant: BoolArray) -> FloatArray:
    # A sum of probabilities may exceed 1 by rounding, and a threshold must be a probability.
    return np.asarray(np.clip(probabilities[:, is_malignant].sum(axis=1), 0.0, 1.0), dtype=np.float64)


def at_point(operating: OperatingPoints, point: PointName) -> OperatingPoints | None:
    """Return a model's thresholds with another operating point in force; None if it has no such point."""
    decision = operating.decision
    if point == decision.point:
        return operating
    if decision.other is None:
        return None
    other = ReferPoints(refer=operating.refer, refer_malignant=operating.refer_malignant)
    return operating.model_copy(
        update={
            "refer": decision.other.refer,
            "refer_malignant": decision.other.refer_malignant,
            "decision": decision.model_copy(update={"point": point, "other": other}),
        }
    )


def answered(
    probabilities: FloatArray, taxonomy: Taxonomy, operating: OperatingPoints, max_set_size: int = 2
) -> BoolArray:
    """Return which images the probabilities alone leave to the model, without an annotator, [N].

    Not answered: at or above a refer threshold; a prediction set that is empty, lacks the label, holds more than
    `max_set_size` classes, or holds a malignant class other than the label; a row that is not finite.

    Args:
        probabilities: [N, C] calibrated.
        taxonomy: class order, malignant classes.
        operating: thresholds of referral and of the sets.
        max_set_size: largest set that needs no annotator, in classes.
    Returns:
        [N].
    """
    is_malignant = np.array([c.malignant for c in taxonomy.classes])
    sets = sets_of(probabilities, taxonomy, operating)
    finite = np.isfinite(probabilities).all(axis=1)
    label = labels_of(probabilities, operating.decision)
    other_malignant = sets & is_malignant & (np.arange(len(is_malignant)) != label[:, None])
    has_label = sets[np.arange(len(sets)), label]
    plain = finite & has_label & (sets.sum(axis=1) <= max_set_size) & ~other_malignant.any(axis=1)
    for code, point in operating.refer.items():
        # Negated, so that NaN is never below a threshold.
        plain &= ~(probabilities[:, taxonomy.index_of(code)] >= point.threshold)
    if operating.refer_malignant is not None:
        plain &= ~(probabilities[:, is_malignant].sum(axis=1) >= operating.refer_malignant.threshold)
    return np.asarray(plain, dtype=np.bool_)


def _share(is_member: BoolArray) -> float | None:
    return float(is_member.mean()) if len(is_member) else None
