"""Learning curves over fixed features: what labels bought, and what further ones would.

In: features [N, D] of labelled images of the train and the val split. Out: recall by class for growing parts of the
labels, resampled over val's groups and over the parts, and the curve a - b n^-c through them. The head is a logistic
regression whose decisions are made at equal class shares, so a mean of recalls is balanced accuracy as the gate reads
it. The network itself is not trained, which the figures cannot show.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.errors import ContractError

PARTS, SMALLEST, SMALLEST_SHARE = 7, 30, 1 / 32
"""Parts of the labels that heads are fitted on, from 30 labels or a 32nd of them to all."""
COMPONENTS = 128
DRAWS, REPLICATES = 5, 400
_STRENGTH = 0.01
_EXPONENTS = np.geomspace(0.1, 2.0, 30)


@dataclass(frozen=True)
class Labelled:
    """Labelled images, one per row.

    Args:
        features: [N, D], finite.
        labels: [N] class indices.
        groups: [N]; images of one lesion share a group.
    """

    features: Float32Array
    labels: IntArray
    groups: NDArray[np.str_]


@dataclass(frozen=True)
class Curve:
    """Recall by class and number of labels.

    Args:
        sizes: [S] labels, growing; the last is all of them.
        class_sizes: [S, C] labels of each class in these.
        recalls: [S, C]; NaN for a class without an image on val.
        replicates: [B, S, C] the same over resampled groups of val and resampled parts of the labels.
    """

    sizes: IntArray
    class_sizes: FloatArray
    recalls: FloatArray
    replicates: FloatArray


def reduced(train: Labelled, val: Labelled) -> tuple[Labelled, Labelled]:
    """Return both with standardised features in at most 128 principal components of train, which needs no labels."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.features)
    scaled = scaler.transform(train.features)
    components = PCA(min(COMPONENTS, *scaled.shape), random_state=0).fit(scaled)
    found = (components.transform(scaled), components.transform(scaler.transform(val.features)))
    few, held = (np.asarray(each, dtype=np.float32) for each in found)
    return Labelled(few, train.labels, train.groups), Labelled(held, val.labels, val.groups)


def right(train: Labelled, val: Labelled, num_classes: int) -> BoolArray:
    """Return which images of val a head that is fitted on train decides right at equal class shares; [M]."""
    from sklearn.linear_model import LogisticRegression

    counts = np.bincount(train.labels, minlength=num_classes)
    if (counts > 0).sum() < 2:
        return np.asarray(val.labels == counts.argmax())
    head = LogisticRegression(C=_STRENGTH, max_iter=2_000).fit(train.features.astype(np.float64), train.labels)
    found = head.predict_proba(val.features.astype(np.float64)) / counts[head.classes_]
    return np.asarray(head.classes_[found.argmax(axis=1)] == val.labels)


def resampled(val: Labelled, num_classes: int, seed: int = 0) -> FloatArray:
    """Return how often each row of val is in each of 400 resamples of its groups, class by class; [B, M]."""
    chance = np.random.default_rng(seed)
    names, first, number = np.unique(val.groups, return_index=True, return_inverse=True)
    times = np.zeros((REPLICATES, len(names)))
    for c in range(num_classes):
        members = np.flatnonzero(val.labels[first] == c)
        if len(members):
            times[:, members] = chance.multinomial(len(members), np.full(len(members), 1 / len(members)), REPLICATES)
    return times[:, number]


def recalls_of(decided: BoolArray, labels: IntArray, weights: FloatArray, num_classes: int) -> FloatArray:
    """Return recall by class and resample.

    Args:
        decided: [..., M] whether a row was decided right.
        labels: [M].
        weights: [B, M].
        num_classes: C.
    Returns:
        [..., B, C]; NaN where a resample has no row of the class.
    """
    found = np.full((*decided.shape[:-1], len(weights), num_classes), np.nan)
    for c in range(num_classes):
        rows = labels == c
        total = weights[:, rows].sum(axis=1)
        hits = decided[..., rows].astype(np.float64) @ weights[:, rows].T
        found[..., c] = np.where(total > 0, hits / np.where(total > 0, total, 1.0), np.nan)
    return found


