"""Networks of torchvision, split into `features` and `head`.

Where torchvision pools and then applies one linear layer, so does the head here, and Grad-CAM has a closed form.
DenseNet's last ReLU, which torchvision applies outside its modules, ends `features`. MobileNetV3 and ConvNeXt have
more than one layer after the pool, whose derivatives are known. The functions ending in `_name` translate the tensor
names of published weights.
"""

import re
from collections import OrderedDict

from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet


class SplitNetwork(nn.Module):
    """The network: [N, 3, S, S] -> logits [N, C].

    Args:
        features: [N, 3, S, S] -> feature map [N, K, h, w].
        head: feature map -> logits.
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] for [N, 3, S, S]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


def resnet18(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """ResNet-18 with the small stem; see `_small_stem_resnet`."""
    return _small_stem_resnet((2, 2, 2, 2), num_classes, head_dropout)


def resnet34(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """ResNet-34 with the small stem; see `_small_stem_resnet`."""
    return _small_stem_resnet((3, 4, 6, 3), num_classes, head_dropout)


def squeezenet(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """SqueezeNet 1.1; the classifier is a 1x1 convolution that ends `features`, one map per class.

    Its dropout stands before that convolution, as published, so `features` has it.
    """
    body = models.squeezenet1_1(num_classes=num_classes)
    classifier = body.classifier[1]
    features = nn.Sequential(
        OrderedDict(body=_without_inplace(body.features), dropout=nn.Dropout(head_dropout), classifier=classifier)
    )
    head = nn.Sequential(OrderedDict(relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    return SplitNetwork(features, head)


def densenet121(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """DenseNet-121."""
    body = models.densenet121(num_classes=1)
    body.features.add_module("relu", nn.ReLU())
    return SplitNetwork(_without_inplace(body.features), _pooled_linear(1024, num_classes, head_dropout))


def inception_v3(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """Inception-v3 without its auxiliary classifier."""
    body = models.inception_v3(weights=None, num_classes=1, aux_logits=False, init_weights=False)
    layers = OrderedDict((n, m) for n, m in body.named_children() if n not in {"avgpool", "dropout", "fc"})
    return SplitNetwork(nn.Sequential(layers), _pooled_linear(2048, num_classes, head_dropout))


def efficientnet_b0(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """EfficientNet-B0."""
    body = models.efficientnet_b0(num_classes=1)
    return SplitNetwork(_without_inplace(body.features), _pooled_linear(1280, num_classes, head_dropout))


def efficientnet_v2_s(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """EfficientNetV2-S."""
    body = models.efficientnet_v2_s(num_classes=1)
    return SplitNetwork(_without_inplace(body.features), _pooled_linear(1280, num_classes, head_dropout))


def mobilenet_v3(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """MobileNetV3-Large; two linear layers follow the pool."""
    body = models.mobilenet_v3_large(num_classes=num_classes)
    head = nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            widen=body.classifier[0],
            hardswish=nn.Hardswish(),
            dropout=nn.Dropout(head_dropout),
            linear=body.classifier[3],
        )
    )
    return SplitNetwork(_without_inplace(body.features), head)


def convnext_tiny(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """ConvNeXt-Tiny; a layer norm follows the pool."""
    body = models.convnext_tiny(num_classes=num_classes)
    head = nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            norm=body.classifier[0],
            flatten=nn.Flatten(),
            dropout=nn.Dropout(head_dropout),
            linear=body.classifier[2],
        )
    )
    return SplitNetwork(_without_inplace(body.features), head)


def imagenet_name(name: str) -> str:
    """Translate a tensor name of torchvision's published weights, old or new, to that of `SplitNetwork.state_dict`.

    >>> imagenet_name("features.denseblock1.denselayer1.norm.1.weight")
    'features.denseblock1.denselayer1.norm1.weight'
    """
    for theirs, ours in _HEADS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


_HEADS = {
    "classifier.weight": "head.linear.weight",  # DenseNet
    "classifier.bias": "head.linear.bias",
    "classifier.1.": "head.linear.",  # EfficientNet
    "classifier.0.": "head.widen.",  # MobileNetV3
    "classifier.3.": "head.linear.",
}


def convnext_name(name: str) -> str:
    """Return `convnext_tiny`'s name of a tensor that torchvision calls `name`."""
    if name.startswith("classifier."):
        return name.replace("classifier.0.", "head.norm.").replace("classifier.2.", "head.linear.")
    return name


def squeezenet_name(name: str) -> str:
    """Return `squeezenet`'s name of a tensor that torchvision calls `name`."""
    if name.startswith("classifier.1."):
        return "features.classifier." + name.removeprefix("classifier.1.")
    return "features.body." + name.removeprefix("features.")


def features_name(name: str) -> str:
    """Return the name here of a tensor that torchvision's ResNet or Inception calls `name`.

    The published ResNet stem is 7x7; its shape fits no tensor here, so loading leaves it out.
    """
    return "head.linear." + name.removeprefix("fc.") if name.startswith("fc.") else "features." + name


def _small_stem_resnet(depths: tuple[int, int, int, int], num_classes: int, head_dropout: float) -> SplitNetwork:
    """Build a ResNet for small images: torchvision's blocks behind a 3x3 stride-1 stem without bias or max-pool."""
    # One class: torchvision's own linear layer is unused. The stem is drawn after the body, as bundles and golden
    # curves expect of a seed.
    body = ResNet(BasicBlock, list(depths), num_classes=1)
    stem = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    stages = {name: body.get_submodule(name) for name in ("bn1", "relu", "layer1", "layer2", "layer3", "layer4")}
    return SplitNetwork(
        nn.Sequential(OrderedDict(conv1=stem, **stages)), _pooled_linear(512, num_classes, head_dropout)
    )


def _pooled_linear(channels: int, num_classes: int, head_dropout: float) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(head_dropout),
            linear=nn.Linear(channels, num_classes),
        )
    )


def _without_inplace(module: nn.Module) -> nn.Module:
    """Make no activation overwrite its input."""
    # Explanations read and differentiate feature maps that an in-place activation after them would change.
    for child in module.modules():
        if getattr(child, "inplace", False):
            child.inplace = False  # type: ignore[assignment]
    return module
