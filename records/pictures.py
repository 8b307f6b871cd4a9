"""Picture files as bytes: format by content, size before decoding, metadata removed without re-encoding.

What stays is what decoding needs: the pixels, the orientation and the ICC profile. Nothing here
decodes pixels.
"""

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image as PillowImage

from records.errors import PictureError

FORMATS = ("jpeg", "png", "webp")
_ORIENTATION_TAG = 0x0112
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_DROPPED = frozenset({b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"dSIG"})
_WEBP_DROPPED = frozenset({b"EXIF", b"XMP "})


def sniff(data: bytes) -> str:
    """Return the format of a picture, by its content.

    Args:
        data: the file.
    Returns:
        `jpeg`, `png` or `webp`.
    Raises:
        PictureError: it is none of them.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == _PNG_MAGIC:
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if not data:
        raise PictureError("the picture is empty; send a JPEG, PNG or WebP file", "empty")
    raise PictureError("these bytes are not a picture that Relook reads; send a JPEG, PNG or WebP file")


def picture_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header, without decoding.

    Args:
        data: the file.
    Returns:
        Width and height as stored, before orientation.
    Raises:
        PictureError: the header cannot be read.
    """
    sniff(data)
    try:
        with PillowImage.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.size
    except PillowImage.DecompressionBombError as error:
        raise PictureError("the picture has too many pixels; send a smaller one", "too_many_pixels") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise PictureError("the picture's header cannot be read; send an undamaged file", "damaged") from error


def strip_metadata(data: bytes) -> bytes:
    """Remove all metadata except orientation and the ICC profile; the pixels are not touched.

    Args:
        data: a JPEG, PNG or WebP file.
    Returns:
        The bytes to store. Stripping them again changes nothing.
    Raises:
        PictureError: it is not such a file, or it is damaged.
    """
    kind = sniff(data)
    try:
        orientation = _orientation(data)
        if kind == "jpeg":
            return _strip_jpeg(data, orientation)
        if kind == "png":
            return _strip_png(data, orientation)
        return _strip_webp(data, orientation)
    except (struct.error, IndexError) as error:
        raise PictureError("the picture is cut off; send an undamaged file", "damaged") from error


def _orientation(data: bytes) -> int:
    try:
        with PillowImage.open(io.BytesIO(data), formats=FORMATS) as picture:
            value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except PillowImage.DecompressionBombError as error:
        raise PictureError("the picture has too many pixels; send a smaller one", "too_many_pixels") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise PictureError("the picture's header cannot be read; send an undamaged file", "damaged") from error
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def _orientation_tiff(orientation: int) -> bytes:
    """Return a TIFF block whose only entry is the orientation (big-endian)."""
    return b"MM\x00*\x00\x00\x00\x08" + struct.pack(">HHHIHHI", 1, _ORIENTATION_TAG, 3, 1, orientation, 0, 0)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, whole segment) up to the start of scan, which is yielded with all that follows."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise PictureError("the picture is damaged between its segments; send an undamaged file", "damaged")
        while data[at + 1] == 0xFF:
            at += 1
        marker = data[at + 1]
        if marker == 0xDA:
            end = data.rfind(b"\xff\xd9")
            yield marker, data[at : end + 2] if end > at else data[at:]
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at : at + 2 + length]
        at += 2 + length


def _strip_jpeg(data: bytes, orientation: int) -> bytes:
    kept = [b"\xff\xd8"]
    if orientation != 1:
        body = b"Exif\x00\x00" + _orientation_tiff(orientation)
        kept.append(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    for marker, segment in _jpeg_segments(data):
        is_application = 0xE0 <= marker <= 0xEF
        is_profile = marker == 0xE2 and segment[4:16] == b"ICC_PROFILE\x00"
        # APP0 says how to read the colours, APP14 (Adobe) which colour transform CMYK uses.
        if marker == 0xFE or (is_application and marker not in (0xE0, 0xEE) and not is_profile):
            continue
        kept.append(segment)
    return b"".join(kept)


def _strip_png(data: bytes, orientation: int) -> bytes:
    kept, at = [_PNG_MAGIC], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, chunk = data[at + 4 : at + 8], data[at : at + 12 + length]
        if len(chunk) < 12 + length:
            raise PictureError("the picture is cut off; send an undamaged file", "damaged")
        at += 12 + length
        if name not in _PNG_DROPPED:
            kept.append(chunk)
        if name == b"IHDR" and orientation != 1:
            kept.append(_png_chunk(b"eXIf", _orientation_tiff(orientation)))
        if name == b"IEND":
            break
    return b"".join(kept)


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _strip_webp(data: bytes, orientation: int) -> bytes:
    chunks, at = [], 12
    while at + 8 <= len(data):
        name, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        end = at + 8 + length + (length & 1)
        if at + 8 + length > len(data):
            raise PictureError("the picture is cut off; send an undamaged file", "damaged")
        if name not in _WEBP_DROPPED:
            chunks.append(data[at:end])
        at = end
    extended = bool(chunks) and chunks[0][:4] == b"VP8X"
    if extended:
        # Bits of VP8X: 0x08 announces EXIF, 0x04 announces XMP.
        flags = (chunks[0][8] & ~0x0C) | (0x08 if orientation != 1 else 0)
        chunks[0] = chunks[0][:8] + bytes([flags]) + chunks[0][9:]
        if orientation != 1:
            tiff = _orientation_tiff(orientation)
            chunks.append(b"EXIF" + struct.pack("<I", len(tiff)) + tiff)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
