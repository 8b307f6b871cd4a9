"""Which optimizers exist: a registry of frozen records, and the settings that choose one.

Weight decay is applied to weights of two or more dimensions only; decaying biases and batch norm
costs accuracy and regularises nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from records.registry import Choice, Range, Registered, Registry
from records.settings import RoomSettings, checked_by

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

ParameterGroups = list[dict[str, Any]]

WEIGHT_DECAY = Range(1e-6, 1e-2, log=True)


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe(Registered):
    """An optimizer that can be chosen.

    Args:
        factory: (parameter groups, learning rate, settings) -> the optimizer.
        default_learning_rate: what is used if the settings name none.
    """

    factory: "Callable[[ParameterGroups, float, OptimizerSettings], Optimizer]" = field(repr=False)
    default_learning_rate: float

    def facts(self) -> dict[str, Any]:
        """Return the default learning rate."""
        return {"default_learning_rate": self.default_learning_rate}


def one_kernel(groups: ParameterGroups) -> bool | None:
    """Return True where one kernel updates all parameters, on a GPU; None leaves the choice to torch."""
    on_gpu = all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
    return True if on_gpu else None


def _sgd(groups: ParameterGroups, learning_rate: float, settings: "OptimizerSettings") -> "Optimizer":
    from torch.optim import SGD

    # Nesterov's step is defined with momentum only.
    nesterov = settings.nesterov and settings.momentum > 0
    return SGD(groups, lr=learning_rate, momentum=settings.momentum, nesterov=nesterov, fused=one_kernel(groups))


def _rmsprop(groups: ParameterGroups, learning_rate: float, settings: "OptimizerSettings") -> "Optimizer":
    from torch.optim import RMSprop

    return RMSprop(groups, lr=learning_rate)


def _adam(groups: ParameterGroups, learning_rate: float, settings: "OptimizerSettings") -> "Optimizer":
    from torch.optim import Adam

    return Adam(groups, lr=learning_rate, fused=one_kernel(groups))


def _adamw(groups: ParameterGroups, learning_rate: float, settings: "OptimizerSettings") -> "Optimizer":
    from torch.optim import AdamW

    return AdamW(groups, lr=learning_rate, fused=one_kernel(groups))


OPTIMIZERS: Registry[OptimizerRecipe] = Registry(
    "optimizer",
    (
        OptimizerRecipe(
            name="sgd",
            description="stochastic gradient descent with momentum, Nesterov's on request",
            factory=_sgd,
            default_learning_rate=0.05,
            tunable={
                "learning_rate": Range(3e-3, 0.3, log=True),
                "momentum": Range(0.8, 0.98),
                "nesterov": Choice((False, True)),
                "weight_decay": WEIGHT_DECAY,
            },
        ),
        OptimizerRecipe(
            name="rmsprop",
            description="steps scaled by a running mean of squared gradients",
            factory=_rmsprop,
            default_learning_rate=1e-3,
            tunable={"learning_rate": Range(1e-5, 1e-2, log=True), "weight_decay": WEIGHT_DECAY},
        ),
        OptimizerRecipe(
            name="adam",
            description="RMSprop's scaling with momentum and bias correction; weight decay as an L2 term",
            factory=_adam,
            default_learning_rate=2e-3,
            tunable={"learning_rate": Range(1e-4, 1e-2, log=True), "weight_decay": WEIGHT_DECAY},
        ),
        OptimizerRecipe(
            name="adamw",
            description="Adam with weight decay apart from the gradient",
            factory=_adamw,
            default_learning_rate=2e-3,
            tunable={"learning_rate": Range(1e-4, 1e-2, log=True), "weight_decay": Range(1e-4, 0.3, log=True)},
        ),
    ),
)


class OptimizerSettings(RoomSettings):
    """How weights are changed by gradients."""

    name: Annotated[str, checked_by(OPTIMIZERS.__getitem__)] = Field(
        default="sgd", description="see `relook catalog optimizers`"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=10, allow_inf_nan=False, description="step size; default: the optimizer's own"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(default=True, description="Nesterov's momentum, in sgd")
    weight_decay: float = Field(
        default=5e-4, ge=0, le=1, allow_inf_nan=False, description="pull of weights to zero (L2), per step"
    )
    l1: float = Field(
        default=0.0,
        ge=0,
        le=0.1,
        allow_inf_nan=False,
        description="factor of the sum of absolute weights that is added to the loss (L1); weights of two or more "
        "dimensions only",
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="largest L2 norm of the gradient over all parameters; a longer gradient is scaled down to it; "
        "default: no limit",
    )
    accumulate_steps: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="parts into which a worker splits its share of a batch; their gradients add up, which needs less "
        "memory",
    )
    trainable_blocks: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="blocks of the network that are trained, counted from its end, with the head; those before stay as "
        "they start; 0 trains the head alone; default: all",
    )
    features_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="factor of the learning rate for everything but the head, which starts from random weights",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="share that a running mean of the weights keeps per step; the mean is validated and served; "
        "default: no mean",
    )


def learning_rate_of(settings: OptimizerSettings) -> float:
    """Return the learning rate that a run starts from: the settings', or the optimizer's default."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return OPTIMIZERS[settings.name].default_learning_rate


def build_optimizer(network: "nn.Module", settings: OptimizerSettings) -> "Optimizer":
    """Build the chosen optimizer over the trainable parameters: decayed weights, and the rest, for each rate."""
    trainable = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    rate = learning_rate_of(settings)
    groups = _groups([one for _, one in trainable], settings)
    if settings.features_rate != 1.0:
        # The head first: what is reported as the learning rate is that of the first group.
        slow = {id(one) for name, one in trainable if name.startswith("features.")}
        groups = _groups([one for _, one in trainable if id(one) not in slow], settings)
        of_features = _groups([one for _, one in trainable if id(one) in slow], settings)
        groups += [{**group, "lr": rate * settings.features_rate} for group in of_features]
    return OPTIMIZERS[settings.name].factory(groups, rate, settings)


def _groups(parameters: "list[nn.Parameter]", settings: OptimizerSettings) -> ParameterGroups:
    # Two groups, because torch sets weight decay per group; one-dimensional parameters are biases and norms.
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
