"""Calibration recovers what was planted."""

import numpy as np
import pytest
from scipy.special import softmax

from records.bundles import Calibration
from records.errors import ConfigError, ContractError, TaxonomyError
from records.taxonomy import load_taxonomy
from vision.calibration.scaling import (
    _penalised_loss,
    apply_calibration,
    fit_calibration,
    reweight,
    stated_prevalence,
)
from vision.metrics.metrics import expected_calibration_error

TAXONOMY = load_taxonomy("ham10000")
NUM_CLASSES = len(TAXONOMY.codes)


def draw_labels(probabilities, generator):
    return (probabilities.cumsum(axis=1) > generator.random((len(probabilities), 1))).argmax(axis=1)


@pytest.fixture(scope="module")
def true_logits():
    return np.random.default_rng(0).normal(scale=1.5, size=(20_000, NUM_CLASSES))


def test_a_planted_temperature_is_recovered(true_logits):
    labels = draw_labels(softmax(true_logits, axis=1), np.random.default_rng(1))
    calibration = fit_calibration(2.5 * true_logits, labels, TAXONOMY)
    assert calibration.temperature == pytest.approx(2.5, rel=0.05)
    assert np.abs(calibration.bias).max() < 0.1
    assert sum(calibration.bias) == pytest.approx(0, abs=1e-9)


def test_a_planted_prior_shift_is_recovered_by_the_bias(true_logits):
    shift = np.log([0.03, 0.05, 0.11, 0.01, 0.11, 0.67, 0.02])
    labels = draw_labels(softmax(true_logits + shift, axis=1), np.random.default_rng(2))
    calibration = fit_calibration(true_logits, labels, TAXONOMY)
    assert calibration.bias == pytest.approx(shift - shift.mean(), abs=0.2)
    assert calibration.temperature == pytest.approx(1.0, rel=0.06)
    assert expected_calibration_error(labels, apply_calibration(true_logits, calibration)) < 0.02
    temperature_only = softmax(true_logits / calibration.temperature, axis=1)
    assert expected_calibration_error(labels, temperature_only) > 0.1


def test_the_class_shares_are_kept():
    labels = np.array([0, 0, 1, 5])
    calibration = fit_calibration(np.zeros((4, NUM_CLASSES)), labels, TAXONOMY)
    assert list(calibration.priors) == list(TAXONOMY.codes)
    assert calibration.priors["akiec"] == 0.5


def test_absent_classes_and_perfect_separation_stay_finite():
    labels = np.arange(30) % 3
    calibration = fit_calibration(20.0 * np.eye(NUM_CLASSES)[labels], labels, TAXONOMY)
    assert 0.01 <= calibration.temperature <= 100
    assert np.isfinite(calibration.bias).all()


def test_the_gradient_is_the_derivative_of_the_loss(true_logits):
    generator = np.random.default_rng(3)
    labels = generator.integers(0, NUM_CLASSES, 50)
    at, step = generator.normal(size=1 + NUM_CLASSES), 1e-6
    _, gradient = _penalised_loss(at, true_logits[:50], labels)
    for i in range(len(at)):
        up, down = at.copy(), at.copy()
        up[i], down[i] = at[i] + step, at[i] - step
        slope = (
            _penalised_loss(up, true_logits[:50], labels)[0] - _penalised_loss(down, true_logits[:50], labels)[0]
        ) / (2 * step)
        assert gradient[i] == pytest.approx(slope, abs=1e-6)


