"""A sanity check for heat maps: do they depend on what the network has learned?

The model parameter randomisation test of Adebayo et al. 2018 (Sanity Checks for Saliency Maps,
section 3): the maps of the trained network are compared with those of the same network with random
weights. Maps that stay alike show edges of the image, not reasons of the model.
"""

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from records.arrays import Float32Array, UInt8Array
from records.bundles import Architecture, Bundle
from vision.explanations.closed_form import closed_form_of
from vision.explanations.gradients import head_gradcam
from vision.inference.loaded import plain_network
from vision.networks import build_model
from vision.preprocess import scale_pixels, to_tensor


def randomisation_similarity(bundle: Bundle, pixels: UInt8Array, *, seed: int = 0) -> float | None:
    """Compare Grad-CAM of the trained network with that of a random one.

    Args:
        bundle: of the trained model.
        pixels: uint8 [N, S, S, 3], real images of the model's geometry, N >= 1.
        seed: of the random weights.
    Returns:
        Mean over the images of the absolute Spearman correlation between both maps of the trained
        model's answer, 0 to 1; images whose trained map is constant are left out. None if all are.
    """
    document = bundle.document
    num_classes = len(document.taxonomy.codes)
    trained = plain_network(bundle)
    inputs = scale_pixels(to_tensor(pixels), document.geometry)
    with torch.inference_mode():
        target = trained(inputs).argmax(dim=1)
    random = random_network(document.architecture, num_classes, seed=seed)
    return similarity(target_maps(trained, inputs, target), target_maps(random, inputs, target))


def random_network(architecture: Architecture, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Build a network with random weights, in evaluation mode; the global generator stays as it is.

    Args:
        architecture: which network.
        num_classes: C.
        seed: of the weights.
    Returns:
        The network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(architecture.name, num_classes, **architecture.options).eval()


def similarity(ours: Float32Array, theirs: Float32Array) -> float | None:
    """Compare the maps of two networks.

    Args:
        ours: [N, h, w] of the trained network.
        theirs: [N, h, w] of the random one; a constant map has nothing in common with ours.
    Returns:
        Mean absolute Spearman correlation, 0 to 1, where ours are not constant; None if all are.
    """
    likeness = [
        abs(float(spearmanr(mine.ravel(), other.ravel()).statistic)) if np.ptp(other) > 0 else 0.0
        for mine, other in zip(ours, theirs, strict=True)
        if np.ptp(mine) > 0
    ]
    return float(np.mean(likeness)) if likeness else None


def target_maps(network: nn.Module, inputs: torch.Tensor, target: torch.Tensor) -> Float32Array:
    """Compute Grad-CAM of one class per image.

    Args:
        network: in evaluation mode, with the parts `features` and `head`.
        inputs: [N, 3, S, S], scaled.
        target: [N] class indices.
    Returns:
        [N, h, w], not negative.
    """
    with torch.inference_mode():
        features: torch.Tensor = network.get_submodule("features")(inputs)
        head = network.get_submodule("head")
        closed_form = closed_form_of(head)
        if closed_form is None:
            return head_gradcam(head, features, target).numpy()
        return closed_form.maps(features)[torch.arange(len(target)), target].numpy()
