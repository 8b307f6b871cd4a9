"""Image files as bytes: format by content, size before decoding, metadata removed without re-encoding.

`strip_metadata` keeps what decoding needs: the pixels, the orientation and the ICC profile. It copies only the parts
that are known to be needed, so unknown metadata is dropped, too. Nothing here decodes pixels.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from records.errors import ImageError

FORMATS = ("jpeg", "png", "webp")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

_ORIENTATION_TAG = 0x0112
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}

_JPEG_SCAN, _JPEG_END, _JPEG_EXIF, _JPEG_ICC = 0xDA, 0xD9, 0xE1, 0xE2
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_KEPT = frozenset(range(0xC0, 0xD0)) | frozenset(range(0xD9, 0xE0))
# Inside a scan, FF 00 is an escaped FF byte, FF D0 to FF D7 are restart markers, and FF FF is padding.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"cICP"}
)

_WEBP_PIXELS = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
_WEBP_KEPT = _WEBP_PIXELS | {b"VP8X", b"ALPH", b"ICCP", b"ANIM"}
_WEBP_HAS_EXIF, _WEBP_HAS_XMP = 0x08, 0x04


def sniff(data: bytes) -> str:
    """Return the format of a file by its content: `jpeg`, `png` or `webp`.

    Anything else raises ImageError (code `empty` or `not_an_image`).
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == _PNG_MAGIC:
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if not data:
        raise ImageError("the image is empty; send a JPEG, PNG or WebP file", "empty")
    raise ImageError("these bytes are not an image that Relook reads; send a JPEG, PNG or WebP file")


def image_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header, as stored, before orientation; both at least 1.

    What follows the header is not read. ImageError (code `damaged`) is raised if the header cannot be read.
    """
    kind = sniff(data)
    try:
        width_px, height_px = {"jpeg": _jpeg_size, "png": _png_size, "webp": _webp_size}[kind](data)
    except (struct.error, IndexError) as error:
        raise _damaged("its header cannot be read") from error
    if width_px < 1 or height_px < 1:
        raise _damaged("its header says that it has no pixels")
    return width_px, height_px


def strip_metadata(data: bytes) -> bytes:
    """Return the file without any metadata except orientation and ICC profile; the pixels are not touched.

    Bytes behind the image's end are dropped. Stripping twice changes nothing. A file that is damaged or truncated
    raises ImageError (code `damaged`).
    """
    image_size(data)
    try:
        return {"jpeg": _strip_jpeg, "png": _strip_png, "webp": _strip_webp}[sniff(data)](data)
    except (struct.error, IndexError) as error:
        raise _damaged("it is cut off") from error


def _damaged(what: str) -> ImageError:
    return ImageError(f"the image is damaged: {what}; send an undamaged file", "damaged")


# ---------------------------------------------------------------- orientation


def _orientation(tiff: bytes) -> int:
    """Return the orientation in an EXIF block, 1 to 8; 1 if it has none or is broken."""
    order = {b"MM": ">", b"II": "<"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION_TAG and kind in _TIFF_INTEGERS:
                (value,) = struct.unpack_from(f"{order}{_TIFF_INTEGERS[kind]}", tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1  # broken metadata is no reason to refuse an image whose pixels are intact
    return 1


def _orientation_tiff(orientation: int) -> bytes:
    """Return a TIFF block whose only entry is the orientation (big-endian)."""
    return b"MM\x00*\x00\x00\x00\x08" + struct.pack(">HHHIHHI", 1, _ORIENTATION_TAG, 3, 1, orientation, 0, 0)


# ---------------------------------------------------------------- JPEG


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, whole segment) up to the end of the image; the data of a scan belongs to its segment."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise _damaged("there is something between its segments")
        # Any number of FF bytes may pad the space before a marker.
        while data[at + 1] == 0xFF:
            at += 1
        marker = data[at + 1]
        if marker == _JPEG_END:
            yield marker, data[at : at + 2]
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        # The length of a scan covers its header only: its data ends at the next marker that is no restart.
        if marker == _JPEG_SCAN:
            found = _JPEG_MARKER.search(data, end)
            end = found.start() if found else len(data) + 1
        if length < 2 or end > len(data):
            raise _damaged("it is cut off")
        yield marker, data[at:end]
        at = end


def _jpeg_size(data: bytes) -> tuple[int, int]:
    for marker, segment in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            height_px, width_px = struct.unpack_from(">HH", segment, 5)
            return width_px, height_px
        if marker == _JPEG_SCAN:
            break
    raise _damaged("it does not say how large it is")


def _strip_jpeg(data: bytes) -> bytes:
    kept: list[bytes] = []
    orientation, has_scan = 1, False
    for marker, segment in _jpeg_segments(data):
        has_scan |= marker == _JPEG_SCAN
        if marker == _JPEG_EXIF and segment[4:10] == b"Exif\x00\x00" and orientation == 1:
            orientation = _orientation(segment[10:])
        elif marker in _JPEG_KEPT or (marker == _JPEG_ICC and segment[4:16] == b"ICC_PROFILE\x00"):
            kept.append(segment)
        # JFIF and Adobe headers define the colour space. They are cut to their fixed part: a thumbnail may follow.
        elif marker == 0xE0 and segment[4:9] == b"JFIF\x00" and len(segment) >= 18:
            kept.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\x00\x00")
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16:
            kept.append(b"\xff\xee\x00\x0e" + segment[4:16])
    if not has_scan:
        raise _damaged("it holds no pixels")
    # Written anew with one entry: the original block may hold position, device and names.
    if orientation != 1:
        body = b"Exif\x00\x00" + _orientation_tiff(orientation)
        kept.insert(0, b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    return b"\xff\xd8" + b"".join(kept)


# ---------------------------------------------------------------- PNG


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, whole chunk) up to the end of the image."""
    name, at = b"", 8
    while name != b"IEND":
        (length,) = struct.unpack_from(">I", data, at)
        name, chunk = data[at + 4 : at + 8], data[at : at + 12 + length]
        at += 12 + length
        if at > len(data):
            raise _damaged("it is cut off")
        yield name, chunk


