"""Fit the checks of suitable images: thresholds of feature distances, and limits of image quality.

The reference is a sample of the train split, at most 300 images of a class. The thresholds of the two distances
(last features, first convolution) are the smallest that each refuse at most 2 % of val. Limits of quality are
quantiles of train and val with a margin, so wide that good images are rarely rejected; see `MARGIN`.

In: features of images and their sizes. Out: a part of the bundle's document, and small arrays.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from images.appearance import FINE_SHARE, LIGHTNESS, SHARPNESS, appearance
from records.arrays import FloatArray, UInt8Array
from records.bundles import QualityLimits, SuitabilityLimits
from records.errors import ContractError
from vision.calibration.neighbours import EARLY, FEATURES, LOOKS, Neighbours, fit_neighbours

MAX_REFUSED = 0.04
"""Share of val that may lie beyond a threshold, half of it for each of the two."""

PER_CLASS = 300
"""Training images of a class whose features are used."""

DIRECTIONS = 32
REFERENCE = 1000
RANK = 5

TAIL = 0.005
"""Share of the fitting images beyond a limit of quality, before the margin."""

MARGIN = 0.15
"""A limit is moved outwards by this share of its distance to the median, and by more where few images show it."""

MANY = 100
"""Number of images with which the margin is twice `MARGIN`; it approaches `MARGIN` with many more."""


@dataclass(frozen=True)
class Described:
    """Images of a split with their features."""

    pixels: UInt8Array
    """[N, S, S, 3]"""
    features: NDArray[np.floating]
    """[N, D], see `pooled_features`"""
    early: NDArray[np.floating]
    """[N, 2 K], see `early_statistics`"""

    def __post_init__(self) -> None:
        """Raise ContractError if lengths differ or there is no image."""
        if not len(self.pixels) == len(self.features) == len(self.early) >= 1:
            raise ContractError("suitability needs images, with the features of each")


def fit_suitability(
    train: Described,
    val: Described,
    *,
    smallest_side_px: int,
    seed: int = 0,
) -> tuple[SuitabilityLimits, dict[str, NDArray[Any]]]:
    """Fit both checks.

    Args:
        train: n training images.
        val: m images of the val split.
        smallest_side_px: shorter side of the smallest image fitted on, as it was sent.
        seed: of the order that decides which images are stored.
    Returns:
        Thresholds for the document, and arrays for the bundle.
    Raises:
        ContractError: a feature is not finite.
    """
    # Only the first vectors are stored as reference, so their order must not be that of the dataset.
    order = np.random.default_rng(seed).permutation(len(train.pixels))
    features = fit_neighbours(train.features[order], max_directions=DIRECTIONS, max_reference=REFERENCE, rank=RANK)
    early = fit_neighbours(train.early[order], max_directions=DIRECTIONS, max_reference=REFERENCE, rank=RANK)
    train_looks, val_looks = appearance(train.pixels[order]), appearance(val.pixels)
    looks = fit_neighbours(train_looks, max_directions=train_looks.shape[1], max_reference=REFERENCE, rank=RANK)
    # Distances as a new image would have them: a stored image is at distance 0 from itself.
    unseen = np.concatenate([_distances_to_others(looks, train_looks), looks.distance(val_looks)])
    document = SuitabilityLimits(
        ood_threshold=refusing_threshold(features.distance(val.features), MAX_REFUSED / 2),
        ood_early_threshold=refusing_threshold(early.distance(val.early), MAX_REFUSED / 2),
        ood_max_refused=MAX_REFUSED,
        quality=_quality_limits(
            np.concatenate([train_looks, val_looks]), unseen, smallest_side_px, val.pixels.shape[1]
        ),
    )
    return document, {**features.arrays(FEATURES), **early.arrays(EARLY), **looks.arrays(LOOKS)}


def refusing_threshold(distances: FloatArray, max_refused: float) -> float:
    """Return the smallest of these distances that at most a share of them exceeds.

    Args:
        distances: [m], m >= 1.
        max_refused: share, 0 to 1.
    Returns:
        The threshold; positive.

    >>> refusing_threshold(np.arange(1.0, 21.0), 0.05)
    19.0
    >>> refusing_threshold(np.arange(1.0, 11.0), 0.05)
    10.0
    """
    # 1e-9: a product such as 0.05 * 20 may fall below the whole number that it stands for.
    allowed = int(np.floor(max_refused * len(distances) + 1e-9))
    return max(float(np.sort(distances)[len(distances) - 1 - allowed]), 1e-6)


def _quality_limits(looks: FloatArray, distances: FloatArray, smallest_side_px: int, side_px: int) -> QualityLimits:
    lightness, sharpness, fine_share = looks[:, LIGHTNESS], looks[:, SHARPNESS], looks[:, FINE_SHARE]
    return QualityLimits(
        min_side_px=min(smallest_side_px, side_px),
        lightness_median=float(np.median(lightness)),
        min_lightness=_limit(lightness, TAIL),
        max_lightness=_limit(lightness, 1.0 - TAIL),
        sharpness_median=float(np.median(sharpness)),
        min_sharpness=_limit(sharpness, TAIL),
        fine_share_median=float(np.median(fine_share)),
        min_fine_share=_limit(fine_share, TAIL),
        distance_median=float(np.median(distances)),
        max_distance=_limit(distances, 1.0 - TAIL),
    )


def _limit(values: FloatArray, quantile: float) -> float:
    """Return a quantile, moved outwards by a share of its distance to the median."""
    edge = float(np.quantile(values, quantile))
    # Extreme quantiles of few images are noisy, so the margin grows with 1 / N.
    return edge + MARGIN * (1.0 + MANY / len(values)) * (edge - float(np.median(values)))


def _distances_to_others(looks: Neighbours, train_looks: FloatArray) -> FloatArray:
    """Return the distance of each training image to the other stored ones."""
    stored = len(looks.reference)
    others = replace(looks, rank=min(looks.rank + 1, stored))
    return np.concatenate([others.distance(train_looks[:stored]), looks.distance(train_looks[stored:])])
