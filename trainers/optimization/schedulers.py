"""Which learning-rate schedules exist: a registry of frozen records, and the settings that choose one.

A schedule moves after every step, after every epoch, or after every epoch by the validation score; its record says
which (`moves`), and the loop calls it accordingly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from records.registry import Range, Registered, Registry
from records.settings import RoomSettings, checked_by

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, kw_only=True)
class SchedulerRecipe(Registered):
    """A schedule that can be chosen.

    Args:
        factory: (optimizer, settings, epochs, steps per epoch) -> the schedule.
        moves: after every `step`, every `epoch`, or every epoch by the validation `score` (higher is better).
    """

    factory: "Callable[[Optimizer, SchedulerSettings, int, int], LRScheduler]" = field(repr=False)
    moves: Literal["step", "epoch", "score"]

    def facts(self) -> dict[str, Any]:
        """Return when it moves."""
        return {"moves": self.moves}


def _step(optimizer: "Optimizer", settings: "SchedulerSettings", epochs: int, steps_per_epoch: int) -> "LRScheduler":
    from torch.optim.lr_scheduler import StepLR

    return StepLR(optimizer, step_size=settings.step_size_epochs, gamma=settings.gamma)


def _plateau(optimizer: "Optimizer", settings: "SchedulerSettings", epochs: int, steps_per_epoch: int) -> "LRScheduler":
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    # Scores are balanced accuracies: the relative threshold of 1e-3 ignores gains below a tenth of a percent.
    return ReduceLROnPlateau(
        optimizer, mode="max", factor=settings.gamma, patience=settings.plateau_patience_epochs, threshold=1e-3
    )


def _cosine(optimizer: "Optimizer", settings: "SchedulerSettings", epochs: int, steps_per_epoch: int) -> "LRScheduler":
    from torch.optim.lr_scheduler import LambdaLR

    total = epochs * steps_per_epoch
    # A run of one epoch warms up too, over a part of it.
    warm_up = min(settings.warmup_epochs * steps_per_epoch, total / 4)

    def factor(step: int) -> float:
        if step < warm_up:
            return float((step + 1) / (warm_up + 1))
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1.0, total - warm_up))))

    return LambdaLR(optimizer, factor)


def _onecycle(
    optimizer: "Optimizer", settings: "SchedulerSettings", epochs: int, steps_per_epoch: int
) -> "LRScheduler":
    from torch.optim.lr_scheduler import OneCycleLR

    # Momentum is cycled where momentum is what the settings chose; Adam's betas are left alone.
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        # One more than the steps taken: OneCycleLR steps once when it is built, and raises beyond its total.
        total_steps=epochs * steps_per_epoch + 1,
        cycle_momentum=bool(optimizer.defaults.get("momentum")),
    )


GAMMA = Range(0.1, 0.7)

SCHEDULERS: Registry[SchedulerRecipe] = Registry(
    "scheduler",
    (
        SchedulerRecipe(
            name="step",
            description="multiplies the learning rate by gamma every few epochs (StepLR)",
            factory=_step,
            moves="epoch",
            tunable={"step_size_epochs": Range(1, 10, integer=True), "gamma": GAMMA},
        ),
        SchedulerRecipe(
            name="plateau",
            description="multiplies it by gamma when validation stops getting better (ReduceLROnPlateau)",
            factory=_plateau,
            moves="score",
            tunable={"plateau_patience_epochs": Range(1, 5, integer=True), "gamma": GAMMA},
        ),
        SchedulerRecipe(
            name="cosine",
            description="warms up linearly, then falls to zero along half a cosine",
            factory=_cosine,
            moves="step",
            tunable={"warmup_epochs": Range(0.0, 3.0)},
        ),
        SchedulerRecipe(
            name="onecycle",
            description="rises to the learning rate and falls far below the start, once over the run (OneCycleLR)",
            factory=_onecycle,
            moves="step",
        ),
    ),
)


class SchedulerSettings(RoomSettings):
    """How the learning rate changes during a run."""

    name: Annotated[str, checked_by(SCHEDULERS.__getitem__)] = Field(
        default="cosine", description="of the learning rate, see `relook catalog schedulers`"
    )
    step_size_epochs: int = Field(default=4, ge=1, le=10_000, description="epochs between two cuts, in step")
    gamma: float = Field(default=0.3, gt=0, lt=1, description="factor of a cut, in step and plateau")
    plateau_patience_epochs: int = Field(
        default=2, ge=0, le=10_000, description="epochs without gain before a cut, in plateau"
    )
    warmup_epochs: float = Field(default=1.0, ge=0, le=1000, description="epochs of rising learning rate, in cosine")
    learning_rate_factors: tuple[tuple[int, float], ...] = Field(
        default=(),
        description="pairs of epoch and factor: what the scheduled rate is multiplied by from that epoch on; "
        "default: never",
    )

    @field_validator("learning_rate_factors")
    @classmethod
    def _ascend(cls, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        epochs = [epoch for epoch, _ in value]
        if epochs != sorted(set(epochs)) or (epochs and epochs[0] < 2):
            raise ValueError(f"the epochs {epochs} should ascend from 2 or later, as [[3, 0.8], [5, 1.2]]")
        if not all(0 < factor <= 1000 for _, factor in value):
            raise ValueError("factors should be above 0 and at most 1000, as [[3, 0.8], [5, 1.2]]")
        return value


def build_scheduler(
    optimizer: "Optimizer", settings: SchedulerSettings, *, epochs: int, steps_per_epoch: int
) -> "LRScheduler":
    """Build the chosen schedule, at its first step.

    Returns the schedule; call it as its record's `moves` says.
    """
    return SCHEDULERS[settings.name].factory(optimizer, settings, epochs, steps_per_epoch)


def rate_factor(settings: SchedulerSettings, epoch: int) -> float:
    """Return what the settings multiply the scheduled learning rate by in an epoch; 1 is the first."""
    return next((factor for start, factor in reversed(settings.learning_rate_factors) if start <= epoch), 1.0)


def plateau_factors(settings: SchedulerSettings, scores: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return what a run with the schedule `plateau` multiplied its learning rate by.

    Args:
        settings: of the run.
        scores: [E] validation scores of its epochs.
    Returns:
        Pairs of epoch and factor, as `learning_rate_factors` has them.
    """
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule: Any = build_scheduler(optimizer, settings, epochs=len(scores), steps_per_epoch=1)
    found = [(1, 1.0)]
    for epoch, score in enumerate(scores, 2):
        schedule.step(score)
        factor = optimizer.param_groups[0]["lr"] * rate_factor(settings, epoch)
        if factor != found[-1][1]:
            found.append((epoch, factor))
    return tuple(found[1:])


def change_rate(optimizer: "Optimizer", scheduler: "LRScheduler", settings: SchedulerSettings, epoch: int) -> None:
    """Multiply the learning rate at the start of `epoch` (1 is the first) if its factor differs from the last one's."""
    change = rate_factor(settings, epoch) / rate_factor(settings, epoch - 1)
    if change == 1.0:
        return
    for group in optimizer.param_groups:
        # What the schedules compute from is multiplied as well, so that they continue at the new height.
        # `initial_lr`, `max_lr` and `min_lr` live in the optimizer's groups and `base_lrs` in the schedule;
        # checkpoints hold both.
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name in group:
                group[name] *= change
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * change for rate in scheduler.base_lrs]