def learning_curve(train: Labelled, val: Labelled, num_classes: int, seed: int = 0) -> Curve:
    """Fit heads on growing parts of the labels and measure them on val.

    Args:
        train: features as of `reduced`; a part takes groups in random order.
        val: the same features.
        num_classes: C.
        seed: of the parts and of the resamples.
    Returns:
        The curve, each part drawn five times.
    Raises:
        ContractError: there are fewer than 60 labels, or val is empty.
    """
    if len(train.labels) < 2 * SMALLEST or not len(val.labels):
        raise ContractError(
            f"a learning curve needs {2 * SMALLEST} labelled images on train and one on val; there are "
            f"{len(train.labels)} and {len(val.labels)}"
        )
    chance = np.random.default_rng(seed)
    names, number = np.unique(train.groups, return_inverse=True)
    total = len(train.labels)
    wanted = np.geomspace(max(SMALLEST, SMALLEST_SHARE * total), total, PARTS).round().astype(np.int64)
    decided = np.zeros((len(wanted), DRAWS, len(val.labels)), dtype=bool)
    counts = np.zeros((len(wanted), DRAWS, num_classes))
    for draw in range(DRAWS):
        order = np.argsort(chance.permutation(len(names))[number], kind="stable")
        for i, size in enumerate(wanted):
            if size == total and draw > 0:
                decided[i, draw], counts[i, draw] = decided[i, 0], counts[i, 0]
                continue
            rows = order[:size]
            part = Labelled(train.features[rows], train.labels[rows], train.groups[rows])
            decided[i, draw] = right(part, val, num_classes)
            counts[i, draw] = np.bincount(part.labels, minlength=num_classes)
    by_draw = recalls_of(decided, val.labels, resampled(val, num_classes, seed), num_classes)
    mean = recalls_of(decided, val.labels, np.ones((1, len(val.labels))), num_classes)[:, :, 0].mean(axis=1)
    # Each replicate takes other parts of the labels, too.
    taken = chance.integers(DRAWS, size=(REPLICATES, DRAWS))
    replicates = np.stack([by_draw[:, draws, b].mean(axis=1) for b, draws in enumerate(taken)])
    return Curve(wanted, counts.mean(axis=1), mean, replicates)


def fitted(sizes: Sequence[float] | FloatArray | IntArray, values: FloatArray) -> FloatArray:
    """Fit a - b n^-c by least squares; falling curves are allowed, or no gain could ever be refuted.

    Args:
        sizes: [S], above 0, S >= 4, or there is no error that could be small.
        values: [B, S].
    Returns:
        [B, 3] of a, b and c, c from 0.1 to 2.
    """
    powers = np.asarray(sizes, dtype=np.float64)[:, None] ** -_EXPONENTS
    x = powers - powers.mean(axis=0)
    y = values - values.mean(axis=1, keepdims=True)
    slopes = y @ x / np.square(x).sum(axis=0)
    errors = np.square(y[:, :, None] - slopes[:, None, :] * x).sum(axis=1)
    best = errors.argmin(axis=1)
    slope = slopes[np.arange(len(values)), best]
    return np.stack([values.mean(axis=1) - slope * powers.mean(axis=0)[best], -slope, _EXPONENTS[best]], axis=1)


def at(parameters: FloatArray, size: float) -> FloatArray:
    """Return the recall of fitted curves at a number of labels, 0 to 1; [B]."""
    a, b, c = parameters.T
    return np.asarray((a - b * size**-c).clip(0.0, 1.0))


def interval(values: FloatArray) -> tuple[float, float]:
    """Return the 95 % interval of resampled values, those that are not finite left out."""
    kept = values[np.isfinite(values)]
    low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) else (np.nan, np.nan)
    return float(low), float(high)
