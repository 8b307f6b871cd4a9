"""Image files as bytes: format by content, size before decoding, metadata removed without re-encoding.

`strip_metadata` keeps what decoding needs: the pixels, the orientation and the ICC profile. It copies only the parts
that are known to be needed, so unknown metadata is dropped, too, and it refuses a file that contradicts itself: one
that announces its size twice, or holds a part that is larger than its header says. Nothing here decodes pixels. Each
function reads a file once, and stops at a fixed number of parts.
"""

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator, Sequence

from records.errors import ImageError

FORMATS = ("jpeg", "png", "webp")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# The parts are walked in Python, a microsecond each, beside all other requests of a process. Files of scanners hold
# some hundred JPEG segments, and a PNG of 89 megapixels with 16 bits about 30,000 chunks of 8 kB.
MAX_SEGMENTS = 4_096
MAX_CHUNKS = 65_536
_MAX_FRAME_CHUNKS = 16
_MAX_TEXT_BYTES = 2**20

_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\x00"
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}

JPEG_SCAN, JPEG_ICC, ICC_HEAD = 0xDA, 0xE2, b"ICC_PROFILE\x00"
_JPEG_END, JPEG_APP1 = 0xD9, 0xE1
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_KEPT = frozenset(range(0xC0, 0xD0)) | frozenset(range(0xD9, 0xE0))
# Inside a scan, FF 00 is an escaped FF byte, FF D0 to FF D7 are restart markers, and FF FF is padding.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Any number of FF bytes may pad the space before a marker.
_JPEG_NEXT = re.compile(rb"\xff+([^\xff])")

_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"cICP"}
)

_WEBP_STILL = frozenset({b"VP8 ", b"VP8L"})
_WEBP_PIXELS = _WEBP_STILL | {b"ANMF"}
_WEBP_KEPT = _WEBP_PIXELS | {b"VP8X", b"ALPH", b"ICCP", b"ANIM"}
_WEBP_HAS_EXIF, _WEBP_HAS_XMP = 0x08, 0x04


