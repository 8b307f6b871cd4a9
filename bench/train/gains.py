"""Figures of several trainings on val, and what one recipe gains on another, with intervals over lesions.

The first row that a `Judge` is given is the base that the others are compared with, seed by seed.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from records.arrays import Float32Array, FloatArray, IntArray
from records.datasets import DatasetVersion
from records.store import Store, find_images
from records.types import Split
from vision.calibration.operating import Lesions, gather_lesions
from vision.metrics.bootstrap import group_strata, percentile_interval, resample_weights, resampled_counts
from vision.metrics.metrics import balanced_accuracy

SPECIFICITY = 0.72
FIGURES = ("equal_prevalence", "macro_auc", "sensitivity")


@dataclass
class Judge:
    """Val, and resamples of its lesions.

    Args:
        image_ids: [N].
        lesion_ids: [N].
        labels: [N] class indices.
        key_class: index of the class whose sensitivity is measured.
        group_index: [N] the independent unit of each image.
        weights: [1 + R, G]; the first row counts every group once.
    """

    image_ids: list[str] = field(repr=False)
    lesion_ids: list[str | None] = field(repr=False)
    labels: IntArray = field(repr=False)
    num_classes: int
    key_class: int
    group_index: IntArray = field(repr=False)
    weights: Float32Array = field(repr=False)
    _base: FloatArray | None = None

    @classmethod
    def of(cls, store: Store, dataset: DatasetVersion) -> "Judge":
        """Read val of a dataset version; its taxonomy has a key class."""
        rows, taxonomy = dataset.split(Split.VAL), store.taxonomy
        assert taxonomy.key_class is not None
        image_ids = [str(one) for one in rows["image_id"]]
        labels = np.array([taxonomy.index_of(str(label)) for label in rows["label"]], dtype=np.int64)
        _, group_index = np.unique(rows["group_id"].to_numpy(dtype=str), return_inverse=True)
        drawn = resample_weights(group_strata(labels, group_index, len(taxonomy.codes)))
        return cls(
            image_ids=image_ids,
            lesion_ids=[image.lesion_id for image in find_images(store, image_ids)],
            labels=labels,
            num_classes=len(taxonomy.codes),
            key_class=taxonomy.index_of(taxonomy.key_class.code),
            group_index=group_index,
            weights=np.concatenate([np.ones((1, drawn.shape[1]), dtype=np.float32), drawn]),
        )

    def row(self, name: str, probabilities: list[FloatArray]) -> dict[str, Any]:
        """Return the figures of one recipe: mean and range over its seeds, and its gain with the interval.

        Args:
            name: of the row.
            probabilities: per seed [N, C], calibrated on val.
        Returns:
            Per figure (mean, lowest, highest), and, but for the base, (gain, low end, high end).
        """
        # [seeds, figures, 1 + R]
        found = np.stack([self._figures(one) for one in probabilities])
        row: dict[str, Any] = {"name": name}
        base = self._base
        if base is None:
            self._base = base = found
        for number, figure in enumerate(FIGURES):
            here = found[:, number]
            row[figure] = [round(float(value), 4) for value in (here[:, 0].mean(), here[:, 0].min(), here[:, 0].max())]
            if base is found:
                ends = percentile_interval(here[:, 1:].mean(axis=0))
                row[f"{figure}_interval"] = [round(float(end), 4) for end in ends]
                continue
            gain = (here - base[: len(here), number]).mean(axis=0)
            row[f"{figure}_gain"] = [round(float(value), 4) for value in (gain[0], *percentile_interval(gain[1:]))]
        return row

    def _figures(self, probabilities: FloatArray) -> FloatArray:
        shares = np.bincount(self.labels, minlength=self.num_classes) / len(self.labels)
        even = np.divide(probabilities, shares, out=np.zeros_like(probabilities), where=shares > 0)
        counts = resampled_counts(self.labels, even.argmax(axis=1), self.group_index, self.weights, self.num_classes)
        by_image = self.weights[:, self.group_index]
        there = np.flatnonzero(shares > 0)
        aucs = [weighted_auc(probabilities[:, at], self.labels == at, by_image) for at in there]
        lesions = gather_lesions(self.image_ids, self.lesion_ids, self.labels, probabilities)
        found = self._sensitivity(lesions)
        return np.stack([balanced_accuracy(counts), np.mean(aucs, axis=0), found])

    def _sensitivity(self, lesions: Lesions) -> FloatArray:
        by_lesion = self.weights[:, self.group_index[lesions.first_image_index]]
        is_case = lesions.labels == self.key_class
        return sensitivity_at(lesions.probabilities[:, self.key_class], is_case, by_lesion, SPECIFICITY)


def weighted_auc(scores: FloatArray, is_case: Any, weights: Float32Array) -> FloatArray:
    """Return the area under the ROC curve of each resample; equal scores count in the order that they come in.

    Args:
        scores: [N].
        is_case: [N].
        weights: [R, N], how often each row was drawn.
    Returns:
        [R].

    >>> weighted_auc(np.array([0.1, 0.4, 0.3, 0.8]), np.array([False, False, True, True]), np.ones((1, 4))).tolist()
    [0.75]
    """
    order = np.argsort(scores, kind="stable")
    drawn, cases = weights[:, order].astype(np.float64), is_case[order]
    below = np.cumsum(drawn * ~cases, axis=1)
    return np.asarray((drawn * cases * below).sum(axis=1) / ((drawn * cases).sum(axis=1) * below[:, -1]))


def sensitivity_at(scores: FloatArray, is_case: Any, weights: Float32Array, specificity: float) -> FloatArray:
    """Return the share of cases above the lowest threshold that keeps a specificity, in each resample.

    Args:
        scores: [L].
        is_case: [L].
        weights: [R, L], how often each row was drawn.
        specificity: share of the others below the threshold, at least.
    Returns:
        [R].

    >>> some = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, False, False])
    >>> sensitivity_at(*some, np.ones((1, 5)), 0.7).tolist(), sensitivity_at(*some, np.ones((1, 5)), 0.6).tolist()
    ([0.5], [1.0])
    """
    order = np.argsort(-scores, kind="stable")
    drawn, cases = weights[:, order].astype(np.float64), is_case[order]
    others = np.cumsum(drawn * ~cases, axis=1)
    kept = others <= (1.0 - specificity) * others[:, -1:] + 1e-9
    return np.asarray((drawn * cases * kept).sum(axis=1) / (drawn * cases).sum(axis=1))
