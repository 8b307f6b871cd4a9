"""Where an evaluation finds its images again: for heat maps, masks and attacks on a few of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.decode import decode_square
from records.arrays import BoolArray, IntArray, UInt8Array
from trainers.evaluation.skin import find_mask, read_mask


@dataclass(frozen=True)
class Images:
    """N images, read when they are asked for."""

    names: list[str]
    """[N] as a person knows them"""
    read: Callable[[int], bytes]
    """position -> the bytes of its file"""
    masks: Path | None = None
    """folder of lesion masks, named after the images"""

    def square(self, index: int, side_px: int) -> UInt8Array:
        """Return an image as a square, [S, S, 3]."""
        return decode_square(self.read(index), side_px)

    def squares(self, indices: IntArray, side_px: int) -> UInt8Array:
        """Return images as squares, [n, S, S, 3]."""
        return np.stack([self.square(int(index), side_px) for index in indices])

    def mask(self, index: int, side_px: int) -> BoolArray | None:
        """Return the lesion's mask, [S, S]; None if there is none."""
        path = find_mask(self.masks, self.names[index]) if self.masks is not None else None
        return read_mask(path, side_px) if path is not None else None
