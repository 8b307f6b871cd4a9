"""Checks of an image before its prediction is trusted: distance from the training images, and image quality.

Both use what `vision.calibration.suitability` fitted and the bundle stores:

- **Out of distribution**: the last features or the first convolution's responses are far from those of all training
  images. The prediction may be wrong in ways that its probabilities do not show; an annotator should look.
- **Quality**: too small, too dark, too bright, blurred, or unlike the training images in colour and texture (for
  dermatoscopy: not a dermatoscopic image). A better image should be taken.

    output = model.predict(pixels)
    for image in assess(model.checks, output, pixels, shorter_sides_px): ...

A bundle made without these checks has neither; all fields of its images are None.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from images.appearance import FINE_SHARE, LIGHTNESS, SHARPNESS, appearance
from records.arrays import FloatArray, UInt8Array
from records.bundles import Bundle, QualityLimits
from records.errors import ContractError
from vision.calibration.neighbours import EARLY, FEATURES, LOOKS, Neighbours
from vision.inference.output import BatchOutput


class QualityReason(StrEnum):
    """What is wrong with an image; the first that applies, in this order, is reported."""

    TOO_SMALL = "too_small"
    TOO_DARK = "too_dark"
    TOO_BRIGHT = "too_bright"
    BLURRED = "blurred"
    UNLIKE_TRAINING = "unlike_training"


@dataclass(frozen=True, slots=True)
class Suitability:
    """The results of both checks for one image; every field is None if the bundle has no checks."""

    ood_score: float | None
    """distance to the training images over the largest that is accepted: above 1 is out of distribution; the
    larger of two, of the last features and of the first convolution"""
    is_out_of_distribution: bool | None
    quality_score: float | None
    """1 = as good as the median training image in every respect, 0 = at a limit, below 0 = beyond one; at most 1"""
    quality_reason: QualityReason | None
    """None: nothing is wrong with the image"""


NOTHING_KNOWN = Suitability(None, None, None, None)


@dataclass(frozen=True)
class ImageChecks:
    """The fitted checks of a bundle."""

    features: Neighbours
    ood_threshold: float
    early: Neighbours | None
    """of the first convolution; None in a bundle made without it"""
    early_threshold: float | None
    looks: Neighbours
    limits: QualityLimits

    def ood_scores(self, pooled: NDArray[np.floating], early: NDArray[np.floating] | None) -> FloatArray:
        """Compare images with the training images.

        Args:
            pooled: [N, D] features, see `pooled_features`.
            early: [N, 2 K], see `early_statistics`; None if nothing was fitted to them.
        Returns:
            [N] the larger of the distances, each over its threshold; NaN where a vector is not finite.
        Raises:
            ContractError: `early` is missing.
        """
        scores = np.asarray(self.features.distance(pooled) / self.ood_threshold, dtype=np.float64)
        if self.early is None or self.early_threshold is None:
            return scores
        if early is None:
            raise ContractError("this bundle compares responses of the first convolution as well, and they are missing")
        return np.maximum(scores, self.early.distance(early) / self.early_threshold)

    def quality(
        self, pixels: UInt8Array, shorter_sides_px: Sequence[int] | None = None
    ) -> list[tuple[float, QualityReason | None]]:
        """Measure the quality of images.

        Args:
            pixels: [N, S, S, 3], as the model sees them.
            shorter_sides_px: [N] of the images as they were sent; None leaves the size out.
        Returns:
            Score and reason per image; see `Suitability`.
        """
        measured = appearance(pixels)
        # The limits were fitted on decoded squares, so quality is measured on what the model sees, not on the upload.
        distance = self.looks.distance(measured)
        rows = []
        for row, (values, far) in enumerate(zip(measured, distance, strict=True)):
            side_px = None if shorter_sides_px is None else shorter_sides_px[row]
            margins = self._margins(values, float(far), side_px)
            # In the order of `QualityReason`, whose first member that applies is reported.
            beyond = [reason for reason in QualityReason if margins.get(reason, 1.0) < 0.0]
            rows.append((min(1.0, *margins.values()), beyond[0] if beyond else None))
        return rows

    def _margins(self, values: FloatArray, distance: float, side_px: int | None) -> dict[QualityReason, float]:
        """Per check how far inside its limit an image is: 1 at the median, 0 at the limit."""
        limits = self.limits
        sharpness = _margin(float(values[SHARPNESS]), limits.sharpness_median, limits.min_sharpness)
        fine_share = _margin(float(values[FINE_SHARE]), limits.fine_share_median, limits.min_fine_share)
        margins = {
            QualityReason.TOO_DARK: _margin(float(values[LIGHTNESS]), limits.lightness_median, limits.min_lightness),
            QualityReason.TOO_BRIGHT: _margin(float(values[LIGHTNESS]), limits.lightness_median, limits.max_lightness),
            QualityReason.BLURRED: min(sharpness, fine_share),
            QualityReason.UNLIKE_TRAINING: _margin(distance, limits.distance_median, limits.max_distance),
        }
        if side_px is not None:
            # An image of twice the smallest side scores like the median training image.
            smallest_px = float(limits.min_side_px)
            margins[QualityReason.TOO_SMALL] = _margin(float(side_px), 2.0 * smallest_px, smallest_px)
        return margins


def image_checks_of(bundle: Bundle) -> ImageChecks | None:
    """Return the checks of a bundle; None if it was made without them."""
    fitted, arrays = bundle.document.suitability, bundle.suitability()
    if fitted is None or arrays is None:
        return None
    return ImageChecks(
        features=Neighbours.from_arrays(arrays, FEATURES),
        ood_threshold=fitted.ood_threshold,
        early=None if fitted.ood_early_threshold is None else Neighbours.from_arrays(arrays, EARLY),
        early_threshold=fitted.ood_early_threshold,
        looks=Neighbours.from_arrays(arrays, LOOKS),
        limits=fitted.quality,
    )


def assess(
    checks: ImageChecks | None,
    output: BatchOutput,
    pixels: UInt8Array,
    shorter_sides_px: Sequence[int] | None = None,
) -> list[Suitability]:
    """Check each image of a batch. Pure; 0.3 ms an image.

    Args:
        checks: of the model, or None.
        output: its predictions for these pixels.
        pixels: [N, S, S, 3], as given to `predict`.
        shorter_sides_px: [N] of the images as they were sent, in pixels; None leaves their size out.
    Returns:
        One `Suitability` per image. Where the output is not finite, the score is None and the image counts as
        out of distribution.
    Raises:
        ContractError: the lengths differ.
    """
    # Checked before the early return, so that wrong calls fail with every bundle.
    scores = output.ood_scores
    if not len(pixels) == len(output.logits) == len(pixels if shorter_sides_px is None else shorter_sides_px):
        raise ContractError("output, pixels and sides must have one length")
    if checks is None or scores is None:
        return [NOTHING_KNOWN] * len(pixels)
    return [
        Suitability(
            ood_score=score if np.isfinite(score) else None,
            # Negated, so that NaN counts as out of distribution.
            is_out_of_distribution=not score <= 1.0,
            quality_score=quality_score,
            quality_reason=reason,
        )
        for score, (quality_score, reason) in zip(
            scores.tolist(), checks.quality(pixels, shorter_sides_px), strict=True
        )
    ]


def _margin(value: float, median: float, limit: float) -> float:
    """Return 1 where the value is the median, 0 at the limit, negative beyond it."""
    return (value - limit) / (median - limit) if median != limit else float(value == limit)
