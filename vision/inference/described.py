"""What a network makes of an image besides its answer, as the vectors by which images are compared.

Its last features, and what its first convolution sees. Torch in, torch out; `neighbours` compares the vectors.
"""

import torch
from torch import Tensor, nn

from records.errors import ContractError

FEW_CHANNELS = 64
"""A feature map with fewer channels is described by their deviation and maximum, too."""


def pooled_features(features: Tensor) -> Tensor:
    """Describe feature maps by a vector each: the mean over positions, for few channels deviation and maximum, too.

    Args:
        features: [N, K, h, w].
    Returns:
        [N, K], or [N, 3 K] if K < 64; fp32.
    """
    flat = features.flatten(2).float()
    mean = flat.mean(dim=2)
    if flat.shape[1] >= FEW_CHANNELS:
        return mean
    return torch.cat([mean, flat.std(dim=2, correction=0), flat.amax(dim=2)], dim=1)


def first_convolution(network: nn.Module) -> nn.Module:
    """Return the layer that sees the image first.

    Args:
        network: with the part `features`, nothing folded into it.
    Returns:
        Its first convolution, the network's own.
    Raises:
        ContractError: it has none.
    """
    for module in network.get_submodule("features").modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise ContractError("a network needs a convolution, and this one has none")


def early_statistics(convolution: nn.Module, inputs: Tensor) -> Tensor:
    """Describe images by what a first convolution makes of them: mean and deviation of each channel.

    Late features keep what tells the classes apart and forget the rest, so that a page of text may lie among the
    lesions; the first filters have forgotten nothing. (Early layers tell far data: Lee et al. 2018, A Simple
    Unified Framework for Detecting Out-of-Distribution Samples, section 2.2.)

    Args:
        convolution: with K filters, fp32.
        inputs: [N, 3, S, S], fp32.
    Returns:
        [N, 2 K], fp32.
    """
    responses = convolution(inputs).flatten(2)
    return torch.cat([responses.mean(dim=2), responses.std(dim=2, correction=0)], dim=1)
