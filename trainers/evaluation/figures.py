"""The schema of an evaluation and the functions that fill its parts.

A metric that is undefined is null, and `undefined` gives the reason under the metric's name; it is never 0 and never
NaN. Intervals are 95 %, by bootstrap over groups within class. Robustness and explanation quality are measured on a
bounded sample, because they cost many forward and backward passes.
"""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.bundles import OperatingPoints, Rule
from records.taxonomy import Taxonomy
from trainers.evaluation.context import ContextReport
from vision.calibration.operating import Lesions, exact_interval
from vision.metrics.bootstrap import percentile_interval
from vision.metrics.metrics import ClassCounts, class_rates

Interval = tuple[float, float]

FIXED_SENSITIVITY = 0.95

MAX_CLASSES = 20
"""Classes of a confusion matrix that can be read; of more, some are drawn and the others are summed up."""

DEGENERATE = 1e-12
"""A bootstrap interval narrower than this did not vary at all."""


class _Shape(BaseModel):
    # NaN and infinity are refused: JSON has neither, and null with a reason is the only way to be undefined.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class AttackPoint(_Shape):
    """Metrics of a model when every image may be changed by up to epsilon."""

    epsilon: float = Field(ge=0, description="largest change of a colour value, in 1/255 of the pixel range")
    accuracy: float = Field(description="at the class shares of the whole split, not of the sample")
    accuracy_ci: Interval
    balanced_accuracy: float
    balanced_accuracy_ci: Interval
    key_class_sensitivity: float | None = Field(
        default=None, description="share of the key class's images that are predicted as it"
    )
    key_class_sensitivity_ci: Interval | None = None
    key_class_referred: float | None = Field(
        default=None, description="share of the key class's images at or above its refer threshold"
    )
    key_class_referred_ci: Interval | None = None


class RobustnessReport(_Shape):
    """Accuracy under attack with full knowledge of the network, in fp32."""

    images: int = Field(ge=1, description="images attacked")
    groups: int = Field(ge=1, description="independent units among them")
    key_class: str | None = None
    pgd_steps: int = Field(ge=1)
    attacks: dict[str, list[AttackPoint]] = Field(description="fgsm and pgd, each by ascending epsilon from 0")


class ReplacementCurve(_Shape):
    """Deletion or insertion: the class's probability while pixels are replaced, most important first."""

    auc: float = Field(description="mean area under the curve; low is good for deletion, high for insertion")
    random_auc: float = Field(description="the same with the cells of each map shuffled")
    gain: float = Field(
        description="how much better than shuffled: above 0 means that the map ranks pixels by importance"
    )
    gain_ci: Interval
    curve: list[float] = Field(description="mean probability at equal steps of the replaced share, 0 to 1")
    random_curve: list[float]


class MaskEnergy(_Shape):
    """How much of the maps' energy lies on the lesion."""

    images: int = Field(ge=1, description="images with a mask and a map")
    energy: float = Field(description="mean share of a map's energy inside the lesion mask")
    energy_ci: Interval
    area: float = Field(description="mean share of the image that the mask covers: what an even map would reach")
    above_area: float = Field(description="share of the images whose map is more on the lesion than an even one")


class ExplanationQuality(_Shape):
    """Faithfulness of the heat maps."""

    method: str
    images: int = Field(ge=1, description="images whose map was tested")
    constant_maps: int = Field(ge=0, description="further images whose map is flat, which explains nothing")
    deletion: ReplacementCurve
    insertion: ReplacementCurve
    randomisation_similarity: float | None = Field(
        default=None, description="mean absolute rank correlation with the maps of a random network; low is good"
    )
    mask_energy: MaskEnergy | None = None


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
    """Images of about the same confidence, and the share predicted correctly."""

    confidence: float = Field(description="mean confidence")
    accuracy: float
    images: int = Field(ge=1)


