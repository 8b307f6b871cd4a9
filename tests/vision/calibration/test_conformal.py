"""Prediction sets: quantiles by hand, pooling, and coverage in simulation."""

import numpy as np

from records.bundles import OperatingPoints
from records.taxonomy import load_taxonomy
from vision.calibration.conformal import conformal_quantile, conformal_thresholds, prediction_set, thresholds_in_order
from vision.calibration.operating import gather_lesions

TAXONOMY = load_taxonomy("ham10000")


def test_quantile_by_hand():
    # n = 9: ceil(10 * 0.9) = 9th smallest; n = 19: ceil(20 * 0.9) = 18th smallest.
    assert conformal_quantile(np.arange(1, 10) / 10) == 0.9
    assert conformal_quantile(np.arange(1, 20) / 20) == 0.9
    assert conformal_quantile(np.arange(1, 20) / 20, promise=0.95) == 0.95


def test_too_few_lesions_for_the_promise_exclude_nothing():
    assert conformal_quantile(np.full(8, 0.1)) == 1.0
    assert conformal_quantile(np.full(18, 0.1), promise=0.95) == 1.0
    assert conformal_quantile(np.array([])) == 1.0


def test_small_classes_share_one_threshold_and_are_named():
    labels = np.repeat([0, 1, 2], [19, 18, 5])
    scores = np.concatenate([np.arange(1, 20) / 100, np.full(18, 0.5), np.full(5, 0.7)])
    thresholds, pooled = conformal_thresholds(scores, labels, ["a", "b", "c", "d"])
    # pooled: 23 scores, ceil(24 * 0.9) = 22nd smallest
    assert thresholds == {"a": 0.18, "b": 0.7, "c": 0.7, "d": 0.7}
    assert pooled == ["b", "c", "d"]


def test_sets_by_hand():
    sets = prediction_set(np.array([[0.6, 0.3, 0.1], [0.44, 0.26, 0.3]]), np.array([0.5, 0.7, 0.8]))
    assert sets.tolist() == [[True, True, False], [False, False, True]]


def test_a_lesion_at_the_threshold_is_in_its_own_set():
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=200)
    for row in p:
        assert prediction_set(row[None], 1.0 - row).all()


def test_a_row_that_is_not_finite_excludes_nothing():
    sets = prediction_set(np.array([[np.nan, np.nan], [0.9, 0.1]]), np.array([0.5, 0.5]))
    assert sets.tolist() == [[True, True], [True, False]]


def test_thresholds_in_class_order_default_to_excluding_nothing():
    operating = OperatingPoints(conformal_thresholds={"mel": 0.4, "akiec": 0.2})
    assert thresholds_in_order(operating, TAXONOMY).tolist() == [0.2, 1, 1, 1, 0.4, 1, 1]


def test_mean_coverage_keeps_the_promise_whatever_the_model_is_worth():
    generator = np.random.default_rng(5)
    num_lesions, coverage = 2 * 39, []
    for _ in range(200):
        labels = np.repeat([0, 1], num_lesions)
        # A poor and overconfident model: the promise does not depend on it.
        logits = generator.normal(scale=3.0, size=(2 * num_lesions, 2)) + 0.5 * np.eye(2)[labels]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        fit = np.tile(np.arange(num_lesions) % 2 == 0, 2)
        true_p = p[np.arange(len(p)), labels]
        thresholds, _ = conformal_thresholds(1 - true_p[fit], labels[fit], ["a", "b"])
        sets = prediction_set(p[~fit], np.array([thresholds["a"], thresholds["b"]]))
        covered = sets[np.arange(len(sets)), labels[~fit]]
        coverage.append([covered[labels[~fit] == c].mean() for c in (0, 1)])
    for mean in np.mean(coverage, axis=0):
        assert 0.90 - 0.01 <= mean <= 0.90 + 1 / 40 + 0.01


def test_coverage_over_200_grouped_resplits_lies_where_theory_says():
    """Lesions of one to four images are dealt to two halves as wholes; one image of each lesion is counted."""
    generator = np.random.default_rng(11)
    per_class, codes = 240, ["a", "b", "c"]
    lesion_labels = np.repeat(np.arange(3), per_class)
    images = generator.integers(1, 5, len(lesion_labels))
    lesion_of = np.repeat(np.arange(len(lesion_labels)), images)
    labels = lesion_labels[lesion_of]
    # Images of a lesion resemble each other, and the model is overconfident.
    tendency = generator.normal(size=(len(lesion_labels), 3)) + np.eye(3)[lesion_labels]
    logits = 3.0 * (tendency[lesion_of] + 0.4 * generator.normal(size=(len(labels), 3)))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = [f"{number:05d}" for number in generator.permutation(len(labels))]
    lesions = gather_lesions(ids, [f"L{number}" for number in lesion_of], labels, p)
    first, truth = lesions.first_image_index, lesions.labels
    true_p = p[first, truth]
    coverage = []
    for _ in range(200):
        is_fit = np.zeros(len(lesions), dtype=np.bool_)
        for label in range(3):
            members = np.flatnonzero(truth == label)
            is_fit[generator.permutation(members)[: per_class // 2]] = True
        thresholds, pooled = conformal_thresholds(1 - true_p[is_fit], truth[is_fit], codes)
        assert pooled == []
        sets = prediction_set(p[first[~is_fit]], np.array([thresholds[code] for code in codes]))
        held = sets[np.arange(len(sets)), truth[~is_fit]]
        coverage.append([held[truth[~is_fit] == label].mean() for label in range(3)])
    upper = 0.90 + 1 / (per_class // 2 + 1) + 0.005
    for mean in np.mean(coverage, axis=0):
        assert 0.90 - 0.005 <= mean <= upper
