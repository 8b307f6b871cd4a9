"""The shape of an evaluation, declared once, and how its parts are filled.

A metric that is undefined is null, and `undefined` says why under the metric's name; it is never 0 and
never NaN. Intervals are 95 %, by bootstrap over groups within class.
"""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.bundles import OperatingPoints
from records.taxonomy import Taxonomy
from trainers.evaluation.probes import ExplanationQuality, RobustnessReport
from vision.calibration.operating import Lesions, exact_interval
from vision.metrics.bootstrap import percentile_interval
from vision.metrics.metrics import class_rates

Interval = tuple[float, float]

FIXED_SENSITIVITY = 0.95

DEGENERATE = 1e-12
"""A bootstrap interval narrower than this did not vary at all."""


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ClassReport(_Shape):
    """One class against the rest, per image; intervals are 95 %, resampled by group."""

    sensitivity: float | None = None
    specificity: float | None = None
    precision: float | None = None
    f1: float | None = None
    support: int = Field(ge=0, description="images of the class")
    lesions: int = Field(ge=0, description="lesions of the class")
    sensitivity_ci: Interval | None = None
    specificity_ci: Interval | None = None
    precision_ci: Interval | None = None
    f1_ci: Interval | None = None
    auc: float | None = Field(default=None, description="area under the class's ROC curve, one against the rest")


class KeyClassReport(_Shape):
    """The first key class at its refer threshold, per lesion (mean probability over its images)."""

    name: str
    sensitivity: float | None
    specificity: float | None
    threshold: float | None = Field(description="calibrated probability; at or above it a lesion is referred")
    sensitivity_ci: Interval | None
    specificity_ci: Interval | None
    lesions: int = Field(ge=0, description="lesions of the key class")
    floor: float = Field(description="sensitivity that a served model must reach")
    proven: bool = Field(description="whether the calibration split proved the floor at this threshold")
    specificity_at_95_sensitivity: float | None = Field(
        default=None, description="largest specificity at a threshold that finds 95 % of the key class's lesions"
    )
    specificity_at_95_sensitivity_ci: Interval | None = None


class ReliabilityBin(_Shape):
    """Images of about the same confidence, and how often their answers were right."""

    confidence: float = Field(description="mean confidence")
    accuracy: float
    images: int = Field(ge=1)


class EqualPrevalence(_Shape):
    """The answers if all classes came equally often: the decision that balanced accuracy rewards.

    Calibrated probabilities of rare classes are small, as they should be, so the most probable class is seldom one of
    them. Re-weighted by Bayes to equal shares, every class has the same say. A script that trains with a balanced
    sampler and takes the largest output decides like this, and is compared with this.
    """

    balanced_accuracy: float
    balanced_accuracy_ci: Interval
    sensitivity: dict[str, float | None] = Field(description="share of a class's images that were answered so")


class Coverage(_Shape):
    """How often the prediction set holds the true class; one image per lesion."""

    promise: float = Field(description="what every class was promised on the calibration split")
    overall: float
    per_class: dict[str, float | None]
    pooled_classes: list[str] = Field(description="classes that share one threshold: promised together, not each")


class SliceReport(_Shape):
    """The figures of a part of the images."""

    images: int = Field(ge=1)
    lesions: int = Field(ge=1)
    classes: int = Field(ge=1, description="classes that the slice has")
    accuracy: float
    accuracy_ci: Interval
    balanced_accuracy: float = Field(description="over the classes that the slice has")
    balanced_accuracy_ci: Interval
    key_class_lesions: int | None = None
    key_class_sensitivity: float | None = Field(default=None, description="per lesion, at the refer threshold")
    key_class_sensitivity_ci: Interval | None = None
    key_class_specificity: float | None = None
    key_class_specificity_ci: Interval | None = None
    answered_share: float | None = None


