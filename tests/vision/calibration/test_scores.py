"""Bands of scores, against counts made by hand."""

import numpy as np
import pytest

from records.errors import ContractError
from vision.calibration.scores import score_bands


def test_bands_count_what_is_right_and_hold_their_lower_end() -> None:
    probabilities = np.array([[0.95, 0.05], [0.5, 0.5], [0.41, 0.59], [0.1, 0.9], [0.0, 1.0]])
    bands = score_bands(probabilities, np.array([0, 1, 1, 0, 1]))
    assert bands == [
        {"low": 0.5, "high": 0.6, "lesions": 2, "right": 1},
        {"low": 0.9, "high": 1.0, "lesions": 3, "right": 2},
    ]
    assert score_bands(np.zeros((0, 2)), np.zeros(0, dtype=np.int64)) == []


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(ContractError):
        score_bands(np.array([[0.5, 0.1]]), np.array([0]))
