"""From the bytes of an image to pixels, with Pillow and Little CMS.

In: a file without metadata, whose work is known to be within the limits. Out: uint8 arrays. It runs in the process
that needs the pixels, or in a decoder process; `images.decode` chooses.
"""

import hashlib
import io
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageCms

from records.arrays import UInt8Array
from records.errors import ImageError
from records.images import FORMATS, damaged, image_size

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
# Rows that are converted at once, so that an image is not held several times.
_BAND_PX = 256
_MAX_TRANSFORM_BYTES = 8 * 2**20
_TRANSFORM_BYTES = 600_000


@dataclass(frozen=True)
class Wanted:
    """What is to be made of an image.

    Args:
        sides_px: sides of the centre squares; empty for the whole image.
        max_side_px: longer side of the whole image, at most; None keeps its size.
    """

    sides_px: tuple[int, ...] = ()
    max_side_px: int | None = None


def decode_here(stripped: bytes, wanted: Wanted) -> list[UInt8Array]:
    """Decode an image in this process.

    Args:
        stripped: a file without metadata.
        wanted: squares, or the whole image.
    Returns:
        One [S, S, 3] per side, or one [H, W, 3].
    Raises:
        ImageError: the file is damaged, or has too many pixels.
    """
    try:
        return _squares(stripped, wanted.sides_px) if wanted.sides_px else [_whole(stripped, wanted.max_side_px)]
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as error:
        raise ImageError("the image has too many pixels; send a smaller one", "too_many_pixels") from error
    except _DAMAGE as error:
        raise ImageError(
            "the image is damaged or cut off and cannot be decoded; send an undamaged file", "damaged"
        ) from error


def _squares(data: bytes, sides_px: tuple[int, ...]) -> list[UInt8Array]:
    squares: list[UInt8Array] = []
    # Sides that need the same JPEG scale share one decode.
    by_scale: dict[int, tuple[PillowImage.Image, Box]] = {}
    for side_px in sides_px:
        image = _opened(data)
        scale = _draft_scale(image, side_px)
        if scale not in by_scale:
            box = _load(image, scale)
            by_scale[scale] = _plain_mode(image), box
        squares.append(_finish(_centre(*by_scale[scale], side_px), image))
    return squares


def _whole(data: bytes, max_side_px: int | None) -> UInt8Array:
    image = _opened(data)
    longer_px = max(image.size)
    factor = 1.0 if max_side_px is None else min(1.0, max_side_px / longer_px)
    wanted = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    box = _load(image, _draft_scale(image, min(wanted)))
    plain = _plain_mode(image)
    if plain.size != wanted:
        plain = plain.resize(wanted, PillowImage.Resampling.BICUBIC, box=box)
    return _finish(plain, image)


def _opened(data: bytes) -> PillowImage.Image:
    image = PillowImage.open(io.BytesIO(data), formats=FORMATS)
    # The limits were checked on the size that the structure says; Pillow must not have found another one.
    if image.size != image_size(data):
        raise damaged("its parts do not agree how large it is")
    return image


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
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _on_white(image: PillowImage.Image) -> PillowImage.Image:
    plain = PillowImage.new("RGB", image.size)
    for top in range(0, image.height, _BAND_PX):
        band = image.crop((0, top, image.width, min(top + _BAND_PX, image.height))).convert("RGBA")
        white = PillowImage.new("RGBA", band.size, (255, 255, 255, 255))
        plain.paste(PillowImage.alpha_composite(white, band).convert("RGB"), (0, top))
    return plain


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
    upright = to_srgb(plain, source.info.get("icc_profile"))
    transpose = _TRANSPOSES.get(_orientation(source))
    if transpose is not None:
        upright = upright.transpose(transpose)
    return np.array(upright, dtype=np.uint8)


def to_srgb(plain: PillowImage.Image, profile: bytes | None) -> PillowImage.Image:
    """Return an image in sRGB; without a usable profile it is taken to be in it."""
    transform = _TRANSFORMS.find(profile, plain.mode) if profile else None
    if transform is not None:
        return transform.apply(plain)
    return plain if plain.mode == "RGB" else plain.convert("RGB")


class _Transforms:
    """The colour transforms used last, bounded in bytes, since a profile may be as large as an image."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, str], tuple[ImageCms.ImageCmsTransform | None, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
        """Return the transform from an embedded profile to sRGB; None if the profile is unusable."""
        key = (hashlib.sha256(profile).digest(), mode)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        built = _transform(profile, mode)
        with self._lock:
            if key not in self._kept:
                size = len(profile) + _TRANSFORM_BYTES
                self._kept[key] = built, size
                self._bytes += size
                while self._bytes > _MAX_TRANSFORM_BYTES:
                    self._bytes -= self._kept.popitem(last=False)[1][1]
        return built


_TRANSFORMS = _Transforms()


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
