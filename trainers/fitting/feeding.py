"""Batches of augmented images, prepared in the background in a fixed order.

One thread copies rows out of the pixel cache and augments them while the network computes; where that is too little,
feeder processes do, and the thread takes their batches. The content of a batch is a function of (seed, epoch, step)
and the rank's share, never of timing or of who prepares it. A policy with phases changes its operations where an
epoch begins.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from records.arrays import IntArray, UInt8Array
from trainers.augmentation import Augmenter
from trainers.augmentation.mixing import Mix, draw_mix
from trainers.fitting.feeder_processes import FeederProcesses, FeedersLostError, lacking_memory
from trainers.optimization.samplers import epoch_order, occurrences
from trainers.settings import TrainersSettings
from vision.seeding import Seeds, image_keys, image_seeds


class PixelSource(Protocol):
    """Decoded images by position, as `images.cache.PixelRows`; where features are trained on, these in their place."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def take(self, indices: Any) -> NDArray[Any]:
        """Return a writable copy of rows, uint8 [n, S, S, 3]; of features float32 [n, ...]."""
        ...


CPU = torch.device("cpu")
logger = logging.getLogger(__name__)

Stream = Callable[[Sequence[IntArray]], Iterator[UInt8Array]]
"""Yields writable rows, [n, S, S, 3], for one array of positions after the other."""


