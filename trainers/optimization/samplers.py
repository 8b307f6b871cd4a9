"""Samplers, which set the order of the images in an epoch: a registry of frozen records, and the order itself.

Sampling happens after the split, so an image drawn often is drawn often in train only. The order
is a function of (seed, epoch) and is the same on every worker; each worker takes its share of
every batch, so two workers together train on the same batches as one worker alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from records.arrays import FloatArray, IntArray
from records.registry import Registered, Registry
from vision.seeding import generator


@dataclass(frozen=True, kw_only=True)
class SamplerRecipe(Registered):
    """A way to draw an epoch.

    Args:
        share: class counts [C], all above zero -> how much of an epoch each class gets, up to a factor;
            None shows every image once.
    """

    share: Callable[[FloatArray], FloatArray] | None = field(repr=False)


SAMPLERS: Registry[SamplerRecipe] = Registry(
    "sampler",
    (
        SamplerRecipe(name="natural", description="every image once, in random order", share=None),
        SamplerRecipe(
            name="balanced", description="every class equally often", share=lambda counts: np.ones_like(counts)
        ),
        SamplerRecipe(
            name="square_root",
            description="every class by the square root of its size: halfway between natural and balanced",
            share=np.sqrt,
        ),
    ),
)


def epoch_order(sampler: str, labels: IntArray, *, seed: int, epoch: int, batch_size: int) -> IntArray:
    """Draw the order of one epoch.

    Args:
        sampler: in `SAMPLERS`.
        labels: [N] class indices of the training images, N >= 1.
        seed: of the run.
        epoch: 0-based.
        batch_size: B; the last batch is filled up from the start of the order.
    Returns:
        [ceil(N / B) * B] positions into `labels`.
    """
    rng = generator(seed, epoch, purpose="order")
    share = SAMPLERS[sampler].share
    order = rng.permutation(len(labels)) if share is None else _draw(labels, share, rng)
    num_batches = -(-len(labels) // batch_size)
    # Full batches only: batch norm and workers' shares need equal sizes.
    return np.resize(order, num_batches * batch_size).astype(np.int64)


def occurrences(order: IntArray) -> IntArray:
    """Count how often each entry has come before in the order.

    Args:
        order: [n] integers.
    Returns:
        [n]; 0 for the first time.

    >>> occurrences(np.array([7, 3, 7, 7, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    by_value = np.argsort(order, kind="stable")
    ordered = order[by_value]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    run_lengths = np.diff(np.r_[starts, len(order)])
    counts = np.empty(len(order), dtype=np.int64)
    counts[by_value] = np.arange(len(order)) - np.repeat(starts, run_lengths)
    return counts


def _draw(labels: IntArray, share: Callable[[FloatArray], FloatArray], rng: np.random.Generator) -> IntArray:
    """Fill each class's part of the epoch with whole passes over the class, so that none is left out by chance."""
    classes, counts = np.unique(labels, return_counts=True)
    shares = share(counts.astype(np.float64))
    quotas = _round_to_sum(shares / shares.sum() * len(labels), len(labels))
    parts = []
    for class_index, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == class_index)
        # Whole passes first, each in its own order: with independent draws some images of a class would be missed by
        # chance.
        passes = -(-int(quota) // len(members))
        parts.append(np.concatenate([rng.permutation(members) for _ in range(max(passes, 1))])[:quota])
    return rng.permutation(np.concatenate(parts))


def _round_to_sum(values: FloatArray, total: int) -> IntArray:
    """Round down, then give what is missing to the largest remainders."""
    rounded = np.floor(values).astype(np.int64)
    missing = total - int(rounded.sum())
    # Largest remainders; a stable sort, so that ties go to the first class on every platform.
    rounded[np.argsort(-(values - rounded), kind="stable")[:missing]] += 1
    return rounded
