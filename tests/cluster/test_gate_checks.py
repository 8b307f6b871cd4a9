"""Each check of the gate by hand: what it compares, at which side of its limit it passes, and what it reports."""

import numpy as np
import pytest

from cluster.gate import Contender, Verdict, decide
from cluster.gate.checks import (
    KeyGain,
    _check_difference,
    _key_difference,
    calibration_check,
    explanation_check,
    floor_checks,
    identity_checks,
    key_gain,
    sensitivity_checks,
    threshold_at_specificity,
)
from cluster.gate.contenders import accuracy_of
from cluster.gate.report import Check
from cluster.settings import GateSettings
from records.taxonomy import Taxonomy, load_taxonomy
from trainers.evaluation.evaluate import SplitPredictions
from vision.calibration.decision import decision_rule
from vision.metrics.metrics import balanced_accuracy, confusion_matrix, expected_calibration_error

TAXONOMY = load_taxonomy("ham10000")
CODES = TAXONOMY.codes
MEL, NV = TAXONOMY.index_of("mel"), TAXONOMY.index_of("nv")
SETTINGS = GateSettings(bootstrap_resamples=200, max_calibration_error=1.0)


def predictions(labels: list[int], mel: list[float]) -> SplitPredictions:
    """One image per lesion with the given p(mel); the rest of the probability is that of nv."""
    probabilities = np.zeros((len(labels), len(CODES)))
    probabilities[:, MEL], probabilities[:, NV] = mel, 1.0 - np.array(mel)
    names = [f"{number:04d}" for number in range(len(labels))]
    return SplitPredictions(
        model_id="m" * 64,
        image_ids=names,
        group_ids=names,
        lesion_ids=names,
        labels=np.array(labels),
        logits=np.log(probabilities + 1e-9).astype(np.float32),
        probabilities=probabilities,
    )


def contender(labels: list[int], mel: list[float], threshold: float | None = 0.5, name: str = "a") -> Contender:
    return Contender(name * 64, predictions(labels, mel), threshold)


def floors(ours: Contender, key_index: int | None = MEL, taxonomy: Taxonomy = TAXONOMY) -> list[Check]:
    groups = np.arange(len(ours.predictions.labels))
    return floor_checks(ours, groups, key_index, taxonomy, GateSettings(min_specificity=0.6))


def test_floors_at_the_operating_point() -> None:
    labels = [MEL] * 10 + [NV] * 5
    ours = contender(labels, [0.5] * 9 + [0.4] + [0.5, 0.4, 0.3, 0.2, 0.1])
    sensitivity, specificity = floors(ours)
    assert sensitivity == Check(
        name="mel sensitivity floor",
        outcome="pass",
        text="mel sensitivity 0.900 at the operating point reaches its floor 0.90 (10 lesions)",
        estimate=0.9,
        limit=0.9,
        lesions=10,
    )
    assert (specificity.name, specificity.estimate, specificity.limit) == ("mel specificity floor", 0.8, 0.6)
    assert (specificity.outcome, specificity.lesions) == ("pass", 5)
    missed = contender(labels, [0.5] * 8 + [0.4] * 2 + [0.5] * 3 + [0.1] * 2)
    texts = [(check.outcome, check.text) for check in floors(missed)]
    assert texts == [
        ("fail", "mel sensitivity 0.800 at the operating point is under its floor 0.90 (10 lesions)"),
        ("fail", "mel specificity 0.400 at the operating point is under its floor 0.60 (5 lesions)"),
    ]


@pytest.mark.parametrize(
    ("labels", "counts"), [([NV, NV], "0 lesions of mel and 2"), ([MEL], "1 lesions of mel and 0")]
)
def test_a_floor_without_lesions_is_undecided(labels: list[int], counts: str) -> None:
    (only,) = floors(contender(labels, [0.5] * len(labels)))
    assert (only.name, only.outcome, only.limit) == ("mel sensitivity floor", "undecided", 0.9)
    assert counts in only.text


def test_one_lesion_of_each_kind_can_be_checked_and_a_model_without_threshold_cannot() -> None:
    assert [check.outcome for check in floors(contender([MEL, NV], [0.9, 0.1]))] == ["pass", "pass"]
    assert floors(contender([MEL, NV], [0.9, 0.1], threshold=None)) == []
    assert floors(contender([MEL, NV], [0.9, 0.1]), key_index=None) == []
    keyless = TAXONOMY.model_copy(update={"key_classes": ()})
    assert floors(contender([MEL, NV], [0.9, 0.1]), taxonomy=keyless) == []


