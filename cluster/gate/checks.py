"""The checks of the gate: floors that a challenger has to reach, and paired comparisons with its rivals.

In: contenders on the gate split and the gate's settings. Out: one `Check` per check. Comparisons are paired:
the same resamples of lesions are drawn for both models, and the one-sided lower bound of the difference
decides. The bounds of several slices hold simultaneously (max-t, see `simultaneous_lower_bounds`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist

import numpy as np

from cluster.gate.contenders import Contender, Slice, accuracy_of, lesions_of
from cluster.gate.report import Check, Outcome
from cluster.settings import GateSettings
from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.taxonomy import Taxonomy
from trainers.evaluation.evaluate import SplitPredictions
from vision.metrics.bootstrap import resampled_counts
from vision.metrics.metrics import balanced_accuracy, expected_calibration_error, mean_by_unit

POWER = 0.8
"""Probability of passing that `Check.passes_from` states."""


def identity_checks(challenger: Contender, rivals: Sequence[tuple[str, Contender]]) -> list[Check]:
    """Check that the challenger predicts differently from each rival; swapping equal models gains nothing."""
    checks = []
    for role, rival in rivals:
        same = challenger.model_id == rival.model_id or (
            # The same probabilities give other labels and referrals under another rule.
            challenger.decision == rival.decision
            and np.array_equal(challenger.predictions.probabilities, rival.predictions.probabilities)
        )
        text = f"its predictions equal those of the {role}" if same else f"it is not the same model as the {role}"
        checks.append(Check(name=f"differs from {role}", outcome="fail" if same else "pass", text=text))
    return checks


def floor_checks(
    challenger: Contender, groups: IntArray, key_index: int | None, taxonomy: Taxonomy, settings: GateSettings
) -> list[Check]:
    """Check sensitivity and specificity of the key class at the challenger's operating point, per lesion."""
    if key_index is None or taxonomy.key_class is None or challenger.key_threshold is None:
        return []
    lesions = lesions_of(challenger.predictions, groups, key_index)
    name, floor = taxonomy.key_class.code, taxonomy.key_class.sensitivity_floor
    num_key, num_other = int(lesions.is_key.sum()), int((~lesions.is_key).sum())
    if num_key == 0 or num_other == 0:
        text = (
            f"the gate split holds {num_key} lesions of {name} and {num_other} others, so the floor cannot be checked"
        )
        return [Check(name=f"{name} sensitivity floor", outcome="undecided", text=text, limit=floor)]
    referred = lesions.key_probability >= challenger.key_threshold
    sensitivity = float(referred[lesions.is_key].mean())
    specificity = float((~referred)[~lesions.is_key].mean())
    return [
        _floor_check(f"{name} sensitivity", sensitivity, floor, num_key),
        _floor_check(f"{name} specificity", specificity, settings.min_specificity, num_other),
    ]


def _floor_check(name: str, value: float, floor: float, lesions: int) -> Check:
    holds = value >= floor
    relation = "reaches" if holds else "is under"
    text = f"{name} {value:.3f} at the operating point {relation} its floor {floor:.2f} ({lesions} lesions)"
    return Check(
        name=f"{name} floor",
        outcome="pass" if holds else "fail",
        text=text,
        estimate=value,
        limit=floor,
        lesions=lesions,
    )


def calibration_check(predictions: SplitPredictions, settings: GateSettings) -> Check:
    """Check the expected calibration error."""
    error = expected_calibration_error(predictions.labels, predictions.probabilities)
    holds = error <= settings.max_calibration_error
    relation = "is within" if holds else "is over"
    return Check(
        name="calibration error",
        outcome="pass" if holds else "fail",
        text=f"calibration error {error:.3f} {relation} its limit {settings.max_calibration_error:.2f}",
        estimate=error,
        limit=settings.max_calibration_error,
    )


def explanation_check(similarity: float | None, settings: GateSettings) -> Check:
    """Check that the heat maps depend on the trained weights.

    `similarity` compares them with the maps of the same network with random weights, 0 to 1; None if it is unknown.
    """
    name, limit = "explanation sanity", settings.max_random_similarity
    if similarity is None:
        return Check(
            name=name, outcome="fail", text="its heat maps could not be compared with those of a randomised network"
        )
    holds = similarity <= limit
    text = (
        f"its heat maps {'differ from' if holds else 'look like'} those of the same network with random weights "
        f"(similarity {similarity:.2f}, limit {limit:.2f})"
    )
    return Check(name=name, outcome="pass" if holds else "fail", text=text, estimate=similarity, limit=limit)


