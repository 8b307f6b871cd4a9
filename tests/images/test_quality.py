"""Images that were taken unlike the rest are named in words."""

import numpy as np

from images.appearance import MEASURES, appearance
from images.quality import MANY_DEVIATIONS, quality_outliers

RANDOM = np.random.default_rng(0)


def images() -> np.ndarray:
    """60 alike noisy images."""
    base = RANDOM.integers(100, 180, size=(60, 1, 1, 3)) + RANDOM.normal(0, 12, size=(60, 32, 32, 3))
    return base.clip(0, 255).astype(np.uint8)


def test_a_dark_a_flat_and_a_blurred_image_are_named() -> None:
    pixels = images()
    pixels[3] = pixels[3] // 40
    pixels[7] = pixels[7].mean(axis=(0, 1)).astype(np.uint8)
    names = [f"P{n}" for n in range(60)]
    found = quality_outliers(appearance(pixels), names)
    words = {(outlier.image, outlier.what) for outlier in found}
    assert {("P3", "flat"), ("P7", "flat"), ("P7", "blurred")} <= words
    assert {outlier.image for outlier in found} == {"P3", "P7"}
    assert all(abs(outlier.deviations) >= MANY_DEVIATIONS for outlier in found)
    assert [abs(o.deviations) for o in found] == sorted((abs(o.deviations) for o in found), reverse=True)


def test_deviations_by_hand() -> None:
    measured = np.zeros((5, 10))
    measured[:, 0] = [98, 99, 100, 101, 150]
    # Median 100, absolute deviations 2 1 0 1 50: their median is 1.
    (outlier,) = quality_outliers(measured, list("abcde"))
    assert (outlier.image, outlier.what, outlier.median) == ("e", "bright", 100.0)
    assert outlier.deviations == round(50 / 1.4826, 2)


def test_a_measure_whose_upper_end_is_no_fault_is_no_outlier() -> None:
    measured = np.zeros((5, 10))
    contrast = MEASURES.index("log_lightness_deviation")
    measured[:, contrast] = [98, 99, 100, 101, 150]
    assert quality_outliers(measured, list("abcde")) == [], "rich in contrast"
    measured[4, contrast] = 50
    assert [outlier.what for outlier in quality_outliers(measured, list("abcde"))] == ["flat"]


def test_images_that_are_all_alike_have_no_outlier() -> None:
    assert quality_outliers(np.zeros((4, 10)), list("abcd")) == []
