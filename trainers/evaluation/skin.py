"""The tone of the skin around a lesion, as its individual typology angle (ITA).

ITA = arctan((L* - 50) / b*) in degrees, of the median CIE L* and b* of the skin (Chardon et al. 1991). Skin is what
lies outside the lesion's mask, grown by a twentieth of the side; without a mask it is the outer ring of the square,
an eighth of the side wide. Pixels much darker than the ring's median are left out: hair and the shadow of the tube.

It is an estimate, good for comparing groups: a dermatoscope's light is not calibrated, and a lesion that reaches the
border is taken for skin where there is no mask.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from images.decode import decode_frame
from records.arrays import BoolArray, UInt8Array
from records.errors import DataError, ImageError
from records.frames import Frame

TONES = (("very light", 55.0), ("light", 41.0), ("intermediate", 28.0), ("tan", 10.0), ("brown", -30.0))
"""Names with the angle that each lies above (Del Bino & Bernerd 2013); below the last one is `dark`."""

RING = 1 / 8
GROWN = 1 / 20
DARKER = 25.0
"""Pixels whose L* lies so far below the median of the rest are not skin."""

MIN_SHARE = 0.02
"""Smallest share of the image that must be skin; with less, the angle is None."""


def typology_angle(image: UInt8Array, mask: BoolArray | None = None) -> float | None:
    """Estimate the ITA of the skin around a lesion.

    Args:
        image: [S, S, 3], sRGB.
        mask: [S, S], true on the lesion; None if it is not known.
    Returns:
        Degrees, -90 to 90; None if too little skin is seen.
    """
    side_px = len(image)
    skin = np.zeros((side_px, side_px), dtype=np.bool_)
    if mask is not None and mask.any():
        grown_px = 2 * max(1, round(GROWN * side_px)) + 1
        skin = ~cv2.dilate(mask.astype(np.uint8), np.ones((grown_px, grown_px), np.uint8)).astype(np.bool_)
    else:
        ring_px = max(1, round(RING * side_px))
        skin[:] = True
        skin[ring_px:-ring_px, ring_px:-ring_px] = False
    lab: NDArray[Any] = cv2.cvtColor(image.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)[skin]
    if len(lab) == 0:
        return None
    # Hair and the shadow of the tube are much darker than skin and would pull the median down.
    lab = lab[lab[:, 0] > float(np.median(lab[:, 0])) - DARKER]
    if len(lab) < MIN_SHARE * side_px**2:
        return None
    lightness, yellowness = float(np.median(lab[:, 0])), float(np.median(lab[:, 2]))
    # ITA is defined for b* > 0; bluish pixels would flip the angle by 180 degrees.
    return float(np.degrees(np.arctan2(lightness - 50.0, max(yellowness, 1e-3))))


def tone_of(angle: float | None) -> str | None:
    """Name a tone: very light, light, intermediate, tan, brown or dark; None if the angle is not known."""
    if angle is None:
        return None
    return next((name for name, above in TONES if angle > above), "dark")


def find_mask(folder: Path, source_id: str | None) -> Path | None:
    """Return the mask of an image: `<name>_segmentation.png` or `<name>.png` in the folder; None if it has none."""
    if source_id is None:
        return None
    candidates = (folder / f"{source_id}_segmentation.png", folder / f"{source_id}.png")
    return next((path for path in candidates if path.is_file()), None)


def read_mask(path: Path, frame: Frame) -> BoolArray:
    """Read a grey mask, bright on the lesion, as what a model sees of it, [S, S]; DataError if it is no image."""
    try:
        return mask_of(path.read_bytes(), frame)
    except (ImageError, OSError) as error:
        raise DataError(f"the mask {path} cannot be read ({error}); it must be a grey PNG") from error


def mask_of(data: bytes, frame: Frame) -> BoolArray:
    """Return a grey image, bright on the lesion, as what a model sees of it, [S, S]; ImageError if it is none."""
    return np.asarray(decode_frame(data, frame).mean(axis=-1) >= 128, dtype=np.bool_)


class SkinTones:
    """Collects the angles of images that arrive in batches.

    Args:
        source_ids: [N] names of all images, by which masks are found.
        masks: folder of masks; None if there are none.
        frame: in which the images are seen.
    """

    def __init__(self, source_ids: Sequence[str | None], masks: Path | None, frame: Frame) -> None:
        self._source_ids, self._frame = source_ids, frame
        self._masks = masks
        self.angles: list[float | None] = []

    def add(self, pixels: UInt8Array) -> None:
        """Measure the next images, [n, S, S, 3]."""
        for image in pixels:
            name = self._source_ids[len(self.angles)]
            path = find_mask(self._masks, name) if self._masks is not None else None
            self.angles.append(typology_angle(image, read_mask(path, self._frame) if path else None))
