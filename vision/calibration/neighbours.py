"""Distance of a vector to the k-th nearest of stored vectors, after whitening.

Vectors are centred, projected on the principal directions of the stored ones and scaled to unit variance there; the
length of the residual outside those directions is one more coordinate. (Sun et al. 2022, Out-of-Distribution Detection
with Deep Nearest Neighbors, with whitening in place of their normalisation; the residual is that of ViM, Wang et al.
2022.) Stored as plain arrays; nothing is pickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from records.arrays import Float32Array, FloatArray
from records.errors import ContractError

SHRINKAGE = 0.02
"""Share of the mean variance that is added to each direction's; bounds the scaling of flat directions."""

FEATURES, EARLY, LOOKS = "features", "early", "appearance"
"""Prefixes under which a bundle stores the three sets of vectors that are compared."""


@dataclass(frozen=True)
class Neighbours:
    """Stored vectors, and how new ones are compared with them."""

    mean: Float32Array
    """[D]"""
    projection: Float32Array
    """[D, d], columns orthogonal; each scales its direction to about unit variance"""
    residual_scale: float
    """what the length of the rest is divided by; 0 leaves the rest out"""
    reference: Float32Array
    """[R, d + 1] stored vectors, projected"""
    rank: int
    """k: the distance to the k-th nearest counts"""

    def distance(self, vectors: NDArray[np.floating]) -> FloatArray:
        """Return the distance to the k-th nearest stored vector.

        Args:
            vectors: [N, D].
        Returns:
            [N], not negative; NaN for a vector that is not finite.
        Raises:
            ContractError: D is another one.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise ContractError(f"vectors must be [N, {len(self.mean)}], got {list(vectors.shape)}")
        distances = np.full(len(vectors), np.nan)
        finite = np.isfinite(vectors).all(axis=1)
        if finite.any():
            projected = self.project(vectors[finite])
            squares = (
                (projected**2).sum(axis=1)[:, None]
                - 2.0 * projected @ self.reference.T.astype(np.float64)
                + (self.reference.astype(np.float64) ** 2).sum(axis=1)
            )
            # Squared distances by the binomial formula cost one matrix product; rounding may leave them below zero.
            nearest = np.partition(squares, self.rank - 1, axis=1)[:, self.rank - 1]
            distances[finite] = np.sqrt(np.clip(nearest, 0.0, None))
        return distances

    def project(self, vectors: NDArray[np.floating]) -> FloatArray:
        """Return vectors [N, D] as they are compared, [N, d + 1]."""
        centred = vectors.astype(np.float64) - self.mean
        inside = centred @ self.projection
        rest = np.zeros((len(vectors), 1))
        if self.residual_scale > 0:
            # Columns are orthogonal, so dividing by their norms undoes the scaling to unit variance.
            directions = self.projection / np.linalg.norm(self.projection, axis=0)
            outside = centred - (centred @ directions) @ directions.T
            rest[:, 0] = np.linalg.norm(outside, axis=1) / self.residual_scale
        return np.concatenate([inside, rest], axis=1)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Return everything as small arrays whose names begin with `name`."""
        return {
            f"{name}.mean": self.mean,
            f"{name}.projection": self.projection,
            f"{name}.residual_scale": np.array(self.residual_scale, dtype=np.float64),
            f"{name}.reference": self.reference,
            f"{name}.rank": np.array(self.rank, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], name: str) -> "Neighbours":
        """Rebuild from what `arrays(name)` gave."""
        return cls(
            mean=arrays[f"{name}.mean"],
            projection=arrays[f"{name}.projection"],
            residual_scale=float(arrays[f"{name}.residual_scale"]),
            reference=arrays[f"{name}.reference"],
            rank=int(arrays[f"{name}.rank"]),
        )


def fit_neighbours(vectors: NDArray[np.floating], *, max_directions: int, max_reference: int, rank: int) -> Neighbours:
    """Store vectors to compare others with.

    Args:
        vectors: [N, D], finite, N >= 1, in an order that means nothing; all of them shape the directions.
        max_directions: d at most.
        max_reference: R at most; the first ones are stored.
        rank: k; with fewer stored vectors it is their number.
    Returns:
        The stored vectors.
    Raises:
        ContractError: no vector, or one that is not finite.
    """
    if len(vectors) == 0 or not np.isfinite(vectors).all():
        raise ContractError("a distance needs at least one vector to compare with, and all must be finite")
    values = vectors.astype(np.float64)
    mean = values.mean(axis=0)
    _, singular, directions = np.linalg.svd(values - mean, full_matrices=False)
    # The SVD of the centred vectors gives directions and variances without a D x D covariance.
    num_directions = min(max_directions, len(singular))
    variance = singular**2 / max(1, len(values) - 1)
    floor = SHRINKAGE * variance.mean() + 1e-12
    scale = 1.0 / np.sqrt(variance[:num_directions] + floor)
    projection = directions[:num_directions].T * scale
    outside = np.sqrt(variance[num_directions:].sum())
    # A placeholder as reference: projecting the vectors to store needs everything else first.
    fitted = Neighbours(
        mean=mean.astype(np.float32),
        projection=np.ascontiguousarray(projection, dtype=np.float32),
        # A residual at the level of rounding would be magnified into noise; 0 leaves it out.
        residual_scale=float(outside) if outside > 1e-6 * singular.max(initial=0.0) else 0.0,
        reference=np.zeros((1, num_directions + 1), dtype=np.float32),
        rank=min(rank, len(values), max_reference),
    )
    reference = fitted.project(values[:max_reference]).astype(np.float32)
    return Neighbours(fitted.mean, fitted.projection, fitted.residual_scale, reference, fitted.rank)
