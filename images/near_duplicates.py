"""Find images that are nearly the same: one shot saved twice, cropped or recompressed.

Two images are near-duplicates if their 64-bit perceptual hashes differ in at most 2 bits *and* their grey 64 px
squares correlate to at least 0.98. The hash alone is cheap but gives false pairs; the correlation alone is exact but
too slow for all pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from records.arrays import BoolArray, Float32Array, IntArray, UInt8Array
from records.errors import ContractError
from records.frames import Frame

HASH_FRAME = Frame(64)
"""What hashes and correlations are computed from, whatever models see."""
MAX_BITS = 2
MIN_CORRELATION = 0.98

_CHUNK_PAIRS = 2048


@dataclass(frozen=True)
class NearDuplicate:
    """A pair of near-duplicates.

    Args:
        first: index of one image.
        second: index of the other, larger than `first`.
        bits: number of bits, of 64, in which the hashes differ.
        correlation: correlation of the grey squares, at most 1.
    """

    first: int
    second: int
    bits: int
    correlation: float


def perceptual_hash(square: UInt8Array) -> str:
    """Return the 64-bit pHash of a [64, 64, 3] square as 16 hex characters; similar images differ in few bits.

    Another shape raises ContractError.
    """
    if square.shape != (HASH_FRAME.side_px, HASH_FRAME.side_px, 3):
        raise ContractError(f"a perceptual hash needs a [64, 64, 3] square, not {list(square.shape)}")
    return str(imagehash.phash(PillowImage.fromarray(square)))


def grey(squares: UInt8Array) -> Float32Array:
    """Return the luminance (ITU-R 601) of [N, S, S, 3] images: [N, S, S], 0 to 255."""
    return squares.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def hash_pairs(
    hashes: NDArray[np.uint64], *, first_new: int = 0, max_bits: int = MAX_BITS
) -> tuple[IntArray, IntArray]:
    """Find all pairs whose hashes are close.

    Args:
        hashes: [N].
        first_new: pairs of two images before this index are skipped: they were compared before.
        max_bits: largest number of differing bits, 0 to 64.
    Returns:
        [P, 2] indices with the smaller one first, sorted; and [P] differing bits.
    """
    found = [_equal_in(mask, hashes, first_new, max_bits) for mask in _masks(max_bits)]
    table = np.unique(np.concatenate(found), axis=0)
    return table[:, :2], np.bitwise_count(hashes[table[:, 0]] ^ hashes[table[:, 1]]).astype(np.int64)


def _masks(max_bits: int) -> list[np.uint64]:
    """Distribute the 64 bits over `max_bits + 1` masks."""
    # Pigeonhole: b differing bits cannot touch all of b + 1 masks, so close hashes are equal in at least one.
    parts = max_bits + 1
    return [np.uint64(sum(1 << bit for bit in range(part, 64, parts))) for part in range(parts)]


def _equal_in(mask: np.uint64, hashes: NDArray[np.uint64], first_new: int, max_bits: int) -> IntArray:
    """Return the close pairs, [P, 2], among hashes that are equal in the bits of a mask."""
    keys = hashes & mask
    some = np.flatnonzero(np.isin(keys, keys[first_new:]))
    order = some[np.argsort(keys[some], kind="stable")]
    keys, found = keys[order], [np.empty((0, 2), dtype=np.int64)]
    left: IntArray = np.arange(len(order))
    for step in range(1, len(order)):
        # Keys are sorted, so an entry without an equal key at this distance has none at a larger one.
        left = left[left + step < len(order)]
        left = left[keys[left] == keys[left + step]]
        if not len(left):
            break
        pairs = np.stack([order[left], order[left + step]], axis=1)
        close = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= max_bits
        found.append(pairs[close & (pairs[:, 1] >= first_new)])
    return np.concatenate(found)


def find_near_duplicates(
    hashes: NDArray[np.uint64],
    squares: Callable[[IntArray], UInt8Array],
    *,
    first_new: int = 0,
    max_bits: int = MAX_BITS,
    min_correlation: float = MIN_CORRELATION,
) -> list[NearDuplicate]:
    """Find all near-duplicates among N images.

    Args:
        hashes: [N] perceptual hashes.
        squares: returns the [n, 64, 64, 3] squares of n image indices; called only for pairs with close hashes.
        first_new: pairs of two images before this index are skipped: they were compared before.
        max_bits: largest number of differing bits.
        min_correlation: smallest correlation.
    Returns:
        The pairs, sorted. An image of one grey value correlates with nothing.
    """
    pairs, bits = hash_pairs(hashes, first_new=first_new, max_bits=max_bits)
    result: list[NearDuplicate] = []
    # In chunks, since each needs the squares of up to twice as many images in memory as floats.
    for start in range(0, len(pairs), _CHUNK_PAIRS):
        some = pairs[start : start + _CHUNK_PAIRS]
        wanted, position = np.unique(some, return_inverse=True)
        position = position.reshape(some.shape)
        unit, varies = _standardised(grey(squares(wanted)))
        correlation = np.einsum("pk,pk->p", unit[position[:, 0]], unit[position[:, 1]])
        alike = (correlation >= min_correlation) & varies[position].all(axis=1)
        result.extend(
            NearDuplicate(int(some[p, 0]), int(some[p, 1]), int(bits[start + p]), min(1.0, float(correlation[p])))
            for p in np.flatnonzero(alike)
        )
    return result


def _standardised(images: Float32Array) -> tuple[Float32Array, BoolArray]:
    """Return [N, K] rows of mean 0 and length 1, and which rows are not constant."""
    flat = images.reshape(len(images), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1)
    varies = length > 1e-3
    return flat / np.where(varies, length, 1.0)[:, None], varies
