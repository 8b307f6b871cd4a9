"""A stratified sample takes every class and spreads over groups."""

import numpy as np

from vision.metrics.sample import stratified_sample


def test_every_class_and_as_many_groups_as_possible():
    labels = np.array([0] * 10 + [1] * 4 + [2])
    groups = np.array([0] * 6 + [1, 2, 3, 4] + [5, 5, 5, 6] + [7])
    chosen = stratified_sample(labels, groups, 5)
    assert sorted(groups[chosen[labels[chosen] == 0]]) == [0, 1, 2, 3, 4]
    assert (labels[chosen] == 1).sum() == 4
    assert chosen[-1] == 14
    assert np.array_equal(chosen, np.unique(chosen))


def test_equal_seeds_draw_equally():
    labels, groups = np.arange(300) % 3, np.arange(300) // 2
    first, again, other = (stratified_sample(labels, groups, 20, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
