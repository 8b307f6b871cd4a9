"""The records of torchvision's networks."""

from typing import TYPE_CHECKING, Any

from vision.networks.recipe import HEAD_DROPOUT, Factory, ModelRecipe

if TYPE_CHECKING:
    from torch import nn

ADDRESS = "https://download.pytorch.org/models/"


def _factory(name: str) -> Factory:
    def build(num_classes: int, **options: Any) -> "nn.Module":
        from vision.networks import torchvision_nets

        network: nn.Module = getattr(torchvision_nets, name)(num_classes, **options)
        return network

    return build


def _published_name(name: str) -> str:
    from vision.networks.torchvision_nets import imagenet_name

    return imagenet_name(name)


def _squeezenet_name(name: str) -> str:
    from vision.networks.torchvision_nets import squeezenet_name

    return squeezenet_name(name)


def _inception_name(name: str) -> str:
    from vision.networks.torchvision_nets import inception_name

    return inception_name(name)


def _convnext_name(name: str) -> str:
    from vision.networks.torchvision_nets import convnext_name

    return convnext_name(name)


TORCHVISION_RECIPES: tuple[ModelRecipe, ...] = (
    ModelRecipe(
        name="squeezenet",
        description="SqueezeNet 1.1: a classifier of one map per class, like the custom CNN",
        factory=_factory("squeezenet"),
        options=("head_dropout",),
        parameters=726_087,
        receptive_field_px=207,
        input_side_px=224,
        minimum_side_px=32,
        gradcam="closed_form",
        target_layer="features.classifier",
        batch_norm=False,
        imagenet=f"{ADDRESS}squeezenet1_1-b8a52dc0.pth",
        imagenet_name=_squeezenet_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
    ModelRecipe(
        name="densenet121",
        description="DenseNet-121: every layer sees all layers before it in its block",
        factory=_factory("densenet121"),
        options=("head_dropout",),
        parameters=6_961_031,
        receptive_field_px=2_071,
        input_side_px=224,
        minimum_side_px=32,
        gradcam="closed_form",
        target_layer="features.relu",
        batch_norm=True,
        imagenet=f"{ADDRESS}densenet121-a639ec97.pth",
        imagenet_name=_published_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
    ModelRecipe(
        name="inception_v3",
        description="Inception-v3 without its auxiliary classifier",
        factory=_factory("inception_v3"),
        options=("head_dropout",),
        parameters=21_799_911,
        receptive_field_px=2_175,
        input_side_px=299,
        minimum_side_px=75,
        gradcam="closed_form",
        target_layer="features.Mixed_7c",
        batch_norm=True,
        imagenet=f"{ADDRESS}inception_v3_google-0cc3c7bd.pth",
        imagenet_name=_inception_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
    ModelRecipe(
        name="efficientnet_b0",
        description="EfficientNet-B0 with squeeze-and-excitation",
        factory=_factory("efficientnet_b0"),
        options=("head_dropout",),
        parameters=4_016_515,
        receptive_field_px=851,
        input_side_px=224,
        minimum_side_px=32,
        gradcam="closed_form",
        target_layer="features.8",
        batch_norm=True,
        imagenet=f"{ADDRESS}efficientnet_b0_rwightman-7f5810bc.pth",
        imagenet_name=_published_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
    ModelRecipe(
        name="efficientnet_v2_s",
        description="EfficientNetV2-S: plain convolutions in the early stages",
        factory=_factory("efficientnet_v2_s"),
        options=("head_dropout",),
        parameters=20_186_455,
        receptive_field_px=1_487,
        input_side_px=384,
        minimum_side_px=32,
        gradcam="closed_form",
        target_layer="features.7",
        batch_norm=True,
        imagenet=f"{ADDRESS}efficientnet_v2_s-dd5fe13b.pth",
        imagenet_name=_published_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
    ModelRecipe(
        name="mobilenet_v3",
        description="MobileNetV3-Large: quick on phones and CPUs; two linear layers after the pool",
        factory=_factory("mobilenet_v3"),
        options=("head_dropout",),
        parameters=4_210_999,
        receptive_field_px=595,
        input_side_px=224,
        minimum_side_px=32,
        gradcam="autograd",
        target_layer="features.16",
        batch_norm=True,
        imagenet=f"{ADDRESS}mobilenet_v3_large-5c1a4163.pth",
        imagenet_name=_published_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
    ModelRecipe(
        name="convnext_tiny",
        description="ConvNeXt-Tiny: 7x7 filters and layer norm, no batch norm",
        factory=_factory("convnext_tiny"),
        options=("head_dropout",),
        parameters=27_825_511,
        receptive_field_px=1_688,
        input_side_px=224,
        minimum_side_px=32,
        gradcam="autograd",
        target_layer="features.7",
        batch_norm=False,
        imagenet=f"{ADDRESS}convnext_tiny-983f1562.pth",
        imagenet_name=_convnext_name,
        tunable={"head_dropout": HEAD_DROPOUT},
    ),
)