class EqualPrevalence(_Shape):
    """Predictions re-weighted by Bayes to equal class shares: the decision that balanced accuracy rewards.

    Calibrated probabilities of rare classes are small, so the most probable class is seldom one of them. A training
    script that uses a balanced sampler and takes the largest output is comparable with these figures.
    """

    balanced_accuracy: float
    balanced_accuracy_ci: Interval
    sensitivity: dict[str, float | None] = Field(description="share of a class's images that were predicted as it")


class RuleReport(_Shape):
    """Labels by one decision rule, whichever is in force."""

    in_force: bool
    balanced_accuracy: float
    balanced_accuracy_ci: Interval
    accuracy: float
    accuracy_ci: Interval
    sensitivity: dict[str, float | None] = Field(description="share of a class's images that get its label")


class LabelOutsideSet(_Shape):
    """Images whose label is not in their own prediction set: its probability is below what is usual for its class."""

    images: int = Field(ge=0)
    share: float = Field(ge=0, le=1)
    accuracy: float | None = Field(description="share of these labels that were right; empty without such images")
    accuracy_of_others: float | None = Field(description="share of all other labels that were right")
    joined: int = Field(ge=0, description="further images whose label is in the set only because the rule names it")
    accuracy_of_joined: float | None


class PointReport(_Shape):
    """One operating point, measured on the evaluated images; the key class per lesion."""

    in_force: bool
    threshold: float | None = Field(description="probability of the key class; at or above it a lesion is referred")
    aim: float | None = Field(description="sensitivity that the threshold was fitted to")
    proven: bool = Field(description="whether the lesions that it was fitted on prove the aim")
    sensitivity: float | None
    sensitivity_ci: Interval | None
    specificity: float | None
    specificity_ci: Interval | None
    answered_share: float = Field(description="share of images that all rules together leave to no annotator")


class ReferralCurve(_Shape):
    """What another threshold of the key class would do; all other rules as in force."""

    threshold: list[float] = Field(description="ascending")
    sensitivity: list[float] = Field(description="share of the key class's lesions at or above the threshold")
    specificity: list[float] = Field(description="share of the other lesions below it")
    abstained: list[float] = Field(description="share of images that go to an annotator")


class Coverage(_Shape):
    """Share of prediction sets that hold the true class; one image per lesion."""

    promise: float = Field(description="coverage that the thresholds were fitted to on the calibration split")
    overall: float
    per_class: dict[str, float | None]
    pooled_classes: list[str] = Field(
        description="classes that share one threshold: coverage is promised for them together, not for each"
    )


class SliceReport(_Shape):
    """Metrics of a part of the images."""

    images: int = Field(ge=1)
    lesions: int = Field(ge=1)
    classes: int = Field(ge=1, description="classes that the slice has")
    accuracy: float
    accuracy_ci: Interval
    balanced_accuracy: float = Field(description="over the classes that the slice has")
    balanced_accuracy_ci: Interval
    balanced_accuracy_without_context: float | None = Field(
        default=None, description="of the images alone; empty for a model that uses no context"
    )
    key_class_lesions: int | None = None
    key_class_sensitivity: float | None = Field(default=None, description="per lesion, at the refer threshold")
    key_class_sensitivity_ci: Interval | None = None
    key_class_specificity: float | None = None
    key_class_specificity_ci: Interval | None = None
    answered_share: float | None = None


