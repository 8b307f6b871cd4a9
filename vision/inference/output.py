"""What one forward pass returns for a batch."""

from dataclasses import dataclass

import numpy as np

from records.arrays import BoolArray, Float32Array, FloatArray


@dataclass(frozen=True)
class BatchOutput:
    """Predictions for N images."""

    logits: Float32Array
    """[N, C], before calibration"""
    probabilities: FloatArray
    """[N, C], calibrated; NaN throughout a row whose logits are not finite"""
    num_threads: int
    """CPU threads that computed it"""
    maps: Float32Array | None
    """[N, C, h, w] Grad-CAM of every class, not negative; NaN for a row whose logits are not finite"""
    ood_scores: FloatArray | None = None
    """[N] distance from the training images, above 1 is out of distribution (see `inference.suitability`); NaN
    for a row whose features are not finite; None if the bundle has no such check"""

    @property
    def finite(self) -> BoolArray:
        """[N]: whether a row has probabilities."""
        return np.asarray(np.isfinite(self.probabilities).all(axis=1), dtype=np.bool_)