def test_the_calibration_error_may_be_as_large_as_its_limit() -> None:
    made = predictions([MEL, NV, NV], [0.7, 0.4, 0.1])
    error = expected_calibration_error(made.labels, made.probabilities)
    at = calibration_check(made, GateSettings(max_calibration_error=error))
    assert (at.name, at.outcome, at.estimate, at.limit) == ("calibration error", "pass", error, error)
    assert at.text == f"calibration error {error:.3f} is within its limit {error:.2f}"
    over = calibration_check(made, GateSettings(max_calibration_error=error / 2))
    assert over.outcome == "fail"
    assert over.text == f"calibration error {error:.3f} is over its limit {error / 2:.2f}"


def test_heat_maps_may_be_as_similar_as_the_limit() -> None:
    settings = GateSettings(max_random_similarity=0.5)
    at = explanation_check(0.5, settings)
    assert (at.name, at.outcome, at.estimate, at.limit) == ("explanation sanity", "pass", 0.5, 0.5)
    assert at.text == (
        "its heat maps differ from those of the same network with random weights (similarity 0.50, limit 0.50)"
    )
    over = explanation_check(0.51, settings)
    assert (over.outcome, over.text.split(" those")[0]) == ("fail", "its heat maps look like")
    unknown = explanation_check(None, settings)
    assert unknown.text == "its heat maps could not be compared with those of a randomised network"
    assert unknown.outcome == "fail"


def test_equal_predictions_or_equal_ids_are_the_same_model() -> None:
    labels = [MEL, NV]
    ours, other = contender(labels, [0.9, 0.1]), contender(labels, [0.8, 0.1], name="b")
    same = contender(labels, [0.9, 0.1], name="b")
    by_id = Contender("a" * 64, other.predictions, 0.5)
    found = identity_checks(ours, [("champion", other), ("previous", same), ("other", by_id)])
    assert [(check.name, check.outcome, check.text) for check in found] == [
        ("differs from champion", "pass", "it is not the same model as the champion"),
        ("differs from previous", "fail", "its predictions equal those of the previous"),
        ("differs from other", "fail", "its predictions equal those of the other"),
    ]


@pytest.mark.parametrize(
    ("specificity", "kept"), [(0.0, 0), (0.07, 7), (0.071, 8), (0.5, 50), (0.999, 100), (1.0, 100), (0.01, 1)]
)
def test_the_threshold_keeps_a_share_of_the_negatives_below_it(specificity: float, kept: int) -> None:
    negatives = np.random.default_rng(0).permutation(np.arange(1, 101) / 100)
    threshold = threshold_at_specificity(negatives, specificity)
    assert int((negatives < threshold).sum()) == kept
    # The lowest such threshold: just above the score that it keeps.
    assert threshold == (np.nextafter(kept / 100, np.inf) if kept else 0.0)


