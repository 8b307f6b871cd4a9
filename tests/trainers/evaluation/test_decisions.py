"""Rules, operating points and labels outside sets in an evaluation and its report."""

from typing import Any

import numpy as np
import pytest

from records.bundles import DecisionRule, OperatingPoints, Rule
from records.taxonomy import load_taxonomy
from tests.vision.calibration.test_decision import CODES, SHARES, drawn
from trainers.evaluation.evaluate import SplitPredictions, evaluate
from trainers.evaluation.figures import Evaluation
from trainers.evaluation.report.plots import referral_plot
from trainers.evaluation.report.words import cards, warnings_of
from vision.calibration.decision import RULES, decision_rule, labels_of
from vision.calibration.operating import fit_operating_points, gather_lesions
from vision.metrics.metrics import balanced_accuracy, confusion_matrix

TAXONOMY = load_taxonomy("ham10000")
COUNT = 900


def predictions(seed: int) -> SplitPredictions:
    probabilities, labels = drawn(COUNT, seed)
    ids = [f"{number:064x}" for number in range(COUNT)]
    return SplitPredictions(
        model_id="m" * 64, image_ids=ids, group_ids=ids, lesion_ids=[None] * COUNT, labels=labels,
        logits=np.log(probabilities).astype(np.float32), probabilities=probabilities,
    )  # fmt: skip


def operating_of(rule: Rule, point: Any = "proven") -> OperatingPoints:
    found = predictions(1)
    lesions = gather_lesions(found.image_ids, found.lesion_ids, found.labels, found.probabilities)
    decision = decision_rule(rule, TAXONOMY, SHARES, point)
    return fit_operating_points(lesions, found.probabilities, TAXONOMY, decision=decision, val=lesions)


@pytest.fixture(scope="module")
def measured() -> dict[str, Evaluation]:
    return {rule: evaluate(predictions(2), TAXONOMY, operating_of(rule), priors=SHARES) for rule in RULES}


def test_the_figures_follow_the_rule_and_all_rules_stay(measured: dict[str, Evaluation]) -> None:
    found = predictions(2)
    for rule, evaluation in measured.items():
        label = labels_of(found.probabilities, operating_of(rule).decision)  # type: ignore[arg-type]
        expected = float(balanced_accuracy(confusion_matrix(found.labels, label, 7)))
        assert evaluation.rule == rule
        assert evaluation.balanced_accuracy == expected == evaluation.by_rule[rule].balanced_accuracy
        assert [name for name, report in evaluation.by_rule.items() if report.in_force] == [rule]
        # What the other rules would give is the same figure, whichever of them is in force.
        for other in RULES:
            assert evaluation.by_rule[other].balanced_accuracy == measured[other].balanced_accuracy
        assert evaluation.at_equal_prevalence.balanced_accuracy == measured["even"].balanced_accuracy
    assert measured["even"].balanced_accuracy > measured["natural"].balanced_accuracy
    assert measured["cost"].per_class["mel"].sensitivity > measured["natural"].per_class["mel"].sensitivity


def test_labels_outside_their_set_are_counted_with_how_often_they_were_right(measured: dict[str, Evaluation]) -> None:
    outside = {rule: evaluation.label_outside_set for rule, evaluation in measured.items()}
    assert outside["natural"].images > 3 * max(outside["even"].images, outside["cost"].images)
    assert (outside["natural"].joined, outside["natural"].accuracy_of_joined) == (0, None)
    assert outside["cost"].joined > 0
    assert any("adds it to the prediction set" in text for text in warnings_of(measured["cost"], TAXONOMY))
    assert outside["natural"].share == outside["natural"].images / COUNT
    assert outside["natural"].accuracy < outside["natural"].accuracy_of_others
    said = [text for text in warnings_of(measured["natural"], TAXONOMY) if "outside its own prediction set" in text]
    assert len(said) == 1
    assert f"{outside['natural'].images} of {COUNT} images" in said[0]


def test_both_points_are_measured_and_lie_on_the_curve(measured: dict[str, Evaluation]) -> None:
    evaluation = measured["natural"]
    proven, target = evaluation.points["proven"], evaluation.points["target"]
    assert (proven.in_force, target.in_force) == (True, False)
    assert (proven.aim, target.aim) == (0.90, 0.93)
    assert proven.sensitivity == evaluation.key_class.sensitivity
    assert 1 - proven.answered_share == pytest.approx(1 - evaluation.answered_share)
    assert target.specificity > proven.specificity
    assert target.answered_share > proven.answered_share
    curve = evaluation.referral
    assert len(curve.threshold) <= 101
    for values, rising in ((curve.threshold, True), (curve.specificity, True), (curve.sensitivity, False)):
        assert sorted(values, reverse=not rising) == values
    assert sorted(curve.abstained, reverse=True) == curve.abstained
    assert (curve.sensitivity[0], curve.specificity[0], curve.abstained[0]) == (1.0, 0.0, 1.0)
    # Between the two neighbours of its threshold, the curve says what the point says.
    at = int(np.searchsorted(curve.threshold, proven.threshold))
    assert curve.sensitivity[at] <= proven.sensitivity <= curve.sensitivity[at - 1]
    assert referral_plot(evaluation, curve).startswith("data:image/svg+xml")


def test_a_target_in_force_claims_no_proof() -> None:
    evaluation = evaluate(predictions(2), TAXONOMY, operating_of("even", "target"), priors=SHARES)
    assert evaluation.points["target"].in_force
    assert evaluation.key_class.threshold == evaluation.points["target"].threshold
    assert any("the referral aims at 93 %" in text for text in warnings_of(evaluation, TAXONOMY))
    assert "if all classes came equally often" in " ".join(card.text for card in cards(evaluation, TAXONOMY))


def test_a_stated_prevalence_moves_natural_labels_and_no_even_ones(measured: dict[str, Evaluation]) -> None:
    stated = dict.fromkeys(CODES, 1 / 7)
    moved = evaluate(predictions(2), TAXONOMY, operating_of("natural"), priors=SHARES, prevalence=stated)
    assert moved.balanced_accuracy == pytest.approx(measured["even"].balanced_accuracy)
    even = evaluate(predictions(2), TAXONOMY, operating_of("even"), priors=SHARES, prevalence=stated)
    assert even.balanced_accuracy == measured["even"].balanced_accuracy


def test_a_model_without_thresholds_or_shares_has_none_of_it() -> None:
    bare = evaluate(predictions(2), TAXONOMY, None)
    assert (bare.rule, bare.by_rule, bare.points) == ("natural", {}, {})
    assert bare.referral is None
    assert bare.label_outside_set is None
    old = operating_of("natural").model_copy(update={"decision": DecisionRule()})
    assert list(evaluate(predictions(2), TAXONOMY, old, priors=SHARES).points) == ["proven"]
