"""Which losses exist: a registry of frozen records."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainers.registry import Range, Registered, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.settings import TrainersSettings

    LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LossRecipe(Registered):
    """A loss that can be chosen.

    Args:
        factory: settings -> function of logits [N, C] and labels [N] that returns the mean over N.
    """

    factory: "Callable[[TrainersSettings], LossFunction]" = field(repr=False)


def _cross_entropy(settings: "TrainersSettings") -> "LossFunction":
    from torch import nn

    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


LOSSES: Registry[LossRecipe] = Registry(
    "loss",
    (
        LossRecipe(
            name="cross_entropy",
            description="negative log-likelihood of the true class, with label smoothing on request",
            factory=_cross_entropy,
            tunable={"label_smoothing": Range(0.0, 0.2)},
        ),
    ),
)
