"""Keep the network fed: batches of augmented pictures, prepared in the background in a fixed order.

One thread copies rows out of the pixel cache and augments them while the network computes. What a
batch holds is a function of (seed, epoch, step) and the share of the rank, never of timing.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainers.augmentation import Augmenter
from trainers.optimization.samplers import IntArray, epoch_order, occurrences
from trainers.seeding import Seeds, image_keys, picture_seeds
from trainers.settings import TrainersSettings


class PixelSource(Protocol):
    """Decoded pictures by position; `trainers.data.cache.PixelRows` is one."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def take(self, indices: Any) -> NDArray[np.uint8]:
        """Return a writable copy of rows, [n, S, S, 3]."""
        ...


@dataclass(frozen=True)
class Batch:
    """One worker's share of one optimizer step.

    Args:
        pixels: [n, S, S, 3], augmented.
        labels: [n] class indices.
        rows: [n] positions in the training data.
    """

    pixels: NDArray[np.uint8]
    labels: IntArray
    rows: IntArray


class Feeder:
    """Prepares the batches of a run, epoch by epoch.

    Args:
        pixels: all pictures of the data.
        labels: [N] class indices of all pictures.
        image_ids: [N] picture ids.
        train_rows: [n] which of them are trained on.
        augmenter: runs the policy; used by the background thread only.
        settings: sampler, batch size, seed, how far to run ahead.
        rank: of this worker.
        world_size: number of workers.
    """

    def __init__(
        self,
        pixels: PixelSource,
        labels: IntArray,
        image_ids: list[str],
        train_rows: IntArray,
        augmenter: Augmenter,
        settings: TrainersSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._pixels = pixels
        self._labels = labels
        self._train_rows = train_rows
        self._keys = image_keys([image_ids[row] for row in train_rows])
        self._augmenter = augmenter
        self._settings = settings
        self._share = slice(rank, None, world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return -(-len(self._train_rows) // self._settings.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's share of every batch of an epoch.

        Args:
            epoch: 0-based.
        Yields:
            Batches in order of step.
        """
        settings = self._settings
        order = epoch_order(
            settings.sampler,
            self._labels[self._train_rows],
            seed=settings.seed,
            epoch=epoch,
            batch_size=settings.batch_size,
        )
        seeds = picture_seeds(settings.seed, epoch, self._keys[order], occurrences(order))
        starts = range(0, len(order), settings.batch_size)
        shares = [
            (order[s : s + settings.batch_size][self._share], seeds[s : s + settings.batch_size][self._share])
            for s in starts
        ]
        yield from self._prefetched(shares)

    def _prefetched(self, shares: list[tuple[IntArray, Seeds]]) -> Iterator[Batch]:
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feeder")
        waiting: deque[Future[Batch]] = deque()
        try:
            for share in shares:
                waiting.append(executor.submit(self._prepare, *share))
                if len(waiting) > self._settings.prefetch_batches:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, positions: IntArray, seeds: Seeds) -> Batch:
        rows = self._train_rows[positions]
        pixels = self._augmenter.apply(self._pixels.take(rows), seeds)
        return Batch(pixels, self._labels[rows], rows)
