"""A sanity check for heat maps: do they depend on what the network has learned?

The model parameter randomisation test of Adebayo et al. 2018 (Sanity Checks for Saliency Maps,
section 3): the maps of the trained network are compared with those of the same network with random
weights. Maps that stay alike show edges of the picture, not reasons of the model.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from records.bundles import Bundle
from trainers.explanations.closed_form import closed_form_of
from trainers.explanations.gradients import head_gradcam
from trainers.inference.loaded import load_weights
from trainers.models import build_model
from trainers.preprocess import scale_pixels, to_tensor


def randomisation_similarity(bundle: Bundle, pixels: NDArray[np.uint8], *, seed: int = 0) -> float | None:
    """Compare Grad-CAM of the trained network with that of a random one.

    Args:
        bundle: of the trained model.
        pixels: uint8 [N, S, S, 3], real pictures of the model's geometry, N >= 1.
        seed: of the random weights.
    Returns:
        Mean over the pictures of the absolute Spearman correlation between both maps of the trained
        model's answer, 0 to 1; pictures whose trained map is constant are left out. None if all are.
    """
    document = bundle.document
    num_classes = len(document.taxonomy.codes)
    trained = build_model(document.architecture.name, num_classes, **document.architecture.options).eval()
    load_weights(trained, bundle.weights(), bundle.id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random = build_model(document.architecture.name, num_classes, **document.architecture.options).eval()
    inputs = scale_pixels(to_tensor(pixels), document.geometry)
    with torch.inference_mode():
        target = trained(inputs).argmax(dim=1)
    pairs = zip(_maps(trained, inputs, target), _maps(random, inputs, target), strict=True)
    likeness = [
        # A random network's constant map has nothing in common with the trained one's.
        abs(float(spearmanr(ours.ravel(), theirs.ravel()).statistic)) if np.ptp(theirs) > 0 else 0.0
        for ours, theirs in pairs
        if np.ptp(ours) > 0
    ]
    return float(np.mean(likeness)) if likeness else None


def _maps(network: torch.nn.Module, inputs: torch.Tensor, target: torch.Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        features: torch.Tensor = network.get_submodule("features")(inputs)
        head = network.get_submodule("head")
        closed_form = closed_form_of(head)
        if closed_form is None:
            return head_gradcam(head, features, target).numpy()
        return closed_form.maps(features)[torch.arange(len(target)), target].numpy()