class Evaluation(_Shape):
    """All metrics of a model on a set of labelled images."""

    model_id: str
    dataset_id: str | None = Field(default=None, description="empty for a folder of other images")
    split: str | None = None
    split_reads: int | None = Field(default=None, description="how often gate or test was read, this time included")
    trained_on: int | None = Field(
        default=None,
        description="images among them that the model was trained on, or on others of their group; empty: not known",
    )
    images: int = Field(ge=1)
    lesions: int = Field(ge=1)
    groups: int = Field(ge=1, description="independent units that the intervals resample")
    balanced_accuracy: float = Field(description="mean sensitivity of the classes that have images")
    balanced_accuracy_ci: Interval
    accuracy: float
    accuracy_ci: Interval
    macro_auc: float | None = Field(description="mean one-against-rest AUC of the classes where it is defined")
    macro_f1: float = Field(description="mean F1 of the classes that have images; one never predicted counts as 0")
    macro_f1_ci: Interval
    ece: float = Field(description="expected calibration error: 15 equal-width bins of confidence")
    reliability: list[ReliabilityBin] = Field(default_factory=list, description="the bins of the calibration error")
    prevalence: dict[str, float] | None = Field(
        default=None, description="class shares that the probabilities were re-weighted to, if any were stated"
    )
    at_equal_prevalence: EqualPrevalence | None = Field(
        default=None, description="empty where the shares at calibration are unknown"
    )
    rule: Rule = Field(default="natural", description="the decision rule that gives the labels of all figures")
    by_rule: dict[str, RuleReport] = Field(
        default_factory=dict, description="the figures that depend on the rule, for every rule"
    )
    label_outside_set: LabelOutsideSet | None = None
    points: dict[str, PointReport] = Field(
        default_factory=dict, description="proven and target; the latter is missing in older bundles"
    )
    referral: ReferralCurve | None = Field(default=None, description="empty without lesions of the key class or others")
    per_class: dict[str, ClassReport]
    key_class: KeyClassReport | None
    confusion_matrix: list[list[int]] = Field(description="row = true class, column = predicted class, in class order")
    answered_share: float | None = Field(description="share of images that thresholds and sets leave to no annotator")
    mean_set_size: float | None = Field(description="mean number of classes in the prediction set")
    coverage: Coverage | None = Field(default=None, description="of the prediction sets")
    context: ContextReport | None = Field(default=None, description="empty for a model that uses no context")
    slices: dict[str, dict[str, SliceReport]] = Field(
        default_factory=dict, description="age, sex, localization, confirmation, skin_tone: value to figures"
    )
    slice_notes: dict[str, str] = Field(default_factory=dict, description="how a slice was made and what it leaves out")
    robustness: RobustnessReport | None = None
    explanations: ExplanationQuality | None = None
    undefined: dict[str, str] = Field(default_factory=dict, description="metric to why it is null or partial")


def drawn_classes(evaluation: Evaluation, count: int = MAX_CLASSES) -> list[int]:
    """Return at most so many classes, in class order: the key class, then those that the most mistakes are about."""
    counts = np.array(evaluation.confusion_matrix)
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diagonal(counts)
    key = None if evaluation.key_class is None else list(evaluation.per_class).index(evaluation.key_class.name)
    return sorted(sorted(range(len(counts)), key=lambda at: (at != key, -mistakes[at], at))[:count])


def class_reports(
    taxonomy: Taxonomy,
    confusion: IntArray,
    resampled: ClassCounts,
    labels: IntArray,
    predicted: IntArray,
    group_index: IntArray,
    lesions: Lesions,
    aucs: FloatArray,
) -> dict[str, ClassReport]:
    """Report every class against the rest, per image.

    Args:
        taxonomy: gives the class order.
        confusion: [C, C]; row = true class, column = predicted class.
        resampled: counts [R, C] of the resamples.
        labels: [N] class indices.
        predicted: [N] class indices.
        group_index: [N] the independent unit of each image.
        lesions: of the same images.
        aucs: [C], NaN where undefined.
    Returns:
        Class code to report, in class order.
    """
    rates, samples = class_rates(confusion), class_rates(resampled)
    reports = {}
    for index, code in enumerate(taxonomy.codes):
        is_case, is_predicted = labels == index, predicted == index
        values: dict[str, Any] = {}
        for name, members in (
            ("sensitivity", is_case),
            ("specificity", ~is_case),
            ("precision", is_predicted),
            ("f1", is_case | is_predicted),
        ):
            # Without members the rate has no denominator; the report says null, and `undefined_reasons` says why.
            if members.any():
                estimate = float(getattr(rates, name)[index])
                # The exact interval needs the groups that this rate's denominator draws from, which differ by rate.
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
    """Report the first key class at its refer threshold, per lesion; None if the taxonomy has no key class.

    `group_index` [L] is the independent unit of each lesion, `weights` [R, G] the resamples.
    """
    key = taxonomy.key_class
    if key is None:
        return None
    is_case = lesions.labels == taxonomy.index_of(key.code)
    point = None if operating is None else operating.refer.get(key.code)
    sensitivity, sensitivity_ci, specificity, specificity_ci = None, None, None, None
    # Needed without an operating point, too: specificity at a fixed sensitivity finds its own threshold.
    scores = lesions.probabilities[:, taxonomy.index_of(key.code)]
    if point is not None:
        is_referred = scores >= point.threshold
        sensitivity, sensitivity_ci = rate_by_group(is_referred, is_case, group_index, weights)
        specificity, specificity_ci = rate_by_group(~is_referred, ~is_case, group_index, weights)
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
    specificity, interval = rate_by_group(scores < threshold, ~is_case, group_index, weights)
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
    # 1e-9: a product such as 0.07 * 100 lies above the whole number that it stands for, and would demand one case more.
    cases = np.sort(scores[is_case])[::-1]
    return float(cases[int(np.ceil(sensitivity * len(cases) - 1e-9)) - 1]) if len(cases) else None


