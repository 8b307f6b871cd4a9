"""Triage: from calibrated probabilities to a decision, its reasons and its priority for review.

In: one row of probabilities, the operating points of the model's bundle, the rules of this service, and the image's
number in [0, 1) that decides whether it is in the audit sample. Out: a `Verdict`. All functions are pure: they use no
clock and no ledger. Thresholds and suitability checks are fitted during training, not here.
"""

from dataclasses import dataclass

import numpy as np

from records.arrays import BoolArray, FloatArray
from records.bundles import OperatingPoints
from records.errors import ContractError
from records.ids import sha256_hex
from records.taxonomy import Taxonomy
from records.types import Decision, ReasonCode
from vision.calibration.decision import labels_of, sets_of
from vision.inference.suitability import NOTHING_KNOWN, Suitability

_PRIORITY_TIERS: dict[ReasonCode, float] = {
    ReasonCode.URGENT: 300.0,
    ReasonCode.INCIDENT: 300.0,
    ReasonCode.FLAGGED: 200.0,
    ReasonCode.REFER: 100.0,
    ReasonCode.NON_FINITE: 100.0,
    ReasonCode.AUDIT_SAMPLE: 50.0,
}

AUDIT_STRATA = ((0.05, 1), (0.2, 2), (float("inf"), 4))
"""Pairs of an upper bound of p(malignant) and the factor by which `serving.audit_share` is multiplied below it."""

CAUTION: dict[Decision, int] = {Decision.ANSWERED: 0, Decision.RETAKE: 1, Decision.REVIEW: 2, Decision.URGENT: 3}
"""How cautious each decision is. Of several decisions about an image or a lesion, the most cautious one is returned."""


@dataclass(frozen=True)
class TriageRules:
    """Thresholds that the operator sets; see `ServingSettings`."""

    low_confidence: float
    max_set_size: int
    audit_share: float
    drifts: bool = False
    """whether the source of the image has changed, so that `audit_share` is a raised one"""


@dataclass(frozen=True)
class Verdict:
    """The decision for one image. Label and confidence are None for non-finite output and for `retake`."""

    decision: Decision
    reasons: tuple[ReasonCode, ...]
    label: str | None
    confidence: float | None
    prediction_set: tuple[str, ...]
    priority: float
    selection_probability: float | None
    suitability: Suitability = NOTHING_KNOWN


def triage(
    probabilities: FloatArray,
    taxonomy: Taxonomy,
    operating: OperatingPoints,
    rules: TriageRules,
    audit_draw: float,
    suitability: Suitability = NOTHING_KNOWN,
) -> Verdict:
    """Return the decision for one image.

    Args:
        probabilities: [C] calibrated, in class order; non-finite if the model's output was.
        taxonomy: class order and malignant classes.
        operating: rule and thresholds of the model. A class without a conformal threshold is in every prediction set,
            so a model without thresholds sends every image to review.
        rules: of this service.
        audit_draw: this image's draw in [0, 1), see `audit_draw_of`.
        suitability: result of the quality and out-of-distribution checks.
    Returns:
        The verdict: `retake` without label for an image too poor to judge, `answered` if there is no reason for review.
    Raises:
        ContractError: there is not one probability per class, or the probabilities do not sum to 1.
    """
    if probabilities.shape != (len(taxonomy.codes),):
        raise ContractError(f"probabilities {probabilities.shape} do not fit {len(taxonomy.codes)} classes")
    is_finite = bool(np.isfinite(probabilities).all())
    p_malignant = malignant_probability(probabilities, taxonomy) if is_finite else 1.0
    chance = audit_chance(p_malignant, rules.audit_share)
    is_sampled = audit_draw < chance
    sampled = (ReasonCode.AUDIT_SAMPLE, *((ReasonCode.DRIFT,) if rules.drifts else ())) if is_sampled else ()
    selection = chance if is_sampled else None
    # Quality is checked first: annotators could not judge the image either, so it is left out of the audit sample.
    if suitability.quality_reason is not None:
        return Verdict(Decision.RETAKE, (ReasonCode.BAD_IMAGE,), None, None, (), 0.0, None, suitability)
    # An image with non-finite output is always reviewed. It counts as malignant in the audit sample (see above).
    if not is_finite:
        reasons = (ReasonCode.NON_FINITE, *sampled)
        priority = priority_of(reasons, None, taxonomy)
        return Verdict(Decision.REVIEW, reasons, None, None, (), priority, selection, suitability)
    if abs(float(probabilities.sum()) - 1.0) > 1e-6:
        raise ContractError(f"probabilities sum to {float(probabilities.sum()):.6f}, not to 1")

    label_index = int(labels_of(probabilities[None], operating.decision)[0])
    members = sets_of(probabilities[None], taxonomy, operating)[0]
    reasons = (
        *_referral_reasons(probabilities, taxonomy, operating),
        *_doubt_reasons(probabilities, label_index, members, taxonomy, rules),
        *((ReasonCode.OUT_OF_DISTRIBUTION,) if suitability.is_out_of_distribution else ()),
        *sampled,
    )
    return Verdict(
        decision=_decision_for(reasons),
        reasons=reasons,
        label=taxonomy.codes[label_index],
        confidence=float(probabilities[label_index]),
        prediction_set=tuple(code for code, inside in zip(taxonomy.codes, members, strict=True) if inside),
        priority=priority_of(reasons, probabilities, taxonomy),
        selection_probability=selection,
        suitability=suitability,
    )