_OTHER_FORMATS = (
    (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF"), (b"II+\x00", "TIFF"), (b"MM\x00+", "TIFF"), (b"BM", "BMP"),
    (b"GIF8", "GIF"), (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"), (b"\xff\x0a", "JPEG XL"), (b"8BPS", "Photoshop"),
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def format_name(head: bytes) -> str | None:
    """Return the format of a file by its first 132 bytes: one of FORMATS, the name of another format, or None."""
    with contextlib.suppress(ImageError):
        return sniff(head)
    return _other_format(head)


def _other_format(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:12] in (b"avif", b"avis") else "HEIC" if head[8:12] in _HEIF_BRANDS else None
    # Two letters are no proof: what follows them in a BMP is its length, zeros, and the length of its header.
    if head[:2] == b"BM" and head[6:10] != bytes(4):
        return None
    if is_dicom(head):
        return "DICOM"
    return next((name for magic, name in _OTHER_FORMATS if head.startswith(magic)), None)


def is_dicom(data: bytes) -> bool:
    """Return whether bytes begin as a DICOM file: 128 bytes of any content, then `DICM`."""
    return data[128:132] == b"DICM"


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
    other = _other_format(data)
    if other is not None:
        raise ImageError(f"Relook does not read {other} files; send a JPEG, PNG or WebP file")
    raise ImageError("these bytes are not an image that Relook reads; send a JPEG, PNG or WebP file")


def image_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header, as stored, before orientation; both at least 1.

    What follows the header is not read. ImageError (code `damaged`) is raised if the header cannot be read.
    """
    kind = sniff(data)
    try:
        width_px, height_px = {"jpeg": _jpeg_size, "png": _png_size, "webp": _webp_size}[kind](data)
    except (struct.error, IndexError) as error:
        raise damaged("its header cannot be read") from error
    if width_px < 1 or height_px < 1:
        raise damaged("its header says that it has no pixels")
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
        raise damaged("it is cut off") from error


def damaged(what: str) -> ImageError:
    """Return the error of a file that is not whole."""
    return ImageError(f"the image is damaged: {what}; send an undamaged file", "damaged")


def too_costly(what: str) -> ImageError:
    """Return the error of a file that needs more work than is allowed."""
    return ImageError(
        f"the image is too costly to decode: {what}; save it anew as a plain JPEG or PNG and send that", "too_costly"
    )


# ---------------------------------------------------------------- orientation


def _orientation(tiff: bytes) -> int | None:
    """Return the orientation in an EXIF block, 1 to 8; None if it has none or is broken."""
    order = {b"MM": ">", b"II": "<"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION_TAG and kind in _TIFF_INTEGERS:
                (value,) = struct.unpack_from(f"{order}{_TIFF_INTEGERS[kind]}", tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return None  # broken metadata is no reason to refuse an image whose pixels are intact
    return None


def _xmp_orientation(xmp: bytes) -> int | None:
    """Return the orientation in an XMP document; programs that edit metadata write it there only."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found and 1 <= int(found[1]) <= 8 else None


def _orientation_tiff(orientation: int) -> bytes:
    """Return a TIFF block whose only entry is the orientation (big-endian)."""
    return b"MM\x00*\x00\x00\x00\x08" + struct.pack(">HHHIHHI", 1, _ORIENTATION_TAG, 3, 1, orientation, 0, 0)


# ---------------------------------------------------------------- JPEG


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, whole segment) up to the end of the image; the data of a scan belongs to its segment."""
    at, has_frame = 2, False
    for _ in range(MAX_SEGMENTS):
        next_marker = _JPEG_NEXT.match(data, at)
        if next_marker is None:
            raise damaged("there is something between its segments" if at < len(data) else "it is cut off")
        at, marker = next_marker.end() - 2, next_marker[1][0]
        if marker == _JPEG_END:
            yield marker, data[at : at + 2]
            return
        # Programs disagree about which of two frame headers counts, so a limit on one says nothing about the other.
        if marker in JPEG_FRAMES and has_frame:
            raise damaged("it says twice how large it is")
        has_frame |= marker in JPEG_FRAMES
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        # The length of a scan covers its header only: its data ends at the next marker that is no restart.
        if marker == JPEG_SCAN:
            found = _JPEG_MARKER.search(data, end)
            end = found.start() if found else len(data) + 1
        if length < 2 or end > len(data):
            raise damaged("it is cut off")
        yield marker, data[at:end]
        at = end
    raise too_costly(f"it has more than {MAX_SEGMENTS} segments")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    for marker, segment in jpeg_segments(data):
        if marker in JPEG_FRAMES:
            height_px, width_px = struct.unpack_from(">HH", segment, 5)
            return width_px, height_px
        if marker == JPEG_SCAN:
            break
    raise damaged("it does not say how large it is")


def _strip_jpeg(data: bytes) -> bytes:
    kept: list[bytes] = []
    exif, xmp, has_scan = None, None, False
    for marker, segment in jpeg_segments(data):
        has_scan |= marker == JPEG_SCAN
        if marker == JPEG_APP1 and segment[4:10] == b"Exif\x00\x00" and exif in (None, 1):
            exif = _orientation(segment[10:]) or exif
        elif marker == JPEG_APP1 and segment[4:].startswith(_XMP_HEAD):
            xmp = _xmp_orientation(segment)
        elif marker in _JPEG_KEPT or (marker == JPEG_ICC and segment[4:16] == ICC_HEAD):
            kept.append(segment)
        # JFIF and Adobe headers define the colour space. They are cut to their fixed part: a thumbnail may follow.
        elif marker == 0xE0 and segment[4:9] == b"JFIF\x00" and len(segment) >= 18:
            kept.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\x00\x00")
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16:
            kept.append(b"\xff\xee\x00\x0e" + segment[4:16])
    if not has_scan:
        raise damaged("it holds no pixels")
    # Written anew with one entry: the original block may hold position, device and names.
    orientation = exif or xmp or 1
    if orientation != 1:
        body = b"Exif\x00\x00" + _orientation_tiff(orientation)
        kept.insert(0, b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    return b"\xff\xd8" + b"".join(kept)


# ---------------------------------------------------------------- PNG


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, whole chunk) up to the end of the image."""
    at = 8
    for _ in range(MAX_CHUNKS):
        (length,) = struct.unpack_from(">I", data, at)
        name, chunk = data[at + 4 : at + 8], data[at : at + 12 + length]
        at += 12 + length
        if at > len(data):
            raise damaged("it is cut off")
        yield name, chunk
        if name == b"IEND":
            return
    raise too_costly(f"it has more than {MAX_CHUNKS} chunks")


def _png_size(data: bytes) -> tuple[int, int]:
    name, chunk = next(png_chunks(data))
    if name != b"IHDR":
        raise damaged("it does not begin with its header")
    width_px, height_px = struct.unpack_from(">II", chunk, 8)
    return width_px, height_px


def _strip_png(data: bytes) -> bytes:
    chunks = list(png_chunks(data))
    kept = [chunk for name, chunk in chunks if name in _PNG_KEPT]
    if any(struct.pack(">I", zlib.crc32(chunk[4:-4])) != chunk[-4:] for chunk in kept):
        raise damaged("a part of it does not have its checksum")
    if not any(name == b"IDAT" for name, _ in chunks):
        raise damaged("it holds no pixels")
    single = [name for name, _ in chunks if name in _PNG_KEPT and name != b"IDAT"]
    # Of two headers or profiles programs take the first or the last, so a limit on one says nothing about the other.
    if len(single) != len(set(single)) or chunks[0][0] != b"IHDR":
        raise damaged("it holds a part twice of which there can be only one")
    orientation = _png_orientation(chunks)
    if orientation != 1:
        body = b"eXIf" + _orientation_tiff(orientation)
        kept.insert(1, struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
    return _PNG_MAGIC + b"".join(kept)


def _png_orientation(chunks: Sequence[tuple[bytes, bytes]]) -> int:
    """Return the orientation of a PNG: of its EXIF chunk, else of EXIF as text, else of XMP; 1 if it has none."""
    exif = [_orientation(chunk[8:-4]) for name, chunk in chunks if name == b"eXIf"]
    texts = dict(_png_text(name, chunk[8:-4]) for name, chunk in chunks if name in _PNG_TEXTS)
    if not exif and b"Raw profile type exif" in texts:
        # A title, a type and a length, one a line, before the hexadecimal digits.
        digits = b"".join(texts[b"Raw profile type exif"].split(b"\n")[3:])
        with contextlib.suppress(ValueError):
            exif = [_orientation(bytes.fromhex(digits.decode("latin-1")).removeprefix(b"Exif\x00\x00"))]
    return next(filter(None, exif), None) or _xmp_orientation(texts.get(b"XML:com.adobe.xmp", b"")) or 1


def _png_text(name: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return keyword and text of a text chunk; the text is empty if the chunk is broken or of no interest."""
    keyword, _, text = body.partition(b"\x00")
    # A kilobyte may inflate to a megabyte, so only the texts that are looked at are inflated, and no further than that.
    if keyword not in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
        return keyword, b""
    is_compressed = name == b"zTXt"
    if name == b"iTXt":
        is_compressed, (_, _, text) = text[:1] == b"\x01", text[2:].partition(b"\x00")
        text = text.partition(b"\x00")[2]
    elif is_compressed:
        text = text[1:]
    try:
        return keyword, zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES) if is_compressed else text
    except zlib.error:
        return keyword, b""


# ---------------------------------------------------------------- WebP


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, body) of the chunks of a file."""
    return _riff_chunks(data, 12, _webp_end(data), MAX_SEGMENTS)


def _frame_chunks(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    return _riff_chunks(body, 16, len(body), _MAX_FRAME_CHUNKS)


def _riff_chunks(data: bytes, at: int, end: int, most: int) -> Iterator[tuple[bytes, bytes]]:
    for _ in range(most):
        if at >= end:
            return
        name, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if at + 8 + length > end:
            raise damaged("it is cut off")
        yield name, data[at + 8 : at + 8 + length]
        at += 8 + length + (length & 1)  # RIFF pads chunks to an even length
    if at < end:
        raise too_costly(f"it has more than {most} chunks")


def _webp_end(data: bytes) -> int:
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise damaged("it is cut off")
    return 8 + int(length)


def _webp_size(data: bytes) -> tuple[int, int]:
    name, body = next(webp_chunks(data), (b"", b""))
    if name == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    return _webp_frame_size(name, body)


def _webp_frame_size(name: bytes, body: bytes) -> tuple[int, int]:
    if name == b"VP8L" and body[:1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if name == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width_px, height_px = struct.unpack_from("<HH", body, 6)
        return width_px & 0x3FFF, height_px & 0x3FFF
    raise damaged("its header cannot be read")


def _require_webp_sizes(data: bytes, chunks: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise ImageError if the file has no pixels, two still images, or pixels outside the size that it announces."""
    width_px, height_px = _webp_size(data)
    stills = [chunk for chunk in chunks if chunk[0] in _WEBP_STILL]
    frames = [body for name, body in chunks if name == b"ANMF"]
    if not stills and not frames:
        raise damaged("it holds no pixels")
    if len(stills) + bool(frames) > 1 or sum(name == b"VP8X" for name, _ in chunks) > 1:
        raise damaged("it holds a part twice of which there can be only one")
    parts = [(0, 0, still, (width_px, height_px)) for still in stills]
    for body in frames:
        x, y, *sides = (int.from_bytes(body[at : at + 3], "little") for at in range(0, 12, 3))
        inner = [chunk for chunk in _frame_chunks(body) if chunk[0] in _WEBP_STILL]
        if len(inner) != 1:
            raise damaged("a frame of it holds no pixels, or two images")
        parts.append((2 * x, 2 * y, inner[0], (1 + sides[0], 1 + sides[1])))
    for left, top, chunk, said in parts:
        inside = left + said[0] <= width_px and top + said[1] <= height_px
        if not inside or _webp_frame_size(*chunk) != said:
            raise damaged("it holds more pixels than its header says")


def _strip_webp(data: bytes) -> bytes:
    chunks = list(webp_chunks(data))
    _require_webp_sizes(data, chunks)
    exif = next((_orientation(body.removeprefix(b"Exif\x00\x00")) for name, body in chunks if name == b"EXIF"), None)
    orientation = exif or next((_xmp_orientation(body) for name, body in chunks if name == b"XMP "), None) or 1
    parts: list[bytes] = []
    for name, body in chunks:
        if name == b"VP8X":
            # The header announces which chunks follow, so it must agree with what is kept.
            flags = body[0] & ~(_WEBP_HAS_EXIF | _WEBP_HAS_XMP) | (_WEBP_HAS_EXIF if orientation != 1 else 0)
            body = bytes([flags]) + body[1:]
        if name == b"ANMF":
            frame = [_webp_chunk(*chunk) for chunk in _frame_chunks(body) if chunk[0] in _WEBP_KEPT]
            body = body[:16] + b"".join(frame)
        if name in _WEBP_KEPT:
            parts.append(_webp_chunk(name, body))
    if orientation != 1 and chunks[0][0] == b"VP8X":
        parts.append(_webp_chunk(b"EXIF", _orientation_tiff(orientation)))
    inside = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\x00" * (len(body) & 1)
