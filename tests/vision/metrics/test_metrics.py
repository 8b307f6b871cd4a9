"""Metrics against hand-computed values and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score, roc_auc_score, roc_curve

from records.errors import ContractError
from trainers.evaluation.figures import sensitivity_threshold
from vision.metrics.metrics import (
    accuracy_of,
    balanced_accuracy,
    check_probabilities,
    class_rates,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    mean_by_unit,
    one_vs_rest_auc,
    reliability_bins,
    score_bands,
)


@pytest.fixture
def cases():
    generator = np.random.default_rng(3)
    labels = generator.choice(5, size=400, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    logits = generator.normal(size=(400, 5)) + 1.5 * np.eye(5)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities


def test_rates_of_a_matrix_worked_out_by_hand():
    # truth:   a a a a  b b  c;   predicted:  a a a b  b c  c
    confusion = confusion_matrix(np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 2, 2]), 3)
    assert confusion.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 1]]
    rates = class_rates(confusion)
    assert rates.sensitivity.tolist() == [3 / 4, 1 / 2, 1]
    assert rates.specificity.tolist() == [1, 4 / 5, 5 / 6]
    assert rates.precision.tolist() == [1, 1 / 2, 1 / 2]
    assert balanced_accuracy(confusion) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)


def test_a_rare_class_missed_once_in_1206_is_not_called_sensitivity():
    # 1 false alarm among 1206 others is a specificity of 0.99917, and 0 of 5 found a sensitivity of 0.
    confusion = np.array([[1205, 1], [5, 0]])
    rates = class_rates(confusion)
    assert rates.specificity[1] == pytest.approx(0.99917, abs=1e-5)
    assert rates.sensitivity[1] == 0.0


def test_rates_agree_with_scikit_learn(cases):
    labels, probabilities = cases
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, 5)
    rates = class_rates(confusion)
    assert rates.sensitivity == pytest.approx(recall_score(labels, predicted, average=None))
    assert rates.precision == pytest.approx(precision_score(labels, predicted, average=None))
    assert float(balanced_accuracy(confusion)) == pytest.approx(balanced_accuracy_score(labels, predicted))
    for c in range(5):
        assert rates.specificity[c] == pytest.approx(recall_score(labels != c, predicted != c))


def test_undefined_rates_are_nan_and_balanced_accuracy_leaves_them_out():
    confusion = np.array([[4, 0, 0], [1, 1, 0], [0, 0, 0]])
    rates = class_rates(confusion)
    assert np.isnan(rates.sensitivity[2])
    assert np.isnan(rates.precision[2])
    assert rates.specificity[2] == 1.0
    assert balanced_accuracy(confusion) == pytest.approx(0.75)
    assert np.isnan(balanced_accuracy(np.zeros((3, 3))))


def test_auc_agrees_with_scikit_learn_and_counts_ties_one_half(cases):
    labels, probabilities = cases
    rounded = probabilities.round(1)
    expected = [roc_auc_score(labels == c, rounded[:, c]) for c in range(5)]
    assert one_vs_rest_auc(labels, rounded) == pytest.approx(expected)


def test_auc_of_a_class_without_cases_is_undefined():
    aucs = one_vs_rest_auc(np.array([0, 1, 0]), np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.8, 0.1, 0.1]]))
    assert aucs[:2].tolist() == [1.0, 1.0]
    assert np.isnan(aucs[2])


def test_calibration_error_by_hand():
    # Bins of width 1/15: 0.62 and 0.64 share (0.6, 0.667], 0.9 lies in (0.867, 0.933].
    probabilities = np.array([[0.62, 0.38], [0.64, 0.36], [0.1, 0.9], [0.1, 0.9]])
    labels = np.array([0, 1, 1, 1])
    expected = (abs(0.62 + 0.64 - 1) + abs(0.9 + 0.9 - 2)) / 4
    assert expected_calibration_error(labels, probabilities) == pytest.approx(expected)


def test_calibration_error_takes_certainty_and_border_values_into_the_last_bin():
    assert expected_calibration_error(np.array([0]), np.array([[1.0, 0.0]])) == 0.0
    assert expected_calibration_error(np.array([1]), np.array([[1.0, 0.0]])) == 1.0


def test_mean_by_unit():
    values = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert mean_by_unit(values, np.array([1, 1, 0])).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert mean_by_unit(np.array([2.0, 4.0, 7.0]), np.array([0, 0, 1])).tolist() == [3.0, 7.0]


@pytest.mark.parametrize(
    "row", [[np.nan, 1.0], [0.6, 0.6], [-0.1, 1.1], [np.inf, 0.0]], ids=["nan", "sum", "negative", "infinite"]
)
def test_a_row_that_is_no_distribution_is_named(row):
    with pytest.raises(ContractError, match="row 1 of 2"):
        check_probabilities(np.array([[0.5, 0.5], row]))


def test_wrong_number_of_classes_is_refused():
    with pytest.raises(ContractError, match=r"\[N, 3\]"):
        check_probabilities(np.array([[0.5, 0.5]]), 3)


def test_f1_and_accuracy_agree_with_scikit_learn(cases):
    labels, probabilities = cases
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, 5)
    assert np.allclose(class_rates(confusion).f1, f1_score(labels, predicted, average=None))
    assert macro_f1(confusion) == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert accuracy_of(confusion) == pytest.approx((labels == predicted).mean())
    stacked = np.stack([confusion, 2 * confusion])
    assert np.allclose(macro_f1(stacked), macro_f1(confusion))


def test_a_class_that_is_never_predicted_counts_as_no_f1():
    assert macro_f1(np.array([[4, 0], [2, 0]])) == pytest.approx((8 / 10 + 0) / 2)


def test_specificity_at_95_sensitivity_agrees_with_scikit_learn(cases):
    labels, probabilities = cases
    for index in range(5):
        scores, is_case = probabilities[:, index], labels == index
        threshold = sensitivity_threshold(scores, is_case, 0.95)
        false_alarms, hits, _ = roc_curve(is_case, scores, drop_intermediate=False)
        expected = 1 - false_alarms[hits >= 0.95 - 1e-12].min()
        assert (scores[~is_case] < threshold).mean() == pytest.approx(expected)
    assert sensitivity_threshold(np.array([0.5]), np.array([False]), 0.95) is None


def test_reliability_bins_add_up_to_the_calibration_error(cases):
    labels, probabilities = cases
    bins = reliability_bins(labels, probabilities)
    assert sum(images for _, _, images in bins) == len(labels)
    error = sum(images * abs(confidence - accuracy) for confidence, accuracy, images in bins) / len(labels)
    assert error == pytest.approx(expected_calibration_error(labels, probabilities))


def test_bands_count_what_is_right_and_hold_their_lower_end() -> None:
    probabilities = np.array([[0.95, 0.05], [0.5, 0.5], [0.41, 0.59], [0.1, 0.9], [0.0, 1.0]])
    bands = score_bands(probabilities, np.array([0, 1, 1, 0, 1]))
    assert bands == [
        {"low": 0.5, "high": 0.6, "lesions": 2, "right": 1},
        {"low": 0.9, "high": 1.0, "lesions": 3, "right": 2},
    ]
    assert score_bands(np.zeros((0, 2)), np.zeros(0, dtype=np.int64)) == []


def test_bands_refuse_what_is_no_distribution() -> None:
    with pytest.raises(ContractError):
        score_bands(np.array([[0.5, 0.1]]), np.array([0]))
