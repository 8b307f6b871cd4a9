"""Decoded pixels of an erased image are blanked; the rows beside it stay."""

from pathlib import Path

import numpy as np

from images.cache import PixelCache
from images.forget import forget_pixels


def test_only_the_erased_image_is_blanked(tmp_path: Path) -> None:
    ids = [f"{i:064x}" for i in (1, 2, 3)]
    pixels = np.stack([np.full((4, 4, 3), i, dtype=np.uint8) for i in (1, 2, 3)])
    PixelCache(tmp_path, 4).append(ids, pixels)
    assert forget_pixels(tmp_path, [ids[1], 64 * "f"]) == 1
    assert forget_pixels(tmp_path, [ids[1]]) == 0
    cache = PixelCache(tmp_path, 4)
    assert cache.missing(ids) == [ids[1]]
    assert np.array_equal(cache.rows([ids[0], ids[2]]).take([0, 1]), pixels[[0, 2]])
    assert bytes(pixels[1]) not in next(tmp_path.glob("*/*.u8")).read_bytes()
