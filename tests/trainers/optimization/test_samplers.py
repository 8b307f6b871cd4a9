"""Samplers: hand-made shares, the contract of every sampler, and sharing between workers."""

import numpy as np
import pytest

from trainers.optimization.samplers import SAMPLERS, epoch_order, occurrences

LABELS = np.repeat([0, 1, 2], [64, 16, 4])


def test_the_suite_runs_all_samplers() -> None:
    assert SAMPLERS.names == ("natural", "balanced", "square_root")


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_order_is_whole_batches_of_known_images_and_depends_on_seed_and_epoch_only(name: str) -> None:
    order = epoch_order(name, LABELS, seed=3, epoch=1, batch_size=16)
    assert len(order) == 96
    assert order.min() >= 0
    assert order.max() < len(LABELS)
    assert np.array_equal(order, epoch_order(name, LABELS, seed=3, epoch=1, batch_size=16))
    assert not np.array_equal(order, epoch_order(name, LABELS, seed=3, epoch=2, batch_size=16))
    assert not np.array_equal(order, epoch_order(name, LABELS, seed=4, epoch=1, batch_size=16))


@pytest.mark.parametrize(
    ("name", "shares"), [("natural", [64, 16, 4]), ("balanced", [28, 28, 28]), ("square_root", [48, 24, 12])]
)
def test_how_often_each_class_is_shown(name: str, shares: list[int]) -> None:
    order = epoch_order(name, LABELS, seed=0, epoch=0, batch_size=84)
    assert np.bincount(LABELS[order]).tolist() == shares


def test_no_image_is_shown_twice_before_all_of_its_class_were_shown() -> None:
    order = epoch_order("balanced", LABELS, seed=0, epoch=0, batch_size=84)
    counts = np.bincount(order, minlength=84)
    for label in range(3):
        of_class = counts[label == LABELS]
        assert of_class.max() - of_class.min() <= 1


def test_natural_shows_every_image_once_and_fills_the_last_batch_from_the_start() -> None:
    order = epoch_order("natural", LABELS, seed=0, epoch=0, batch_size=80)
    assert sorted(order[:84]) == list(range(84))
    assert np.array_equal(order[84:], order[:76])


def test_fewer_images_than_a_batch() -> None:
    assert len(epoch_order("natural", LABELS[:5], seed=0, epoch=0, batch_size=16)) == 16


def test_a_class_without_images_takes_no_share() -> None:
    labels = np.array([0, 0, 2, 2])
    assert np.bincount(labels[epoch_order("balanced", labels, seed=0, epoch=0, batch_size=4)]).tolist() == [2, 0, 2]


def test_occurrences_count_what_came_before() -> None:
    assert occurrences(np.array([7, 3, 7, 7, 3])).tolist() == [0, 0, 1, 2, 1]
    assert occurrences(np.array([], dtype=np.int64)).tolist() == []
