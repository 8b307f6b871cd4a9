"""Figures of what a bundle decides: its decision rule beside the others, its operating points, labels outside sets.

In: served probabilities [N, C], lesions, and the bundle's thresholds. Out: parts of an `Evaluation`. A model has one
rule and one operating point in force; the others are measured on the same images, so that a choice can be compared.
"""

from collections.abc import Mapping

import numpy as np

from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.bundles import DecisionRule, OperatingPoints, PointName
from records.errors import ConfigError
from records.taxonomy import Taxonomy
from trainers.evaluation.figures import (
    LabelOutsideSet,
    PointReport,
    ReferralCurve,
    RuleReport,
    interval_of,
    key_class_report,
)
from vision.calibration.conformal import prediction_set, thresholds_in_order
from vision.calibration.decision import RULES, decision_rule, labels_of, sets_of
from vision.calibration.operating import Lesions, answered, at_point
from vision.metrics.bootstrap import resampled_counts
from vision.metrics.metrics import accuracy_of, balanced_accuracy, confusion_matrix

POINTS: tuple[PointName, ...] = ("proven", "target")
CURVE_POINTS = 101
"""Thresholds of a curve at most: more lesions than that move it by less than one step that can be seen."""


def decided(served: FloatArray, stated: FloatArray, decision: DecisionRule) -> IntArray:
    """Return the labels, [N] class indices.

    Args:
        served: [N, C] at the prevalence of calibration.
        stated: [N, C] the same at a stated prevalence, or `served` itself.
        decision: rule of the bundle, whose weights belong to `served`.
    Returns:
        [N]. The label of `even` depends on no prevalence: what re-weighting multiplies, dividing by the share removes.
    """
    return labels_of(served if decision.rule == "even" else stated, decision)


def rule_reports(
    labels: IntArray,
    served: FloatArray,
    stated: FloatArray,
    taxonomy: Taxonomy,
    priors: Mapping[str, float] | None,
    in_force: DecisionRule,
    group_index: IntArray,
    weights: Float32Array,
) -> dict[str, RuleReport]:
    """Report the labels of every decision rule.

    Args:
        labels: [N] true class indices.
        served: [N, C].
        stated: [N, C], see `decided`.
        taxonomy: class order and miss costs.
        priors: class shares at calibration; without them there is no report.
        in_force: the bundle's rule.
        group_index: [N] the independent unit of each image.
        weights: [R, G] resamples.
    Returns:
        Rule to report; `cost` is missing where the taxonomy has no costs.
    """
    if not priors:
        return {}
    reports: dict[str, RuleReport] = {}
    for rule in RULES:
        try:
            decision = in_force if rule == in_force.rule else decision_rule(rule, taxonomy, priors)
        except ConfigError:
            continue
        predicted = decided(served, stated, decision)
        confusion = confusion_matrix(labels, predicted, len(taxonomy.codes))
        resampled = resampled_counts(labels, predicted, group_index, weights, len(taxonomy.codes))
        estimate, accuracy = float(balanced_accuracy(confusion)), float(accuracy_of(confusion))
        counts = confusion.sum(axis=1)
        reports[rule] = RuleReport(
            in_force=rule == in_force.rule,
            balanced_accuracy=estimate,
            balanced_accuracy_ci=interval_of(estimate, balanced_accuracy(resampled), weights.shape[1]),
            accuracy=accuracy,
            accuracy_ci=interval_of(accuracy, accuracy_of(resampled), weights.shape[1]),
            sensitivity={
                code: float(confusion[index, index] / counts[index]) if counts[index] else None
                for index, code in enumerate(taxonomy.codes)
            },
        )
    return reports


def label_outside_set(
    labels: IntArray, served: FloatArray, taxonomy: Taxonomy, operating: OperatingPoints
) -> LabelOutsideSet | None:
    """Count the images whose label lies outside their prediction set; None without thresholds."""
    if not operating.conformal_thresholds:
        return None
    predicted = labels_of(served, operating.decision)
    rows, right = np.arange(len(served)), predicted == labels
    outside = ~sets_of(served, taxonomy, operating)[rows, predicted]
    joined = ~prediction_set(served, thresholds_in_order(operating, taxonomy))[rows, predicted] & ~outside
    return LabelOutsideSet(
        images=int(outside.sum()),
        share=float(outside.mean()),
        accuracy=_share(right[outside]),
        accuracy_of_others=_share(right[~outside]),
        joined=int(joined.sum()),
        accuracy_of_joined=_share(right[joined]),
    )


def point_reports(
    served: FloatArray,
    lesions: Lesions,
    taxonomy: Taxonomy,
    operating: OperatingPoints,
    group_index: IntArray,
    weights: Float32Array,
    max_set_size: int,
) -> dict[str, PointReport]:
    """Report the operating points that a bundle has.

    Args:
        served: [N, C].
        lesions: of the same images.
        taxonomy: key class, malignant classes.
        operating: of the bundle.
        group_index: [L] the independent unit of each lesion.
        weights: [R, G] resamples.
        max_set_size: larger prediction sets go to an annotator.
    Returns:
        Name to report.
    """
    reports: dict[str, PointReport] = {}
    for name in POINTS:
        at = at_point(operating, name)
        if at is None:
            continue
        key = key_class_report(taxonomy, at, lesions, group_index, weights)
        point = None if taxonomy.key_class is None else at.refer.get(taxonomy.key_class.code)
        reports[name] = PointReport(
            in_force=operating.decision.point == name,
            threshold=None if point is None else point.threshold,
            aim=None if point is None else point.sensitivity_floor,
            proven=point is not None and point.proven,
            sensitivity=None if key is None else key.sensitivity,
            sensitivity_ci=None if key is None else key.sensitivity_ci,
            specificity=None if key is None else key.specificity,
            specificity_ci=None if key is None else key.specificity_ci,
            answered_share=float(answered(served, taxonomy, at, max_set_size).mean()),
        )
    return reports


def referral_curve(
    served: FloatArray, lesions: Lesions, taxonomy: Taxonomy, operating: OperatingPoints, max_set_size: int
) -> ReferralCurve | None:
    """Sweep the refer threshold of the key class.

    Args:
        served: [N, C].
        lesions: of the same images.
        taxonomy: key class, malignant classes.
        operating: of the bundle; all its other rules stay in force.
        max_set_size: larger prediction sets go to an annotator.
    Returns:
        The curve; None without a key class, or if all lesions or none are of it.
    """
    if taxonomy.key_class is None:
        return None
    code, index = taxonomy.key_class.code, taxonomy.index_of(taxonomy.key_class.code)
    is_case, scores = lesions.labels == index, lesions.probabilities[:, index]
    if is_case.all() or not is_case.any():
        return None
    candidates = np.unique(np.append(scores[is_case], 0.0))
    at = np.linspace(0, len(candidates) - 1, min(CURVE_POINTS, len(candidates))).round().astype(np.int64)
    thresholds = candidates[at]
    refer = {other: point for other, point in operating.refer.items() if other != code}
    others = answered(served, taxonomy, operating.model_copy(update={"refer": refer}), max_set_size)
    return ReferralCurve(
        threshold=thresholds.tolist(),
        sensitivity=[float((scores[is_case] >= threshold).mean()) for threshold in thresholds],
        specificity=[float((scores[~is_case] < threshold).mean()) for threshold in thresholds],
        abstained=[float(1.0 - (others & (served[:, index] < threshold)).mean()) for threshold in thresholds],
    )


def _share(is_member: BoolArray) -> float | None:
    return float(is_member.mean()) if len(is_member) else None
