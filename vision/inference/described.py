"""Feature vectors of images, from the last features and from the first convolution of a network.

Torch in, torch out; `vision.calibration.neighbours` compares the vectors.
"""

import torch
from torch import Tensor, nn

from records.errors import ContractError

FEW_CHANNELS = 64
"""A feature map with fewer channels is also described by their deviation and maximum."""


def pooled_features(features: Tensor) -> Tensor:
    """Describe feature maps by the mean over positions; for few channels by deviation and maximum as well.

    Args:
        features: [N, K, h, w].
    Returns:
        [N, K], or [N, 3 K] if K < 64; fp32.
    """
    flat = features.flatten(2).float()
    mean = flat.mean(dim=2)
    if flat.shape[1] >= FEW_CHANNELS:
        return mean
    return torch.cat([mean, _deviation(flat, mean), flat.amax(dim=2)], dim=1)


def first_convolution(network: nn.Module) -> nn.Module:
    """Return the first convolution of a network, the layer itself.

    Args:
        network: with the part `features`, before batch norm is folded.
    Returns:
        Its first convolution, not a copy.
    Raises:
        ContractError: it has none.
    """
    for module in network.get_submodule("features").modules():
        # Not every network declares the one that sees the image first.
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module
    raise ContractError("a network needs a convolution, and this one has none")


def early_statistics(convolution: nn.Module, inputs: Tensor) -> Tensor:
    """Describe images by mean and deviation of each channel of the first convolution.

    Late features keep what separates the classes and drop the rest, so that a page of text may lie among the lesions;
    the first filters still see the difference. (Lee et al. 2018, A Simple Unified Framework for Detecting
    Out-of-Distribution Samples, section 2.2.)

    Args:
        convolution: with K filters, fp32.
        inputs: [N, 3, S, S], fp32.
    Returns:
        [N, 2 K], fp32.
    """
    responses = convolution(inputs).flatten(2)
    mean = responses.mean(dim=2)
    return torch.cat([mean, _deviation(responses, mean)], dim=1)


def _deviation(values: Tensor, mean: Tensor) -> Tensor:
    # Tensor.std takes ten times as long on a CPU.
    return (values - mean.unsqueeze(2)).square().mean(dim=2).sqrt()
