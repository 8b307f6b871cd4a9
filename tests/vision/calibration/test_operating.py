"""Thresholds: exact bounds, the refer point by hand, urgency, and what is left to the model."""

import numpy as np
import pytest
from scipy.stats import binom

from records.bundles import OperatingPoints, ReferPoint
from records.errors import ContractError
from records.taxonomy import load_taxonomy
from vision.calibration.conformal import conformal_thresholds
from vision.calibration.operating import (
    answered,
    exact_interval,
    exact_lower_bound,
    fit_operating_points,
    gather_lesions,
    refer_point,
    urgent_threshold,
)

TAXONOMY = load_taxonomy("ham10000")
MEL = TAXONOMY.index_of("mel")


@pytest.mark.parametrize(("misses", "smallest_n", "stated_n"), [(0, 29, 31), (2, 61, 61), (4, 89, 92)])
def test_lesions_needed_to_prove_090(misses, smallest_n, stated_n):
    assert exact_lower_bound(smallest_n - misses, smallest_n) >= 0.90
    assert exact_lower_bound(smallest_n - 1 - misses, smallest_n - 1) < 0.90
    # In the stated number of lesions, so many misses are the most that still prove it.
    assert exact_lower_bound(stated_n - misses, stated_n) >= 0.90
    assert exact_lower_bound(stated_n - misses - 1, stated_n) < 0.90


def test_the_lower_bound_inverts_the_binomial_tail():
    for successes, trials in ((1, 1), (3, 10), (45, 50)):
        bound = exact_lower_bound(successes, trials)
        assert binom.sf(successes - 1, trials, bound) == pytest.approx(0.05)
    assert exact_lower_bound(0, 10) == 0.0
    assert exact_lower_bound(29, 29) == pytest.approx(0.05 ** (1 / 29))


def test_the_exact_interval_of_textbooks():
    assert exact_interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert exact_interval(7, 10) == pytest.approx((0.3475, 0.9333), abs=1e-4)


def test_refer_point_is_the_highest_threshold_that_proves_the_floor():
    # 61 cases allow 2 misses, so the threshold is the third smallest score.
    case_scores = 0.30 + np.arange(61) / 100
    scores = np.concatenate([case_scores, [0.05, 0.10, 0.31, 0.90]])
    is_case = np.arange(65) < 61
    point = refer_point(scores, is_case, 0.90)
    assert point.threshold == case_scores[2]
    assert point.proven
    assert point.sensitivity == 59 / 61
    assert point.sensitivity_lower_bound == pytest.approx(exact_lower_bound(59, 61))
    assert point.specificity == 3 / 4
    assert point.lesions == 61


def test_too_few_cases_prove_nothing_and_that_is_said():
    scores = np.concatenate([np.arange(1, 21) / 100, [0.0]])
    point = refer_point(scores, np.arange(21) < 20, 0.90)
    assert not point.proven
    assert point.threshold == 0.03  # 18 of 20 at or above it
    assert point.sensitivity == 0.9
    assert point.sensitivity_lower_bound < 0.90


def test_equal_scores_are_counted_together():
    point = refer_point(np.full(40, 0.5), np.ones(40, dtype=bool), 0.90)
    assert (point.threshold, point.sensitivity, point.proven) == (0.5, 1.0, True)
    assert point.specificity is None


def test_without_cases_everything_is_referred():
    point = refer_point(np.array([0.2, 0.4]), np.zeros(2, dtype=bool), 0.90)
    assert (point.threshold, point.proven, point.sensitivity, point.specificity) == (0.0, False, None, 0.0)


def test_urgent_is_the_lowest_threshold_that_reaches_the_predictive_value():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.6, 0.5])
    is_case = np.array([True, True, False, True, False, False])
    # shares at or above: 0.9: 1, 0.8: 1, 0.7: 2/3, 0.6: 3/5, 0.5: 1/2
    assert urgent_threshold(scores, is_case, 2 / 3, min_lesions=1) == 0.7
    assert urgent_threshold(scores, is_case, 0.6, min_lesions=1) == 0.6
    assert urgent_threshold(scores, is_case, 0.9, min_lesions=3) is None
    assert urgent_threshold(np.array([]), np.array([], dtype=bool), 0.5) is None


def distribution(**p):
    row = np.zeros(len(TAXONOMY.codes))
    for code, value in p.items():
        row[TAXONOMY.index_of(code)] = value
    return row


