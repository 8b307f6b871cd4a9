"""Scores of single images from their probabilities; images with larger scores are labelled sooner.

Pure functions. Rows that are not finite are not scored: `non_finite_rows` finds them, and they go to an annotator
first. `suspicious_rows` ranks images whose recorded label is probably wrong.
"""

import numpy as np
from numpy.typing import NDArray

from records.arrays import FloatArray, IntArray
from records.errors import ContractError


def least_confidence_scores(probabilities: FloatArray) -> FloatArray:
    """Score how unsure each prediction is: 1 minus the probability of the best class (Lewis and Gale 1994).

    Args:
        probabilities: [N, C], rows sum to 1 within 1e-6, C >= 2.
    Returns:
        [N] in [0, 1 - 1/C]; larger is less sure.
    Raises:
        ContractError: wrong rank, C < 2, or a row that does not sum to 1 (names the row).

    >>> least_confidence_scores(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.5, 0.0]
    """
    _check(probabilities)
    scores: FloatArray = 1.0 - probabilities.max(axis=1)
    return scores


def margin_scores(probabilities: FloatArray) -> FloatArray:
    """Score how undecided each prediction is: 1 minus the gap between its two best classes (Scheffer 2001).

    Args:
        probabilities: [N, C], rows sum to 1 within 1e-6, C >= 2.
    Returns:
        [N] in [0, 1]; 1 is a tie.
    Raises:
        ContractError: wrong rank, C < 2, or a row that does not sum to 1 (names the row).

    >>> margin_scores(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    _check(probabilities)
    best = np.partition(probabilities, -2, axis=1)
    scores: FloatArray = 1.0 - (best[:, -1] - best[:, -2])
    return scores


def entropy_scores(probabilities: FloatArray) -> FloatArray:
    """Score the entropy of each prediction, in nats (Shannon 1948).

    Args:
        probabilities: [N, C], rows sum to 1 within 1e-6, C >= 2.
    Returns:
        [N] in [0, ln C].
    Raises:
        ContractError: wrong rank, C < 2, or a row that does not sum to 1 (names the row).

    >>> entropy_scores(np.array([[0.5, 0.5], [1.0, 0.0]])).round(4).tolist()
    [0.6931, 0.0]
    """
    _check(probabilities)
    return _entropy(probabilities)


def bald_scores(samples: FloatArray) -> FloatArray:
    """Score how much passes with dropout disagree: mutual information of prediction and weights (Houlsby 2011).

    Args:
        samples: [S, N, C] probabilities of S passes with dropout on, rows sum to 1 within 1e-6.
    Returns:
        [N], entropy of the mean minus mean entropy, at least 0; 0 where all passes agree.
    Raises:
        ContractError: wrong rank, no pass, C < 2, or a row that does not sum to 1.

    >>> bald_scores(np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])).round(4).tolist()
    [0.6931, 0.0]
    """
    if samples.ndim != 3 or len(samples) == 0:
        raise ContractError(f"samples must be [S, N, C] with S >= 1, got {list(samples.shape)}")
    _check(samples.reshape(-1, samples.shape[-1]))
    scores: FloatArray = np.maximum(_entropy(samples.mean(axis=0)) - _entropy(samples).mean(axis=0), 0.0)
    return scores


def miss_cost_scores(probabilities: FloatArray, miss_costs: FloatArray) -> FloatArray:
    """Score the expected cost of not reviewing an image: the sum of each class's probability times its miss cost.

    Args:
        probabilities: [N, C], rows sum to 1 within 1e-6, C >= 2.
        miss_costs: [C], of the taxonomy, at least 0.
    Returns:
        [N], at least 0.
    Raises:
        ContractError: wrong shapes, a negative cost, or a row that does not sum to 1 (names the row).

    >>> miss_cost_scores(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([1.0, 20.0])).tolist()
    [10.5, 1.0]
    """
    _check(probabilities)
    if miss_costs.shape != (probabilities.shape[1],) or not (miss_costs >= 0).all():
        raise ContractError(
            f"miss costs must be {probabilities.shape[1]} numbers of at least 0, got {miss_costs.tolist()}"
        )
    scores: FloatArray = probabilities @ miss_costs
    return scores


def at_equal_prevalence(probabilities: FloatArray, class_shares: FloatArray) -> FloatArray:
    """Move probabilities to equal class shares by Bayes: p / share, scaled to sum to 1.

    Args:
        probabilities: [..., C], finite.
        class_shares: [C] that they were calibrated at, at least 0; a class with share 0 gets probability 0.
    Returns:
        [..., C]; a row whose whole probability is on classes with share 0 stays as it is.

    >>> at_equal_prevalence(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([0.9, 0.1])).round(2).tolist()
    [[0.1, 0.9], [0.5, 0.5]]
    """
    # Factors are at most 1: one over a tiny share could be infinite.
    known = class_shares > 0
    moved = probabilities * np.where(
        known, class_shares[known].min(initial=1.0) / np.where(known, class_shares, 1.0), 0.0
    )
    totals = moved.sum(axis=-1, keepdims=True)
    found: FloatArray = np.where(totals > 0, moved / np.where(totals > 0, totals, 1.0), probabilities)
    return found


def rare_margin_rows(probabilities: FloatArray, label_counts: IntArray, group_ids: list[str], budget: int) -> list[int]:
    """Take rows of the predicted classes in turn, the class with the fewest labels first, by the least margin.

    So each class that is predicted gets an equal share of the budget, as long as it has rows; what a class cannot
    fill goes to the others, and what is left over to the classes with the fewest labels.

    Args:
        probabilities: [N, C] at equal prevalence, rows sum to 1 within 1e-6, C >= 2.
        label_counts: [C] labelled images of each class.
        group_ids: [N] group of each row.
        budget: most rows to take.
    Returns:
        Row indices in the order of taking, one per group.
    Raises:
        ContractError: wrong rank, C < 2, or a row that does not sum to 1 (names the row).

    >>> rows = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    >>> rare_margin_rows(rows, np.array([50, 3]), ["a", "b", "c", "d"], 3)
    [3, 1, 2]
    """
    # Rounded, so that equal margins stay equal whatever the order of summation was.
    order = np.argsort(-margin_scores(probabilities).round(12), kind="stable")
    predicted = probabilities[order].argmax(axis=1)
    by_rarity = np.argsort(label_counts, kind="stable")
    queues = [iter(order[predicted == c].tolist()) for c in by_rarity]
    taken: dict[str, int] = {}
    while queues and len(taken) < budget:
        for queue in list(queues):
            row = next((row for row in queue if group_ids[row] not in taken), None)
            if row is None:
                queues.remove(queue)
            elif len(taken) < budget:
                taken[group_ids[row]] = row
    return list(taken.values())


def non_finite_rows(probabilities: FloatArray) -> NDArray[np.intp]:
    """Return the indices of rows with a value that is not finite."""
    return np.flatnonzero(~np.isfinite(probabilities).all(axis=1))


def suspicious_rows(labels: NDArray[np.intp], probabilities: FloatArray) -> list[int]:
    """Return the rows whose label is probably wrong, by confident learning (Northcutt et al. 2021).

    Args:
        labels: [N] recorded class indices.
        probabilities: [N, C] in class order, rows sum to 1, by models that did not learn from the row's lesion.
    Returns:
        Row numbers, those with the lowest probability of their label first; may be empty.
    Raises:
        ContractError: the shapes do not fit, or a probability is not finite.
    """
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),):
        raise ContractError(f"{labels.shape} labels do not fit probabilities of shape {probabilities.shape}")
    if not np.isfinite(probabilities).all():
        raise ContractError("a probability is not finite; leave out the images that the model cannot predict")
    # cleanlab estimates a threshold per class from its own rows, so classes without rows are left out.
    present, compact = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        return []
    from cleanlab.filter import find_label_issues

    among = np.maximum(probabilities[:, present], 1e-12)
    found = find_label_issues(
        compact, among / among.sum(axis=1, keepdims=True), return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return [int(row) for row in found]


def one_per_group(order: NDArray[np.intp], group_ids: list[str], budget: int) -> list[int]:
    """Take at most one row of each group, in the given order.

    Args:
        order: [N] row indices, best first.
        group_ids: [N] group of each row; images of one lesion share a group.
        budget: most rows to take.
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


def _check(probabilities: FloatArray) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ContractError(f"probabilities must be [N, C] with C >= 2, got {list(probabilities.shape)}")
    wrong = np.flatnonzero(~(np.abs(probabilities.sum(axis=1) - 1.0) <= 1e-6))
    if len(wrong):
        raise ContractError(f"row {wrong[0]} does not sum to 1; look for non-finite rows first")


def _entropy(probabilities: FloatArray) -> FloatArray:
    # 0 ln 0 = 0; where the probability is 0 the logarithm is replaced by 0, which also avoids the warning.
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    found: FloatArray = np.maximum(-(probabilities * logs).sum(axis=-1), 0.0)
    return found
