"""What to do when a device runs out of memory: compute fewer images at once, and find the largest batch that fits.

A step that computes its batch in more parts has the same gradient, so a training that had too little memory goes on
with the recipe it was given. Batch norm takes its mean over a part, which therefore has two images or more.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

FEWEST_IMAGES = 2
MOST_IMAGES = 1024
STEPS_PER_EPOCH = 16
"""A batch is so small that an epoch has this many steps, however much memory there is."""
DEFAULT_BATCH = 64
"""Of `auto` on a CPU, whose memory is not what limits a batch."""

Result = TypeVar("Result")


def first_that_fits(compute: Callable[[int], Result], candidates: Sequence[int]) -> tuple[Result, int]:
    """Return the result for the first candidate with which the device does not run out of memory, and the candidate.

    Raises torch.OutOfMemoryError: the last one needs too much, too.
    """
    for candidate in candidates[:-1]:
        try:
            return compute(candidate), candidate
        except torch.OutOfMemoryError:
            pass
        # After the block above: while an error is handled, its traceback keeps the tensors of the failed call.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return compute(candidates[-1]), candidates[-1]


def halvings(number: int, fewest: int = FEWEST_IMAGES) -> list[int]:
    """Return the number, its half, and so on, down to `fewest`.

    >>> halvings(20), halvings(1)
    ([20, 10, 5, 2], [1])
    """
    found = [number]
    while found[-1] // 2 >= fewest:
        found.append(found[-1] // 2)
    return found


def doublings(parts: int, num_images: int, fewest: int = FEWEST_IMAGES) -> list[int]:
    """Return numbers of parts, each twice the one before, of which every part has `fewest` images.

    >>> doublings(1, 20), doublings(3, 5)
    ([1, 2, 4, 8], [3])
    """
    found = [parts]
    while num_images // (found[-1] * 2) >= fewest:
        found.append(found[-1] * 2)
    return found


def largest_batch(take_step: Callable[[int], object], num_train: int) -> int:
    """Find the largest batch with which a step fits into memory.

    Args:
        take_step: takes one whole optimizer step with so many images.
        num_train: training images; an epoch keeps 16 steps or more where they suffice.
    Returns:
        Its size, a power of two from 2 to 1024.
    """
    sizes = [size for size in halvings(MOST_IMAGES) if size * STEPS_PER_EPOCH <= num_train] or [FEWEST_IMAGES]
    return first_that_fits(take_step, sizes)[1]
