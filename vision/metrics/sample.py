"""A bounded sample of labelled images, for what is too slow to measure on all of them."""

import numpy as np

from records.arrays import IntArray


def stratified_sample(labels: IntArray, group_index: IntArray, per_class: int, *, seed: int = 0) -> IntArray:
    """Draw up to so many images of every class, from as many groups as possible.

    A group gives its second image only when every group of the class has given its first.

    Args:
        labels: [N] class indices.
        group_index: [N], 0 to G - 1, the independent unit of each image.
        per_class: largest number of images of a class, at least 1.
        seed: of the draw.
    Returns:
        Image indices, ascending; equal arguments give equal samples.
    """
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        turn = np.zeros(len(members), dtype=np.int64)
        seen: dict[int, int] = {}
        for position, group in enumerate(group_index[members].tolist()):
            turn[position] = seen.get(group, 0)
            seen[group] = int(turn[position]) + 1
        chosen.extend(members[np.argsort(turn, kind="stable")][:per_class].tolist())
    return np.array(sorted(chosen), dtype=np.int64)
