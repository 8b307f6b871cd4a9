"""Decode the bytes of an image into the square that models see.

Input: the bytes of a JPEG, PNG or WebP file. Output: uint8 [S, S, 3], sRGB, upright: the centre of the image with its
shorter side resized to S. The result depends only on the bytes, S and `DECODE_VERSION`, so training and serving see
the same pixels. Scaling to floats is part of a bundle's geometry; image quality is not judged here.
"""

import io
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageCms

from records.arrays import UInt8Array
from records.errors import ContractError, ImageError
from records.images import FORMATS, sniff

DECODE_VERSION = 1
"""Part of every cache key and bundle. Raise it with any change that alters a single pixel of any image."""

Box = tuple[float, float, float, float]

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}
# Pillow and the colour engine raise any of these for damaged bytes, depending on where the damage is.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)


def decode_square(data: bytes, side_px: int) -> UInt8Array:
    """Decode the centre square of an image to [S, S, 3], sRGB, upright; see `decode_squares`."""
    return decode_squares(data, (side_px,))[side_px]


def decode_squares(data: bytes, sides_px: Sequence[int]) -> dict[int, UInt8Array]:
    """Decode the centre square of an image at several sides, sharing the work between them.

    Args:
        data: a JPEG, PNG or WebP file.
        sides_px: the sides, each at least 1. Sides that need the same JPEG scale share one decode.
    Returns:
        Side to [S, S, 3]; each equal to the result of `decode_square` for that side alone.
    Raises:
        ImageError: the bytes are not such a file, are truncated, or hold too many pixels.
        ContractError: a side is below 1.
    """
    if not sides_px or min(sides_px) < 1:
        raise ContractError(f"sides_px must hold sides of at least 1 px, not {tuple(sides_px)}")
    sniff(data)
    squares: dict[int, UInt8Array] = {}
    by_scale: dict[int, tuple[PillowImage.Image, Box]] = {}
    try:
        for side_px in sides_px:
            image = PillowImage.open(io.BytesIO(data), formats=FORMATS)
            scale = _draft_scale(image, side_px)
            if scale not in by_scale:
                box = _load(image, scale)
                by_scale[scale] = _plain_mode(image), box
            squares[side_px] = _finish(_centre(*by_scale[scale], side_px), image)
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as error:
        raise ImageError("the image has too many pixels; send a smaller one", "too_many_pixels") from error
    except _DAMAGE as error:
        raise ImageError(
            "the image is damaged or cut off and cannot be decoded; send an undamaged file", "damaged"
        ) from error
    return squares


def decode_image(data: bytes, max_side_px: int | None = None) -> UInt8Array:
    """Decode a whole image for display.

    Args:
        data: a JPEG, PNG or WebP file.
        max_side_px: the longer side is reduced to this; None keeps the size.
    Returns:
        [H, W, 3], sRGB, upright.
    Raises:
        ImageError: the bytes are not such a file, are truncated, or hold too many pixels.
    """
    sniff(data)
    try:
        image = PillowImage.open(io.BytesIO(data), formats=FORMATS)
        longer_px = max(image.size)
        factor = 1.0 if max_side_px is None else min(1.0, max_side_px / longer_px)
        wanted = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        box = _load(image, _draft_scale(image, min(wanted)))
        plain = _plain_mode(image)
        if plain.size != wanted:
            plain = plain.resize(wanted, PillowImage.Resampling.BICUBIC, box=box)
        return _finish(plain, image)
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as error:
        raise ImageError("the image has too many pixels; send a smaller one", "too_many_pixels") from error
    except _DAMAGE as error:
        raise ImageError(
            "the image is damaged or cut off and cannot be decoded; send an undamaged file", "damaged"
        ) from error


def _draft_scale(image: PillowImage.Image, side_px: int) -> int:
    """Return the factor by which a JPEG may be reduced while it is decoded: 1, 2, 4 or 8."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    # Only whole reductions that leave at least the wanted side; resizing does the rest.
    ratio = min(image.size) // side_px
    return next((scale for scale in (8, 4, 2) if ratio >= scale), 1)


def _load(image: PillowImage.Image, scale: int) -> Box:
    """Decode and return the box of the decoded image that is not padding."""
    width_px, height_px = image.size
    if scale > 1:
        # libjpeg scales in the frequency domain, which costs a fraction of a full decode. Rounded up to whole
        # blocks, the result may end in padding, so the exact box is returned.
        image.draft(None, (width_px // scale, height_px // scale))
    image.load()
    return (0.0, 0.0, width_px / scale, height_px / scale)


def _plain_mode(image: PillowImage.Image) -> PillowImage.Image:
    """Convert a decoded image to L, RGB or CMYK; transparent pixels are blended with white."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion to 8 bits clips at 255, so 16-bit images would come out white.
        return PillowImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        return PillowImage.fromarray((np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        see_through = image.convert("RGBA")
        white = PillowImage.new("RGBA", see_through.size, (255, 255, 255, 255))
        return PillowImage.alpha_composite(white, see_through).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _centre(plain: PillowImage.Image, box: Box, side_px: int) -> PillowImage.Image:
    _, _, width, height = box
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    return plain.resize(
        (side_px, side_px), PillowImage.Resampling.BICUBIC, box=(left, top, left + shorter, top + shorter)
    )


def _finish(plain: PillowImage.Image, source: PillowImage.Image) -> UInt8Array:
    """Apply the colour profile and the orientation of the source.

    They come last: on the small image both are cheap, and the result is the same.
    """
    upright = _to_srgb(plain, source.info.get("icc_profile"))
    transpose = _TRANSPOSES.get(_orientation(source))
    if transpose is not None:
        upright = upright.transpose(transpose)
    return np.array(upright, dtype=np.uint8)


def _to_srgb(plain: PillowImage.Image, profile: bytes | None) -> PillowImage.Image:
    transform = _transform(profile, plain.mode) if profile else None
    if transform is not None:
        return transform.apply(plain)
    return plain if plain.mode == "RGB" else plain.convert("RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform from an embedded profile to sRGB; None if the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.NOCACHE,  # without a cache, threads may share the transform
        )
    except (ImageCms.PyCMSError, *_DAMAGE):
        # A profile that is damaged or for another colour space is ignored; the pixels are taken as sRGB.
        return None


def _orientation(image: PillowImage.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        # Without readable EXIF the image is taken as upright; its pixels are intact.
        return 1
    return value if isinstance(value, int) else 1
