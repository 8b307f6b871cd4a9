"""Near-duplicates: hand cases for bits and correlation, and the vectorised search against a plain loop."""

import time

import numpy as np
import pytest

from images.near_duplicates import find_near_duplicates, grey, hash_pairs, perceptual_hash
from records.arrays import FloatArray, IntArray, UInt8Array
from records.errors import ContractError


def images(*greys: FloatArray) -> UInt8Array:
    return np.stack([np.repeat(g[..., None], 3, axis=2) for g in greys]).round().clip(0, 255).astype(np.uint8)


def ramp() -> FloatArray:
    return np.broadcast_to(np.linspace(20, 220, 64), (64, 64)).copy()


def test_bits_are_counted() -> None:
    pairs, bits = hash_pairs(np.array([0b0000, 0b0011, 0b0111, 0b1111], dtype=np.uint64))
    assert pairs.tolist() == [[0, 1], [1, 2], [1, 3], [2, 3]]
    assert bits.tolist() == [2, 1, 2, 1]


def test_all_64_bits_count() -> None:
    pairs, bits = hash_pairs(np.array([0, 2**63, 2**64 - 1], dtype=np.uint64), max_bits=64)
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert bits.tolist() == [1, 64, 63]


def test_pairs_of_two_old_images_are_not_looked_for_again() -> None:
    hashes = np.zeros(4, dtype=np.uint64)
    pairs, _ = hash_pairs(hashes, first_new=3)
    assert pairs.tolist() == [[0, 3], [1, 3], [2, 3]]
    assert hash_pairs(hashes, first_new=4)[0].shape == (0, 2)


def test_search_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 40, dtype=np.uint64)
    hashes = base[rng.integers(0, 40, 1300)] ^ (np.uint64(1) << rng.integers(0, 64, 1300, dtype=np.uint64))
    pairs, bits = hash_pairs(hashes, max_bits=2)
    expected = [
        (i, j, (int(hashes[i]) ^ int(hashes[j])).bit_count())
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 2
    ]
    assert [(int(i), int(j), int(b)) for (i, j), b in zip(pairs, bits, strict=True)] == expected


def test_ten_thousand_images_take_seconds() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 10_015, dtype=np.uint64)
    started = time.process_time()
    hash_pairs(hashes)
    assert time.process_time() - started < 10


def test_both_hash_and_correlation_must_agree() -> None:
    noise = np.random.default_rng(0).normal(0, 60, (64, 64))
    squares = images(ramp(), ramp() * 0.8 + 10, ramp() + noise, 240 - ramp())
    same_hash = np.zeros(4, dtype=np.uint64)
    found = find_near_duplicates(same_hash, lambda index: squares[index])
    assert [(p.first, p.second, p.bits) for p in found] == [(0, 1, 0)]
    assert found[0].correlation > 0.999
    apart = np.array([0, 0b111, 0b111111, 2**40 - 1], dtype=np.uint64)
    assert find_near_duplicates(apart, lambda index: squares[index]) == []


def test_a_flat_image_is_like_no_other() -> None:
    squares = images(np.full((64, 64), 90.0), np.full((64, 64), 90.0))
    assert find_near_duplicates(np.zeros(2, dtype=np.uint64), lambda index: squares[index]) == []


def test_only_candidates_are_fetched() -> None:
    asked: list[list[int]] = []

    def squares(index: IntArray) -> UInt8Array:
        asked.append(index.tolist())
        return images(*[ramp() for _ in index])

    found = find_near_duplicates(np.array([0, 2**50 - 1, 1], dtype=np.uint64), squares)
    assert asked == [[0, 2]]
    assert [(p.first, p.second) for p in found] == [(0, 2)]


def test_hash_survives_light_and_not_a_turn() -> None:
    rng = np.random.default_rng(3)
    blob = np.zeros((64, 64))
    for _ in range(6):
        x, y = rng.integers(8, 56, 2)
        blob += 150 * np.exp(-((np.arange(64)[None, :] - x) ** 2 + (np.arange(64)[:, None] - y) ** 2) / 90)
    first, brighter, turned = (int(perceptual_hash(p), 16) for p in images(blob, blob * 0.9 + 20, blob.T[::-1]))
    assert (first ^ brighter).bit_count() <= 2
    assert (first ^ turned).bit_count() > 8


def test_hash_wants_its_own_size() -> None:
    with pytest.raises(ContractError, match=r"\[64, 64, 3\]"):
        perceptual_hash(np.zeros((32, 32, 3), dtype=np.uint8))


def test_grey_is_luminance() -> None:
    square = np.array([[[255, 0, 0]], [[0, 255, 0]]], dtype=np.uint8)[None]
    assert grey(square)[0, :, 0].tolist() == pytest.approx([76.245, 149.685], abs=1e-3)
