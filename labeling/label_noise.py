"""Labels that are probably wrong, by confident learning (Northcutt et al. 2021).

A pure function over out-of-fold probabilities: an image's probabilities must come from a model that did
not learn from its lesion. What is suspicious gets a second opinion; nothing is changed here.
"""

import numpy as np
from numpy.typing import NDArray

from records.arrays import FloatArray
from records.errors import ContractError


def suspicious_rows(labels: NDArray[np.intp], probabilities: FloatArray) -> list[int]:
    """Return the rows whose label is probably wrong, the most suspicious first.

    Args:
        labels: [N] class indices as they are recorded.
        probabilities: [N, C] out-of-fold, in class order, rows sum to 1.
    Returns:
        Row numbers, by how little the model believes the label; empty if there is nothing to suspect.
        Classes that no row has are left out of the comparison.
    Raises:
        ContractError: the shapes do not fit, or a probability is not finite.
    """
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),):
        raise ContractError(f"{labels.shape} labels do not fit probabilities of shape {probabilities.shape}")
    if not np.isfinite(probabilities).all():
        raise ContractError("a probability is not finite; leave out the images that the model cannot answer")
    present, compact = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        return []
    from cleanlab.filter import find_label_issues

    among = np.maximum(probabilities[:, present], 1e-12)
    found = find_label_issues(
        compact, among / among.sum(axis=1, keepdims=True), return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return [int(row) for row in found]
