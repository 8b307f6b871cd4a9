"""How much rounding alone changes a model's distances, which whitening may magnify."""

import numpy as np
import torch

from records.bundles import Bundle
from vision.inference.described import early_statistics, first_convolution, pooled_features
from vision.inference.loaded import LoadedModel, plain_network

ROUNDING = 10.0
"""Distances of another engine may differ by this many times what rounding changes in torch."""


def rounding_of_scores(bundle: Bundle, model: LoadedModel) -> float:
    """Return by how much folding, which is exact but for rounding, changes the distances of the golden images.

    Whitening magnifies rounding where the features of all training images are nearly equal, as in a network that was
    hardly trained.
    """
    network = plain_network(bundle)
    inputs = model.inputs(bundle.golden()["inputs"])
    with torch.inference_mode():
        pooled = pooled_features(network.get_submodule("features")(inputs)).numpy()
        early = early_statistics(first_convolution(network), inputs).numpy()
    checks = model.checks
    if checks is None:
        return 0.0
    folded = np.asarray(model.predict(bundle.golden()["inputs"]).ood_scores)
    return float(np.abs(checks.ood_scores(pooled, early) - folded).max())