def _png_size(data: bytes) -> tuple[int, int]:
    name, chunk = next(_png_chunks(data))
    if name != b"IHDR":
        raise _damaged("it does not begin with its header")
    width_px, height_px = struct.unpack_from(">II", chunk, 8)
    return width_px, height_px


def _strip_png(data: bytes) -> bytes:
    chunks = list(_png_chunks(data))
    kept = [chunk for name, chunk in chunks if name in _PNG_KEPT]
    if any(struct.pack(">I", zlib.crc32(chunk[4:-4])) != chunk[-4:] for chunk in kept):
        raise _damaged("a part of it does not have its checksum")
    if not any(name == b"IDAT" for name, _ in chunks):
        raise _damaged("it holds no pixels")
    orientation = next((_orientation(chunk[8:-4]) for name, chunk in chunks if name == b"eXIf"), 1)
    if orientation != 1:
        body = b"eXIf" + _orientation_tiff(orientation)
        kept.insert(1, struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
    return _PNG_MAGIC + b"".join(kept)


# ---------------------------------------------------------------- WebP


def _webp_chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, body) of the chunks between two offsets."""
    while at < end:
        name, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if at + 8 + length > end:
            raise _damaged("it is cut off")
        yield name, data[at + 8 : at + 8 + length]
        at += 8 + length + (length & 1)  # RIFF pads chunks to an even length


def _webp_end(data: bytes) -> int:
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise _damaged("it is cut off")
    return 8 + int(length)


def _webp_size(data: bytes) -> tuple[int, int]:
    name, body = next(_webp_chunks(data, 12, _webp_end(data)), (b"", b""))
    if name == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if name == b"VP8L" and body[:1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if name == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width_px, height_px = struct.unpack_from("<HH", body, 6)
        return width_px & 0x3FFF, height_px & 0x3FFF
    raise _damaged("its header cannot be read")


def _strip_webp(data: bytes) -> bytes:
    chunks = list(_webp_chunks(data, 12, _webp_end(data)))
    if not any(name in _WEBP_PIXELS for name, _ in chunks):
        raise _damaged("it holds no pixels")
    orientation = next((_orientation(body) for name, body in chunks if name == b"EXIF"), 1)
    parts: list[bytes] = []
    for name, body in chunks:
        if name == b"VP8X":
            # The header announces which chunks follow, so it must agree with what is kept.
            flags = body[0] & ~(_WEBP_HAS_EXIF | _WEBP_HAS_XMP) | (_WEBP_HAS_EXIF if orientation != 1 else 0)
            body = bytes([flags]) + body[1:]
        if name == b"ANMF":
            frame = [_webp_chunk(*chunk) for chunk in _webp_chunks(body, 16, len(body)) if chunk[0] in _WEBP_KEPT]
            body = body[:16] + b"".join(frame)
        if name in _WEBP_KEPT:
            parts.append(_webp_chunk(name, body))
    if orientation != 1 and chunks[0][0] == b"VP8X":
        parts.append(_webp_chunk(b"EXIF", _orientation_tiff(orientation)))
    inside = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\x00" * (len(body) & 1)