def _decision_for(reasons: tuple[ReasonCode, ...]) -> Decision:
    if not reasons:
        return Decision.ANSWERED
    return Decision.URGENT if ReasonCode.URGENT in reasons else Decision.REVIEW


def audit_chance(p_malignant: float, share: float) -> float:
    """Return the probability with which an image enters the audit sample.

    Sampling is stratified: missed malignant cases concentrate where p(malignant) is not small, so sampling more there
    narrows the interval of the estimated live sensitivity. Weighting by 1 / probability keeps the estimate unbiased.

    Args:
        p_malignant: summed probability of the malignant classes; 1 if the output is not finite.
        share: setting `serving.audit_share`, the probability in the lowest stratum.
    Returns:
        `share` below 0.05, twice that below 0.2, four times that from there on; at most 1.

    >>> audit_chance(0.01, 0.02), audit_chance(0.1, 0.02), audit_chance(0.5, 0.02)
    (0.02, 0.04, 0.08)
    """
    factor = next(factor for bound, factor in AUDIT_STRATA if p_malignant < bound)
    return min(1.0, factor * share)


def priority_of(reasons: tuple[ReasonCode, ...], probabilities: FloatArray | None, taxonomy: Taxonomy) -> float:
    """Return the priority of a review item; items of larger priority are reviewed first.

    priority = tier + 10 * p(malignant) + (1 - (p1 - p2)), where p1 and p2 are the two largest probabilities and the
    tier is that of the strongest reason: urgent and incident 300, flagged 200, refer and non-finite 100, audit sample
    50, any other 0. The audit sample is above the other doubts because a sample that is never reviewed estimates
    nothing.

    Args:
        reasons: of the review item.
        probabilities: [C], or None if not finite (counts as p(malignant) = 1 and a tie).
        taxonomy: malignant classes.
    Returns:
        A finite number.
    """
    tier = max((_PRIORITY_TIERS.get(reason, 0.0) for reason in reasons), default=0.0)
    if probabilities is None or not np.isfinite(probabilities).all():
        return tier + 11.0
    second, first = np.sort(probabilities)[-2:]
    return tier + 10.0 * malignant_probability(probabilities, taxonomy) + 1.0 - float(first - second)


def malignant_probability(probabilities: FloatArray, taxonomy: Taxonomy) -> float:
    """Return the summed probability of the malignant classes, 0 to 1."""
    is_malignant = np.array([c.malignant for c in taxonomy.classes])
    return float(np.clip(probabilities[is_malignant].sum(), 0.0, 1.0))


def audit_draw_of(image_id: str, salt: str) -> float:
    """Return an image's draw for the audit sample: the same image always gets the same number.

    Args:
        image_id: SHA-256 of the stored bytes.
        salt: setting `serving.audit_salt`.
    Returns:
        In [0, 1), uniform over images and independent of any model's output.
    """
    # A hash instead of a random generator, so that a repeated request, another replica and a candidate get the same
    # number.
    return int(sha256_hex(f"{salt}:{image_id}".encode())[:13], 16) / 2**52


def _referral_reasons(
    probabilities: FloatArray, taxonomy: Taxonomy, operating: OperatingPoints
) -> tuple[ReasonCode, ...]:
    p_malignant = malignant_probability(probabilities, taxonomy)
    reasons = []
    if operating.urgent_threshold is not None and p_malignant >= operating.urgent_threshold:
        reasons.append(ReasonCode.URGENT)
    over_key = any(probabilities[taxonomy.index_of(code)] >= point.threshold for code, point in operating.refer.items())
    over_malignant = operating.refer_malignant is not None and p_malignant >= operating.refer_malignant.threshold
    if over_key or over_malignant:
        reasons.append(ReasonCode.REFER)
    return tuple(reasons)


def _doubt_reasons(
    probabilities: FloatArray, label_index: int, members: BoolArray, taxonomy: Taxonomy, rules: TriageRules
) -> tuple[ReasonCode, ...]:
    is_malignant = np.array([c.malignant for c in taxonomy.classes])
    others = members.copy()
    others[label_index] = False
    reasons = []
    # A label outside the set is a reason, too, and so is an empty set: its probability is below what is usual for
    # images of its class, so the image is an unusual one of the class, or of another class.
    if not members[label_index] or int(members.sum()) > rules.max_set_size or bool((others & is_malignant).any()):
        reasons.append(ReasonCode.PREDICTION_SET)
    if float(probabilities[label_index]) < rules.low_confidence:
        reasons.append(ReasonCode.LOW_CONFIDENCE)
    return tuple(reasons)
