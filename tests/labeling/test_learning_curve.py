"""The arithmetic of learning curves, over made-up features whose figures are known."""

from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from labeling import learning_curve as curves
from records.errors import ContractError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Heads this small take ten times as long where the threads of BLAS wait for each other on busy cores."""
    with threadpool_limits(1):
        yield


def made_up(lesions: int, seed: int, apart: float = 1.0) -> curves.Labelled:
    """Two thirds of the lesions of class 0, one third of class 1, none of class 2; every second has two images."""
    chance = np.random.default_rng(seed)
    lesion = np.sort(np.concatenate([np.arange(lesions), np.arange(0, lesions, 2)]))
    labels = (lesion % 3 == 0).astype(np.int64)
    features = chance.normal(size=(len(lesion), 20)).astype(np.float32)
    features[:, 0] += apart * labels
    return curves.Labelled(features, labels, np.array([f"L{number}" for number in lesion]))


def test_a_power_curve_is_found_again_and_a_flat_one_gains_nothing() -> None:
    sizes = np.array([50, 100, 200, 400, 800])
    rising, falling = 0.8 - 2.0 * sizes**-0.5, 0.5 + 1.0 * sizes**-0.5
    found = curves.fitted(sizes, np.stack([rising, np.full(5, 0.6), falling]))
    later = curves.at(found, 900.0)
    assert later == pytest.approx([0.8 - 2.0 / 30, 0.6, 0.5 + 1.0 / 30], abs=2e-3)


def test_recall_is_weighted_and_a_class_without_rows_has_none() -> None:
    decided, labels = np.array([True, False, True]), np.array([0, 0, 1])
    found = curves.recalls_of(decided, labels, np.array([[1.0, 3.0, 1.0], [2.0, 0.0, 0.0]]), 3)
    np.testing.assert_array_equal(found, [[0.25, 1.0, np.nan], [1.0, np.nan, np.nan]])


def test_a_curve_grows_to_all_labels_and_repeats() -> None:
    train, val = curves.reduced(made_up(100, 0), made_up(60, 1))
    curve = curves.learning_curve(train, val, 3, seed=4)
    assert curve.sizes.tolist()[-1] == len(train.labels) == 150
    assert (np.diff(curve.sizes) > 0).all()
    assert curve.sizes[0] >= curves.SMALLEST
    np.testing.assert_allclose(curve.class_sizes.sum(axis=1), curve.sizes, atol=0.5)
    assert np.isnan(curve.recalls[:, 2]).all()
    again = curves.learning_curve(train, val, 3, seed=4)
    np.testing.assert_array_equal(again.replicates, curve.replicates)


def test_95_of_100_intervals_hold_what_many_images_say() -> None:
    train, large = curves.reduced(made_up(160, 0), made_up(6_000, 2))
    decided, held = curves.right(train, large, 2), 0
    truth = np.mean([decided[large.labels == c].mean() for c in (0, 1)])
    lesions = np.array([int(name[1:]) for name in large.groups])
    for number in range(100):
        rows = lesions // 60 == number
        val = curves.Labelled(large.features[rows], large.labels[rows], large.groups[rows])
        weights = curves.resampled(val, 2)
        # Images of one lesion are drawn together.
        assert (np.diff(weights)[:, np.diff(lesions[rows]) == 0] == 0).all()
        recalls = curves.recalls_of(decided[rows], val.labels, weights, 2)
        low, high = curves.interval(recalls.mean(axis=1))
        held += bool(low <= truth <= high)
    assert 88 <= held <= 100


def test_one_class_is_decided_always_and_too_few_labels_are_refused() -> None:
    val = made_up(30, 1)
    only = made_up(30, 2)
    kept = only.labels == 0
    only = curves.Labelled(only.features[kept], only.labels[kept], only.groups[kept])
    np.testing.assert_array_equal(curves.right(only, val, 3), val.labels == 0)
    with pytest.raises(ContractError, match="needs 60 labelled images on train"):
        curves.learning_curve(only, val, 3)
