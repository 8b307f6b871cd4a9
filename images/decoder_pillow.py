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
from records.frames import Box, Frame
from records.images import FORMATS, damaged, image_size

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
        frames: what is taken of it; empty for the image at its own size.
        max_side_px: the longer side is reduced to this where there are no frames; None keeps the size.
    """

    frames: tuple[Frame, ...] = ()
    max_side_px: int | None = None


def decode_here(stripped: bytes, wanted: Wanted) -> list[UInt8Array]:
    """Decode an image in this process.

    Args:
        stripped: a file without metadata.
        wanted: frames, or the image at its own size.
    Returns:
        [H, W, 3] for each frame, or of the image.
    Raises:
        ImageError: the file is damaged, or has too many pixels.
    """
    try:
        return _framed(stripped, wanted.frames) if wanted.frames else [_complete(stripped, wanted.max_side_px)]
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as error:
        raise ImageError("the image has too many pixels; send a smaller one", "too_many_pixels") from error
    except _DAMAGE as error:
        raise ImageError(
            "the image is damaged or cut off and cannot be decoded; send an undamaged file", "damaged"
        ) from error


def _framed(data: bytes, frames: tuple[Frame, ...]) -> list[UInt8Array]:
    found: list[UInt8Array] = []
    # Frames that need the same JPEG scale share one decode.
    by_scale: dict[int, tuple[PillowImage.Image, Box]] = {}
    for frame in frames:
        image = _opened(data)
        box, size = frame.box(*image.size), frame.size(*image.size)
        scale = _draft_scale(image, min((box[2] - box[0]) // size[0], (box[3] - box[1]) // size[1]))
        if scale not in by_scale:
            by_scale[scale] = _loaded(image, scale)
        plain, (_, _, width_px, height_px) = by_scale[scale]
        part = plain.resize(size, PillowImage.Resampling.BICUBIC, box=frame.box(width_px, height_px))
        found.append(_finish(part, image))
    return found


def _complete(data: bytes, max_side_px: int | None) -> UInt8Array:
    image = _opened(data)
    longer_px = max(image.size)
    factor = 1.0 if max_side_px is None else min(1.0, max_side_px / longer_px)
    wanted = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    plain, box = _loaded(image, _draft_scale(image, min(image.size) // min(wanted)))
    if plain.size != wanted:
        plain = plain.resize(wanted, PillowImage.Resampling.BICUBIC, box=box)
    return _finish(plain, image)


def _opened(data: bytes) -> PillowImage.Image:
    image = PillowImage.open(io.BytesIO(data), formats=FORMATS)
    # The limits were checked on the size that the structure says; Pillow must not have found another one.
    if image.size != image_size(data):
        raise damaged("its parts do not agree how large it is")
    return image


def _draft_scale(image: PillowImage.Image, ratio: float) -> int:
    """Return the factor by which a JPEG may be reduced while it is decoded, 1, 2, 4 or 8: at most `ratio`."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    # Only whole reductions that leave at least the wanted sides; resizing does the rest.
    return next((scale for scale in (8, 4, 2) if ratio >= scale), 1)


def _loaded(image: PillowImage.Image, scale: int) -> tuple[PillowImage.Image, Box]:
    """Decode to L, RGB or CMYK, and return the box of the result that is not padding."""
    width_px, height_px = image.size
    if scale > 1:
        # libjpeg scales in the frequency domain, which costs a fraction of a full decode. Rounded up to whole
        # blocks, the result may end in padding, so the exact box is returned.
        image.draft(None, (width_px // scale, height_px // scale))
    image.load()
    return _plain_mode(image), (0.0, 0.0, width_px / scale, height_px / scale)


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