def test_lesions_average_their_images_and_are_represented_by_the_smallest_id():
    p = np.stack([distribution(mel=0.2, nv=0.8), distribution(mel=0.6, nv=0.4), distribution(nv=1.0)])
    lesions = gather_lesions(["b", "a", "c"], ["L1", "L1", None], np.array([MEL, MEL, 5]), p)
    assert len(lesions) == 2
    by_image = {int(i): k for k, i in enumerate(lesions.first_image_index)}
    assert set(by_image) == {1, 2}
    assert lesions.probabilities[by_image[1], MEL] == pytest.approx(0.4)
    assert lesions.labels[by_image[1]] == MEL
    assert lesions.lesion_index[0] == lesions.lesion_index[1] == by_image[1]


def test_lesions_refuse_rows_that_are_no_distribution():
    with pytest.raises(ContractError, match="row 0"):
        gather_lesions(["a"], [None], np.array([0]), np.full((1, 7), np.nan))


def test_operating_points_hold_all_that_triage_needs():
    generator = np.random.default_rng(1)
    labels = generator.choice(7, size=600, p=[0.05, 0.08, 0.12, 0.01, 0.12, 0.6, 0.02])
    logits = generator.normal(size=(600, 7)) + 3 * np.eye(7)[labels]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    lesions = gather_lesions([f"{i:04}" for i in range(600)], [f"L{i // 2}{labels[i]}" for i in range(600)], labels, p)
    operating = fit_operating_points(lesions, p, TAXONOMY)
    assert operating.refer["mel"].proven
    assert operating.refer["mel"].sensitivity_lower_bound >= 0.90
    assert operating.refer_malignant is not None
    assert operating.refer_malignant.lesions == int(np.isin(lesions.labels, [0, 1, MEL]).sum())
    assert 0 < operating.urgent_threshold < 1
    assert "df" in operating.pooled_classes
    assert "nv" not in operating.pooled_classes
    assert operating.conformal_thresholds["df"] == operating.conformal_thresholds["vasc"]
    assert OperatingPoints.model_validate_json(operating.model_dump_json()) == operating


def test_what_may_be_answered_without_an_annotator():
    point = {
        "sensitivity_floor": 0.9,
        "proven": True,
        "sensitivity": 0.95,
        "sensitivity_lower_bound": 0.9,
        "specificity": 0.5,
    }
    operating = OperatingPoints(
        refer={"mel": ReferPoint(threshold=0.2, lesions=40, **point)},
        refer_malignant=ReferPoint(threshold=0.3, lesions=40, **point),
        conformal_thresholds=dict.fromkeys(TAXONOMY.codes, 0.85),
    )
    rows = {
        "plain": (distribution(nv=0.95, mel=0.05), True),
        "two harmless classes": (distribution(nv=0.6, bkl=0.4), True),
        "three harmless classes": (distribution(nv=0.4, bkl=0.3, df=0.3), False),
        "key class at its threshold": (distribution(nv=0.8, mel=0.2), False),
        "malignant at its threshold": (distribution(nv=0.7, bcc=0.15, akiec=0.15), False),
        "a malignant class in the set": (distribution(nv=0.84, bcc=0.16), False),
        "not finite": (np.full(7, np.nan), False),
        "empty set": (np.full(7, 1 / 7), False),
    }
    got = answered(np.stack([row for row, _ in rows.values()]), TAXONOMY, operating)
    assert dict(zip(rows, got.tolist(), strict=True)) == {name: expected for name, (_, expected) in rows.items()}


def test_images_without_a_lesion_are_lesions_of_their_own():
    p = np.stack([distribution(nv=1.0)] * 4)
    lesions = gather_lesions(["10", "9", "x", "y"], [None, None, "L", "L"], np.array([5, 5, 5, MEL]), p)
    # One lesion with two diagnoses is counted once for each of them.
    assert len(lesions) == 4
    assert sorted(lesions.first_image_index.tolist()) == [0, 1, 2, 3]
    together = gather_lesions(["10", "9"], ["L", "L"], np.array([5, 5]), p[:2])
    assert together.first_image_index.tolist() == [0]  # ids are compared as text
    with pytest.raises(ContractError, match="image ids, lesion ids, labels and probabilities must have one length"):
        gather_lesions(["a", "b"], ["L"], np.array([5, 5]), p[:2])


