"""Image files that cost more than they look, built by hand, and plain files of every kind."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageCms

from records.arrays import UInt8Array
from records.images import JPEG_FRAMES, JPEG_SCAN, jpeg_segments

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def encoded(image: PillowImage.Image, kind: str, **options: object) -> bytes:
    """Encode an image with Pillow."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pattern(width_px: int = 96, height_px: int = 64) -> UInt8Array:
    """Smooth colours with a bright corner: [H, W, 3]."""
    x, y = np.meshgrid(np.linspace(0, 255, width_px), np.linspace(0, 255, height_px))
    image = np.stack([x, y, 255 - x], axis=2).astype(np.uint8)
    image[: height_px // 4, : width_px // 4] = (250, 250, 20)
    return image


def segment(marker: int, body: bytes = b"") -> bytes:
    """Return a JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def riff_chunk(name: bytes, body: bytes) -> bytes:
    """Return a WebP chunk."""
    return name + struct.pack("<I", len(body)) + body + b"\x00" * (len(body) & 1)


def webp(*chunks: bytes) -> bytes:
    """Return a WebP file."""
    inside = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def webp_canvas(width_px: int, height_px: int, flags: int = 0) -> bytes:
    """Return the header of an extended WebP file."""
    sides = (width_px - 1).to_bytes(3, "little") + (height_px - 1).to_bytes(3, "little")
    return riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def webp_still(width_px: int, height_px: int) -> bytes:
    """Return the chunk with the pixels of a WebP file."""
    return encoded(PillowImage.new("RGB", (width_px, height_px), (9, 99, 199)), "WEBP", lossless=True)[12:]


def webp_frame(left: int, top: int, width_px: int, height_px: int, still: bytes) -> bytes:
    """Return a frame of an animated WebP file that says where it lies and how large it is."""
    numbers = (left // 2, top // 2, width_px - 1, height_px - 1, 100)
    return riff_chunk(b"ANMF", b"".join(n.to_bytes(3, "little") for n in numbers) + b"\x00" + still)


def png(width_px: int, height_px: int, rows: bytes, *before: bytes, colour: int = 2) -> bytes:
    """Return a PNG with the given uncompressed rows, and chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 8, colour, 0, 0, 0))
    return PNG_HEAD + header + b"".join(before) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def png_of(image: UInt8Array, *before: bytes) -> bytes:
    """Return a PNG of [H, W, 3] pixels, with chunks before them."""
    height_px, width_px, _ = image.shape
    return png(width_px, height_px, b"".join(b"\x00" + row.tobytes() for row in image), *before)


def zeros(mebibytes: int) -> bytes:
    """Return a zlib stream that inflates to this many MiB of zeros."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(mebibytes)) + packer.flush()


def progressive(width_px: int, height_px: int, extra_scans: int) -> bytes:
    """Return a JPEG whose last scan is repeated: a few bytes each, and a pass over all pixels."""
    plain = encoded(PillowImage.new("RGB", (width_px, height_px), (90, 120, 50)), "JPEG", progressive=True)
    parts = list(jpeg_segments(plain))
    scan = max(n for n, (marker, _) in enumerate(parts) if marker == JPEG_SCAN)
    tables = max(n for n, (marker, _) in enumerate(parts[:scan]) if marker == JPEG_SCAN) + 1
    repeated = b"".join(part for _, part in parts[tables : scan + 1])
    head = b"".join(part for _, part in parts[: scan + 1])
    return b"\xff\xd8" + head + repeated * extra_scans + b"\xff\xd9"


def with_parts(jpeg: bytes, *parts: bytes) -> bytes:
    """Put segments at the beginning of a JPEG."""
    return jpeg[:2] + b"".join(parts) + jpeg[2:]


def with_size(jpeg: bytes, width_px: int, height_px: int) -> bytes:
    """Say another size in the header of a JPEG."""
    found = next(part for marker, part in jpeg_segments(jpeg) if marker in JPEG_FRAMES)
    return jpeg.replace(found, found[:5] + struct.pack(">HH", height_px, width_px) + found[9:], 1)


def srgb_profile(padding: int = 0) -> bytes:
    """Return an sRGB profile, with bytes behind it that nothing refers to."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(padding)
    return struct.pack(">I", len(profile)) + profile[4:]


def _turned(orientation: int) -> PillowImage.Exif:
    block = PillowImage.Exif()
    block[0x0112] = orientation
    return block


def _see_through() -> PillowImage.Image:
    # The hidden colour differs from white, on which it has to be blended.
    image = PillowImage.fromarray(pattern()).convert("RGBA")
    alpha = np.full(pattern().shape[:2], 255, dtype=np.uint8)
    alpha[:, 48:] = 60
    image.putalpha(PillowImage.fromarray(alpha))
    return image


def _deep() -> PillowImage.Image:
    return PillowImage.fromarray((pattern()[..., 0].astype(np.uint16) << 8) + 17)


PLAIN: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(PillowImage.fromarray(pattern()), "JPEG", quality=95),
    "progressive": lambda: encoded(PillowImage.fromarray(pattern()), "JPEG", quality=95, progressive=True),
    "png": lambda: encoded(PillowImage.fromarray(pattern()), "PNG"),
    "webp": lambda: encoded(PillowImage.fromarray(pattern()), "WEBP", lossless=True),
    "grey": lambda: encoded(PillowImage.fromarray(pattern()).convert("L"), "JPEG", quality=95),
    "16 bits": lambda: encoded(_deep(), "PNG"),
    "LA": lambda: encoded(_see_through().convert("LA"), "PNG"),
    "RGBA": lambda: encoded(_see_through(), "PNG"),
    "RGBA in WebP": lambda: encoded(_see_through(), "WEBP", lossless=True, exact=True),
    "palette with a transparent colour": lambda: encoded(
        PillowImage.fromarray(pattern()).quantize(16), "PNG", transparency=3
    ),
    "CMYK": lambda: encoded(PillowImage.fromarray(pattern()).convert("CMYK"), "JPEG", quality=95),
    "turned by EXIF": lambda: encoded(PillowImage.fromarray(pattern()), "JPEG", quality=95, exif=_turned(6)),
    "turned PNG": lambda: encoded(PillowImage.fromarray(pattern()), "PNG", exif=_turned(8)),
    "with a profile": lambda: encoded(PillowImage.fromarray(pattern()), "JPEG", quality=95, icc_profile=srgb_profile()),
}
"""Files of every kind that is accepted."""
