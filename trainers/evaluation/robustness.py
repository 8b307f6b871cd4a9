"""What is left of a model under attack: accuracy over a range of epsilons, with intervals by group.

In: a network behind its scaling and calibration, images uint8 [N, S, S, 3] with their classes and groups.
Out: `RobustnessReport`. For PGD, an image that fell at one epsilon stays fallen at larger ones, since the
smaller change is still allowed. FGSM takes one step of full length, so its curve may rise again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from records.arrays import BoolArray, FloatArray, IntArray, UInt8Array
from records.errors import ContractError
from records.taxonomy import Taxonomy
from trainers.evaluation.attacks import PGD_STEPS, Attack, PixelNetwork, attacks_on
from trainers.evaluation.figures import Interval, interval_of
from trainers.evaluation.probes import AttackPoint, RobustnessReport
from vision.metrics.bootstrap import group_strata, resample_weights, resampled_confusions
from vision.metrics.metrics import (
    balanced_accuracy,
    class_rates,
    confusion_matrix,
)

EPSILONS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""In 1/255 of the pixel range."""

PER_CLASS = 20
"""Images of a class that are attacked unless another number is asked for."""

BATCH_SIZE = 32


@dataclass(frozen=True)
class Sample:
    """The images that are attacked, and what their figures are resampled and weighted by."""

    labels: IntArray
    """[N] class indices"""
    group_index: IntArray
    """[N] the independent unit of each image"""
    class_shares: FloatArray
    """[C] of the whole split, so that accuracy does not depend on how the sample was drawn"""
    taxonomy: Taxonomy
    refer_threshold: float | None = None
    """of the key class, on its calibrated probability; None leaves that figure out"""

    @property
    def is_key(self) -> BoolArray:
        """[N]: whether an image is of the key class."""
        key = self.taxonomy.key_class
        return np.asarray(self.labels == (-1 if key is None else self.taxonomy.index_of(key.code)), dtype=np.bool_)


def robustness_curves(
    model: PixelNetwork,
    pixels: UInt8Array,
    sample: Sample,
    *,
    epsilons: Sequence[float] = EPSILONS,
    pgd_steps: int = PGD_STEPS,
    on_batch: Callable[[int], None] | None = None,
) -> RobustnessReport:
    """Attack a sample of images with FGSM and PGD at every epsilon.

    Args:
        model: the network behind its scaling and calibration.
        pixels: [N, S, S, 3], N >= 1.
        sample: what the images are.
        epsilons: in 1/255 of the pixel range, not negative; 0 is added, order does not matter.
        pgd_steps: gradient steps of PGD, at least 1.
        on_batch: told how many images were dealt with, for a progress bar that ends at `work_of`.
    Returns:
        The curves; the point at 0 is the model's answer for the untouched images.
    Raises:
        ContractError: an epsilon is negative, there is no image, or an answer is not finite.
    """
    ascending = sorted({0.0, *(float(epsilon) for epsilon in epsilons)})
    if ascending[0] < 0 or not np.isfinite(ascending).all():
        raise ContractError(f"epsilons must be finite and not negative, got {list(epsilons)}")
    if not len(pixels) == len(sample.labels) >= 1:
        raise ContractError(f"robustness needs an image per label, got {len(pixels)} for {len(sample.labels)}")
    values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255.0
    summary = _Summary(sample)
    clean = _answers(model, values)
    curves: dict[str, list[AttackPoint]] = {}
    for name, attack in attacks_on(model, pgd_steps).items():
        worst = clean
        curves[name] = [summary.point(0.0, clean)]
        for epsilon in ascending[1:]:
            standing = summary.standing(worst) if name == "pgd" else np.ones(len(values), dtype=np.bool_)
            answers = _attacked(model, attack, epsilon / 255.0, values, sample.labels, standing, worst, on_batch)
            worst = summary.worse_of(worst, answers) if name == "pgd" else answers
            curves[name].append(summary.point(epsilon, worst))
    key = sample.taxonomy.key_class
    return RobustnessReport(
        images=len(values),
        groups=summary.num_groups,
        key_class=key.code if key is not None and sample.is_key.any() else None,
        pgd_steps=pgd_steps,
        attacks=curves,
    )


def work_of(num_images: int, epsilons: Sequence[float] = EPSILONS) -> int:
    """Return how many images `robustness_curves` deals with, over both attacks and all epsilons."""
    return 2 * len({0.0, *epsilons} - {0.0}) * num_images


def _attacked(
    model: PixelNetwork,
    attack: Attack,
    epsilon: float,
    values: torch.Tensor,
    labels: IntArray,
    standing: BoolArray,
    before: FloatArray,
    on_batch: Callable[[int], None] | None,
) -> FloatArray:
    """Return probabilities [N, C] after the attack; images that do not stand keep their earlier row."""
    answers = before.copy()
    truth = torch.from_numpy(labels)
    for start in range(0, len(values), BATCH_SIZE):
        batch = start + np.flatnonzero(standing[start : start + BATCH_SIZE])
        if len(batch):
            answers[batch] = _answers(model, attack(values[batch], truth[batch], epsilon))
        if on_batch is not None:
            on_batch(min(BATCH_SIZE, len(values) - start))
    return answers