def test_apply_by_hand():
    calibration = Calibration(temperature=2.0, bias=[0.0, np.log(3.0)])
    # exp(ln 4 / 2) = 2 against 3
    assert apply_calibration(np.array([[np.log(4.0), 0.0]]), calibration) == pytest.approx(np.array([[2 / 5, 3 / 5]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_not_finite_and_spoils_no_other(bad):
    logits = np.zeros((3, 2))
    logits[1, 0] = bad
    probabilities = apply_calibration(logits, Calibration(bias=[0.0, 0.0]))
    assert np.isnan(probabilities[1]).all()
    assert (probabilities[[0, 2]] == 0.5).all()


def test_huge_logits_do_not_overflow():
    assert apply_calibration(np.array([[1e4, -1e4]]), Calibration(bias=[0.0, 0.0])).tolist() == [[1.0, 0.0]]


def test_reweighting_recovers_another_prevalence_exactly():
    # Two classes, one feature: Bayes by hand. p(x|a) = 0.8, p(x|b) = 0.2.
    def posterior(share_a):
        a, b = 0.8 * share_a, 0.2 * (1 - share_a)
        return np.array([[a / (a + b), b / (a + b)]])

    moved = reweight(posterior(0.5), {"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.9})
    assert moved == pytest.approx(posterior(0.1))
    assert reweight(moved, {"a": 0.1, "b": 0.9}, {"b": 5, "a": 5}) == pytest.approx(posterior(0.5))


def test_reweighting_refuses_what_is_undefined():
    half = np.array([[0.5, 0.5]])
    with pytest.raises(TaxonomyError, match="for each of a, b"):
        reweight(half, {"a": 0.5, "b": 0.5}, {"a": 1.0})
    with pytest.raises(ContractError, match="without a share"):
        reweight(half, {"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5})


def test_fit_refuses_what_it_cannot_use():
    labels = np.array([0, 1])
    with pytest.raises(ContractError, match=r"\[N >= 1, 7\]"):
        fit_calibration(np.zeros((2, 3)), labels, TAXONOMY)
    logits = np.zeros((2, NUM_CLASSES))
    logits[1, 2] = np.nan
    with pytest.raises(ContractError, match="row 1"):
        fit_calibration(logits, labels, TAXONOMY)


def test_a_planted_prior_shift_is_recovered_by_reweighting():
    """Calibrated at one prevalence and re-weighted to another, the probabilities are calibrated at the other."""
    generator = np.random.default_rng(7)
    at_home = np.array([0.04, 0.06, 0.12, 0.02, 0.12, 0.6, 0.04])
    elsewhere = np.array([0.01, 0.02, 0.05, 0.01, 0.01, 0.89, 0.01])

    def drawn(shares, count):
        labels = generator.choice(NUM_CLASSES, size=count, p=shares)
        return labels, generator.normal(size=(count, NUM_CLASSES)) + 2.0 * np.eye(NUM_CLASSES)[labels]

    labels, logits = drawn(at_home, 20_000)
    calibration = fit_calibration(logits, labels, TAXONOMY)
    labels, logits = drawn(elsewhere, 20_000)
    as_served = apply_calibration(logits, calibration)
    stated = dict(zip(TAXONOMY.codes, elsewhere.tolist(), strict=True))
    reweighted = reweight(as_served, calibration.priors, stated)
    assert expected_calibration_error(labels, as_served) > 0.025
    assert expected_calibration_error(labels, reweighted) < 0.0125
    assert np.abs(reweighted.mean(axis=0) - elsewhere).max() < 0.005


def test_what_is_not_stated_shares_the_rest_as_before():
    priors = {"mel": 0.1, "nv": 0.6, "bcc": 0.3}
    assert stated_prevalence({"nv": 0.9, "mel": 0.02}, priors) == pytest.approx({"mel": 0.02, "nv": 0.9, "bcc": 0.08})
    for stated, message in (
        ({"scc": 0.1}, "names the class 'scc'; there are mel, nv, bcc"),
        ({"nv": 1.2}, "must be a share from 0 to 1"),
        ({"nv": 0.9, "mel": 0.3}, "sums to 1.2"),
        ({"nv": 0.5, "mel": 0.1, "bcc": 0.1}, "sums to 0.7"),
    ):
        with pytest.raises(ConfigError, match=message):
            stated_prevalence(stated, priors)
    with pytest.raises(ConfigError, match="calibration had none"):
        stated_prevalence({"mel": 0.1}, priors | {"mel": 0.0})


def test_logits_that_do_not_fit_the_calibration_are_refused():
    for shape in ((2, 3), (2,), (2, 1, 2)):
        with pytest.raises(ContractError, match=r"logits must be \[N, 2\], got"):
            apply_calibration(np.zeros(shape), Calibration(bias=[0.0, 0.0]))


def test_single_precision_logits_are_computed_in_double_precision():
    logits = np.array([[3.1, -2.7, 0.3]], dtype=np.float32)
    calibration = Calibration(temperature=1.7, bias=[0.1, -0.2, 0.1])
    expected = softmax(logits.astype(np.float64) / 1.7 + np.array([0.1, -0.2, 0.1]), axis=1)
    assert (apply_calibration(logits, calibration) == expected).all()
    labels = np.array([0, 1, 2, 0, 5, 6, 3, 4])
    narrow = np.random.default_rng(9).normal(size=(8, NUM_CLASSES)).astype(np.float32)
    assert fit_calibration(narrow, labels, TAXONOMY) == fit_calibration(narrow.astype(np.float64), labels, TAXONOMY)


def test_a_single_image_can_be_calibrated_and_none_cannot():
    assert fit_calibration(np.zeros((1, NUM_CLASSES)), np.array([5]), TAXONOMY).priors["nv"] == 1.0
    with pytest.raises(ContractError, match="N >= 1"):
        fit_calibration(np.zeros((0, NUM_CLASSES)), np.array([], dtype=np.int64), TAXONOMY)


def test_the_temperature_stays_within_its_bounds():
    """Labels that contradict the logits ask for an endless temperature, labels that fit them for none."""
    labels = np.arange(4000) % NUM_CLASSES
    sharp = fit_calibration(1e-3 * np.eye(NUM_CLASSES)[labels], labels, TAXONOMY)
    assert sharp.temperature == pytest.approx(np.exp(-4.6))
    flat = fit_calibration(1e4 * np.eye(NUM_CLASSES)[(labels + 1) % NUM_CLASSES], labels, TAXONOMY)
    assert flat.temperature == pytest.approx(np.exp(4.6))
    assert sum(flat.bias) == pytest.approx(0, abs=1e-9)


def test_the_biases_sum_to_zero_where_the_labels_are_uneven():
    labels = np.array([5] * 30 + [0, 1, 2])
    bias = fit_calibration(np.zeros((33, NUM_CLASSES)), labels, TAXONOMY).bias
    assert sum(bias) == pytest.approx(0, abs=1e-12)
    assert max(bias) == bias[5] > 1.0


def test_a_class_that_was_absent_keeps_probability_zero():
    moved = reweight(np.array([[0.5, 0.5, 0.0]]), {"a": 0.5, "b": 0.5, "c": 0.0}, {"a": 0.2, "b": 0.8, "c": 0.0})
    assert moved == pytest.approx(np.array([[0.2, 0.8, 0.0]]))
    with pytest.raises(ContractError, match=r"^a class without a share in the calibration data cannot get"):
        reweight(np.array([[0.5, 0.5]]), {"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5})
    # A share of 1 before is as good as any other.
    assert reweight(np.array([[1.0, 0.0]]), {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}).tolist() == [[1.0, 0.0]]
    with pytest.raises(TaxonomyError, match="share >= 0"):
        reweight(np.array([[0.5, 0.5]]), {"a": 0.5, "b": 0.5}, {"a": 1.5, "b": -0.5})


def test_prevalences_of_none_all_and_rounding():
    priors = {"mel": 0.1, "nv": 0.6, "bcc": 0.3}
    assert stated_prevalence({"nv": 1.0}, priors) == {"mel": 0.0, "nv": 1.0, "bcc": 0.0}
    assert stated_prevalence({"mel": 0.0}, priors) == pytest.approx({"mel": 0.0, "nv": 2 / 3, "bcc": 1 / 3})
    exact = {"mel": 0.1, "nv": 0.6, "bcc": 0.3}
    assert stated_prevalence(exact, priors) == exact
    assert stated_prevalence({"mel": 0.0}, priors | {"mel": 0.0})["mel"] == 0.0
    almost = {"mel": 0.1, "nv": 0.6, "bcc": 0.3 + 5e-7}
    assert stated_prevalence(almost, priors) == almost
