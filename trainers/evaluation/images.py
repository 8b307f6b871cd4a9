"""What an evaluation needs of its images besides their predictions: how to read them, masks, and traits.

Heat maps and attacks need some of the images again, with their lesion masks; slices are formed by the traits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from images.decode import decode_frame
from records.arrays import BoolArray, IntArray, UInt8Array
from records.frames import Frame
from records.types import Image
from trainers.evaluation.skin import find_mask, mask_of, read_mask, tone_of

CONFIRMED_BY = ("histopathology", "confocal or follow-up", "consensus", "one reader", "flag")
"""By label rank."""

AGE_BAND_YEARS = 20


@dataclass(frozen=True)
class Images:
    """N images, read when they are asked for."""

    names: list[str]
    """[N] file name or source id"""
    read: Callable[[int], bytes]
    """position -> the bytes of its file"""
    masks: Path | None = None
    """folder of lesion masks, named after the images"""
    outlines: Mapping[int, bytes] = field(default_factory=dict)
    """position -> the lesion as an annotator painted it, a grey PNG; used where the folder has no mask"""

    def seen(self, indices: IntArray, frame: Frame) -> UInt8Array:
        """Return images as a network sees them, [n, S, S, 3]."""
        return np.stack([decode_frame(self.read(int(index)), frame) for index in indices])

    def mask(self, index: int, frame: Frame) -> BoolArray | None:
        """Return the lesion's mask as a network sees it, [S, S]; None if there is none."""
        path = find_mask(self.masks, self.names[index]) if self.masks is not None else None
        if path is not None:
            return read_mask(path, frame)
        outline = self.outlines.get(index)
        return None if outline is None else mask_of(outline, frame)


@dataclass(frozen=True)
class Traits:
    """What slices are cut by; None where it is unknown."""

    age: str | None
    sex: str | None
    localization: str | None
    confirmation: str | None
    skin_tone: str | None


def age_band(age_years: float | None) -> str | None:
    """Name the band of an age: under 20, 20 to 39, 40 to 59, 60 to 79, 80 and older."""
    if age_years is None:
        return None
    low = int(age_years) // AGE_BAND_YEARS * AGE_BAND_YEARS
    if low == 0:
        return f"under {AGE_BAND_YEARS}"
    return "80 and older" if low >= 80 else f"{low} to {low + AGE_BAND_YEARS - 1}"


def traits_of_images(
    images: Sequence[Image], label_ranks: Sequence[int], angles: Sequence[float | None]
) -> list[Traits]:
    """Return the traits of N stored images; `angles` are those of `skin.typology_angle`."""
    return [
        Traits(
            age=age_band(image.age_years),
            sex=image.sex,
            localization=image.localization,
            confirmation=CONFIRMED_BY[rank] if rank < len(CONFIRMED_BY) else None,
            skin_tone=tone_of(angle),
        )
        for image, rank, angle in zip(images, label_ranks, angles, strict=True)
    ]
