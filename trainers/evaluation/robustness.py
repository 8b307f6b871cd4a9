"""Robustness to adversarial changes: FGSM and PGD, and the metrics over a range of epsilons.

In: a network behind its scaling and calibration, images uint8 [N, S, S, 3] with their classes and groups. Out:
`RobustnessReport`, with intervals by group. Attacks work on pixel values in [0, 1] through calibration, network and
scaling; changed values are not rounded to whole colour values, so a file of them would be a little weaker.
For PGD, an image misclassified at one epsilon stays so at larger ones, since the smaller change is still allowed.
FGSM takes one step of full length, so its curve may rise again. (Goodfellow et al. 2015; Madry et al. 2018; computed
by captum.robust.)
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from captum.robust import FGSM, PGD
from torch import Tensor, nn

from records.arrays import BoolArray, FloatArray, IntArray, UInt8Array
from records.bundles import Calibration, DecisionRule, Geometry
from records.errors import ContractError
from records.taxonomy import Taxonomy
from trainers.evaluation.figures import AttackPoint, Interval, RobustnessReport, interval_of, rate_by_group
from vision.calibration.decision import labels_of
from vision.metrics.bootstrap import group_strata, resample_weights, resampled_counts
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

PGD_STEPS = 10
STEP_SHARE = 2.5
"""A PGD step is this times epsilon over the number of steps, so that the border can be reached and left."""

Attack = Callable[[Tensor, Tensor, float], Tensor]
"""(values [N, 3, S, S], labels [N], epsilon as a share of the pixel range) -> changed values"""


class PixelNetwork(nn.Module):
    """A network behind its scaling and calibration: pixel values in [0, 1] in, calibrated logits out.

    Args:
        network: [N, 3, S, S], scaled -> logits [N, C], fp32; put into evaluation mode, its parameters need no gradient.
        geometry: gives the scaling, mean and standard deviation.
        calibration: temperature and bias; None leaves the logits as they are.
    """

    def __init__(self, network: nn.Module, geometry: Geometry, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._is_min_max = geometry.scaling == "min_max"
        self._mean = torch.tensor(geometry.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(geometry.std).view(1, 3, 1, 1)
        self._temperature = calibration.temperature if calibration else 1.0
        self._bias = torch.tensor(calibration.bias) if calibration else torch.zeros(())

    def forward(self, values: Tensor) -> Tensor:
        """Return calibrated logits [N, C] of pixel values [N, 3, S, S] in [0, 1]; differentiable."""
        # Mirrors `vision.preprocess.scale_pixels`, which works on uint8 and in place: this one must be differentiable.
        # The clamp is one colour value, as there, so that an image of one colour becomes 0.
        if self._is_min_max:
            low = values.amin(dim=(1, 2, 3), keepdim=True)
            high = values.amax(dim=(1, 2, 3), keepdim=True)
            scaled = (values - low) / (high - low).clamp(min=1.0 / 255.0)
        else:
            scaled = (values - self._mean) / self._std
        logits: Tensor = self.network(scaled.contiguous(memory_format=torch.channels_last))
        return logits / self._temperature + self._bias


def attacks_on(model: PixelNetwork, pgd_steps: int = PGD_STEPS) -> dict[str, Attack]:
    """Return `fgsm`, one step of length epsilon, and `pgd`, small steps kept within epsilon of the image."""
    fgsm = FGSM(model, loss_func=_loss, lower_bound=0.0, upper_bound=1.0)
    pgd = PGD(model, loss_func=_loss, lower_bound=0.0, upper_bound=1.0)
    # captum skips pixels whose gradient is below 1e-6; some networks would look robust for that reason alone.
    fgsm.zero_thresh = pgd.fgsm.zero_thresh = 0.0

    def by_fgsm(values: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        # A copy, because captum makes its input require gradients.
        return _quietly(lambda: fgsm.perturb(values.clone(), epsilon, labels))

    def by_pgd(values: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        step = STEP_SHARE * epsilon / pgd_steps
        return _quietly(lambda: pgd.perturb(values.clone(), epsilon, step, pgd_steps, labels))

    return {"fgsm": by_fgsm, "pgd": by_pgd}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log-sum-exp of the other classes' logits minus the true class's logit, [N].

    The cross-entropy is log(1 + exp(this)), so both gradients have the same signs. But the gradient of the
    cross-entropy vanishes in fp32 where the network is confident, which would make such a network look robust.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]


def _quietly(perturb: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        # captum requires gradients of its own copies, and warns about it.
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require gradients")
        return perturb().detach()


@dataclass(frozen=True)
class Sample:
    """The attacked images with what their metrics are resampled and weighted by."""

    labels: IntArray
    """[N] class indices"""
    group_index: IntArray
    """[N] the independent unit of each image"""
    class_shares: FloatArray
    """[C] of the whole split, so that accuracy does not depend on how the sample was drawn"""
    taxonomy: Taxonomy
    refer_threshold: float | None = None
    """of the key class, on its calibrated probability; None leaves that figure out"""
    decision: DecisionRule = field(default_factory=DecisionRule)
    """which class is the label"""

    @property
    def is_key(self) -> BoolArray:
        """[N]: whether an image is of the key class."""
        key = self.taxonomy.key_class
        # No label is -1: without a key class no image is of it.
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
        on_batch: called with the number of images processed, for a progress bar that ends at `work_of`.
    Returns:
        The curves; the point at 0 is for the untouched images.
    Raises:
        ContractError: an epsilon is negative, there is no image, or a logit is not finite.
    """
    ascending = sorted({0.0, *(float(epsilon) for epsilon in epsilons)})
    if ascending[0] < 0 or not np.isfinite(ascending).all():
        raise ContractError(f"epsilons must be finite and not negative, got {list(epsilons)}")
    if not len(pixels) == len(sample.labels) >= 1:
        raise ContractError(f"robustness needs an image per label, got {len(pixels)} for {len(sample.labels)}")
    values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255.0
    summary = _Summary(sample)
    clean = _probabilities(model, values)
    curves: dict[str, list[AttackPoint]] = {}
    for name, attack in attacks_on(model, pgd_steps).items():
        worst = clean
        curves[name] = [summary.point(0.0, clean)]
        for epsilon in ascending[1:]:
            # PGD leaves out images whose metrics cannot fall further, which saves most passes at large epsilons. FGSM
            # attacks all of them, since its longer step may miss.
            standing = summary.standing(worst) if name == "pgd" else np.ones(len(values), dtype=np.bool_)
            after = _attacked(model, attack, epsilon / 255.0, values, sample.labels, standing, worst, on_batch)
            worst = summary.worse_of(worst, after) if name == "pgd" else after
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
    """Return how many images `robustness_curves` processes, over both attacks and all epsilons."""
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
    after = before.copy()
    truth = torch.from_numpy(labels)
    for start in range(0, len(values), BATCH_SIZE):
        batch = start + np.flatnonzero(standing[start : start + BATCH_SIZE])
        if len(batch):
            after[batch] = _probabilities(model, attack(values[batch], truth[batch], epsilon))
        # Images left out count as processed, so that the progress bar reaches its end.
        if on_batch is not None:
            on_batch(min(BATCH_SIZE, len(values) - start))
    return after


