"""Wrong labels are found among right ones."""

import numpy as np
import pytest

from labeling.label_noise import suspicious_rows
from records.errors import ContractError


def test_half_of_planted_noise_is_found_at_a_precision_above_one_half() -> None:
    chance = np.random.default_rng(0)
    truth = chance.choice(7, 1400, p=[0.05, 0.07, 0.12, 0.03, 0.13, 0.57, 0.03])
    # A model that is right in about three quarters of cases, as an honest out-of-fold one may be.
    logits = chance.normal(size=(1400, 7)) + 2.8 * np.eye(7)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels, wrong = truth.copy(), chance.choice(1400, 70, replace=False)
    labels[wrong] = (truth[wrong] + chance.integers(1, 7, 70)) % 7
    found = suspicious_rows(labels, probabilities)
    hits = np.cumsum(np.isin(found, wrong))
    at_half = int(np.searchsorted(hits, 35)) + 1
    assert hits[-1] >= 35
    assert 35 / at_half >= 0.5


def test_what_cannot_be_judged_is_refused_or_empty() -> None:
    assert suspicious_rows(np.array([2, 2]), np.full((2, 3), 1 / 3)) == []
    with pytest.raises(ContractError, match="not finite"):
        suspicious_rows(np.array([0, 1]), np.array([[np.nan, 1.0], [0.5, 0.5]]))
    with pytest.raises(ContractError, match="do not fit"):
        suspicious_rows(np.array([0]), np.full((2, 2), 0.5))
