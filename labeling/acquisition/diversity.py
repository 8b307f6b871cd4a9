"""Diverse images: k-center, BADGE and TypiClust over feature vectors.

In: features [N, D] and the group of each row. Out: row indices in the order of choice, at most one per group. The
features are read in parts, so a pool in a memory-mapped file does not have to fit into memory.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from records.arrays import BoolArray, Float32Array, FloatArray

Features = NDArray[Any]
"""[N, D], float16 to float64, in memory or memory-mapped."""

_ROWS_AT_ONCE = 16_384
_CENTRES_AT_ONCE = 256
_LEADERS = 4_096
_NEIGHBOURS = 20  # of TypiClust's typicality, as in the paper
_MOST_CLUSTERS = 500
_PASSES = 10  # of k-means over the features; later ones change its inertia by less than 1 %
_MOST_COMPARED = 2_000


def k_center_rows(
    features: Features, groups: NDArray[np.intp], budget: int, known: Features | None = None
) -> list[int]:
    """Take the row that is farthest from all known and taken rows, repeatedly (Sener and Savarese 2018).

    Args:
        features: [N, D] of the pool.
        groups: [N] group number of each row, 0 and up.
        budget: most rows to take.
        known: [M, D] of labelled images; without any, the row farthest from the mean comes first.
    Returns:
        Row indices in the order of taking, one per group.
    """
    start = known if known is not None and len(known) else _mean(features)[None]
    squares = _squares(features)
    centres = np.asarray(start, dtype=np.float32)
    parts = [_nearest_of(part, squares[at : at + len(part)], centres) for at, part in _parts(features)]
    nearest = np.concatenate(parts) if parts else np.empty(0)
    free = np.ones(len(features), dtype=bool)
    taken: list[int] = []
    counted = np.zeros(len(features), dtype=np.intp)
    leaders: NDArray[np.intp] = np.empty(0, dtype=np.intp)
    floor = np.inf
    while len(taken) < budget and free.any():
        leaders = leaders[free[leaders]]
        _count_in(taken, nearest, counted, leaders, features, squares)
        # Lazy greedy: each taken row can only lower the distances of the others. An old distance is therefore an upper
        # bound, and rows whose bound is below the best current distance need no update. Only when all leaders have
        # fallen below the bound of the rest are new leaders chosen.
        while not len(leaders) or nearest[leaders].max() < floor:
            leaders, floor = _leaders(nearest, free)
            _count_in(taken, nearest, counted, leaders, features, squares)
        row = int(leaders[np.argmax(nearest[leaders])])
        taken.append(row)
        free &= groups != groups[row]
    return taken


def _leaders(nearest: FloatArray, free: BoolArray) -> tuple[NDArray[np.intp], float]:
    """Return the free rows with the largest distances known so far, and the upper bound of all other rows."""
    known = np.where(free, nearest, -1.0)
    floor = float(np.partition(known, -_LEADERS)[-_LEADERS]) if len(known) > _LEADERS else 0.0
    return np.flatnonzero(known >= max(floor, 0.0)), floor


def _count_in(
    taken: list[int],
    nearest: FloatArray,
    counted: NDArray[np.intp],
    rows: NDArray[np.intp],
    features: Features,
    squares: FloatArray,
) -> None:
    """Update the distances of some rows with the centres that were taken since the last update of each row."""
    late = rows[counted[rows] < len(taken)]
    if not len(late):
        return
    fresh = taken[int(counted[late].min()) :]
    centres = np.asarray(features[fresh], dtype=np.float32)
    for at in range(0, len(late), _ROWS_AT_ONCE):
        some = late[at : at + _ROWS_AT_ONCE]
        part = np.asarray(features[some], dtype=np.float32)
        nearest[some] = np.minimum(nearest[some], _nearest_of(part, squares[some], centres))
    counted[late] = len(taken)


def badge_rows(
    features: Features, probabilities: FloatArray, groups: NDArray[np.intp], budget: int, chance: np.random.Generator
) -> list[int]:
    """Draw rows whose last-layer gradients are large and differ from each other (BADGE, Ash et al. 2020).

    The gradient of a row is the outer product of (probabilities minus one-hot of the best class) and its features. The
    first row is the one with the largest gradient, the others are k-means++ draws.

    Args:
        features: [N, D].
        probabilities: [N, C], finite.
        groups: [N] group number of each row, 0 and up.
        budget: most rows to take.
        chance: generator of the draws.
    Returns:
        Row indices in the order of drawing, one per group.
    """
    errors = probabilities.astype(np.float32)
    errors[np.arange(len(errors)), probabilities.argmax(axis=1)] -= 1.0
    squares = _squares(features) * np.square(errors).sum(axis=1)
    nearest: FloatArray = np.full(len(features), np.inf)
    free = np.ones(len(features), dtype=bool)
    taken: list[int] = []
    while len(taken) < budget and free.any():
        weights = np.where(free, nearest if taken else squares, 0.0)
        row = _draw(weights, free, chance) if taken else int(np.argmax(np.where(free, squares, -1.0)))
        taken.append(row)
        free &= groups != groups[row]
        centre = np.asarray(features[row], dtype=np.float32)
        # The inner product of two outer products is the product of their factors' inner products, so the [N, C * D]
        # matrix of gradients is never made.
        for at, part in _parts(features):
            here = slice(at, at + len(part))
            along = (part @ centre) * (errors[here] @ errors[row])
            # Rounding can make the distance of two equal rows negative, which no weight of a draw may be.
            distance = np.maximum(squares[here] + squares[row] - 2.0 * along, 0.0)
            np.minimum(nearest[here], distance, out=nearest[here])
    return taken


def typical_rows(
    features: Features, groups: NDArray[np.intp], budget: int, seed: int, known: Features | None = None
) -> list[int]:
    """Take the most typical row of each cluster, large clusters first (TypiClust, Hacohen et al. 2022).

    Args:
        features: [N, D].
        groups: [N] group number of each row, 0 and up.
        budget: most rows to take.
        seed: of the clustering and of the samples in large clusters.
        known: [M, D] of labelled images; clusters with the fewest of them come first.
    Returns:
        Row indices in the order of taking, one per group.
    """
    num_known = 0 if known is None else len(known)
    num_clusters = min(budget + num_known, _MOST_CLUSTERS, len(features))
    if not num_clusters:
        return []
    centres = _cluster_centres(features, num_clusters, seed)
    clusters = _nearest_centre(features, centres)
    covered: NDArray[np.intp] = np.zeros(len(centres), dtype=np.intp)
    if known is not None and num_known:
        covered = np.bincount(_nearest_centre(known, centres), minlength=len(centres)).astype(np.intp)
    sizes = np.bincount(clusters, minlength=len(centres))
    chance = np.random.default_rng(seed)
    members = {c: np.flatnonzero(clusters == c) for c in range(len(centres)) if sizes[c]}
    queues = {c: _by_typicality(features, rows, chance) for c, rows in members.items()}
    free = np.ones(len(features), dtype=bool)
    taken: list[int] = []
    while len(taken) < budget and queues:
        cluster = min(queues, key=lambda c: (covered[c], -sizes[c], c))
        row = next((r for r in queues[cluster] if free[r]), None)
        if row is None:
            del queues[cluster]
            continue
        taken.append(row)
        free &= groups != groups[row]
        covered[cluster] += 1
    return taken


def _cluster_centres(features: Features, num_clusters: int, seed: int) -> Float32Array:
    """Return k-means centres [num_clusters, D], fitted on parts of the features."""
    from sklearn.cluster import MiniBatchKMeans

    chance = np.random.default_rng(seed)
    # No reassignment: it moves the centres of small clusters into large ones, and a small cluster may be a rare
    # diagnosis.
    model = MiniBatchKMeans(num_clusters, random_state=int(chance.integers(2**31)), reassignment_ratio=0.0)
    # The first batch places the centres, so it is drawn from the whole pool and not from its beginning.
    first = np.sort(chance.choice(len(features), min(len(features), _ROWS_AT_ONCE), replace=False))
    model.partial_fit(np.asarray(features[first], dtype=np.float32))
    for _ in range(_PASSES):
        for _, part in _parts(features):
            model.partial_fit(part)
    centres: Float32Array = model.cluster_centers_.astype(np.float32)
    return centres


def _nearest_centre(features: Features, centres: Float32Array) -> NDArray[np.intp]:
    of_centres = np.square(centres).sum(axis=1)
    found = [(of_centres - 2.0 * (part @ centres.T)).argmin(axis=1) for _, part in _parts(features)]
    return np.concatenate(found)


def _by_typicality(features: Features, rows: NDArray[np.intp], chance: np.random.Generator) -> list[int]:
    """Return rows of one cluster, those with the closest neighbours first; in a large one, neighbours in a sample."""
    against = chance.choice(rows, _MOST_COMPARED, replace=False) if len(rows) > _MOST_COMPARED else rows
    others = np.asarray(features[against], dtype=np.float64)
    neighbours = min(_NEIGHBOURS, len(against) - 1)
    mean_distance = np.zeros(len(rows))
    for at in range(0, len(rows) if neighbours else 0, _MOST_COMPARED):
        part = np.asarray(features[rows[at : at + _MOST_COMPARED]], dtype=np.float64)
        squares = np.square(part).sum(axis=1)[:, None] + np.square(others).sum(axis=1) - 2.0 * part @ others.T
        closest = np.sort(np.partition(squares, neighbours, axis=1)[:, : neighbours + 1], axis=1)[:, 1:]
        mean_distance[at : at + len(part)] = np.sqrt(np.maximum(closest, 0.0)).mean(axis=1)
    # Rounded, so that rows with equal distances keep their order whatever the order of summation was.
    return [int(row) for row in rows[np.argsort(mean_distance.round(9), kind="stable")]]


def _draw(weights: FloatArray, free: BoolArray, chance: np.random.Generator) -> int:
    """Draw a row in proportion to its weight; where all are 0, any free one."""
    total = np.cumsum(weights if weights.sum() > 0 else free.astype(np.float64))
    return int(np.searchsorted(total, chance.random() * total[-1], side="right"))


def _squares(features: Features) -> FloatArray:
    parts = [np.square(part, dtype=np.float64).sum(axis=1) for _, part in _parts(features)]
    return np.concatenate(parts) if parts else np.empty(0)


def _nearest_of(part: Float32Array, squares: FloatArray, centres: Float32Array) -> FloatArray:
    """Return each row's squared distance to its nearest centre."""
    nearest: FloatArray = np.full(len(part), np.inf)
    for at in range(0, len(centres), _CENTRES_AT_ONCE):
        some = centres[at : at + _CENTRES_AT_ONCE]
        distances = np.square(some, dtype=np.float64).sum(axis=1) - 2.0 * (part @ some.T)
        np.minimum(nearest, distances.min(axis=1), out=nearest)
    return np.maximum(nearest + squares, 0.0)


def _mean(features: Features) -> Float32Array:
    total = np.zeros(features.shape[1])
    for _, part in _parts(features):
        total += part.sum(axis=0, dtype=np.float64)
    return (total / max(len(features), 1)).astype(np.float32)


def _parts(features: Features) -> Iterator[tuple[int, Float32Array]]:
    for at in range(0, len(features), _ROWS_AT_ONCE):
        yield at, np.asarray(features[at : at + _ROWS_AT_ONCE], dtype=np.float32)
