"""Networks of torchvision, cut into `features` and `head`; their weights' names stay recognisable.

Where torchvision pools and then applies one linear layer, so does the head here, and Grad-CAM has a
closed form. DenseNet's last ReLU, which torchvision applies outside its modules, ends `features`.
MobileNetV3 and ConvNeXt have more than one layer after the pool; their maps are differentiated.
The published weights' names are translated by `imagenet_name`.
"""

import re
from collections import OrderedDict

from torch import Tensor, nn
from torchvision import models


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


def squeezenet(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """SqueezeNet 1.1; the classifier is a 1x1 convolution that ends `features`, one map per class.

    Its dropout stands before that convolution, as published, so `features` has it.

    Args:
        num_classes: C.
        head_dropout: rate before the classifier.
    Returns:
        The network.
    """
    body = models.squeezenet1_1(num_classes=num_classes)
    classifier = body.classifier[1]
    features = nn.Sequential(
        OrderedDict(body=_without_inplace(body.features), dropout=nn.Dropout(head_dropout), classifier=classifier)
    )
    head = nn.Sequential(OrderedDict(relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    return SplitNetwork(features, head)


def densenet121(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """DenseNet-121.

    Args:
        num_classes: C.
        head_dropout: rate before the linear layer.
    Returns:
        The network.
    """
    body = models.densenet121(num_classes=1)
    body.features.add_module("relu", nn.ReLU())
    return SplitNetwork(_without_inplace(body.features), _pooled_linear(1024, num_classes, head_dropout))


def inception_v3(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """Inception-v3 without its auxiliary classifier.

    Args:
        num_classes: C.
        head_dropout: rate before the linear layer.
    Returns:
        The network.
    """
    body = models.inception_v3(weights=None, num_classes=1, aux_logits=False, init_weights=False)
    layers = OrderedDict((n, m) for n, m in body.named_children() if n not in {"avgpool", "dropout", "fc"})
    return SplitNetwork(nn.Sequential(layers), _pooled_linear(2048, num_classes, head_dropout))


def efficientnet_b0(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """EfficientNet-B0.

    Args:
        num_classes: C.
        head_dropout: rate before the linear layer.
    Returns:
        The network.
    """
    body = models.efficientnet_b0(num_classes=1)
    return SplitNetwork(_without_inplace(body.features), _pooled_linear(1280, num_classes, head_dropout))


def efficientnet_v2_s(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """EfficientNetV2-S.

    Args:
        num_classes: C.
        head_dropout: rate before the linear layer.
    Returns:
        The network.
    """
    body = models.efficientnet_v2_s(num_classes=1)
    return SplitNetwork(_without_inplace(body.features), _pooled_linear(1280, num_classes, head_dropout))


def mobilenet_v3(num_classes: int, *, head_dropout: float = 0.2) -> SplitNetwork:
    """MobileNetV3-Large; two linear layers follow the pool.

    Args:
        num_classes: C.
        head_dropout: rate before the last linear layer.
    Returns:
        The network.
    """
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
    """ConvNeXt-Tiny; a layer norm follows the pool.

    Args:
        num_classes: C.
        head_dropout: rate before the linear layer.
    Returns:
        The network.
    """
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
    """Return our name of a tensor of published weights.

    Args:
        name: as torchvision has it, or had it when the file was written.
    Returns:
        As `SplitNetwork.state_dict` has it.

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


def inception_name(name: str) -> str:
    """Return `inception_v3`'s name of a tensor that torchvision calls `name`."""
    return "head.linear." + name.removeprefix("fc.") if name.startswith("fc.") else "features." + name


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
    """Let no activation overwrite its input: explanations read and differentiate what lies before it."""
    for child in module.modules():
        if getattr(child, "inplace", False):
            child.inplace = False  # type: ignore[assignment]
    return module
