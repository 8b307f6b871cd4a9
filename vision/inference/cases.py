"""The nearest confirmed cases of an image, by an exact search.

Vectors are compared as the bundle compares features with its training images, so a distance is a share of the largest
one that is accepted: above 1 an image is out of distribution.
"""

import numpy as np

from records.arrays import Float32Array, FloatArray, IntArray, UInt8Array
from records.cases import Cases
from records.errors import ContractError
from vision.inference.loaded import LoadedModel


def nearest_of(loaded: LoadedModel, cases: Cases, pixels: UInt8Array) -> tuple[IntArray, FloatArray]:
    """Order all cases by their distance from an image.

    Args:
        loaded: the model of the cases.
        cases: N of them.
        pixels: [S, S, 3], the image as the model sees it.
    Returns:
        [N] numbers of cases, the nearest first, and [N] their distances; both empty if the image has no finite
        features.
    Raises:
        ContractError: the model has no checks, or the cases are those of another one.
    """
    checks = loaded.checks
    if checks is None:
        raise ContractError("a model without checks of its images has nothing to compare them by")
    described = loaded.describe(pixels[None])
    if not np.isfinite(described).all():
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    vector = checks.features.project(described)[0]
    if cases.vectors.shape[1] != len(vector):
        raise ContractError(f"cases have {cases.vectors.shape[1]} numbers each, and this model {len(vector)}")
    squares = _squares(cases.vectors, vector)
    order = np.argsort(squares, kind="stable")
    return order, np.sqrt(squares[order]) / checks.ood_threshold


def _squares(vectors: Float32Array, vector: FloatArray) -> FloatArray:
    # Differences and not the binomial formula: of the nearest ones rounding would leave nothing but noise.
    return np.asarray(((vectors - vector.astype(np.float32)) ** 2).sum(axis=1, dtype=np.float64))