def test_a_bound_at_the_floor_proves_it_and_scores_at_the_threshold_are_referred():
    floor = exact_lower_bound(10, 10)
    scores = np.concatenate([np.full(10, 0.5), [0.5, 0.4]])
    point = refer_point(scores, np.arange(12) < 10, floor)
    assert (point.threshold, point.proven, point.specificity) == (0.5, True, 0.5)
    assert point.sensitivity_lower_bound == floor
    # All of them are needed: no threshold with fewer hits reaches the floor.
    spread = refer_point(np.arange(10) / 10, np.ones(10, dtype=bool), floor)
    assert (spread.threshold, spread.proven) == (0.0, True)
    one_case = refer_point(np.array([0.3, 0.2]), np.array([True, False]), 0.9)
    assert (one_case.threshold, one_case.proven, one_case.lesions) == (0.3, False, 1)
    assert refer_point(np.array([0.3]), np.array([True]), 0.05).proven


def test_the_level_of_the_bound_is_that_of_the_caller():
    scores, is_case = np.arange(40) / 40, np.ones(40, dtype=bool)
    strict, loose = (refer_point(scores, is_case, 0.8, level) for level in (0.99, 0.5))
    assert strict.threshold < loose.threshold
    hits = int((scores >= strict.threshold).sum())
    assert strict.sensitivity_lower_bound == exact_lower_bound(hits, 40, 0.99)


def test_nothing_refers_an_image_with_probability_zero_where_there_was_no_case():
    point = refer_point(np.array([0.0, 0.4]), np.zeros(2, dtype=bool), 0.90)
    assert (point.specificity, point.lesions) == (0.0, 0)


def test_urgent_counts_the_fewest_lesions_and_the_first_of_them():
    scores, is_case = np.array([0.9, 0.8]), np.array([False, True])
    assert urgent_threshold(scores, is_case, 0.5, min_lesions=2) == 0.8
    assert urgent_threshold(scores, is_case, 0.5, min_lesions=3) is None
    assert urgent_threshold(np.array([0.9]), np.array([True]), 1.0, min_lesions=1) == 0.9


def test_each_operating_point_uses_its_own_lesions_and_floor():
    generator = np.random.default_rng(3)
    labels = generator.choice(7, size=500, p=[0.08, 0.08, 0.12, 0.02, 0.12, 0.55, 0.03])
    logits = generator.normal(size=(500, 7)) + 2 * np.eye(7)[labels]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    lesions = gather_lesions([f"{i:04}" for i in range(500)], [f"L{i}" for i in range(500)], labels, p)
    found = fit_operating_points(lesions, p, TAXONOMY, urgent_predictive_value=0.8, promise=0.7)
    order = lesions.first_image_index
    floor = TAXONOMY.key_class.sensitivity_floor
    is_malignant = np.array([c.malignant for c in TAXONOMY.classes])
    scores = p[order][:, is_malignant].sum(axis=1).clip(0, 1)
    assert found.refer["mel"] == refer_point(p[order, MEL], labels[order] == MEL, floor)
    assert found.refer_malignant == refer_point(scores, is_malignant[labels[order]], floor)
    assert found.urgent_threshold == urgent_threshold(scores, is_malignant[labels[order]], 0.8)
    assert found.conformal_promise == 0.7
    thresholds, _ = conformal_thresholds(1.0 - p[order, labels[order]], labels[order], TAXONOMY.codes, 0.7)
    assert found.conformal_thresholds == thresholds


def test_a_sum_of_probabilities_above_one_by_rounding_is_a_threshold_of_one():
    row = distribution(mel=0.1 + 0.2, bcc=0.7)
    row[MEL] += 1e-9
    lesions = gather_lesions(["a", "b"], [None, None], np.array([MEL, 5]), np.stack([row, distribution(nv=1.0)]))
    assert fit_operating_points(lesions, np.stack([row, distribution(nv=1.0)]), TAXONOMY).refer_malignant.threshold == 1


def test_thresholds_of_one_class_do_not_answer_for_another_row():
    """Each row is judged alone: a row of a batch gives what it gives by itself."""
    generator = np.random.default_rng(5)
    rows = generator.dirichlet(np.full(7, 0.3), size=40)
    rows[7, 2] = np.nan
    points = fit_operating_points(
        gather_lesions([str(i) for i in range(39)], [None] * 39, np.arange(39) % 7, np.delete(rows, 7, axis=0)),
        np.delete(rows, 7, axis=0), TAXONOMY,
    )  # fmt: skip
    together = answered(rows, TAXONOMY, points)
    assert together.dtype == np.bool_
    assert together.tolist() == [bool(answered(row[None], TAXONOMY, points)[0]) for row in rows]
