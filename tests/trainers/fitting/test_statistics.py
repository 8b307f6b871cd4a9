"""Mean and deviation against numpy."""

import numpy as np
import pytest

from trainers.fitting.statistics import evenly_spaced, pixel_statistics
from trainers.fitting.training_data import TrainingData


def test_statistics_are_those_of_the_training_images(toy_data: TrainingData) -> None:
    mean, std = pixel_statistics(toy_data.pixels, toy_data.train_index)
    values = toy_data.pixels.take(toy_data.train_index).astype(np.float64) / 255.0
    assert mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-6)
    assert std == pytest.approx(values.std(axis=(0, 1, 2)), abs=1e-6)


def test_order_does_not_matter(toy_data: TrainingData) -> None:
    assert pixel_statistics(toy_data.pixels, np.arange(9)) == pixel_statistics(toy_data.pixels, np.arange(9)[::-1])


def test_one_colour_has_a_deviation_that_can_be_divided_by() -> None:
    class Flat:
        def __len__(self) -> int:
            return 2

        def take(self, indices: object) -> np.ndarray:
            return np.full((2, 4, 4, 3), 51, dtype=np.uint8)

    assert pixel_statistics(Flat(), np.arange(2)) == ((0.2, 0.2, 0.2), (0.001, 0.001, 0.001))


def test_evenly_spaced_rows() -> None:
    assert evenly_spaced(np.array([9, 1, 5]), 8).tolist() == [1, 5, 9]
    assert evenly_spaced(np.arange(101), 3).tolist() == [0, 50, 100]
