"""The dissertation's custom CNN (sixteen small convolutions, five pools, no linear layer) and its dropout.

A block is conv -> ReLU -> batch norm -> dropout. The last block is the classifier: a 1x1 convolution
with one channel per class, then the same ReLU, batch norm and dropout, then global average pooling.
Its convolution ends `features`, the rest is `head`, so class c's logit depends on class c's map only.
51,221 parameters with seven classes. Any side of 32 px or more works; 224 px was the original.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

POOL = 0
PLAN: tuple[tuple[int, int], ...] = (
    (8, 3), (16, 3), (8, 1), (POOL, 2),
    (16, 3), (16, 3), (32, 3), (8, 1), (POOL, 2),
    (8, 3), (16, 3), (32, 3), (8, 1), (POOL, 2),
    (16, 3), (32, 3), (POOL, 2),
    (32, 3), (64, 3), (POOL, 2),
)  # fmt: skip
"""Channels and kernel side of every convolution before the classifier; POOL is a 2x2 max-pool."""

LARGEST_RATE = 0.1
"""Largest dropout rate at which drawing positions is faster than drawing a number per value."""


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


class SparseDropout(nn.Dropout):
    """Dropout that draws the positions to zero instead of one number per value; [N, K, h, w] -> the same.

    `nn.Dropout(0.01)` on a CPU draws a number for every value to zero one in a hundred, which is a third of the time
    of a training step of the custom CNN. Drawing k of n positions with replacement zeroes each value with probability
    p if (1 - 1/n)^k = 1 - p, that is k = log(1 - p) / log(1 - 1/n).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zero values with probability p while training and scale the rest by 1 / (1 - p)."""
        if not self.training or self.p == 0.0:
            return input
        # Positions index channels-last memory, which four dimensions have; GPUs draw fast enough.
        if self.p > LARGEST_RATE or input.device.type != "cpu" or input.dim() != 4:
            return super().forward(input)
        dropped: Tensor = _DropPositions.apply(input, self.p)
        return dropped


class _DropPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rate: float) -> Tensor:
        count = values.numel()
        # A single value counts as two: log1p(-1) is undefined.
        draws = round(math.log1p(-rate) / math.log1p(-1.0 / max(count, 2)))
        positions = torch.randint(count, (draws,)) if count else torch.empty(0, dtype=torch.int64)
        ctx.scale = 1.0 / (1.0 - rate)
        ctx.save_for_backward(positions)
        ctx.channels_last = values.is_contiguous(memory_format=torch.channels_last)
        return _scale_and_zero(values, positions, ctx.scale, ctx.channels_last)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return _scale_and_zero(gradients[0], positions, ctx.scale, ctx.channels_last), None


def _scale_and_zero(values: Tensor, positions: Tensor, scale: float, channels_last: bool) -> Tensor:
    # A position means the same value in both directions only if both count in the same memory order.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    scaled = values.mul(scale).contiguous(memory_format=layout)
    flat = (scaled.permute(0, 2, 3, 1) if channels_last else scaled).view(-1)
    flat.index_fill_(0, positions, 0.0)
    return scaled


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
