"""Triage: nothing above a threshold is answered, no reason for review is dropped, and offline equals online."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.arrays import FloatArray
from records.bundles import OperatingPoints, ReferPoint
from records.errors import ContractError
from records.taxonomy import load_taxonomy
from records.types import Decision, ReasonCode
from serving.triage import (
    TriageRules,
    Verdict,
    audit_chance,
    audit_draw_of,
    malignant_probability,
    priority_of,
    triage,
)
from vision.calibration.operating import answered
from vision.inference.suitability import NOTHING_KNOWN, Suitability

TAXONOMY = load_taxonomy("ham10000")
CODES = TAXONOMY.codes


def refer_point(threshold: float) -> ReferPoint:
    return ReferPoint(
        threshold=threshold, sensitivity_floor=0.9, proven=True, sensitivity=1.0, sensitivity_lower_bound=0.9,
        specificity=0.5, lesions=40,
    )  # fmt: skip


def operating_points(q: float) -> OperatingPoints:
    return OperatingPoints(
        refer={"mel": refer_point(0.2)},
        refer_malignant=refer_point(0.4),
        urgent_threshold=0.9,
        conformal_thresholds=dict.fromkeys(CODES, q),
    )


POINTS = operating_points(0.7)
RULES = TriageRules(low_confidence=0.5, max_set_size=2, audit_share=0.02)
NOT_SAMPLED = 0.5


def probabilities(**named: float) -> FloatArray:
    """Named classes as given, the rest shared by the others."""
    others = [code for code in CODES if code not in named]
    rest = (1.0 - sum(named.values())) / len(others)
    return np.array([named.get(code, rest) for code in CODES])


def decide(row: FloatArray, draw: float = NOT_SAMPLED) -> Verdict:
    return triage(row, TAXONOMY, POINTS, RULES, draw)


rows = st.lists(st.floats(1e-6, 1.0), min_size=len(CODES), max_size=len(CODES)).map(
    lambda values: np.array(values) ** 4 / np.sum(np.array(values) ** 4)
)


def test_a_clear_image_is_answered() -> None:
    verdict = decide(probabilities(nv=0.95))
    assert verdict.decision is Decision.ANSWERED
    assert verdict.reasons == ()
    assert (verdict.label, verdict.confidence, verdict.prediction_set) == ("nv", 0.95, ("nv",))
    assert verdict.selection_probability is None


@pytest.mark.parametrize(
    ("row", "decision", "reasons"),
    [
        (probabilities(nv=0.78, mel=0.20), "review", {"refer"}),
        (probabilities(nv=0.55, bcc=0.42), "review", {"refer", "prediction_set"}),
        (probabilities(nv=0.45, bkl=0.44), "review", {"low_confidence"}),
        (probabilities(nv=0.33, bkl=0.32, df=0.31), "review", {"low_confidence", "prediction_set"}),
        (probabilities(mel=0.95), "urgent", {"urgent", "refer"}),
    ],
)
def test_rules_by_hand(row: FloatArray, decision: str, reasons: set[str]) -> None:
    verdict = decide(row)
    assert verdict.decision == decision
    assert {reason.value for reason in verdict.reasons} == reasons


def test_an_empty_prediction_set_goes_to_review() -> None:
    strict = operating_points(0.01)
    verdict = triage(probabilities(nv=0.9), TAXONOMY, strict, RULES, NOT_SAMPLED)
    assert verdict.prediction_set == ()
    assert verdict.reasons == (ReasonCode.PREDICTION_SET,)


def test_a_model_without_thresholds_sends_everything_to_review() -> None:
    verdict = triage(probabilities(nv=0.99), TAXONOMY, OperatingPoints(), RULES, NOT_SAMPLED)
    assert verdict.decision is Decision.REVIEW


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_non_finite_output_goes_to_review_without_a_label(broken: float) -> None:
    row = probabilities(nv=0.9)
    row[3] = broken
    verdict = decide(row)
    assert verdict.decision is Decision.REVIEW
    assert verdict.reasons == (ReasonCode.NON_FINITE,)
    assert (verdict.label, verdict.confidence, verdict.prediction_set) == (None, None, ())
    assert np.isfinite(verdict.priority)


def test_the_audit_sample_takes_certain_predictions_and_stores_their_probability() -> None:
    verdict = decide(probabilities(nv=0.99), draw=0.019)
    assert verdict.decision is Decision.REVIEW
    assert verdict.reasons == (ReasonCode.AUDIT_SAMPLE,)
    assert verdict.selection_probability == 0.02
    assert verdict.label == "nv"


def test_the_audit_draw_is_uniform_and_fixed_per_image() -> None:
    draws = np.array([audit_draw_of(f"{number:064x}", "audit") for number in range(4000)])
    assert draws[7] == audit_draw_of(f"{7:064x}", "audit")
    assert 0.0 <= draws.min() < draws.max() < 1.0
    assert np.mean(draws < 0.02) == pytest.approx(0.02, abs=0.008)
    assert draws[7] != audit_draw_of(f"{7:064x}", "another salt")


@given(rows)
@settings(max_examples=300, deadline=None)
def test_nothing_above_a_threshold_is_ever_answered(row: FloatArray) -> None:
    verdict = decide(row)
    p_malignant = malignant_probability(row, TAXONOMY)
    point = POINTS.refer_malignant
    assert point is not None
    if row[TAXONOMY.index_of("mel")] >= POINTS.refer["mel"].threshold or p_malignant >= point.threshold:
        assert verdict.decision is not Decision.ANSWERED
        assert ReasonCode.REFER in verdict.reasons
    assert (verdict.decision is Decision.ANSWERED) == (not verdict.reasons)
    assert verdict.label == CODES[int(row.argmax())]


@given(rows)
@settings(max_examples=200, deadline=None)
def test_offline_figures_count_the_decisions_of_the_service(row: FloatArray) -> None:
    online = triage(row, TAXONOMY, POINTS, TriageRules(0.0, 2, 0.0), NOT_SAMPLED).decision is Decision.ANSWERED
    assert bool(answered(row[None], TAXONOMY, POINTS)[0]) == online


def test_priority_is_urgent_flagged_referred_sampled_unsure() -> None:
    row = probabilities(nv=0.5)
    order = [
        ReasonCode.URGENT,
        ReasonCode.FLAGGED,
        ReasonCode.REFER,
        ReasonCode.AUDIT_SAMPLE,
        ReasonCode.LOW_CONFIDENCE,
    ]
    ranks = [priority_of((reason,), row, TAXONOMY) for reason in order]
    assert ranks == sorted(ranks, reverse=True)
    worse = priority_of((ReasonCode.REFER,), probabilities(nv=0.5, mel=0.4), TAXONOMY)
    assert worse > priority_of((ReasonCode.REFER,), probabilities(nv=0.5, bkl=0.4), TAXONOMY)


def test_rows_that_do_not_fit_are_a_bug_of_the_caller() -> None:
    with pytest.raises(ContractError, match="do not fit 7 classes"):
        decide(np.array([0.5, 0.5]))
    with pytest.raises(ContractError, match="sum to"):
        decide(np.full(7, 0.5))


def test_an_image_of_poor_quality_is_to_be_taken_again() -> None:
    """Neither its probabilities nor the audit draw matter: nobody could judge it."""
    blurred = Suitability(0.4, False, -0.2, "blurred")
    for row in (probabilities(nv=0.99), probabilities(mel=0.95), np.full(7, np.nan)):
        verdict = triage(row, TAXONOMY, POINTS, RULES, 0.0, blurred)
        assert verdict == Verdict(Decision.RETAKE, (ReasonCode.BAD_IMAGE,), None, None, (), 0.0, None, blurred)


def test_an_image_that_is_out_of_distribution_goes_to_review() -> None:
    foreign = Suitability(1.7, True, 0.5, None)
    verdict = triage(probabilities(nv=0.99), TAXONOMY, POINTS, RULES, NOT_SAMPLED, foreign)
    assert (verdict.decision, verdict.reasons) == (Decision.REVIEW, (ReasonCode.OUT_OF_DISTRIBUTION,))
    assert verdict.suitability == foreign
    known = Suitability(0.3, False, 0.5, None)
    assert triage(probabilities(nv=0.99), TAXONOMY, POINTS, RULES, NOT_SAMPLED, known).reasons == ()


def test_non_finite_output_is_sampled_as_if_it_were_malignant_and_keeps_its_checks() -> None:
    row = np.full(7, np.nan)
    checks = Suitability(0.3, False, 0.5, None)
    verdict = triage(row, TAXONOMY, POINTS, RULES, 0.079, checks)
    assert verdict.reasons == (ReasonCode.NON_FINITE, ReasonCode.AUDIT_SAMPLE)
    assert (verdict.selection_probability, verdict.suitability) == (0.08, checks)
    assert verdict.priority == 111.0
    assert triage(row, TAXONOMY, POINTS, RULES, 0.08, checks).selection_probability is None


def test_a_threshold_belongs_to_its_upper_side() -> None:
    """At a threshold an image is referred or urgent; below it, and at the confidence asked for, it is not."""
    malignant = np.array([c.malignant for c in TAXONOMY.classes])
    row = np.where(malignant, 0.0, 0.25)
    row[TAXONOMY.index_of("bcc")] = 0.0
    row[TAXONOMY.index_of("nv")] = 0.5
    row[[TAXONOMY.index_of(code) for code in ("bkl", "df", "vasc")]] = (0.25, 0.25, 0.0)
    assert ReasonCode.LOW_CONFIDENCE not in decide(row).reasons
    row = np.zeros(7)
    row[TAXONOMY.index_of("bcc")], row[TAXONOMY.index_of("nv")] = 0.5, 0.5
    at = OperatingPoints(
        refer={"mel": refer_point(0.5)}, refer_malignant=refer_point(0.5), urgent_threshold=0.5,
        conformal_thresholds=dict.fromkeys(CODES, 0.7),
    )  # fmt: skip
    verdict = triage(row, TAXONOMY, at, RULES, NOT_SAMPLED)
    assert verdict.reasons[:2] == (ReasonCode.URGENT, ReasonCode.REFER)
    assert verdict.decision is Decision.URGENT


def test_strata_of_the_audit_sample() -> None:
    chances = [audit_chance(p, 0.02) for p in (0.0, 0.0499, 0.05, 0.1999, 0.2, 1.0)]
    assert chances == [0.02, 0.02, 0.04, 0.04, 0.08, 0.08]
    assert audit_chance(0.9, 0.6) == 1.0
    assert decide(probabilities(nv=0.99), draw=0.02).reasons == ()


def test_priorities_by_hand() -> None:
    row = probabilities(nv=0.5, mel=0.3)  # the other five have 0.04 each, two of them are malignant
    p_malignant = 0.3 + 2 * 0.04
    for reasons, tier in (
        ((ReasonCode.URGENT, ReasonCode.REFER), 300.0),
        ((ReasonCode.FLAGGED,), 200.0),
        ((ReasonCode.LOW_CONFIDENCE, ReasonCode.REFER), 100.0),
        ((ReasonCode.AUDIT_SAMPLE,), 50.0),
        ((ReasonCode.PREDICTION_SET,), 0.0),
        ((), 0.0),
    ):
        assert priority_of(reasons, row, TAXONOMY) == pytest.approx(tier + 10 * p_malignant + 1 - (0.5 - 0.3))
    assert priority_of((ReasonCode.NON_FINITE,), None, TAXONOMY) == 111.0
    verdict = decide(row)
    assert verdict.priority == pytest.approx(priority_of(verdict.reasons, row, TAXONOMY))
    assert verdict.suitability is NOTHING_KNOWN


def test_probabilities_may_miss_one_by_rounding_only() -> None:
    row = probabilities(nv=0.9)
    row[0] += 5e-7
    assert decide(row).label == "nv"
    row[0] += 1e-5
    with pytest.raises(ContractError, match="sum to"):
        decide(row)
    assert malignant_probability(np.where([c.malignant for c in TAXONOMY.classes], 0.4, 0.0), TAXONOMY) == 1.0
    assert malignant_probability(np.full(7, -1e-9), TAXONOMY) == 0.0