@dataclass(frozen=True)
class KeyGain:
    """Key-class lesions that one model finds and the other does not, both at the rival's specificity.

    Args:
        specificity: the rival's at its operating point, 0 to 1.
        is_key: [G] true for lesions of the key class.
        gain: [G] 1 found by the challenger only, -1 by the rival only, else 0.
    """

    specificity: float
    is_key: BoolArray
    gain: FloatArray


def accuracy_check(
    role: str,
    challenger: Contender,
    rival: Contender,
    groups: IntArray,
    weights: Float32Array,
    taxonomy: Taxonomy,
    settings: GateSettings,
) -> Check:
    """Compare balanced accuracy; the challenger has to gain, and its lower bound has to stay above the margin."""
    num_classes, labels = len(taxonomy.codes), challenger.predictions.labels
    estimates, resampled = [], []
    for contender in (challenger, rival):
        estimates.append(accuracy_of(contender, num_classes))
        resampled.append(balanced_accuracy(resampled_counts(labels, contender.labels, groups, weights, num_classes)))
    differences = resampled[0] - resampled[1]
    return _check_difference(
        name=f"balanced accuracy against {role}",
        estimate=estimates[0] - estimates[1],
        lower=float(np.nanquantile(differences, 1 - settings.confidence)),
        spread=float(np.nanstd(differences)),
        margin=settings.margin,
        confidence=settings.confidence,
        must_gain=True,
        lesions=int(groups.max()) + 1,
    )


def sensitivity_checks(
    role: str,
    challenger: Contender,
    rival: Contender,
    groups: IntArray,
    weights: Float32Array,
    key_index: int,
    slices: Sequence[Slice],
    settings: GateSettings,
) -> list[Check]:
    """Compare key-class sensitivity at the rival's specificity, in the whole split and in each large slice."""
    name = f"key-class sensitivity against {role}"
    found = key_gain(challenger, rival, groups, key_index)
    if found is None:
        text = f"{name} cannot be compared: no such lesions on the gate split"
        return [Check(name=name, outcome="undecided", text=text)]
    # `key_gain` returned a result, so there are lesions of the key class and the difference exists.
    whole = _key_difference(found, np.ones_like(found.is_key), weights)
    assert whole is not None
    checks = [
        _check_difference(
            name=f"{name} at specificity {found.specificity:.2f}",
            estimate=whole[0],
            lower=float(np.nanquantile(whole[1], 1 - settings.confidence)),
            spread=float(np.nanstd(whole[1])),
            margin=settings.key_class_margin,
            confidence=settings.confidence,
            must_gain=False,
            lesions=int(found.is_key.sum()),
        )
    ]
    return [*checks, *_slice_checks(name, found, groups, weights, slices, settings)]


def key_gain(challenger: Contender, rival: Contender, groups: IntArray, key_index: int) -> KeyGain | None:
    """Set the challenger's threshold to the rival's specificity and compare hits; None if one group has no lesion."""
    ours, theirs = (lesions_of(c.predictions, groups, key_index) for c in (challenger, rival))
    is_key = ours.is_key
    if not is_key.any() or is_key.all() or rival.key_threshold is None:
        return None
    specificity = float((theirs.key_probability[~is_key] < rival.key_threshold).mean())
    threshold = threshold_at_specificity(ours.key_probability[~is_key], specificity)
    hits = (ours.key_probability >= threshold).astype(np.float64)
    rival_hits = (theirs.key_probability >= rival.key_threshold).astype(np.float64)
    return KeyGain(specificity, is_key, hits - rival_hits)


def threshold_at_specificity(negatives: FloatArray, specificity: float) -> float:
    """Return the lowest threshold that keeps at least this share of the negatives below it."""
    # Without the tolerance a product such as 0.07 * 100 = 7.000000000000001 would be rounded up to 8.
    kept = ceil(specificity * len(negatives) - 1e-9)
    ordered = np.sort(negatives)
    if kept >= len(ordered):
        return float(np.nextafter(ordered[-1], np.inf))  # a score equal to the threshold counts as positive
    return float(np.nextafter(ordered[kept - 1], np.inf)) if kept > 0 else 0.0


def lesions_in(part: Slice, groups: IntArray) -> BoolArray:
    """Return which lesions have an image in a slice, [G] bool."""
    return np.asarray(mean_by_unit(part.members.astype(np.float64), groups) > 0)


