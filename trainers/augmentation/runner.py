"""Run a policy over batches of images: the same image and seed give the same result, whoever computes it.

In: uint8 [N, S, S, 3] and a seed per image. Out: uint8 [N, S, S, 3]. An augmenter keeps one pair of
generators that all its transforms share and reseeds it for every image, which costs 6 microseconds
where seeding an albumentations pipeline costs 250. It serves one thread at a time.
"""

import os
import random
from typing import Any

import numpy as np

from records.arrays import UInt8Array
from trainers.augmentation.operations import OPERATIONS, Canvas
from trainers.augmentation.policy import Policy
from vision.seeding import Seeds


class Augmenter:
    """A policy, ready to run. Use one per thread."""

    def __init__(self, policy: Policy, canvas: Canvas) -> None:
        self.policy = policy
        self._canvas = canvas
        self._operations = policy.operations
        self._python_random = random.Random(0)
        self._bits = np.random.PCG64(0)
        self._transforms = self._build()

    def begin_epoch(self, epoch: int) -> None:
        """Take the operations that the policy has for an epoch; 1 is the first. Until then they are the first one's."""
        operations = self.policy.operations_at(epoch)
        if operations != self._operations:
            self._operations = operations
            self._transforms = self._build()

    def apply(self, pixels: UInt8Array, seeds: Seeds) -> UInt8Array:
        """Augment a batch.

        Args:
            pixels: [N, S, S, 3]; may be overwritten.
            seeds: [N], one per image.
        Returns:
            [N, S, S, 3].
        """
        if not self._transforms:
            return pixels
        for index, seed in enumerate(seeds.tolist()):
            self._reseed(seed)
            image = pixels[index]
            for transform in self._transforms:
                image = transform(image=image)["image"]
            pixels[index] = image
        return pixels

    def _build(self) -> list[Any]:
        if not self._operations:
            return []
        # Its import would ask a package index for newer versions.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import cv2

        # OpenCV's own threads would compete with the network for the same cores.
        cv2.setNumThreads(0)
        generator = np.random.Generator(self._bits)
        transforms = []
        for step in self._operations:
            transform = OPERATIONS[step.operation].build(step.checked_parameters(), step.probability, self._canvas)
            # All transforms share one pair of generators, so reseeding the pair reseeds them all.
            transform.set_random_state(generator, self._python_random)
            transforms.append(transform)
        return transforms

    def _reseed(self, seed: int) -> None:
        self._python_random.seed(seed)
        # Setting the state of PCG64 directly skips SeedSequence's hashing, which would cost more than most
        # transforms. The increment has to be odd.
        self._bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": seed, "inc": 1},
            "has_uint32": 0,
            "uinteger": 0,
        }