def rate_by_group(
    is_hit: BoolArray, is_member: BoolArray, group_index: IntArray, weights: Float32Array
) -> tuple[float | None, Interval | None]:
    """Return the share of hits among the members, both [N], with its interval by group; None without members."""
    if not is_member.any():
        return None, None
    num_groups = weights.shape[1]
    members = np.bincount(group_index, weights=is_member, minlength=num_groups)
    hits = np.bincount(group_index, weights=is_member & is_hit, minlength=num_groups)
    drawn = weights @ members
    # A resample that drew no member has no rate: NaN, which the interval leaves out.
    samples = np.divide(weights @ hits, drawn, out=np.full(len(weights), np.nan), where=drawn > 0)
    estimate = float(hits.sum() / members.sum())
    return estimate, interval_of(estimate, samples, int((members > 0).sum()))


def interval_of(estimate: float, samples: FloatArray, num_groups: int) -> Interval:
    """Take a 95 % interval; exact (Clopper-Pearson over groups) where the bootstrap does not vary.

    A bootstrap does not vary where the estimate is 0 or 1, or where there are too few groups to draw from.

    Args:
        estimate: a share.
        samples: [R] the same share in every resample.
        num_groups: independent units that it rests on, at least 1.
    Returns:
        Lower and upper end.
    """
    low, high = percentile_interval(samples)
    # Negated, so that NaN ends, where no resample is defined, take the exact interval as well.
    if not high - low > DEGENERATE:
        return exact_interval(round(estimate * num_groups), num_groups)
    return float(low), float(high)


def undefined_reasons(
    taxonomy: Taxonomy,
    per_class: dict[str, ClassReport],
    key_class: KeyClassReport | None,
    operating: OperatingPoints | None,
) -> dict[str, str]:
    """Return, per metric that is null or rests on fewer classes than the taxonomy has, the reason in one sentence."""
    reasons = {}
    absent = [code for code, report in per_class.items() if report.support == 0]
    for code, report in per_class.items():
        if report.sensitivity is None:
            reasons[f"per_class.{code}.sensitivity"] = f"no image of {code}"
        if report.specificity is None:
            reasons[f"per_class.{code}.specificity"] = f"every image is {code}"
        if report.precision is None:
            reasons[f"per_class.{code}.precision"] = f"no image was predicted as {code}"
    if absent:
        present = [code for code in taxonomy.codes if code not in absent]
        note = f"over {', '.join(present)} only: no image of {', '.join(absent)}"
        if len(present) == 1:
            note = (
                f"every image is {present[0]}, so to name it is always right: no figure says how classes are told apart"
            )
            reasons["accuracy"] = note
        reasons["balanced_accuracy"] = reasons["macro_auc"] = note
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
