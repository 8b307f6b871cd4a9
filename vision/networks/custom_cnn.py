"""The dissertation's custom CNN: sixteen small convolutions, five pools, no linear layer.

A block is conv -> ReLU -> batch norm -> dropout. The last block is the classifier: a 1x1 convolution
with one channel per class, then the same ReLU, batch norm and dropout, then global average pooling.
Its convolution ends `features`, the rest is `head`, so class c's logit depends on class c's map only.
51,221 parameters with seven classes. Any side of 32 px or more works; 224 px was the original.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from vision.networks.dropout import SparseDropout

POOL = 0
PLAN: tuple[tuple[int, int], ...] = (
    (8, 3), (16, 3), (8, 1), (POOL, 2),
    (16, 3), (16, 3), (32, 3), (8, 1), (POOL, 2),
    (8, 3), (16, 3), (32, 3), (8, 1), (POOL, 2),
    (16, 3), (32, 3), (POOL, 2),
    (32, 3), (64, 3), (POOL, 2),
)  # fmt: skip
"""Channels and kernel side of every convolution before the classifier; POOL is a 2x2 max-pool."""


class CustomCnn(nn.Module):
    """The network: [N, 3, S, S] -> logits [N, C].

    Args:
        num_classes: C.
        batch_norm: False gives the dissertation's `base` variant.
        dropout: rate after every block.
    """

    def __init__(self, num_classes: int, *, batch_norm: bool = True, dropout: float = 0.01) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, num_convs = 3, 0
        for width, kernel_px in PLAN:
            if width == POOL:
                layers[f"pool{sum(name.startswith('pool') for name in layers) + 1}"] = nn.MaxPool2d(
                    kernel_px, kernel_px
                )
                continue
            num_convs += 1
            layers[f"block{num_convs}"] = _block(channels, width, kernel_px, batch_norm, dropout)
            channels = width
        layers["classifier"] = nn.Conv2d(channels, num_classes, 1)
        self.features = nn.Sequential(layers)
        self.head = nn.Sequential(
            OrderedDict(
                [
                    *_after_conv(num_classes, batch_norm, dropout),
                    ("pool", nn.AdaptiveAvgPool2d(1)),
                    ("flatten", nn.Flatten()),
                ]
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                _zero_bias(module)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] for [N, 3, S, S]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


def _block(channels: int, width: int, kernel_px: int, batch_norm: bool, dropout: float) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel_px, padding=kernel_px // 2)
    return nn.Sequential(OrderedDict([("conv", conv), *_after_conv(width, batch_norm, dropout)]))


def _after_conv(width: int, batch_norm: bool, dropout: float) -> list[tuple[str, nn.Module]]:
    norm: list[tuple[str, nn.Module]] = [("norm", nn.BatchNorm2d(width))] if batch_norm else []
    return [("relu", nn.ReLU()), *norm, ("dropout", SparseDropout(dropout))]


def _zero_bias(conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        with torch.no_grad():
            conv.bias.zero_()
