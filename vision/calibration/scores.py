"""How often answers of about the same score were right, on images that neither training nor calibration saw.

In: probabilities and labels of one image per lesion of the calibration split. Out: bands of the largest
probability with how many of its answers were right; the page says it in words beside an answer.
"""

from typing import Any

import numpy as np

from records.arrays import FloatArray, IntArray
from vision.metrics.metrics import check_probabilities

NUM_BANDS = 10


def score_bands(probabilities: FloatArray, labels: IntArray, num_bands: int = NUM_BANDS) -> list[dict[str, Any]]:
    """Count right answers by how sure the model was.

    Args:
        probabilities: [L, C] calibrated, a distribution per row.
        labels: [L] class indices.
        num_bands: of equal width over 0 to 1; a band holds its lower end, the last one both.
    Returns:
        `low`, `high`, `lesions` and `right` of every band that holds a lesion, by rising score.
    Raises:
        ContractError: a row is not a distribution.
    """
    check_probabilities(probabilities)
    right = probabilities.argmax(axis=1) == labels
    bands = np.minimum((probabilities.max(axis=1) * num_bands).astype(np.int64), num_bands - 1)
    return [
        {
            "low": int(band) / num_bands,
            "high": (int(band) + 1) / num_bands,
            "lesions": int((bands == band).sum()),
            "right": int(right[bands == band].sum()),
        }
        for band in np.unique(bands)
    ]
