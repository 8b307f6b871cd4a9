"""Which losses exist: a registry of frozen records, and the settings that choose one.

Every loss is a mean over the images of a batch, of a cross-entropy times a weight that does not depend on
the rest of the batch, so two workers with half a batch each compute what one computes with all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from records.arrays import FloatArray, IntArray
from records.errors import ConfigError
from records.registry import Range, Registered, Registry
from records.settings import RoomSettings, checked_by
from records.taxonomy import Taxonomy
from trainers.optimization.samplers import SAMPLERS

if TYPE_CHECKING:
    from torch import Tensor

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

    factory: "Callable[[LossSettings, LossContext], LossFunction]" = field(repr=False)


def class_weights(context: LossContext) -> FloatArray:
    """Return weights under which every class counts the same, with mean 1 over the images shown.

    Returns [C]; 0 for a class that is never shown.
    """
    # Classes that are never shown get weight 0 instead of infinity.
    inverse = np.divide(1.0, context.shown, out=np.zeros_like(context.shown), where=context.shown > 0)
    return _with_mean_one(inverse, context.shown)


def cost_weights(context: LossContext) -> FloatArray:
    """Return weights in proportion to the miss costs, with mean 1 over the images shown.

    Returns [C].
    Raises ConfigError: every class that is shown costs nothing.
    """
    if not (context.miss_costs * context.shown).sum() > 0:
        raise ConfigError(
            "trainers.loss.name is cost_sensitive, and every miss_cost of the taxonomy is 0; give one class a cost "
            "above 0"
        )
    return _with_mean_one(context.miss_costs, context.shown)


def _with_mean_one(weights: FloatArray, shown: FloatArray) -> FloatArray:
    return np.asarray(weights * shown.sum() / (weights * shown).sum(), dtype=np.float64)


def _cross_entropy(settings: "LossSettings", context: LossContext) -> "LossFunction":
    from torch import nn

    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


def _class_weighted(settings: "LossSettings", context: LossContext) -> "LossFunction":
    return _weighted(settings, class_weights(context))


def _cost_sensitive(settings: "LossSettings", context: LossContext) -> "LossFunction":
    return _weighted(settings, cost_weights(context))


def _weighted(settings: "LossSettings", weights: FloatArray) -> "LossFunction":
    import torch
    from torch.nn.functional import cross_entropy

    # Not CrossEntropyLoss(weight=): its mean divides by the batch's weights, and two half batches would not add up to
    # the whole one.
    table = torch.tensor(weights, dtype=torch.float32)

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        each = cross_entropy(logits, labels, label_smoothing=settings.label_smoothing, reduction="none")
        return (each * table.to(labels.device)[labels]).mean()

    return loss


def logit_shifts(context: LossContext, strength: float) -> FloatArray:
    """Return what a loss adds to the logits: `strength` times the logarithm of each class's share of the images shown.

    Returns [C]; a class that is never shown counts as half an image, so that its logit is finite and falls.
    """
    shares = np.maximum(context.shown, 0.5) / context.shown.sum()
    return np.asarray(strength * np.log(shares), dtype=np.float64)


def _logit_adjusted(settings: "LossSettings", context: LossContext) -> "LossFunction":
    import torch
    from torch.nn.functional import cross_entropy

    shifts = torch.tensor(logit_shifts(context, settings.adjust_strength), dtype=torch.float32)

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        shifted = logits + shifts.to(logits.device)
        return cross_entropy(shifted, labels, label_smoothing=settings.label_smoothing)

    return loss


def _focal(settings: "LossSettings", context: LossContext) -> "LossFunction":
    import torch
    from torch.nn.functional import cross_entropy

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        # The focal weight needs the true probability, so it is computed without label smoothing; the loss has it.
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
            description="cross-entropy that fades where the prediction is right already (Lin et al. 2017)",
            factory=_focal,
            tunable={"focal_gamma": Range(0.5, 3.0), "label_smoothing": SMOOTHING},
        ),
        LossRecipe(
            name="cost_sensitive",
            description="cross-entropy weighted by what the taxonomy says that missing a class costs",
            factory=_cost_sensitive,
            tunable={"label_smoothing": SMOOTHING},
        ),
        LossRecipe(
            name="logit_adjusted",
            description="cross-entropy of logits plus the logarithm of the class shares (Menon et al. 2021)",
            factory=_logit_adjusted,
            tunable={"adjust_strength": Range(0.5, 1.5), "label_smoothing": SMOOTHING},
        ),
    ),
)


class LossSettings(RoomSettings):
    """What is minimized."""

    name: Annotated[str, checked_by(LOSSES.__getitem__)] = Field(
        default="cross_entropy", description="see `relook catalog losses`"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the label spread over all classes")
    focal_gamma: float = Field(
        default=2.0, ge=0, le=10, allow_inf_nan=False, description="how fast the focal loss fades; 0 is cross-entropy"
    )
    adjust_strength: float = Field(
        default=1.0,
        ge=0,
        le=4,
        allow_inf_nan=False,
        description="how much the logit-adjusted loss takes the class shares away; 0 is cross-entropy, 1 all of them",
    )
    distill_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of a teacher in the loss, with `--distill-from`; labels have the rest",
    )
    distill_temperature: float = Field(
        default=2.0, gt=0, le=20, description="softens probabilities of teacher and student, with `--distill-from`"
    )


def build_loss(settings: LossSettings, labels: IntArray, taxonomy: Taxonomy, *, sampler: str) -> "LossFunction":
    """Build the chosen loss.

    Args:
        settings: the chosen loss and its numbers.
        labels: [N] class indices of the training images.
        taxonomy: gives class order and miss costs.
        sampler: in `SAMPLERS`; it decides how often a class is shown, which class weights correct for.
    Returns:
        Function of logits [N, C] and labels [N] that returns the mean loss.
    Raises:
        ConfigError: the loss goes by miss costs, and they are all 0 for the classes at hand.
    """
    counts = np.bincount(labels, minlength=len(taxonomy.codes)).astype(np.float64)
    share = SAMPLERS[sampler].share
    shown = counts.copy()
    if share is not None:
        shown[counts > 0] = share(counts[counts > 0])
    costs = np.array([each.miss_cost for each in taxonomy.classes], dtype=np.float64)
    return LOSSES[settings.name].factory(settings, LossContext(shown / shown.sum() * len(labels), costs))