class Evaluation(_Shape):
    """What a model is worth on a set of labelled images."""

    model_id: str
    dataset_id: str | None = Field(default=None, description="empty for a folder of other images")
    split: str | None = None
    split_reads: int | None = Field(
        default=None, description="how often gate or test was looked at, this time included"
    )
    images: int = Field(ge=1)
    lesions: int = Field(ge=1)
    groups: int = Field(ge=1, description="independent units that the intervals resample")
    balanced_accuracy: float = Field(description="mean sensitivity of the classes that have images")
    balanced_accuracy_ci: Interval
    accuracy: float
    accuracy_ci: Interval
    macro_auc: float | None = Field(description="mean one-against-rest AUC of the classes where it is defined")
    macro_f1: float = Field(description="mean F1 of the classes that have images; one never answered counts as 0")
    macro_f1_ci: Interval
    ece: float = Field(description="expected calibration error: 15 equal-width bins of confidence")
    reliability: list[ReliabilityBin] = Field(default_factory=list, description="the bins of the calibration error")
    prevalence: dict[str, float] | None = Field(
        default=None, description="class shares that the probabilities were re-weighted to, if any were stated"
    )
    at_equal_prevalence: EqualPrevalence | None = Field(
        default=None, description="empty where the shares at calibration are unknown"
    )
    per_class: dict[str, ClassReport]
    key_class: KeyClassReport | None
    confusion_matrix: list[list[int]] = Field(description="row = truth, column = answer, in class order")
    answered_share: float | None = Field(description="share of images that thresholds and sets leave to no annotator")
    mean_set_size: float | None = Field(description="mean number of classes in the prediction set")
    coverage: Coverage | None = Field(default=None, description="of the prediction sets")
    slices: dict[str, dict[str, SliceReport]] = Field(
        default_factory=dict, description="age, sex, localization, confirmation, skin_tone: value to figures"
    )
    slice_notes: dict[str, str] = Field(default_factory=dict, description="how a slice came about, what it leaves out")
    robustness: RobustnessReport | None = None
    explanations: ExplanationQuality | None = None
    undefined: dict[str, str] = Field(default_factory=dict, description="metric to why it is null or partial")


def class_reports(
    taxonomy: Taxonomy,
    confusion: IntArray,
    confusions: FloatArray,
    labels: IntArray,
    predicted: IntArray,
    group_index: IntArray,
    lesions: Lesions,
    aucs: FloatArray,
) -> dict[str, ClassReport]:
    """Report every class against the rest, per image.

    Args:
        taxonomy: class order.
        confusion: [C, C]; row = truth, column = answer.
        confusions: [R, C, C] of the resamples.
        labels: [N] class indices.
        predicted: [N] class indices.
        group_index: [N] the independent unit of each image.
        lesions: of the same images.
        aucs: [C], NaN where undefined.
    Returns:
        Class code to report, in class order.
    """
    rates, samples = class_rates(confusion), class_rates(confusions)
    reports = {}
    for index, code in enumerate(taxonomy.codes):
        is_case, is_answer = labels == index, predicted == index
        values: dict[str, Any] = {}
        for name, members in (
            ("sensitivity", is_case),
            ("specificity", ~is_case),
            ("precision", is_answer),
            ("f1", is_case | is_answer),
        ):
            if members.any():
                estimate = float(getattr(rates, name)[index])
                num_groups = len(np.unique(group_index[members]))
                values[name] = estimate
                values[f"{name}_ci"] = interval_of(estimate, getattr(samples, name)[:, index], num_groups)
        if np.isfinite(aucs[index]):
            values["auc"] = float(aucs[index])
        reports[code] = ClassReport(support=int(is_case.sum()), lesions=int((lesions.labels == index).sum()), **values)
    return reports


def key_class_report(
    taxonomy: Taxonomy,
    operating: OperatingPoints | None,
    lesions: Lesions,
    group_index: IntArray,
    weights: Float32Array,
) -> KeyClassReport | None:
    """Report the first key class at its refer threshold, per lesion.

    Args:
        taxonomy: with the key class.
        operating: with its threshold; None if the model has none.
        lesions: with their mean probabilities.
        group_index: [L] the independent unit of each lesion.
        weights: [R, G] of the resamples.
    Returns:
        The report; None if the taxonomy has no key class.
    """
    key = taxonomy.key_class
    if key is None:
        return None
    is_case = lesions.labels == taxonomy.index_of(key.code)
    point = None if operating is None else operating.refer.get(key.code)
    sensitivity, sensitivity_ci, specificity, specificity_ci = None, None, None, None
    scores = lesions.probabilities[:, taxonomy.index_of(key.code)]
    if point is not None:
        is_referred = scores >= point.threshold
        sensitivity, sensitivity_ci = _lesion_rate(is_referred, is_case, group_index, weights)
        specificity, specificity_ci = _lesion_rate(~is_referred, ~is_case, group_index, weights)
    return KeyClassReport(
        name=key.code,
        sensitivity=sensitivity,
        specificity=specificity,
        threshold=None if point is None else point.threshold,
        sensitivity_ci=sensitivity_ci,
        specificity_ci=specificity_ci,
        lesions=int(is_case.sum()),
        floor=key.sensitivity_floor,
        proven=point is not None and point.proven,
        **_at_fixed_sensitivity(scores, is_case, group_index, weights),
    )


