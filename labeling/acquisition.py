"""Acquisition rules: which pictures an expert's minute is best spent on.

Pure functions over probabilities: a score per picture, larger is asked sooner. They neither read
nor store anything. A row that is not finite is never scored away: `non_finite_rows` names it, and it goes
to an expert first.
"""

import numpy as np
from numpy.typing import NDArray

from records.errors import ContractError

FloatArray = NDArray[np.float64]


def least_confidence_scores(probabilities: FloatArray) -> FloatArray:
    """Score how unsure each answer is: 1 minus the probability of the best class (Lewis and Gale 1994).

    Args:
        probabilities: [N, C], rows sum to 1 within 1e-6, C >= 2.
    Returns:
        [N] in [0, 1 - 1/C]; larger is less sure.
    Raises:
        ContractError: wrong rank, C < 2, or a row that does not sum to 1 (names the row).

    >>> least_confidence_scores(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.5, 0.0]
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ContractError(f"probabilities must be [N, C] with C >= 2, got {list(probabilities.shape)}")
    wrong = np.flatnonzero(~(np.abs(probabilities.sum(axis=1) - 1.0) <= 1e-6))
    if len(wrong):
        raise ContractError(f"row {wrong[0]} does not sum to 1; look for non-finite rows first")
    scores: FloatArray = 1.0 - probabilities.max(axis=1)
    return scores


def non_finite_rows(probabilities: FloatArray) -> NDArray[np.intp]:
    """Return the indices of rows with a value that is not finite; each of them goes to an expert."""
    return np.flatnonzero(~np.isfinite(probabilities).all(axis=1))


def one_per_group(order: NDArray[np.intp], group_ids: list[str], budget: int) -> list[int]:
    """Take from an order at most one picture of each group.

    Args:
        order: [N] row indices, best first.
        group_ids: [N] group of each row; pictures of one lesion share a group.
        budget: how many to take at most.
    Returns:
        Row indices, best first.

    >>> one_per_group(np.array([2, 0, 1]), ["a", "b", "a"], 2)
    [2, 1]
    """
    taken: dict[str, int] = {}
    for row in order:
        if len(taken) == budget:
            break
        taken.setdefault(group_ids[row], int(row))
    return list(taken.values())
