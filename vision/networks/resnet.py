"""ResNets for small images: a 3x3 stride-1 stem without bias and no max-pool.

The blocks are torchvision's; the stem, and the split into `features` and `head`, are ours.
ResNet-18 has 11,172,423 parameters with seven classes.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet


class SmallStemResNet(nn.Module):
    """The network: [N, 3, S, S] -> logits [N, C].

    Args:
        depths: blocks of the four stages; (2, 2, 2, 2) is ResNet-18.
        num_classes: C.
        head_dropout: rate before the linear layer.
    """

    def __init__(self, depths: tuple[int, int, int, int], num_classes: int, *, head_dropout: float = 0.2) -> None:
        super().__init__()
        # One class: torchvision's own linear layer is not used, and its stem is replaced before it is drawn on.
        body = ResNet(BasicBlock, list(depths), num_classes=1)
        stem = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.features = nn.Sequential(
            OrderedDict(
                conv1=stem,
                bn1=body.bn1,
                relu=body.relu,
                layer1=body.layer1,
                layer2=body.layer2,
                layer3=body.layer3,
                layer4=body.layer4,
            )
        )
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(head_dropout),
                linear=nn.Linear(512, num_classes),
            )
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] for [N, 3, S, S]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


def imagenet_name(name: str) -> str:
    """Return our name of a tensor that torchvision calls `name`; the published stem is 7x7 and fits nowhere."""
    return "head.linear." + name.removeprefix("fc.") if name.startswith("fc.") else "features." + name
