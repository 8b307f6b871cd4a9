"""The nearest confirmed cases of an image, by an exact search.

Vectors are compared as the bundle compares features with its training images, so a distance is a share of the largest
one that is accepted: above 1 an image is out of distribution.
"""

import numpy as np

from records.arrays import Float32Array, FloatArray, IntArray, UInt8Array
from records.cases import Cases
from records.errors import ContractError
from vision.inference.loaded import LoadedModel


def vectors_of(loaded: LoadedModel, pixels: UInt8Array) -> FloatArray:
    """Describe images as they are compared with cases, in one forward pass.

    Args:
        loaded: the model of the cases.
        pixels: [N, S, S, 3], the images as the model sees them.
    Returns:
        [N, d + 1]; not finite where an image has no finite features.
    Raises:
        ContractError: the model has no checks.
    """
    if loaded.checks is None:
        raise ContractError("a model without checks of its images has nothing to compare them by")
    described = loaded.describe(pixels)
    finite = np.isfinite(described).all(axis=1, keepdims=True)
    return np.where(finite, loaded.checks.features.project(np.where(finite, described, 0.0)), np.nan)


def nearest_of(loaded: LoadedModel, cases: Cases, vector: FloatArray) -> tuple[IntArray, FloatArray]:
    """Order all cases by their distance from an image.

    Args:
        loaded: the model of the cases.
        cases: N of them.
        vector: [d + 1], of the image, from `vectors_of`.
    Returns:
        [N] numbers of cases, the nearest first, and [N] their distances; both empty if the vector is not finite.
    Raises:
        ContractError: the model has no checks, or the cases are those of another one.
    """
    if loaded.checks is None or cases.vectors.shape[1] != len(vector):
        raise ContractError(f"cases have {cases.vectors.shape[1]} numbers each, and this model {len(vector)}")
    if not np.isfinite(vector).all():
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    squares = _squares(cases.vectors, vector)
    order = np.argsort(squares, kind="stable")
    return order, np.sqrt(squares[order]) / loaded.checks.ood_threshold


def _squares(vectors: Float32Array, vector: FloatArray) -> FloatArray:
    # Differences and not the binomial formula: of the nearest ones rounding would leave nothing but noise.
    return np.asarray(((vectors - vector.astype(np.float32)) ** 2).sum(axis=1, dtype=np.float64))
