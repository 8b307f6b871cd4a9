"""Fit what tells suitable pictures from others: distance of the features, and limits of quality.

The reference is a sample of the train side, at most 300 pictures of a class. The threshold of the feature
distance is the smallest that refuses at most 5 % of val. Limits of quality are quantiles of train and val with a
margin, wide enough that a good picture is hardly ever sent back; see `MARGIN`.

In: features [N, D], pixels uint8 [N, S, S, 3] and sizes. Out: the part of the bundle's document, and small arrays.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from records.bundles import QualityLimits, SuitabilityLimits
from records.errors import ContractError
from trainers.evaluation.metrics import FloatArray
from trainers.inference.appearance import FINE_SHARE, LIGHTNESS, SHARPNESS, appearance
from trainers.inference.neighbours import Neighbours, fit_neighbours
from trainers.inference.suitability import FEATURES, LOOKS

MAX_REFUSED = 0.05
"""Share of val whose features may lie beyond the threshold."""

PER_CLASS = 300
"""Training pictures of a class whose features are looked at."""

DIRECTIONS = 32
REFERENCE = 1000
RANK = 5

TAIL = 0.005
"""Share of the fitting pictures beyond a limit of quality, before the margin."""

MARGIN = 0.15
"""A limit is moved outwards by this share of its distance to the median, and by more where few pictures show it."""

MANY = 100
"""With so many pictures the margin is twice `MARGIN`, with many more it comes down to it."""


def fit_suitability(
    train_features: NDArray[np.floating],
    train_pixels: NDArray[np.uint8],
    val_features: NDArray[np.floating],
    val_pixels: NDArray[np.uint8],
    *,
    smallest_side_px: int,
    seed: int = 0,
) -> tuple[SuitabilityLimits, dict[str, NDArray[Any]]]:
    """Fit both checks.

    Args:
        train_features: [n, D] pooled features of training pictures.
        train_pixels: [n, S, S, 3] of the same pictures.
        val_features: [m, D].
        val_pixels: [m, S, S, 3].
        smallest_side_px: shorter side of the smallest picture fitted on, as it was sent.
        seed: of the order that decides which pictures are stored.
    Returns:
        Thresholds for the document, and arrays for the bundle.
    Raises:
        ContractError: a side is empty, or a feature is not finite.
    """
    if not (len(train_features) == len(train_pixels) >= 1 and len(val_features) == len(val_pixels) >= 1):
        raise ContractError("suitability needs pictures of train and of val, with their features")
    order = np.random.default_rng(seed).permutation(len(train_features))
    features = fit_neighbours(train_features[order], max_directions=DIRECTIONS, max_reference=REFERENCE, rank=RANK)
    train_looks, val_looks = appearance(train_pixels[order]), appearance(val_pixels)
    looks = fit_neighbours(train_looks, max_directions=train_looks.shape[1], max_reference=REFERENCE, rank=RANK)
    unseen = np.concatenate([_distances_to_others(looks, train_looks), looks.distance(val_looks)])
    document = SuitabilityLimits(
        ood_threshold=refusing_threshold(features.distance(val_features)),
        ood_max_refused=MAX_REFUSED,
        quality=_quality_limits(
            np.concatenate([train_looks, val_looks]), unseen, smallest_side_px, val_pixels.shape[1]
        ),
    )
    return document, {**features.arrays(FEATURES), **looks.arrays(LOOKS)}


def refusing_threshold(distances: FloatArray, max_refused: float = MAX_REFUSED) -> float:
    """Return the smallest of these distances that at most a share of them exceeds.

    Args:
        distances: [m], m >= 1.
        max_refused: share, 0 to 1.
    Returns:
        The threshold; positive.

    >>> refusing_threshold(np.arange(1.0, 21.0))
    19.0
    >>> refusing_threshold(np.arange(1.0, 11.0))
    10.0
    """
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
    return edge + MARGIN * (1.0 + MANY / len(values)) * (edge - float(np.median(values)))


def _distances_to_others(looks: Neighbours, train_looks: FloatArray) -> FloatArray:
    """Return how far each training picture is from the stored ones; those that are stored themselves do not count."""
    stored = len(looks.reference)
    others = replace(looks, rank=min(looks.rank + 1, stored))
    return np.concatenate([others.distance(train_looks[:stored]), looks.distance(train_looks[stored:])])
