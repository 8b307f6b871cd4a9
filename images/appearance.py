"""Ten numbers that describe an image without any network: colour, contrast, sharpness.

Input: decoded pixels uint8 [N, S, S, 3], as the model sees them. Output: [N, 10], columns named by `MEASURES`. The
limits that are fitted to these numbers are in `vision.inference.suitability`.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from records.arrays import FloatArray, UInt8Array

MEASURES = (
    "lightness",
    "green_red",
    "blue_yellow",
    "log_lightness_deviation",
    "log_green_red_deviation",
    "log_blue_yellow_deviation",
    "log_sharpness",
    "log_contour",
    "log_fine_share",
    "centre_difference",
)
LIGHTNESS, SHARPNESS, FINE_SHARE = (MEASURES.index(n) for n in ("lightness", "log_sharpness", "log_fine_share"))


def appearance(pixels: UInt8Array) -> FloatArray:
    """Measure the colour, contrast and sharpness of images.

    Means and deviations are of CIE Lab in 8 bits. Sharpness is the deviation of the Laplacian (Pech-Pacheco et
    al. 2000), contour that of the Sobel gradient, the fine share their ratio: blur takes fine detail first.

    Args:
        pixels: [N, S, S, 3], S at least 8.
    Returns:
        [N, 10], columns as in `MEASURES`; finite for every image, also one of a single colour.
    """
    measured = np.empty((len(pixels), len(MEASURES)))
    for row, image in enumerate(pixels):
        measured[row] = _measure(image)
    return measured


def _measure(image: UInt8Array) -> list[float]:
    mean, deviation = cv2.meanStdDev(cv2.cvtColor(image, cv2.COLOR_RGB2LAB))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    sharpness = _deviation(cv2.Laplacian(grey, cv2.CV_16S))
    contour = float(
        np.hypot(_deviation(cv2.Sobel(grey, cv2.CV_16S, 1, 0)), _deviation(cv2.Sobel(grey, cv2.CV_16S, 0, 1)))
    )
    quarter = len(grey) // 4
    centre = float(grey[quarter:-quarter, quarter:-quarter].mean() - grey.mean())
    # In logarithms, so that the ratio of the two is a difference and a featureless image stays finite.
    log_sharpness, log_contour = float(np.log1p(sharpness)), float(np.log1p(contour))
    return [
        *mean[:, 0].tolist(),
        *np.log1p(deviation[:, 0]).tolist(),
        log_sharpness,
        log_contour,
        log_sharpness - log_contour,
        centre,
    ]


def _deviation(filtered: NDArray[Any]) -> float:
    # At the border the filter sees mirrored pixels, whose edges are not in the image.
    _, deviation = cv2.meanStdDev(filtered[1:-1, 1:-1])
    return float(deviation[0, 0])
