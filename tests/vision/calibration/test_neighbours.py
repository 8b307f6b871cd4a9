"""Distances to stored vectors: hand numbers, and what makes a vector far."""

import numpy as np
import pytest
import torch

from records.errors import ContractError
from vision.calibration.neighbours import Neighbours, fit_neighbours
from vision.inference.described import pooled_features


def plain(reference, rank):
    """Neighbours that change nothing: no mean, no turn, no scale."""
    points = np.array(reference, dtype=np.float32)
    dimensions = points.shape[1]
    stored = np.concatenate([points, np.zeros((len(points), 1), dtype=np.float32)], axis=1)
    return Neighbours(np.zeros(dimensions, np.float32), np.eye(dimensions, dtype=np.float32), 0.0, stored, rank)


def test_the_kth_nearest_counts():
    line = plain([[0.0], [1.0], [3.0]], rank=2)
    assert line.distance(np.array([[0.0], [4.0]])).tolist() == pytest.approx([1.0, 3.0])


def test_directions_vary_alike_and_the_rest_counts_as_one():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(400, 6)) * [100.0, 10.0, 1.0, 0.1, 0.1, 0.1]
    fitted = fit_neighbours(vectors, max_directions=3, max_reference=200, rank=5)
    projected = fitted.project(vectors)
    assert projected.shape == (400, 4)
    # The shrinkage keeps directions of little variance small; the largest has variance one.
    assert projected[:, 0].std() == pytest.approx(1.0, abs=0.1)
    assert 0.9 < np.sqrt((projected[:, 3] ** 2).mean()) < 1.1
    inside = fitted.distance(vectors[200:])
    outside = fitted.distance(vectors[200:210] + np.array([0, 0, 0, 0, 5.0, 0]))
    assert outside.min() > 3 * inside.max()


def test_arrays_carry_everything():
    vectors = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    fitted = fit_neighbours(vectors, max_directions=4, max_reference=30, rank=3)
    arrays = fitted.arrays("features")
    again = Neighbours.from_arrays(arrays, "features")
    assert np.array_equal(again.distance(vectors), fitted.distance(vectors))
    assert sum(array.nbytes for array in arrays.values()) < 4000


def test_few_vectors_and_equal_ones_still_give_numbers():
    one = fit_neighbours(np.ones((1, 3)), max_directions=32, max_reference=10, rank=5)
    assert one.rank == 1
    same = fit_neighbours(np.ones((20, 3)), max_directions=32, max_reference=10, rank=5)
    assert same.distance(np.ones((1, 3))).tolist() == pytest.approx([0.0], abs=1e-6)
    assert same.distance(np.full((1, 3), 2.0))[0] > 1.0


def test_what_is_not_finite_has_no_distance():
    fitted = fit_neighbours(np.random.default_rng(2).normal(size=(20, 3)), max_directions=3, max_reference=20, rank=2)
    distances = fitted.distance(np.array([[0.0, np.nan, 0.0], [0.0, 0.0, 0.0]]))
    assert np.isnan(distances[0])
    assert np.isfinite(distances[1])
    with pytest.raises(ContractError, match="finite"):
        fit_neighbours(np.array([[np.inf]]), max_directions=1, max_reference=1, rank=1)
    with pytest.raises(ContractError, match=r"must be \[N, 3\]"):
        fitted.distance(np.zeros((2, 4)))


def test_few_channels_are_described_by_more_than_their_mean():
    features = torch.arange(24.0).reshape(1, 6, 2, 2)
    pooled = pooled_features(features)
    assert pooled.shape == (1, 18)
    assert pooled[0, [0, 6, 12]].tolist() == pytest.approx([1.5, 1.25**0.5, 3.0])
    assert pooled_features(torch.zeros(2, 64, 2, 2)).shape == (2, 64)
