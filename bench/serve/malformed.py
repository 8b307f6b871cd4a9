"""Malformed uploads drawn from a seed: the same seed and number give the same upload.

In: a seed and a number. Out: a request for one of the routes that take images. Most are real images of every format
that is read, damaged in one to three places; some checksums are corrected afterwards, so that the damage reaches the
decoders. A few stay intact, since a damaged request must not affect the next.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image as PillowImage

ROUTES = (
    "/v1/predictions",
    "/v1/predictions?explain=gradcam",
    "/v1/predictions/batch",
    "/v1/explanations",
)
CONTENT_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream", "text/plain", "", "image/*")
CONTEXTS = (
    "{}", "{", "[]", "null", '{"age": 1e999}', '{"age": NaN}', '{"consent": "none"}', '{"sex": "\\ud800"}',
    '{"patient_id": "' + "x" * 300 + '"}', "[" * 2000, '{"acquired_at": "2026-13-40T99:00:00Z"}', "\x00",
)  # fmt: skip
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Upload:
    """A request to send.

    Args:
        path: with its query.
        content_type: header; empty sends none.
        body: the bytes.
    """

    path: str
    content_type: str
    body: bytes


def malformed_upload(seed: int, number: int) -> Upload:
    """Draw an upload.

    Args:
        seed: of the series.
        number: in the series.
    Returns:
        The request; nine of ten are damaged.
    """
    draw = np.random.default_rng((seed, number))
    kinds = images()
    data = kinds[sorted(kinds)[draw.integers(len(kinds))]]
    if draw.random() < 0.9:
        for _ in range(draw.integers(1, 4)):
            data = DAMAGES[draw.integers(len(DAMAGES))](data, draw)
    path = ROUTES[draw.integers(len(ROUTES))]
    if path.endswith("/batch") or draw.random() < 0.25:
        return _form(path, data, draw)
    content_type = CONTENT_TYPES[draw.integers(len(CONTENT_TYPES))] if draw.random() < 0.3 else "image/jpeg"
    return Upload(path, content_type, data)


@lru_cache(maxsize=1)
def images() -> dict[str, bytes]:
    """Return one intact image of every format that is read, by name."""
    pixels = np.random.default_rng(5).integers(0, 256, (72, 96, 4), dtype=np.uint8)
    rgba = PillowImage.fromarray(pixels).resize((96, 72), PillowImage.Resampling.BICUBIC)
    rgb = rgba.convert("RGB")
    mirrored = rgb.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    deep = PillowImage.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return {
        "jpeg": _saved(rgb, "JPEG"),
        "jpeg_progressive": _saved(rgb, "JPEG", progressive=True, exif=exif),
        "jpeg_cmyk": _saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg_grey": _saved(rgb.convert("L"), "JPEG"),
        "png": _saved(rgb, "PNG"),
        "png_alpha": _saved(rgba, "PNG", exif=exif),
        "png_deep": _saved(deep, "PNG"),
        "png_palette": _saved(rgb.convert("P"), "PNG", transparency=3),
        "png_bits": _saved(rgb.convert("1"), "PNG"),
        "png_animated": _saved(rgb, "PNG", save_all=True, append_images=[mirrored]),
        "webp": _saved(rgb, "WEBP"),
        "webp_lossless": _saved(rgba, "WEBP", lossless=True, exif=exif),
        "webp_animated": _saved(rgb, "WEBP", save_all=True, append_images=[mirrored]),
    }


def png_of(width: int, height: int, compressed: bytes, *, colour: int = 2) -> bytes:
    """Write a PNG by hand, so that header and content need not agree.

    Args:
        width: that the header claims, pixels.
        height: that the header claims, pixels.
        compressed: what stands where zlib data should.
        colour: PNG colour type; 0 grey, 2 RGB.
    Returns:
        The file; all checksums are right.
    """
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return PNG_MAGIC + b"".join(_chunk(n, d) for n, d in ((b"IHDR", header), (b"IDAT", compressed), (b"IEND", b"")))


def _saved(image: PillowImage.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# ---------------------------------------------------------------- damage

Damage = Callable[[bytes, np.random.Generator], bytes]


def _cut(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: draw.integers(len(data) + 1)]


def _flip(data: bytes, draw: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in draw.integers(0, max(1, len(data)), draw.integers(1, 16)):
        changed[at : at + 1] = bytes([draw.integers(256)])
    return bytes(changed)


def _flip_header(data: bytes, draw: np.random.Generator) -> bytes:
    return _flip(data[:64], draw) + data[64:]


def _extreme(data: bytes, draw: np.random.Generator) -> bytes:
    """Overwrite four bytes with a length that is far too large, or with zero."""
    at = draw.integers(0, max(1, min(len(data), 400)))
    value = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x00\x00\xff\xff")[draw.integers(4)]
    return data[:at] + value + data[at + 4 :]


def _repeat(data: bytes, draw: np.random.Generator) -> bytes:
    start, end = sorted(draw.integers(0, len(data) + 1, 2))
    return data[:end] + data[start:end] + data[end:]


def _remove(data: bytes, draw: np.random.Generator) -> bytes:
    start, end = sorted(draw.integers(0, len(data) + 1, 2))
    return data[:start] + data[min(end, start + 64) :]


def _splice(data: bytes, draw: np.random.Generator) -> bytes:
    others = list(images().values())
    other = others[draw.integers(len(others))]
    return data[: draw.integers(len(data) + 1)] + other[draw.integers(len(other)) :]


def _mend_checksums(data: bytes, draw: np.random.Generator) -> bytes:
    """Change one more byte of a PNG and correct the checksums of its chunks."""
    changed = _flip(data[8:], draw)
    at, parts = 0, [PNG_MAGIC]
    while data[:8] == PNG_MAGIC and at + 8 <= len(changed):
        (length,) = struct.unpack_from(">I", changed, at)
        parts.append(_chunk(changed[at + 4 : at + 8], changed[at + 8 : at + 8 + min(length, 1 << 20)]))
        at += 12 + length
    return b"".join(parts) if len(parts) > 1 else data


def _bomb(data: bytes, draw: np.random.Generator) -> bytes:
    """Return a small file that decompresses to more rows than its header says, or to the largest allowed image."""
    side = int(draw.choice([1, 64, 6000, 50_000]))
    return png_of(side, side, zlib.compress(bytes(4_000_000)))


def _nothing(data: bytes, draw: np.random.Generator) -> bytes:
    return data[:0] if draw.random() < 0.5 else draw.bytes(int(draw.integers(1, 2000)))


DAMAGES: tuple[Damage, ...] = (
    _cut, _flip, _flip, _flip_header, _extreme, _extreme, _repeat, _remove, _splice, _mend_checksums,
    _mend_checksums, _bomb, _nothing,
)  # fmt: skip


# ---------------------------------------------------------------- forms


def _form(path: str, data: bytes, draw: np.random.Generator) -> Upload:
    context = CONTEXTS[draw.integers(len(CONTEXTS))]
    if path.endswith("/batch") and draw.random() < 0.5:
        context = json.dumps([{}])
    name = ("image", "image", "image", "photo", "")[draw.integers(5)]
    boundary = b"b0undary"
    body = (
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="' + name.encode() + b'"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + data + b"\r\n--" + boundary + b"\r\n"
        b'Content-Disposition: form-data; name="context"\r\nContent-Type: application/json\r\n\r\n'
        + context.encode("utf-8", "surrogatepass") + b"\r\n--" + boundary + b"--\r\n"
    )  # fmt: skip
    if draw.random() < 0.3:
        body = (_cut, _flip_header, _repeat, _remove)[draw.integers(4)](body, draw)
    shown = ("b0undary", "b0undary", "b0undary", "another", "")[draw.integers(5)]
    return Upload(path, f"multipart/form-data; boundary={shown}", body)