def _probabilities(model: PixelNetwork, values: torch.Tensor) -> FloatArray:
    """Return calibrated probabilities [N, C] of pixel values [N, 3, S, S]."""
    with torch.inference_mode():
        parts = [model(values[start : start + BATCH_SIZE]) for start in range(0, len(values), BATCH_SIZE)]
        # Softmax in float64 keeps tiny probabilities of the true class comparable in `worse_of`.
        logits = torch.cat(parts).double()
    if not torch.isfinite(logits).all():
        raise ContractError("the network gives logits that are not finite; such a model cannot be attacked")
    return np.asarray(torch.softmax(logits, dim=1).numpy(), dtype=np.float64)


class _Summary:
    """Computes metrics from probabilities [N, C], with the same bootstrap resamples for every point."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._num_classes = len(sample.taxonomy.codes)
        _, self._group_index = np.unique(sample.group_index, return_inverse=True)
        self._weights = resample_weights(group_strata(sample.labels, self._group_index, self._num_classes))
        self.num_groups = self._weights.shape[1]
        self._key_index = int(sample.labels[sample.is_key][0]) if sample.is_key.any() else None

    def standing(self, probabilities: FloatArray) -> BoolArray:
        """[N]: images whose metrics an attack can still lower."""
        # An image of the key class counts until it is neither predicted as such nor referred: both shares are reported.
        right = self._labels_of(probabilities) == self._sample.labels
        return np.asarray(right | (self._sample.is_key & self._referred(probabilities)), dtype=np.bool_)

    def worse_of(self, before: FloatArray, after: FloatArray) -> FloatArray:
        """Return per image the misclassified row if one is, else the row with the lower probability of its class."""
        rows = np.arange(len(before))
        labels = self._sample.labels
        # By probability alone, a correct row could win over a misclassified one that gives the true class more.
        was_right, is_right = self._labels_of(before) == labels, self._labels_of(after) == labels
        is_less = after[rows, labels] < before[rows, labels]
        is_worse = np.where(was_right == is_right, is_less, was_right)
        return np.where(is_worse[:, None], after, before)

    def point(self, epsilon: float, probabilities: FloatArray) -> AttackPoint:
        """Compute the metrics of one epsilon."""
        labels, predicted = self._sample.labels, self._labels_of(probabilities)
        confusion = confusion_matrix(labels, predicted, self._num_classes)
        resampled = resampled_counts(labels, predicted, self._group_index, self._weights, self._num_classes)
        accuracy = self._weighted(class_rates(confusion).sensitivity)
        balanced = float(balanced_accuracy(confusion))
        accuracies = self._weighted(class_rates(resampled).sensitivity)
        return AttackPoint(
            epsilon=epsilon,
            accuracy=float(accuracy),
            accuracy_ci=interval_of(float(accuracy), accuracies, self.num_groups),
            balanced_accuracy=balanced,
            balanced_accuracy_ci=interval_of(balanced, balanced_accuracy(resampled), self.num_groups),
            **self._key_figures(predicted, probabilities),
        )

    def _labels_of(self, probabilities: FloatArray) -> IntArray:
        return labels_of(probabilities, self._sample.decision)

    def _weighted(self, sensitivity: FloatArray) -> FloatArray:
        """Accuracy at the class shares of the split, over the classes that were sampled."""
        # A class without sampled images has no sensitivity; leaving out its share differs from counting it as 0.
        shares = np.where(np.isnan(sensitivity), 0.0, self._sample.class_shares)
        return np.asarray((np.nan_to_num(sensitivity) * shares).sum(axis=-1) / shares.sum(axis=-1))

    def _key_figures(self, predicted: IntArray, probabilities: FloatArray) -> dict[str, Any]:
        if self._key_index is None:
            return {}
        sensitivity, interval = self._rate(predicted == self._key_index)
        figures: dict[str, Any] = {"key_class_sensitivity": sensitivity, "key_class_sensitivity_ci": interval}
        if self._sample.refer_threshold is not None:
            referred, referred_interval = self._rate(self._referred(probabilities))
            figures |= {"key_class_referred": referred, "key_class_referred_ci": referred_interval}
        return figures

    def _referred(self, probabilities: FloatArray) -> BoolArray:
        if self._key_index is None or self._sample.refer_threshold is None:
            return np.zeros(len(probabilities), dtype=np.bool_)
        return np.asarray(probabilities[:, self._key_index] >= self._sample.refer_threshold, dtype=np.bool_)

    def _rate(self, is_hit: BoolArray) -> tuple[float | None, Interval | None]:
        return rate_by_group(is_hit, self._sample.is_key, self._group_index, self._weights)
