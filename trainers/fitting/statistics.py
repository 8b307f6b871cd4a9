"""Mean and standard deviation of the training images, per channel."""

import numpy as np

from records.arrays import FloatArray, IntArray
from trainers.fitting.feeding import PixelSource

Rgb = tuple[float, float, float]

MOST_IMAGES = 2048
CHUNK = 256
SMALLEST_STD = 1e-3


def evenly_spaced(rows: IntArray, most: int) -> IntArray:
    """Pick rows that stand for all of them.

    Args:
        rows: [n], n >= 1.
        most: how many at most.
    Returns:
        [min(n, most)], ascending, evenly spaced among the sorted rows.
    """
    return np.sort(rows)[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]


def pixel_statistics(pixels: PixelSource, rows: IntArray) -> tuple[Rgb, Rgb]:
    """Compute mean and standard deviation over the values of the training images.

    Args:
        pixels: decoded images.
        rows: [n] the training rows; of more than 2048, evenly spaced ones are used.
    Returns:
        Mean and deviation of red, green and blue, of values in 0 to 1, rounded to 6 digits.
    """
    chosen = evenly_spaced(rows, MOST_IMAGES)
    values = np.arange(256) / 255.0
    histogram = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(chosen), CHUNK):
        batch = pixels.take(chosen[start : start + CHUNK])
        for channel in range(3):
            histogram[channel] += np.bincount(batch[..., channel].ravel(), minlength=256)
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = shares @ values**2 - mean**2
    std = np.maximum(np.sqrt(np.maximum(variance, 0.0)), SMALLEST_STD)
    return _rgb(mean), _rgb(std)


def _rgb(values: FloatArray) -> Rgb:
    red, green, blue = (round(float(value), 6) for value in values)
    return (red, green, blue)
