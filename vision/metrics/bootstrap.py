"""Bootstrap by group within class, and samples by group.

Images of one group (lesion, patient) are not independent, so whole groups are drawn, as many of each class as there
are. A resample is a row of weights: how often each group was drawn. Metrics that are functions of counts per class
then cost three matrix products for all resamples. Equal seeds and equal groups give equal weights, so two models are
compared pairwise by using the same weights.
"""

import numpy as np

from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.errors import ContractError
from vision.metrics.metrics import ClassCounts

NUM_RESAMPLES = 1000
LEVEL = 0.95


def group_strata(labels: IntArray, group_index: IntArray, num_classes: int) -> IntArray:
    """Return the class that each group is resampled within.

    A group with images of several classes belongs to its most frequent one, at a tie to the one
    that fewer images have.

    Args:
        labels: [N] class indices.
        group_index: [N], 0 to G - 1, every group at least once.
        num_classes: C.
    Returns:
        [G] class indices.
    """
    counts = np.zeros((int(group_index.max()) + 1, num_classes))
    np.add.at(counts, (group_index, labels), 1.0)
    rarity = 1.0 / (1.0 + counts.sum(axis=0))
    # Added weights stay under one image, so they decide between equal counts only.
    return np.asarray((counts + 0.5 * rarity / rarity.max()).argmax(axis=1), dtype=np.int64)


def resample_weights(strata: IntArray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Float32Array:
    """Draw bootstrap resamples of groups, with replacement within each stratum.

    Args:
        strata: [G] the stratum of each group.
        num_resamples: R.
        seed: of the generator.
    Returns:
        [R, G]: how often each group was drawn; within a stratum each row sums to the stratum's size.
    """
    generator = np.random.default_rng(seed)
    weights = np.zeros((num_resamples, len(strata)), dtype=np.float32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        # Multinomial counts are what n draws with replacement from n groups give.
        weights[:, members] = generator.multinomial(
            len(members), np.full(len(members), 1.0 / len(members)), size=num_resamples
        )
    return weights


def resampled_counts(
    labels: IntArray, predicted: IntArray, group_index: IntArray, weights: Float32Array, num_classes: int
) -> ClassCounts:
    """Count the cases per class of every resample.

    Args:
        labels: [N] class indices.
        predicted: [N] class indices.
        group_index: [N], 0 to G - 1.
        weights: [R, G] from `resample_weights`.
        num_classes: C.
    Returns:
        The counts, each [R, C].
    Raises:
        ContractError: the groups do not fit the weights.
    """
    num_groups = weights.shape[1]
    if len(group_index) and int(group_index.max()) >= num_groups:
        raise ContractError(f"group index {int(group_index.max())} is outside the {num_groups} groups of the weights")

    def resampled(rows: BoolArray, classes: IntArray) -> FloatArray:
        # One row of counts per group first. Counts below 2^24 are exact in float32.
        flat = group_index[rows] * num_classes + classes[rows]
        by_group = np.bincount(flat, minlength=num_groups * num_classes).reshape(num_groups, num_classes)
        return (weights @ by_group.astype(np.float32)).astype(np.float64)

    all_rows = np.ones(len(labels), dtype=bool)
    return ClassCounts(
        resampled(labels == predicted, labels), resampled(all_rows, labels), resampled(all_rows, predicted)
    )


def percentile_interval(values: FloatArray, level: float = LEVEL) -> FloatArray:
    """Take the central interval of resampled values, leaving out resamples where they are undefined.

    Args:
        values: [R, ...], NaN = undefined in that resample.
        level: share of the resamples inside, 0 to 1.
    Returns:
        [2, ...]: lower and upper end; NaN where no resample is defined.
    """
    tail = (1.0 - level) / 2
    # nanquantile warns where no resample is defined; those ends stay NaN.
    defined = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    if defined.any():
        ends[:, defined] = np.nanquantile(values[:, defined], [tail, 1.0 - tail], axis=0)
    return ends


def stratified_sample(labels: IntArray, group_index: IntArray, per_class: int, *, seed: int = 0) -> IntArray:
    """Draw at most `per_class` images of every class, from as many groups as possible.

    A group gives its second image only when every group of the class has given its first.

    Args:
        labels: [N] class indices.
        group_index: [N], 0 to G - 1, the independent unit of each image.
        per_class: largest number of images of a class, at least 1.
        seed: of the permutation.
    Returns:
        Image indices, ascending; equal arguments give equal samples.
    """
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        rank = np.zeros(len(members), dtype=np.int64)
        seen: dict[int, int] = {}
        # rank: how many images of its group precede it. Sorted by it, every group gives one image before any gives two.
        for position, group in enumerate(group_index[members].tolist()):
            rank[position] = seen.get(group, 0)
            seen[group] = int(rank[position]) + 1
        chosen.extend(members[np.argsort(rank, kind="stable")][:per_class].tolist())
    return np.array(sorted(chosen), dtype=np.int64)
