"""The work that decoding an image will cause, read from the structure of its file before any pixel is made.

In: a file as `records.images.strip_metadata` returns it. Out: its `Work`, or an ImageError if a limit is exceeded.
Nothing is taken from a header alone: a JPEG costs its size once for every scan that is really there, and a header that
announces more pixels than its bytes can hold is refused.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from images.settings import ImagesSettings
from records.errors import ImageError
from records.images import (
    ICC_HEAD,
    JPEG_FRAMES,
    JPEG_ICC,
    JPEG_SCAN,
    damaged,
    image_size,
    jpeg_segments,
    png_chunks,
    sniff,
    too_costly,
    webp_chunks,
)

_SEQUENTIAL = (0xC0, 0xC1)
_MAX_DEFLATE_RATIO = 1032
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# (first column, first row, columns, rows) of the passes of an interlaced PNG
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PLAIN_PROFILE_BYTES = 2**16


@dataclass(frozen=True)
class Work:
    """What an image costs.

    Args:
        width_px: of the decoded image, before orientation.
        height_px: the same.
        samples: values that decoding computes, over all scans.
        scans: of a JPEG; 1 for others.
        memory_bytes: what decoding it holds at once, roughly.
        is_plain: whether it uses only what common encoders write, whose cost `samples` measures well.
        profile: the ICC profile; empty if there is none.
    """

    width_px: int
    height_px: int
    samples: int
    scans: int
    memory_bytes: int
    is_plain: bool
    profile: bytes = field(repr=False)

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width_px * self.height_px


def measure(stripped: bytes, limits: ImagesSettings) -> Work:
    """Return the work that an image causes.

    Args:
        stripped: a file without metadata.
        limits: what is allowed.
    Returns:
        The work, within the limits.
    Raises:
        ImageError: code `too_many_pixels` or `too_costly` above a limit; `damaged` if the parts do not fit together.
    """
    max_profile_bytes = limits.max_profile_kb * 1000
    try:
        width_px, height_px = image_size(stripped)
        # First: the others multiply it.
        require_pixels(width_px, height_px, limits)
        work = {"jpeg": _jpeg, "png": _png, "webp": _webp}[sniff(stripped)](
            stripped, width_px, height_px, max_profile_bytes
        )
    except (struct.error, IndexError, KeyError) as error:
        raise damaged("its parts do not fit together") from error
    if work.scans > limits.max_scans:
        raise too_costly(f"it has {work.scans} scans and {limits.max_scans} are allowed")
    if work.samples > limits.max_megasamples * 1e6:
        raise too_costly(
            f"it takes {work.samples / 1e6:.0f} million values and {limits.max_megasamples:g} million are allowed"
        )
    if work.memory_bytes > limits.decoder_memory_mb * 2**20:
        raise too_costly(
            f"it needs {work.memory_bytes / 2**20:.0f} MB of memory and {limits.decoder_memory_mb} are allowed"
        )
    if len(work.profile) > max_profile_bytes:
        raise too_costly(f"its colour profile is larger than the {limits.max_profile_kb} kB that are allowed")
    return work


def require_pixels(width_px: int, height_px: int, limits: ImagesSettings) -> None:
    """Raise ImageError (code `too_many_pixels`) for an image that is larger than any part of Relook decodes."""
    if width_px * height_px > limits.max_megapixels * 1e6:
        raise ImageError(
            f"the image has {width_px} x {height_px} pixels and {limits.max_megapixels:g} million are allowed; "
            "send a smaller one",
            "too_many_pixels",
        )


def is_cheap(work: Work, limits: ImagesSettings) -> bool:
    """Return whether an image may be decoded beside other work, in the process that needs it."""
    return work.is_plain and work.samples < limits.inline_megasamples * 1e6 and _is_plain_profile(work.profile)


def _jpeg(data: bytes, width_px: int, height_px: int, max_profile_bytes: int) -> Work:
    frame = precision = samples = scans = 0
    sizes: dict[int, int] = {}
    profile: list[bytes] = []
    for marker, segment in jpeg_segments(data):
        if marker in JPEG_FRAMES:
            frame, precision = marker, segment[4]
            sizes = _component_sizes(segment, width_px, height_px)
            samples += width_px * height_px * len(sizes)
        elif marker == JPEG_SCAN:
            scans += 1
            scanned = sum(sizes[segment[5 + 2 * n]] for n in range(segment[4]))
            samples += scanned
            # The shortest codes of a block of 64 values are two, of a bit each.
            if frame in _SEQUENTIAL and len(segment) * 8 < 2 * scanned // 64:
                raise damaged("it holds fewer pixels than its header says")
        elif marker == JPEG_ICC and sum(map(len, profile)) <= max_profile_bytes:
            profile.append(segment[4 + len(ICC_HEAD) :])
    return Work(
        width_px,
        height_px,
        samples,
        scans,
        # With several scans the coefficients of the whole image are held, of two bytes each.
        memory_bytes=8 * width_px * height_px + (2 * sum(sizes.values()) if scans > 1 or frame == 0xC2 else 0),
        is_plain=precision == 8 and frame in (*_SEQUENTIAL, 0xC2),
        # The first byte of each part is its number; the second says how many there are.
        profile=b"".join(part[2:] for part in sorted(profile)),
    )


def _component_sizes(segment: bytes, width_px: int, height_px: int) -> dict[int, int]:
    """Return the values that a pass over each component computes, by its id; whole blocks of 8 x 8."""
    components = [segment[at : at + 2] for at in range(10, 10 + 3 * segment[9], 3)]
    factors = [(code[0], code[1] >> 4, code[1] & 15) for code in components]
    if not factors or not all(1 <= across <= 4 and 1 <= down <= 4 for _, across, down in factors):
        raise damaged("its header cannot be read")
    most_across, most_down = max(f[1] for f in factors), max(f[2] for f in factors)
    sizes: dict[int, int] = {}
    for key, across, down in factors:
        columns, rows = -(-width_px * across // (8 * most_across)), -(-height_px * down // (8 * most_down))
        # Some cameras give several components one id: a scan of that id then counts for all of them.
        sizes[key] = sizes.get(key, 0) + 64 * columns * rows
    return sizes


def _png(data: bytes, width_px: int, height_px: int, max_profile_bytes: int) -> Work:
    packed_bytes, profile = 0, b""
    depth = channels = interlaced = 0
    for name, chunk in png_chunks(data):
        if name == b"IHDR":
            depth, channels, interlaced = chunk[16], _PNG_CHANNELS[chunk[17]], chunk[20]
        elif name == b"IDAT":
            packed_bytes += len(chunk) - 12
        elif name == b"iCCP":
            profile = _inflated(chunk[8:-4].partition(b"\x00")[2][1:], max_profile_bytes + 1)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    row_bytes = 0
    for left, top, across, down in passes:
        columns, rows = -(-max(0, width_px - left) // across), -(-max(0, height_px - top) // down)
        row_bytes += rows * (1 + -(-columns * channels * depth // 8)) if columns else 0
    if row_bytes > _MAX_DEFLATE_RATIO * packed_bytes:
        raise damaged("it holds fewer pixels than its header says")
    # Converting costs a pass over four values a pixel, whatever the depth.
    samples = row_bytes + 4 * width_px * height_px
    return Work(
        width_px, height_px, samples, 1, 12 * width_px * height_px, is_plain=not interlaced, profile=profile
    )  # fmt: skip


def _inflated(packed: bytes, most_bytes: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, most_bytes)
    except zlib.error:
        return b""  # a broken profile is ignored when the image is decoded


def _webp(data: bytes, width_px: int, height_px: int, max_profile_bytes: int) -> Work:
    chunks: Mapping[bytes, bytes] = dict(webp_chunks(data))
    # Canvas, frame, copy and result, each of four values a pixel. libwebp keeps the interpreter's lock meanwhile, so
    # a WebP is sent to a decoder process at a quarter of the pixels.
    samples = 16 * width_px * height_px
    return Work(
        width_px, height_px, samples, 1, 20 * width_px * height_px, is_plain=b"ANMF" not in chunks,
        profile=chunks.get(b"ICCP", b"")[: max_profile_bytes + 1],
    )  # fmt: skip


def _is_plain_profile(profile: bytes) -> bool:
    """Return whether a profile is made of curves and a matrix, as those of cameras and screens are.

    Others may hold any number of tables to be evaluated one after another, at each point of a grid.
    """
    if not profile:
        return True
    if len(profile) > _PLAIN_PROFILE_BYTES or len(profile) < 132:
        return len(profile) < 132
    (count,) = struct.unpack_from(">I", profile, 128)
    if count > 64 or len(profile) < 132 + 12 * count:
        return False
    tags = [profile[at : at + 3] for at in range(132, 132 + 12 * count, 12)]
    return b"A2B" not in tags and b"D2B" not in tags