def test_gain_of_the_key_class_at_the_specificity_of_the_rival() -> None:
    labels = [MEL, MEL, MEL, NV, NV, NV, NV]
    rival = contender(labels, [0.5, 0.2, 0.9, 0.5, 0.1, 0.1, 0.1], name="b")
    ours = contender(labels, [0.3, 0.3, 0.25, 0.9, 0.25, 0.2, 0.1], threshold=0.01)
    found = key_gain(ours, rival, np.arange(7), MEL)
    assert found is not None
    # The rival refers one of four others; three of ours lie below just over 0.25, the score of the third.
    assert found.specificity == 0.75
    assert found.gain.tolist() == [0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert found.gain.dtype == np.float64
    assert found.is_key.tolist() == [True] * 3 + [False] * 4
    for without in (
        contender(labels, [0.5] * 7, threshold=None, name="b"),
        contender([NV] * 7, [0.5] * 7, name="b"),
        contender([MEL] * 7, [0.5] * 7, name="b"),
    ):
        alike = contender(without.predictions.labels.tolist(), [0.4] * 7)
        assert key_gain(alike, without, np.arange(7), MEL) is None
    (check,) = sensitivity_checks(
        "champion", ours, contender(labels, [0.5] * 7, threshold=None, name="b"), np.arange(7),
        np.ones((5, 7), dtype=np.float32), MEL, [], SETTINGS,
    )  # fmt: skip
    assert check == Check(
        name="key-class sensitivity against champion",
        outcome="undecided",
        text="key-class sensitivity against champion cannot be compared: no such lesions on the gate split",
    )


def test_an_equal_sensitivity_passes_and_need_not_gain() -> None:
    labels = [MEL] * 40 + [NV] * 40
    mel = [0.9] * 40 + [0.1] * 40
    ours, rival = contender(labels, mel), contender(labels, mel, name="b")
    weights = np.ones((50, 80), dtype=np.float32)
    (check,) = sensitivity_checks("champion", ours, rival, np.arange(80), weights, MEL, [], SETTINGS)
    assert (check.outcome, check.estimate, check.lesions) == ("pass", 0.0, 40)
    assert check.name == "key-class sensitivity against champion at specificity 1.00"


def test_a_resample_without_key_lesions_stays_unknown() -> None:
    found = KeyGain(0.9, np.array([True, True, False]), np.array([1.0, -1.0, 1.0]))
    weights = np.array([[1, 0, 9], [0, 0, 9], [0, 3, 1], [2, 1, 0]], dtype=np.float32)
    difference = _key_difference(found, np.array([True, True, True]), weights)
    assert difference is not None
    assert difference[0] == 0.0
    assert difference[1].tolist() == pytest.approx([1.0, np.nan, -1.0, 1 / 3], nan_ok=True)
    first = _key_difference(found, np.array([True, False, True]), weights)
    assert first is not None
    assert first[1].tolist() == pytest.approx([1.0, np.nan, np.nan, 1.0], nan_ok=True)
    assert _key_difference(found, np.array([False, False, True]), weights) is None


def difference(estimate: float, lower: float, *, must_gain: bool = False, margin: float = 0.05) -> Check:
    return _check_difference(
        name="gain", estimate=estimate, lower=lower, spread=0.02, margin=margin, confidence=0.95,
        must_gain=must_gain, lesions=100,
    )  # fmt: skip


def test_a_difference_is_held_against_its_margin() -> None:
    passed = difference(0.01, -0.02)
    assert passed.text == "gain holds: +0.010, at least -0.020 with 95% confidence, margin -0.05 (100 lesions)"
    assert (passed.estimate, passed.lower_bound, passed.limit, passed.lesions) == (0.01, -0.02, -0.05, 100)
    assert passed.more_lesions is None
    # At the margin the estimate is not worse, and its bound does not exclude the margin.
    assert difference(-0.05, -0.06).outcome == "undecided"
    assert difference(-0.051, -0.06).outcome == "fail"
    assert difference(0.01, -0.05).outcome == "undecided"
    assert difference(0.0, 0.0).outcome == "pass"
    assert difference(0.0, 0.0, must_gain=True).outcome == "fail"
    assert difference(-0.01, 0.0, must_gain=True).outcome == "fail"
    assert difference(0.01, 0.0, must_gain=True).outcome == "pass"


def test_an_undecided_difference_says_how_many_lesions_are_missing() -> None:
    unclear = difference(0.01, -0.08)
    # The half-width 0.09 has to shrink to 0.06: (0.09 / 0.06)^2 = 2.25 times the lesions.
    assert unclear.more_lesions == 125
    assert unclear.text.endswith("; about 125 more lesions would decide")
    at_the_margin = difference(-0.05, -0.06)
    assert at_the_margin.more_lesions is None
    assert at_the_margin.text == (
        "gain is not clear: -0.050, at least -0.060 with 95% confidence, margin -0.05 (100 lesions)"
    )


def test_the_difference_from_which_a_check_usually_passes() -> None:
    # z(0.95) = 1.645 and z(0.8) = 0.842: a bound needs 2.486 spreads above the margin, an estimate 0.842.
    assert difference(0.0, 0.0).passes_from == pytest.approx(2.4865 * 0.02 - 0.05, abs=1e-4)
    assert difference(0.1, 0.1, must_gain=True).passes_from == pytest.approx(0.8416 * 0.02, abs=1e-4)


def test_the_report_counts_lesions_and_names_the_champion() -> None:
    labels = [MEL] * 30 + [NV] * 30
    ours = contender(labels, [0.9] * 30 + [0.1] * 30)
    rival = contender(labels, [0.9] * 25 + [0.2] * 5 + [0.1] * 20 + [0.9] * 10, name="b")
    other = contender(labels, [0.9] * 20 + [0.2] * 10 + [0.1] * 30, name="c")
    report = decide(
        ours, [("previous", other), ("champion", rival)], taxonomy=TAXONOMY, settings=SETTINGS,
        explanation_similarity=0.1, looks={"gate": 3},
    )  # fmt: skip
    assert (report.champion, report.challenger, report.looks) == ("b" * 64, "a" * 64, {"gate": 3})
    assert (report.images, report.lesions, report.key_lesions) == (60, 60, 30)
    predicted = ours.predictions.probabilities.argmax(axis=1)
    expected = balanced_accuracy(confusion_matrix(np.array(labels), predicted, len(CODES)))
    assert report.balanced_accuracy == pytest.approx(float(expected))
    accuracy = {check.name: check for check in report.checks if check.name.startswith("balanced accuracy")}
    assert accuracy["balanced accuracy against champion"].estimate == pytest.approx(1.0 - (25 / 30 + 20 / 30) / 2)
    assert accuracy["balanced accuracy against champion"].lesions == 60
    assert report.verdict is Verdict.PROMOTE
    assert report.why == "every floor is reached and no comparison is worse or unclear"
    alone = decide(ours, [], taxonomy=TAXONOMY, settings=SETTINGS, explanation_similarity=0.1)
    assert alone.champion is None


def test_a_taxonomy_without_key_class_is_judged_by_accuracy_alone() -> None:
    keyless = TAXONOMY.model_copy(update={"key_classes": ()})
    labels = [MEL] * 30 + [NV] * 30
    ours, rival = contender(labels, [0.9] * 30 + [0.1] * 30), contender(labels, [0.9] * 60, name="b")
    report = decide(ours, [("champion", rival)], taxonomy=keyless, settings=SETTINGS, explanation_similarity=0.1)
    assert (report.lesions, report.key_lesions) == (60, 0)
    assert [check.name for check in report.checks if "mel" in check.name or "key-class" in check.name] == []
    assert report.verdict is Verdict.PROMOTE


def test_a_report_of_predictions_that_are_not_finite() -> None:
    labels = [MEL] * 3 + [NV] * 3
    ours, rival = contender(labels, [0.9] * 6), contender(labels, [0.8] * 6, name="b")
    ours.predictions.probabilities[0] = np.inf
    report = decide(
        ours, [("champion", rival)], taxonomy=TAXONOMY, settings=SETTINGS, explanation_similarity=0.1, looks={"gate": 2}
    )
    assert (report.champion, report.looks, report.key_lesions) == ("b" * 64, {"gate": 2}, 0)
    assert [(check.name, check.outcome) for check in report.checks] == [("finite predictions", "fail")]


def test_contenders_are_compared_by_the_labels_that_they_would_serve() -> None:
    labels = [MEL] * 10 + [NV] * 30
    given = predictions(labels, [0.3] * 10 + [0.05] * 30)
    even = decision_rule("even", TAXONOMY, {**dict.fromkeys(CODES, 0.02), "mel": 0.1, "nv": 0.8})
    plain, challenger = Contender("a" * 64, given, 0.5), Contender("b" * 64, given, 0.5, even)
    # 0.3 / 0.1 is more than 0.7 / 0.8, and 0.05 / 0.1 is less than 0.95 / 0.8.
    assert (accuracy_of(plain, 7), accuracy_of(challenger, 7)) == (0.5, 1.0)
    # Equal probabilities under another rule are another model; under the same rule nothing would change.
    assert [check.outcome for check in identity_checks(challenger, [("champion", plain)])] == ["pass"]
    same = Contender("c" * 64, given, 0.5)
    assert [check.outcome for check in identity_checks(same, [("champion", plain)])] == ["fail"]
    verdict = decide(
        challenger, [("champion", plain)], taxonomy=TAXONOMY, settings=SETTINGS, explanation_similarity=0.0
    )
    (gain,) = [check for check in verdict.checks if check.name == "balanced accuracy against champion"]
    assert (gain.outcome, gain.estimate) == ("pass", 0.5)
