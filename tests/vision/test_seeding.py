"""Seeds are functions of what they are about."""

import numpy as np

from vision.seeding import derive_seed, generator, image_keys, image_seeds

KEYS = image_keys([f"{number:016x}{'0' * 48}" for number in range(1000)])
FIRST = np.zeros(1000, dtype=np.int64)


def test_derived_seeds_are_fixed_for_good() -> None:
    assert derive_seed(0, "network") == 4765466500708297189
    assert derive_seed("1", 2) != derive_seed(1, 2) != derive_seed(2, 1)
    assert 0 <= derive_seed("anything") < 2**63


def test_generators_differ_by_purpose() -> None:
    a, b = (generator(1, 2, purpose=purpose).integers(2**62) for purpose in ("order", "other"))
    assert a != b
    assert a == generator(1, 2, purpose="order").integers(2**62)


def test_image_seeds_do_not_collide_and_do_not_depend_on_company() -> None:
    seeds = image_seeds(0, 3, KEYS, FIRST)
    assert len(np.unique(seeds)) == 1000
    assert seeds[17] == image_seeds(0, 3, KEYS[17:18], FIRST[:1])[0]
    for other in (
        image_seeds(1, 3, KEYS, FIRST),
        image_seeds(0, 4, KEYS, FIRST),
        image_seeds(0, 3, KEYS, FIRST + 1),
    ):
        assert not np.isin(other, seeds).any()


def test_image_seeds_use_all_their_bits() -> None:
    bits = (image_seeds(0, 0, KEYS, FIRST)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.07


def test_keys_are_the_first_bits_of_the_id() -> None:
    assert image_keys(["00000000000000ff" + "a" * 48]).tolist() == [255]
