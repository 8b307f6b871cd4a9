"""What one forward pass returns for a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from records.arrays import BoolArray, Float32Array, FloatArray
from vision.calibration.context import ContextUse


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
    without_context: FloatArray | None = None
    """[N, C] probabilities of the images alone; None if no context was given or the bundle uses none"""
    context: Sequence[ContextUse] | None = None
    """[N] what of the context counted; None where `without_context` is"""

    @property
    def finite(self) -> BoolArray:
        """[N]: whether a row has probabilities."""
        return np.asarray(np.isfinite(self.probabilities).all(axis=1), dtype=np.bool_)

    @classmethod
    def joined(cls, parts: "Sequence[BatchOutput]") -> "BatchOutput":
        """Return the outputs of the parts of a batch, at least one, as that of the whole."""
        if len(parts) == 1:
            return parts[0]
        maps = [part.maps for part in parts if part.maps is not None]
        scores = [part.ood_scores for part in parts if part.ood_scores is not None]
        return cls(
            logits=np.concatenate([part.logits for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            num_threads=parts[0].num_threads,
            maps=np.concatenate(maps) if maps else None,
            ood_scores=np.concatenate(scores) if scores else None,
        )

    def take(self, rows: Sequence[int]) -> "BatchOutput":
        """Return the output of some of the images, in the order of `rows`."""
        if list(rows) == list(range(len(self.logits))):
            return self
        index = list(rows)
        return BatchOutput(
            logits=self.logits[index],
            probabilities=self.probabilities[index],
            num_threads=self.num_threads,
            maps=None if self.maps is None else self.maps[index],
            ood_scores=None if self.ood_scores is None else self.ood_scores[index],
            without_context=None if self.without_context is None else self.without_context[index],
            context=None if self.context is None else [self.context[row] for row in index],
        )
