"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation and with ReLU6, for small devices; 0, 1 and 2.

Written in plain layers, so that a bundle of it is served without the package that its ImageNet weights come in;
`imagenet_name` translates the packages' tensor names. TensorFlow's SAME padding is kept, as it is for sides that are
multiples of 32: a stride of 2 pads right and below only, which is worth several points of accuracy with the published
weights.
"""

from collections import OrderedDict
from math import ceil

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

STAGES: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Repeats, kernel side, stride of the first, expansion and width of every stage, of Lite0."""
STEM_WIDTH, TOP_WIDTH = 32, 1280
DROPPED_PATHS = 0.2
"""Rate at which the last block's residual is left out while training; earlier blocks in proportion."""


class EfficientNetLite(nn.Module):
    """The network: [N, 3, S, S] -> logits [N, C].

    Args:
        num_classes: C.
        wider: factor of the widths of the stages; stem and top keep theirs.
        deeper: factor of the repeats; those of the first and the last stage stay.
        head_dropout: rate before the linear layer.
    """

    def __init__(self, num_classes: int, *, wider: float = 1.0, deeper: float = 1.0, head_dropout: float = 0.2) -> None:
        super().__init__()
        stages = _scaled(wider, deeper)
        num_blocks = sum(stage[0] for stage in stages)
        blocks: list[nn.Module] = []
        channels = STEM_WIDTH
        for repeats, kernel_px, stride, expansion, width in stages:
            for repeat in range(repeats):
                # Stochastic depth grows linearly with depth, from 0 at the first block, as published.
                rate = DROPPED_PATHS * len(blocks) / num_blocks
                blocks.append(
                    InvertedResidual(channels, width, kernel_px, stride if repeat == 0 else 1, expansion, rate)
                )
                channels = width
        self.features = nn.Sequential(
            OrderedDict(
                stem=_conv_norm(3, STEM_WIDTH, 3, stride=2),
                blocks=nn.Sequential(*blocks),
                top=_conv_norm(channels, TOP_WIDTH, 1),
            )
        )
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(head_dropout),
                linear=nn.Linear(TOP_WIDTH, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] for [N, 3, S, S]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


def _scaled(wider: float, deeper: float) -> list[tuple[int, int, int, int, int]]:
    last = len(STAGES) - 1
    return [
        (
            repeats if number in (0, last) else ceil(deeper * repeats),
            kernel_px,
            stride,
            expansion,
            _width(wider * width),
        )
        for number, (repeats, kernel_px, stride, expansion, width) in enumerate(STAGES)
    ]


def _width(wanted: float) -> int:
    """Round to a multiple of 8 that is at least 90 % of what is wanted, as published."""
    width = max(8, int(wanted + 4) // 8 * 8)
    return width + 8 if width < 0.9 * wanted else width


class InvertedResidual(nn.Module):
    """Inverted residual block: expand by 1x1, depthwise filter, project by 1x1; add the input where shapes allow.

    Args:
        channels: of the input.
        width: channels of the output.
        kernel_px: side of the filter.
        stride: of the filter.
        expansion: factor of the widening; 1 leaves it out.
        dropped: rate at which the residual is left out while training.
    """

    def __init__(self, channels: int, width: int, kernel_px: int, stride: int, expansion: int, dropped: float) -> None:
        super().__init__()
        wide = channels * expansion
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion != 1:
            steps["expand"] = _conv_norm(channels, wide, 1)
        steps["filter"] = _conv_norm(wide, wide, kernel_px, stride=stride, groups=wide)
        steps["project"] = _conv_norm(wide, width, 1, active=False)
        self.steps = nn.Sequential(steps)
        self.adds = stride == 1 and channels == width
        # "row" drops the residual of single images, not of the whole batch.
        self.drop_path = StochasticDepth(dropped, "row")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [N, width, h', w'] for [N, channels, h, w]."""
        outputs: Tensor = self.steps(inputs)
        return inputs + self.drop_path(outputs) if self.adds else outputs


def imagenet_name(name: str) -> str:
    """Translate a tensor name of the published files to that of `EfficientNetLite.state_dict`.

    An unknown name is returned unchanged.

    >>> imagenet_name("_blocks.3._bn1.weight")
    'features.blocks.3.steps.filter.norm.weight'
    """
    parts = name.split(".")
    if parts[0] == "_blocks":
        return ".".join(("features.blocks", parts[1], "steps", _IN_BLOCK.get(parts[2], parts[2]), *parts[3:]))
    return ".".join((_OUTSIDE.get(parts[0], parts[0]), *parts[1:]))


_IN_BLOCK = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "filter.conv",
    "_bn1": "filter.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}
_OUTSIDE = {
    "_conv_stem": "features.stem.conv",
    "_bn0": "features.stem.norm",
    "_conv_head": "features.top.conv",
    "_bn1": "features.top.norm",
    "_fc": "head.linear",
}


def _conv_norm(
    channels: int, width: int, kernel_px: int, *, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    around = kernel_px // 2
    # TensorFlow pads an even input of a strided convolution by one pixel less above and left than below and right.
    if stride == 2:
        layers["pad"] = nn.ZeroPad2d((around - 1, around, around - 1, around))
        around = 0
    layers["conv"] = nn.Conv2d(channels, width, kernel_px, stride, padding=around, groups=groups, bias=False)
    layers["norm"] = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
    if active:
        layers["relu"] = nn.ReLU6()
    return nn.Sequential(layers)