def simultaneous_lower_bounds(estimates: FloatArray, differences: FloatArray, confidence: float) -> FloatArray:
    """Return lower bounds of several differences that hold simultaneously (max-t).

    Each bound is c standard deviations below its estimate, with one c for all: the quantile, over the
    resamples, of the largest standardized deviation of any slice.

    Args:
        estimates: [K].
        differences: [R, K] resampled; NaN where a resample holds none of a slice's lesions.
        confidence: probability that all K bounds hold, 0 to 1.
    Returns:
        [K]; a difference that does not vary is its own bound.
    """
    spread = np.nanstd(differences, axis=0)
    varies = spread > 0
    if not varies.any():
        return estimates.copy()
    standardized = (differences[:, varies] - estimates[varies]) / spread[varies]
    worst = np.nanquantile(np.nanmax(standardized, axis=1), confidence)
    return np.where(varies, estimates - worst * spread, estimates)


def _slice_checks(
    name: str,
    found: KeyGain,
    groups: IntArray,
    weights: Float32Array,
    slices: Sequence[Slice],
    settings: GateSettings,
) -> list[Check]:
    """Check the slices that hold enough lesions of the key class; the others are only counted in the report."""
    parts = [(part, lesions_in(part, groups)) for part in slices]
    large = [(p, inside) for p, inside in parts if int((found.is_key & inside).sum()) >= settings.min_slice_lesions]
    if not large:
        return []
    pairs = [_key_difference(found, inside, weights) for _, inside in large]
    estimates = np.array([pair[0] for pair in pairs if pair is not None])
    differences = np.stack([pair[1] for pair in pairs if pair is not None], axis=1)
    lower = simultaneous_lower_bounds(estimates, differences, settings.confidence)
    return [
        _check_difference(
            name=f"{name} in {part.name}",
            estimate=float(estimates[k]),
            lower=float(lower[k]),
            spread=float(np.nanstd(differences[:, k])),
            margin=settings.key_class_margin,
            confidence=settings.confidence,
            must_gain=False,
            lesions=int((found.is_key & inside).sum()),
        )
        for k, (part, inside) in enumerate(large)
    ]


def _key_difference(found: KeyGain, inside: BoolArray, weights: Float32Array) -> tuple[float, FloatArray] | None:
    """Return the gain in sensitivity over some lesions, and in every resample, [R]; None without a key lesion."""
    chosen = found.is_key & inside
    if not chosen.any():
        return None
    key_weights = weights[:, chosen].astype(np.float64)
    drawn = key_weights.sum(axis=1)
    # A resample that drew none of these lesions says nothing about them: it stays NaN, not 0.
    resampled = np.full(len(weights), np.nan)
    np.divide(key_weights @ found.gain[chosen], drawn, out=resampled, where=drawn > 0)
    return float(found.gain[chosen].mean()), resampled


def _check_difference(
    *,
    name: str,
    estimate: float,
    lower: float,
    spread: float,
    margin: float,
    confidence: float,
    must_gain: bool,
    lesions: int,
) -> Check:
    """Decide on a paired difference: fail if it is worse, undecided if its bound does not exclude the margin."""
    least = 0.0 if must_gain else -margin
    bound = f"at least {lower:+.3f} with {confidence:.0%} confidence"
    figures = f"{estimate:+.3f}, {bound}, margin {-margin:+.2f} ({lesions} lesions)"
    more = None
    outcome: Outcome
    if estimate < least or (must_gain and estimate <= 0):
        outcome, text = "fail", f"{name} is not good enough: {figures}"
    elif lower > -margin:
        outcome, text = "pass", f"{name} holds: {figures}"
    else:
        outcome = "undecided"
        # The half-width of the bound shrinks with the square root of the lesions.
        room = estimate + margin
        more = ceil(lesions * ((estimate - lower) / room) ** 2) - lesions if room > 0 else None
        advice = f"; about {more} more lesions would decide" if more is not None else ""
        text = f"{name} is not clear: {figures}{advice}"
    # From this true difference on, each condition of a pass holds with a probability of 0.8: the bound is above
    # the margin, and the estimate is at least `least`.
    normal = NormalDist()
    reach = normal.inv_cdf(confidence) + normal.inv_cdf(POWER)
    return Check(
        name=name,
        outcome=outcome,
        text=text,
        estimate=estimate,
        lower_bound=lower,
        limit=-margin,
        lesions=lesions,
        more_lesions=more,
        passes_from=max(reach * spread - margin, least + normal.inv_cdf(POWER) * spread),
    )
