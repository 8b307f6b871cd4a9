"""Seeds derived from names and numbers, so that random choices do not depend on which process makes them, or when.

Every random choice of a run is a function of the run's seed, the epoch and its purpose. A checkpoint therefore needs
no generator state: a resumed epoch draws what it would have drawn.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from records.arrays import IntArray

Seeds = NDArray[np.uint64]


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and on their order."""
    # The type is part of the text, and \x1f separates: ("1", "2"), (1, 2) and ("12",) must not collide.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, epoch: int, *, purpose: str) -> np.random.Generator:
    """Return a generator that only one purpose in one epoch of one run uses."""
    return np.random.default_rng(derive_seed(seed, epoch, purpose))


def image_keys(image_ids: list[str]) -> Seeds:
    """Return the first 64 bits of each image's id, [N]."""
    return np.array([int(image_id[:16], 16) for image_id in image_ids], dtype=np.uint64)


def image_seeds(seed: int, epoch: int, keys: Seeds, occurrence: IntArray) -> Seeds:
    """Mix a seed for every image of an epoch.

    Args:
        seed: of the run.
        epoch: 0-based.
        keys: [n] from `image_keys`.
        occurrence: [n] how often the image was drawn before in this epoch.
    Returns:
        [n]; equal arguments give equal seeds, on every machine.
    """
    base = np.uint64(derive_seed(seed, epoch, "augmentation"))
    return _scramble(_scramble(keys ^ base) + occurrence.astype(np.uint64))


def _scramble(values: Seeds) -> Seeds:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
