"""Which part of an image a model sees, and at which size: the arithmetic, without pixels.

In: the size of an image. Out: the part of it that counts, in its own coordinates, and the size to which that part is
scaled. Everything that decodes an image for a model, or draws a heat map over one, asks here; `images.decode` makes
the pixels.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the image."""


class Crop(StrEnum):
    """Which part of an image a model sees."""

    CENTER = "center"
    WHOLE = "whole"


@dataclass(frozen=True, order=True)
class Frame:
    """What is made of an image, whatever its size.

    Args:
        side_px: S, at least 1.
        crop: `center` cuts the longer side to the centre square; `whole` cuts nothing.
        squeezed: to [S, S], as a network takes it; false keeps the proportions, with S as the longer side.

    >>> Frame(64).box(200, 150), Frame(64).size(200, 150)
    ((25.0, 0.0, 175.0, 150.0), (64, 64))
    >>> Frame(64, Crop.WHOLE).box(200, 150), Frame(64, Crop.WHOLE).shown(100).size(200, 150)
    ((0.0, 0.0, 200, 150), (100, 75))
    """

    side_px: int
    crop: Crop = Crop.CENTER
    squeezed: bool = True

    def shown(self, side_px: int) -> "Frame":
        """Return the same part of an image as people see it: at another side, in its own proportions."""
        # The centre square has the proportions that a network takes, so both ask for the same pixels.
        return replace(self, side_px=side_px, squeezed=self.crop is Crop.CENTER)

    def box(self, width_px: float, height_px: float) -> Box:
        """Return the part of an image that counts."""
        if self.crop is Crop.WHOLE:
            return 0.0, 0.0, width_px, height_px
        shorter_px = min(width_px, height_px)
        left_px, top_px = (width_px - shorter_px) / 2, (height_px - shorter_px) / 2
        return left_px, top_px, left_px + shorter_px, top_px + shorter_px

    def size(self, width_px: float, height_px: float) -> tuple[int, int]:
        """Return the width and height to which that part is scaled, each at least 1."""
        if self.squeezed:
            return self.side_px, self.side_px
        left_px, top_px, right_px, bottom_px = self.box(width_px, height_px)
        across_px, down_px = right_px - left_px, bottom_px - top_px
        scale = self.side_px / max(across_px, down_px)
        return max(1, round(across_px * scale)), max(1, round(down_px * scale))

    @property
    def part(self) -> str:
        """The part of an image in words."""
        return {Crop.CENTER: "the centre square", Crop.WHOLE: "the whole image, squeezed"}[self.crop]

    @property
    def name(self) -> str:
        """Short text for folders and messages that differs between what networks take: `64px`, `64px-whole`."""
        return f"{self.side_px}px" + ("" if self.crop is Crop.CENTER else f"-{self.crop}")