def _answers(model: PixelNetwork, values: torch.Tensor) -> FloatArray:
    """Return calibrated probabilities [N, C] of pixel values [N, 3, S, S]."""
    with torch.inference_mode():
        parts = [model(values[start : start + BATCH_SIZE]) for start in range(0, len(values), BATCH_SIZE)]
        logits = torch.cat(parts).double()
    if not torch.isfinite(logits).all():
        raise ContractError("the network gives logits that are not finite; such a model cannot be attacked")
    return np.asarray(torch.softmax(logits, dim=1).numpy(), dtype=np.float64)


class _Summary:
    """Turns answers into figures, with the same bootstrap resamples for every point."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._num_classes = len(sample.taxonomy.codes)
        _, self._group_index = np.unique(sample.group_index, return_inverse=True)
        self._weights = resample_weights(group_strata(sample.labels, self._group_index, self._num_classes))
        self.num_groups = self._weights.shape[1]
        self._key_index = int(sample.labels[sample.is_key][0]) if sample.is_key.any() else None

    def standing(self, answers: FloatArray) -> BoolArray:
        """[N]: images that an attack can still take something from."""
        right = answers.argmax(axis=1) == self._sample.labels
        return np.asarray(right | (self._sample.is_key & self._referred(answers)), dtype=np.bool_)

    def worse_of(self, before: FloatArray, after: FloatArray) -> FloatArray:
        """Keep of each image the wrong answer before the right one, else the row that gives its class less."""
        rows = np.arange(len(before))
        labels = self._sample.labels
        was_right, is_right = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
        is_less = after[rows, labels] < before[rows, labels]
        is_worse = np.where(was_right == is_right, is_less, was_right)
        return np.where(is_worse[:, None], after, before)

    def point(self, epsilon: float, answers: FloatArray) -> AttackPoint:
        """Compute the figures of one epsilon."""
        labels, predicted = self._sample.labels, answers.argmax(axis=1)
        confusion = confusion_matrix(labels, predicted, self._num_classes)
        confusions = resampled_confusions(labels, predicted, self._group_index, self._weights, self._num_classes)
        accuracy = self._weighted(class_rates(confusion).sensitivity)
        balanced = float(balanced_accuracy(confusion))
        accuracies = self._weighted(class_rates(confusions).sensitivity)
        return AttackPoint(
            epsilon=epsilon,
            accuracy=float(accuracy),
            accuracy_ci=interval_of(float(accuracy), accuracies, self.num_groups),
            balanced_accuracy=balanced,
            balanced_accuracy_ci=interval_of(balanced, balanced_accuracy(confusions), self.num_groups),
            **self._key_figures(predicted, answers),
        )

    def _weighted(self, sensitivity: FloatArray) -> FloatArray:
        """Accuracy at the class shares of the split, over the classes that were sampled."""
        shares = np.where(np.isnan(sensitivity), 0.0, self._sample.class_shares)
        return np.asarray((np.nan_to_num(sensitivity) * shares).sum(axis=-1) / shares.sum(axis=-1))

    def _key_figures(self, predicted: IntArray, answers: FloatArray) -> dict[str, Any]:
        if self._key_index is None:
            return {}
        sensitivity, interval = self._share(predicted == self._key_index)
        figures: dict[str, Any] = {"key_class_sensitivity": sensitivity, "key_class_sensitivity_ci": interval}
        if self._sample.refer_threshold is not None:
            referred, referred_interval = self._share(self._referred(answers))
            figures |= {"key_class_referred": referred, "key_class_referred_ci": referred_interval}
        return figures

    def _referred(self, answers: FloatArray) -> BoolArray:
        if self._key_index is None or self._sample.refer_threshold is None:
            return np.zeros(len(answers), dtype=np.bool_)
        return np.asarray(answers[:, self._key_index] >= self._sample.refer_threshold, dtype=np.bool_)

    def _share(self, is_hit: BoolArray) -> tuple[float, Interval]:
        """Return the share of hits among the key class's images, with its interval by group."""
        is_key = self._sample.is_key
        members = np.bincount(self._group_index, weights=is_key, minlength=self.num_groups)
        hits = np.bincount(self._group_index, weights=is_key & is_hit, minlength=self.num_groups)
        drawn = self._weights @ members
        samples = np.divide(self._weights @ hits, drawn, out=np.full(len(drawn), np.nan), where=drawn > 0)
        estimate = float(hits.sum() / members.sum())
        return estimate, interval_of(estimate, samples, int((members > 0).sum()))
