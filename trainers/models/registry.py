"""Which networks exist, with the numbers that people ask of a network.

The numbers are declared here, so that a catalogue needs no torch, and each is proven by a test on
the built network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from records.errors import ConfigError
from trainers.registry import Range, Registered, Registry

if TYPE_CHECKING:
    from torch import nn

    from trainers.settings import TrainersSettings

DROPOUT = Range(0.0, 0.1)
HEAD_DROPOUT = Range(0.0, 0.5)


class _Factory(Protocol):
    def __call__(self, num_classes: int, **options: Any) -> "nn.Module": ...


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(Registered):
    """A network that can be built.

    Args:
        factory: (num_classes, **options) -> a network with `features` and `head`.
        options: which settings shape it; they are stored in the bundle.
        parameters: trainable parameters with seven classes and default options.
        receptive_field_px: side of the input square that one position of the last feature map sees.
        input_side_px: the side it was designed for.
        minimum_side_px: the smallest side that survives its pools.
        gradcam: `closed_form` if the map needs no backward pass, else `autograd`.
        target_layer: the layer whose output Grad-CAM weighs; always the end of `features`.
        batch_norm: whether it holds batch norm.
    """

    factory: _Factory = field(repr=False)
    options: tuple[str, ...]
    parameters: int
    receptive_field_px: int
    input_side_px: int
    minimum_side_px: int
    gradcam: Literal["closed_form", "autograd"]
    target_layer: str
    batch_norm: bool

    def facts(self) -> dict[str, Any]:
        """Return the numbers of the network."""
        return {
            "parameters": self.parameters,
            "input_side": self.input_side_px,
            "minimum_side": self.minimum_side_px,
            "receptive_field": self.receptive_field_px,
            "gradcam": self.gradcam,
            "target_layer": self.target_layer,
            "batch_norm": self.batch_norm,
        }


def _custom_cnn(num_classes: int, **options: Any) -> "nn.Module":
    from trainers.models.custom_cnn import CustomCnn

    return CustomCnn(num_classes, **options)


def _custom_cnn_base(num_classes: int, **options: Any) -> "nn.Module":
    from trainers.models.custom_cnn import CustomCnn

    return CustomCnn(num_classes, batch_norm=False, **options)


def _resnet18(num_classes: int, **options: Any) -> "nn.Module":
    from trainers.models.resnet import SmallStemResNet

    return SmallStemResNet((2, 2, 2, 2), num_classes, **options)


MODELS: Registry[ModelRecipe] = Registry(
    "model",
    (
        ModelRecipe(
            name="custom_cnn",
            description="the dissertation's small all-convolutional network with batch norm",
            factory=_custom_cnn,
            options=("dropout",),
            parameters=51_221,
            receptive_field_px=168,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.classifier",
            batch_norm=True,
            tunable={"dropout": DROPOUT},
        ),
        ModelRecipe(
            name="custom_cnn_base",
            description="the same network without batch norm",
            factory=_custom_cnn_base,
            options=("dropout",),
            parameters=50_583,
            receptive_field_px=168,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.classifier",
            batch_norm=False,
            tunable={"dropout": DROPOUT},
        ),
        ModelRecipe(
            name="resnet18",
            description="ResNet-18 with a 3x3 stride-1 stem and no max-pool, for small pictures",
            factory=_resnet18,
            options=("head_dropout",),
            parameters=11_172_423,
            receptive_field_px=109,
            input_side_px=64,
            minimum_side_px=8,
            gradcam="closed_form",
            target_layer="features.layer4",
            batch_norm=True,
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
    ),
)


def architecture_options(settings: "TrainersSettings") -> dict[str, Any]:
    """Pick the settings that shape the chosen network; a bundle stores them.

    Args:
        settings: of the trainers.
    Returns:
        Option name to value.
    """
    return {name: getattr(settings, name) for name in MODELS[settings.model].options}


def build_model(name: str, num_classes: int, **options: Any) -> "nn.Module":
    """Build a network with fresh weights from torch's global generator.

    Args:
        name: in `MODELS`.
        num_classes: C, at least 2.
        options: those that the network takes; what is left out has the network's default.
    Returns:
        A network with `features` and `head`: float32 [N, 3, S, S] -> logits [N, C].
    Raises:
        ConfigError: no such network, or an option that it does not take.
    """
    recipe = MODELS[name]
    unknown = sorted(set(options) - set(recipe.options))
    if unknown:
        raise ConfigError(f"model {name!r} takes no option {unknown[0]!r}; it takes {', '.join(recipe.options)}")
    factory: Callable[..., nn.Module] = recipe.factory
    return factory(num_classes, **options)


def check_side(name: str, side_px: int) -> None:
    """Refuse a side that a network's pools would shrink to nothing.

    Args:
        name: of the network.
        side_px: S.
    Raises:
        ConfigError: S is too small; names the smallest that works and the one it was designed for.
    """
    recipe = MODELS[name]
    if side_px < recipe.minimum_side_px:
        raise ConfigError(
            f"trainers.side_px is {side_px}, and {name} needs at least {recipe.minimum_side_px} "
            f"(it was designed for {recipe.input_side_px})"
        )
