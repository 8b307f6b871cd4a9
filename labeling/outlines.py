"""The outline of a lesion that an annotator painted: Label Studio's run lengths become a small grey PNG.

In: regions of an annotation, which any program with a token may have written. Out: a mask of at most 128 pixels on its
longer side, white where at least half of a cell was painted. What cannot be read is no outline; the diagnosis beside it
counts all the same.
"""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from records.arrays import BoolArray, UInt8Array
from records.errors import DataError

logger = logging.getLogger(__name__)

CONTROL = "outline"
SIDE_PX = 128
_MAX_PIXELS = 1024 * 1024
_MAX_BYTES = 4_000_000
_WORD, _HEAD_BITS = 8, 53


def outline_of(result: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what was painted in all regions of an annotation as a PNG in base64; None if nothing was."""
    painted: BoolArray | None = None
    for region in result:
        if region.get("from_name") != CONTROL or region.get("type") != "brushlabels":
            continue
        try:
            mask = _mask_of(region)
        except (DataError, TypeError, ValueError, KeyError) as error:
            logger.warning("an outline was left out: %s", error)
            continue
        painted = mask if painted is None or painted.shape != mask.shape else painted | mask
    if painted is None or not painted.any():
        return None
    height, width = painted.shape
    scale = min(1.0, SIDE_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawn = PillowImage.fromarray((255 * painted).astype(np.uint8)).resize(size, PillowImage.Resampling.BOX)
    buffer = io.BytesIO()
    drawn.point(lambda level: 255 if level >= 128 else 0).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _mask_of(region: Mapping[str, Any]) -> BoolArray:
    value, width, height = region["value"], region["original_width"], region["original_height"]
    if not (isinstance(width, int) and isinstance(height, int) and 0 < width * height <= _MAX_PIXELS and width > 0):
        raise DataError(f"an outline of {width} by {height} pixels cannot be read")
    packed = value["rle"]
    if value.get("format") != "rle" or not isinstance(packed, list) or len(packed) > _MAX_BYTES:
        raise DataError("an outline has its pixels as run lengths")
    levels = unpacked(bytes(packed), width * height * 4)
    return np.asarray(levels.reshape(height, width, 4)[..., 3] > 127, dtype=np.bool_)


def unpacked(packed: bytes, length: int) -> UInt8Array:
    """Return the bytes that `rle-pack` packed, as Label Studio does with the RGBA pixels of a brush.

    Label Studio's package reads the same bit by bit, without a limit: a string of 32 million characters for 4 MB.

    Args:
        packed: the number of values (32 bits), bits of a value less 1 (5), four run sizes less 1 (4 bits each), then
            runs: whether one value repeats (1), which run size (2), the length less 1, and one or all of the values.
        length: number of values that there have to be.
    Returns:
        The values.
    Raises:
        DataError: it is not such data, or has another number of values.
    """
    if len(packed) < 7:
        raise DataError("run lengths end before they begin")
    head = int.from_bytes(packed[:7])
    count, word = head >> 24, (head >> 19 & 31) + 1
    sizes = [(head >> shift & 15) + 1 for shift in (15, 11, 7, 3)]
    if count != length or word != _WORD:
        raise DataError(f"run lengths of {count} values of {word} bits, where {length} of {_WORD} are needed")
    # A painted image has hundreds of thousands of runs: the loop only finds where they are.
    at, done, last = _HEAD_BITS, 0, 8 * len(packed)
    starts, lengths, repeated = list[int](), list[int](), list[bool]()
    while done < count:
        window = int.from_bytes(packed[at >> 3 : (at >> 3) + 4].ljust(4, b"\0")) << (at & 7) & 0xFFFFFFFF
        size = sizes[window >> 29 & 3]
        run = 1 + (window >> (29 - size) & ((1 << size) - 1))
        repeats = bool(window >> 31)
        at += 3 + size
        starts.append(at)
        lengths.append(run)
        repeated.append(repeats)
        at += _WORD if repeats else _WORD * run
        done += run
        if at > last or done > count:
            raise DataError("run lengths end too soon, or are longer than the image")
    number = np.repeat(np.arange(len(starts)), lengths)
    inside = np.arange(count) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    bit = np.asarray(starts)[number] + np.where(np.asarray(repeated)[number], 0, _WORD * inside)
    data = np.frombuffer(packed + b"\0", dtype=np.uint8).astype(np.uint16)
    pair = data[bit >> 3] << 8 | data[(bit >> 3) + 1]
    return np.asarray(pair >> (8 - (bit & 7)) & 255, dtype=np.uint8)
