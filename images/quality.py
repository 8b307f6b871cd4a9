"""Images of a dataset that are unusually dark, bright, blurred or flat.

Input: decoded pixels. Output: the images that lie many robust deviations (median, and 1.4826 times the median absolute
deviation) from the others. They are reported, not removed: a dark image may be of dark skin, and a flat one of an
evenly coloured lesion. Whether an image suits one model is decided in `vision.inference.suitability`.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from images.appearance import MEASURES, appearance
from images.cache import PixelRows
from records.arrays import FloatArray

MANY_DEVIATIONS = 4.0
_CHUNK = 512
_NORMAL = 1.4826
_WORDS = {
    "lightness": ("dark", "bright"),
    "log_lightness_deviation": ("flat", None),
    "log_sharpness": ("blurred", "noisy"),
}


class QualityOutlier(BaseModel):
    """An image that differs from the others in one measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = Field(description="the image's name at its source, or its id")
    what: str = Field(description="dark, bright, flat, blurred or noisy")
    measure: str = Field(description="see images.appearance.MEASURES")
    value: float
    median: float = Field(description="of all images")
    deviations: float = Field(description="robust deviations from the median; negative is below")


def quality_outliers(measured: FloatArray, names: Sequence[str]) -> list[QualityOutlier]:
    """Return the images that differ most, the furthest first; none where all images measure the same.

    Args:
        measured: [N, 10] from `appearance`.
        names: [N].
    Returns:
        One entry per image and measure.
    """
    found = []
    for measure, words in _WORDS.items():
        values = measured[:, MEASURES.index(measure)]
        median = float(np.median(values))
        spread = _NORMAL * float(np.median(np.abs(values - median)))
        # Median and MAD, since a few extreme images must not widen the range that they are judged by.
        if spread <= 1e-9:
            continue
        deviations = (values - median) / spread
        for row in np.flatnonzero(np.abs(deviations) >= MANY_DEVIATIONS):
            what = words[0] if deviations[row] < 0 else words[1]
            if what is not None:
                found.append(
                    QualityOutlier(
                        image=names[row],
                        what=what,
                        measure=measure,
                        value=round(float(values[row]), 3),
                        median=round(median, 3),
                        deviations=round(float(deviations[row]), 2),
                    )
                )
    return sorted(found, key=lambda outlier: (-abs(outlier.deviations), outlier.image, outlier.measure))


def measure(rows: PixelRows) -> FloatArray:
    """Measure N cached images, a few at a time: [N, 10], see `appearance`."""
    starts = range(0, len(rows), _CHUNK)
    parts = [appearance(rows.take(np.arange(start, min(start + _CHUNK, len(rows))))) for start in starts]
    return np.concatenate(parts) if parts else np.empty((0, len(MEASURES)))