def _at_fixed_sensitivity(
    scores: FloatArray, is_case: BoolArray, group_index: IntArray, weights: Float32Array
) -> dict[str, Any]:
    """Return specificity where 95 % of the cases are found; the interval is at that threshold."""
    threshold = sensitivity_threshold(scores, is_case, FIXED_SENSITIVITY)
    if threshold is None:
        return {}
    specificity, interval = _lesion_rate(scores < threshold, ~is_case, group_index, weights)
    return {"specificity_at_95_sensitivity": specificity, "specificity_at_95_sensitivity_ci": interval}


def sensitivity_threshold(scores: FloatArray, is_case: BoolArray, sensitivity: float) -> float | None:
    """Return the highest threshold at which a share of the cases is found; None without cases.

    Args:
        scores: [L].
        is_case: [L].
        sensitivity: share of the cases at or above the threshold, above 0 and at most 1.
    Returns:
        One of the cases' scores.

    >>> sensitivity_threshold(np.array([0.9, 0.5, 0.2, 0.8]), np.array([True, True, True, False]), 0.6)
    0.5
    """
    cases = np.sort(scores[is_case])[::-1]
    return float(cases[int(np.ceil(sensitivity * len(cases) - 1e-9)) - 1]) if len(cases) else None


def _lesion_rate(
    is_hit: BoolArray, is_member: BoolArray, group_index: IntArray, weights: Float32Array
) -> tuple[float | None, Interval | None]:
    """Return the share of hits among the member lesions, with its interval by group."""
    if not is_member.any():
        return None, None
    num_groups = weights.shape[1]
    members = np.bincount(group_index, weights=is_member, minlength=num_groups)
    hits = np.bincount(group_index, weights=is_member & is_hit, minlength=num_groups)
    drawn = weights @ members
    samples = np.divide(weights @ hits, drawn, out=np.full(len(weights), np.nan), where=drawn > 0)
    estimate = float(hits.sum() / members.sum())
    return estimate, interval_of(estimate, samples, int((members > 0).sum()))


def interval_of(estimate: float, samples: FloatArray, num_groups: int) -> Interval:
    """Take a 95 % interval; exact (Clopper-Pearson over groups) where the bootstrap does not vary.

    That is the case where the estimate is 0 or 1, and where there are too few groups to draw from.

    Args:
        estimate: a share.
        samples: [R] the same share in every resample.
        num_groups: independent units that it rests on, at least 1.
    Returns:
        Lower and upper end.
    """
    low, high = percentile_interval(samples)
    if not high - low > DEGENERATE:
        return exact_interval(round(estimate * num_groups), num_groups)
    return float(low), float(high)


def undefined_reasons(
    taxonomy: Taxonomy,
    per_class: dict[str, ClassReport],
    key_class: KeyClassReport | None,
    operating: OperatingPoints | None,
) -> dict[str, str]:
    """Say why figures are null, or rest on fewer classes than the taxonomy has.

    Args:
        taxonomy: of the evaluation.
        per_class: its class reports.
        key_class: its key class report.
        operating: the model's thresholds, or None.
    Returns:
        Metric to one sentence.
    """
    reasons = {}
    absent = [code for code, report in per_class.items() if report.support == 0]
    for code, report in per_class.items():
        if report.sensitivity is None:
            reasons[f"per_class.{code}.sensitivity"] = f"no image of {code}"
        if report.specificity is None:
            reasons[f"per_class.{code}.specificity"] = f"every image is {code}"
        if report.precision is None:
            reasons[f"per_class.{code}.precision"] = f"no image was answered {code}"
    if absent:
        present = [code for code in taxonomy.codes if code not in absent]
        note = f"over {', '.join(present)} only: no image of {', '.join(absent)}"
        reasons["balanced_accuracy"] = note
        reasons["macro_auc"] = note if len(present) > 1 else f"every image is {present[0]}"
    if key_class is None:
        reasons["key_class"] = f"taxonomy {taxonomy.name} declares no key class"
    elif key_class.threshold is None:
        reasons["key_class.sensitivity"] = "the model has no operating point for the key class"
    elif key_class.sensitivity is None:
        reasons["key_class.sensitivity"] = f"no lesion of {key_class.name}"
    elif key_class.specificity is None:
        reasons["key_class.specificity"] = f"every lesion is {key_class.name}"
    if operating is None:
        reasons["answered_share"] = reasons["mean_set_size"] = "the model has no operating points"
    return reasons