@dataclass(frozen=True)
class Batch:
    """One worker's share of one optimizer step.

    Args:
        pixels: [n, S, S, 3], augmented; or features, [n, ...].
        labels: [n] class indices.
        rows: [n] positions in the training data.
        partner_labels: [n] class indices of what was mixed in; None if nothing was.
        partner_rows: [n] positions in the training data of what was mixed in.
        share: of `labels` in a mixed batch; the partners' have the rest.
        weight: of the share's mean loss in the mean over the workers; 1 where all shares are equal.
    """

    pixels: NDArray[Any]
    labels: IntArray
    rows: IntArray
    partner_labels: IntArray | None = None
    share: float = 1.0
    weight: float = 1.0
    partner_rows: IntArray | None = None

    def parts(self, count: int) -> "list[tuple[Batch, float]]":
        """Cut the share.

        Returns parts with the weight of each part's mean loss; the weights add up to the share's.
        """
        if count == 1:
            return [(self, self.weight)]
        ends = np.cumsum([len(places) for places in np.array_split(self.rows, count)]).tolist()
        # Slices and not lists of places: a slice stays in pinned memory, from which a GPU copies without waiting.
        spans = [(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]
        return [(self._part(slice(*span)), self.weight * (span[1] - span[0]) / len(self.rows)) for span in spans]

    def _part(self, at: slice) -> "Batch":
        partners = self.partner_labels[at] if self.partner_labels is not None else None
        rows = self.partner_rows[at] if self.partner_rows is not None else None
        return Batch(self.pixels[at], self.labels[at], self.rows[at], partners, self.share, partner_rows=rows)


class Feeder:
    """Prepares the batches of a run, epoch by epoch.

    Args:
        pixels: all images of the data.
        labels: [N] class indices of all images.
        image_ids: [N] image ids.
        train_rows: [n] which of them are trained on.
        augmenter: runs the policy; used by the background thread only.
        settings: sampler, batch size, seed, how far to run ahead.
        feeders: processes that prepare batches; 0 leaves it to the background thread.
        device: where batches go.
        stream: of training images; default: rows are taken out of `pixels`.
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
        feeders: int = 0,
        device: torch.device = CPU,
        stream: Stream | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._stream = stream or (lambda parts: map(pixels.take, parts))
        self._labels = labels
        self._train_rows = train_rows
        self._keys = image_keys([image_ids[row] for row in train_rows])
        self._augmenter = augmenter
        self._settings = settings
        self._share = slice(rank, None, world_size)
        self._world_size = world_size
        self._pinned = device.type == "cuda"
        self._processes: FeederProcesses | None = None
        if feeders:
            self._start_processes(pixels, feeders)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return -(-len(self._train_rows) // self._settings.images_per_step)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this worker's share of every batch of an epoch.

        Args:
            epoch: 0-based.
            first_step: 0-based; those before it are left out.
        Yields:
            Batches in order of step.
        """
        settings, size = self._settings, self._settings.images_per_step
        order = epoch_order(
            settings.sampler,
            self._labels[self._train_rows],
            seed=settings.seed,
            epoch=epoch,
            batch_size=size,
        )
        # A seed per shown image: from its id, the epoch and how often it was shown before, so an image gets the same
        # augmentation whatever batch or worker it falls into.
        seeds = image_seeds(settings.seed, epoch, self._keys[order], occurrences(order))
        # Skipped steps cost nothing: order and seeds are computed for the whole epoch, images only from here on.
        starts = range(first_step * size, len(order), size)
        shares = [
            self._share_of(order[s : s + size], seeds[s : s + size], epoch, step)
            for step, s in enumerate(starts, first_step)
        ]
        yield from self._prefetched(shares)

    def close(self) -> None:
        """End the feeder processes, if there are any."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def _start_processes(self, pixels: PixelSource, count: int) -> None:
        def prepare(share: _Share) -> UInt8Array:
            return _augmented(self._augmenter, share, pixels.take(share.rows[share.needed]))

        processes = FeederProcesses(prepare, count, self._settings.workers.prefetch_batches)
        largest = -(-self._settings.images_per_step // self._world_size) * self._settings.model.side_px**2 * 3
        lacking = lacking_memory(processes.needed_bytes(largest))
        if lacking is None:
            self._processes = processes
        else:
            logger.warning("%s; the training goes on with its feeder thread", lacking)

    def _share_of(self, positions: IntArray, seeds: Seeds, epoch: int, step: int) -> "_Share":
        mixing, settings = self._augmenter.policy.mixing, self._settings
        rows, own = self._train_rows[positions], np.arange(len(positions))[self._share]
        if mixing is None:
            return _Share(epoch, rows, seeds, own, own, None)
        mix = draw_mix(mixing, len(positions), settings.model.side_px, seed=settings.seed, epoch=epoch, step=step)
        # Partners may belong to another worker's share; each image is augmented once.
        needed = own if mix is None else np.union1d(own, mix.partner[own])
        return _Share(epoch, rows, seeds, own, needed, mix)

    def _prefetched(self, shares: "list[_Share]") -> Iterator[Batch]:
        # One thread, because the augmenter's generators are shared by its transforms and because batches have to come
        # in order; OpenCV and numpy release the GIL, so it overlaps with the network. Feeder processes belong to this
        # thread, too: in the main one torch would raise the death of a process wherever the loop is just then.
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feeder")
        waiting: deque[Future[Batch]] = deque()
        pieces = self._pieces(shares)
        try:
            for share in shares:
                waiting.append(executor.submit(self._prepare, share, pieces))
                # Bounds the memory of batches that are ready and not yet used.
                if len(waiting) > self._settings.workers.prefetch_batches:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Also when the consumer stops in mid-epoch: a batch still being prepared would race with the next epoch's
            # use of the augmenter.
            executor.shutdown(wait=True, cancel_futures=True)

    def _pieces(self, shares: "list[_Share]") -> Iterator[UInt8Array]:
        """Yield the finished pixels of each share, by processes if there are any, and by this thread if they died."""
        done = 0
        if self._processes is not None:
            try:
                for pixels in self._processes.pixels(shares):
                    yield pixels
                    done += 1
            except FeedersLostError as error:
                logger.warning("%s; the training goes on with its feeder thread", str(error))
                self.close()
        left = shares[done:]
        raw = self._stream([share.rows[share.needed] for share in left])
        for share in left:
            yield _augmented(self._augmenter, share, next(raw))

    def _prepare(self, share: "_Share", pieces: Iterator[UInt8Array]) -> Batch:
        own_rows = share.rows[share.own]
        own_labels = self._labels[own_rows]
        # Shares differ by an image where workers do not divide the batch; DDP averages over workers, so a share's
        # mean loss is weighted by its size to give the mean over the batch.
        weight = len(own_rows) * self._world_size / self._settings.images_per_step
        pixels = next(pieces)
        if self._pinned:
            pixels = torch.from_numpy(pixels).pin_memory().numpy()
        if share.mix is None:
            return Batch(pixels, own_labels, own_rows, weight=weight)
        partners = share.rows[share.mix.partner[share.own]]
        return Batch(pixels, own_labels, own_rows, self._labels[partners], share.mix.share, weight, partners)


@dataclass(frozen=True)
class _Share:
    """A batch, and which of it is this worker's.

    Args:
        epoch: 0-based.
        rows: [B] of the whole batch.
        seeds: [B].
        own: [n] places in the batch.
        needed: ascending places of the images that are needed: own ones, and what is mixed into them.
        mix: how the batch is mixed; None leaves it as it is.
    """

    epoch: int
    rows: IntArray
    seeds: Seeds
    own: IntArray
    needed: IntArray
    mix: Mix | None


def _augmented(augmenter: Augmenter, share: _Share, pixels: UInt8Array) -> UInt8Array:
    """Augment a share's images, [n, S, S, 3], and mix its own ones with their partners."""
    augmenter.begin_epoch(share.epoch + 1)
    pixels = augmenter.apply(pixels, share.seeds[share.needed])
    if share.mix is None:
        return pixels
    # `needed` is sorted, so searchsorted finds where each image lies among the augmented ones.
    own_at, partners_at = (np.searchsorted(share.needed, at) for at in (share.own, share.mix.partner[share.own]))
    return share.mix.apply(pixels[own_at], pixels[partners_at])
