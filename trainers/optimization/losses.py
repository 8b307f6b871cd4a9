"""Which losses exist: a registry of frozen records.

Every loss is a mean over the images of a batch, of a cross-entropy times a weight that does not depend on
the rest of the batch, so two workers with half a batch each compute what one computes with all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from records.arrays import FloatArray, IntArray
from records.errors import ConfigError
from records.registry import Range, Registered, Registry
from records.taxonomy import Taxonomy
from trainers.optimization.samplers import SAMPLERS

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.settings import TrainersSettings

    LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossContext:
    """What a loss may know of the data.

    Args:
        shown: [C] how often an epoch shows each class, after sampling; not negative.
        miss_costs: [C] of the taxonomy.
    """

    shown: FloatArray
    miss_costs: FloatArray


@dataclass(frozen=True, kw_only=True)
class LossRecipe(Registered):
    """A loss that can be chosen.

    Args:
        factory: (settings, context) -> function of logits [N, C] and labels [N] that returns the mean over N.
    """

    factory: "Callable[[TrainersSettings, LossContext], LossFunction]" = field(repr=False)


def build_loss(settings: "TrainersSettings", labels: IntArray, taxonomy: Taxonomy) -> "LossFunction":
    """Build the chosen loss.

    Args:
        settings: of the trainers.
        labels: [N] class indices of the training images.
        taxonomy: gives class order and miss costs.
    Returns:
        Function of logits [N, C] and labels [N] that returns the mean loss.
    Raises:
        ConfigError: the loss goes by miss costs, and they are all 0 for the classes at hand.
    """
    counts = np.bincount(labels, minlength=len(taxonomy.codes)).astype(np.float64)
    share = SAMPLERS[settings.sampler].share
    shown = counts.copy()
    if share is not None:
        shown[counts > 0] = share(counts[counts > 0])
    costs = np.array([each.miss_cost for each in taxonomy.classes], dtype=np.float64)
    return LOSSES[settings.loss].factory(settings, LossContext(shown / shown.sum() * len(labels), costs))


def class_weights(context: LossContext) -> FloatArray:
    """Return weights under which every class counts the same, with mean 1 over the images shown.

    Args:
        context: how often each class is shown.
    Returns:
        [C]; 0 for a class that is never shown.
    """
    inverse = np.divide(1.0, context.shown, out=np.zeros_like(context.shown), where=context.shown > 0)
    return _with_mean_one(inverse, context.shown)


def cost_weights(context: LossContext) -> FloatArray:
    """Return weights in proportion to the miss costs, with mean 1 over the images shown.

    Args:
        context: costs, and how often each class is shown.
    Returns:
        [C].
    Raises:
        ConfigError: every class that is shown costs nothing.
    """
    if not (context.miss_costs * context.shown).sum() > 0:
        raise ConfigError(
            "trainers.loss is cost_sensitive, and every miss_cost of the taxonomy is 0; give one class a cost above 0"
        )
    return _with_mean_one(context.miss_costs, context.shown)


def _with_mean_one(weights: FloatArray, shown: FloatArray) -> FloatArray:
    return np.asarray(weights * shown.sum() / (weights * shown).sum(), dtype=np.float64)


def _cross_entropy(settings: "TrainersSettings", context: LossContext) -> "LossFunction":
    from torch import nn

    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


def _class_weighted(settings: "TrainersSettings", context: LossContext) -> "LossFunction":
    return _weighted(settings, class_weights(context))


def _cost_sensitive(settings: "TrainersSettings", context: LossContext) -> "LossFunction":
    return _weighted(settings, cost_weights(context))


def _weighted(settings: "TrainersSettings", weights: FloatArray) -> "LossFunction":
    import torch
    from torch.nn.functional import cross_entropy

    table = torch.tensor(weights, dtype=torch.float32)

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        each = cross_entropy(logits, labels, label_smoothing=settings.label_smoothing, reduction="none")
        return (each * table.to(labels.device)[labels]).mean()

    return loss


def _focal(settings: "TrainersSettings", context: LossContext) -> "LossFunction":
    import torch
    from torch.nn.functional import cross_entropy

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        surprise = cross_entropy(logits, labels, reduction="none")
        each = cross_entropy(logits, labels, label_smoothing=settings.label_smoothing, reduction="none")
        # 1 - p without the cancellation near p = 1; the floor keeps the derivative finite there.
        missed = (-torch.expm1(-surprise)).clamp(min=1e-7)
        return (missed**settings.focal_gamma * each).mean()

    return loss


SMOOTHING = Range(0.0, 0.2)

LOSSES: Registry[LossRecipe] = Registry(
    "loss",
    (
        LossRecipe(
            name="cross_entropy",
            description="negative log-likelihood of the true class, with label smoothing on request",
            factory=_cross_entropy,
            tunable={"label_smoothing": SMOOTHING},
        ),
        LossRecipe(
            name="class_weighted",
            description="cross-entropy in which every class counts the same, whatever the sampler shows",
            factory=_class_weighted,
            tunable={"label_smoothing": SMOOTHING},
        ),
        LossRecipe(
            name="focal",
            description="cross-entropy that fades where the answer is right already (Lin et al. 2017)",
            factory=_focal,
            tunable={"focal_gamma": Range(0.5, 3.0), "label_smoothing": SMOOTHING},
        ),
        LossRecipe(
            name="cost_sensitive",
            description="cross-entropy weighted by what the taxonomy says that missing a class costs",
            factory=_cost_sensitive,
            tunable={"label_smoothing": SMOOTHING},
        ),
    ),
)
