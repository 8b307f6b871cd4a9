"""Bundles with checks and thresholds, whose distances rounding does not decide."""

import hashlib

import numpy as np
from torch import nn

from records.bundles import Bundle, OperatingPoints
from records.store import Store
from tests.models import write_random_bundle
from tests.vision.inference.foreign import foreign_images
from trainers.fitting.suitability import reference_outputs
from vision.calibration.suitability import Described, fit_suitability
from vision.inference.loaded import plain_network
from vision.networks import MODELS


def side_of(name: str) -> int:
    """At one position the map of a network with layer norm is zero but for rounding."""
    return 64 if name == "convnext_tiny" else max(32, MODELS[name].minimum_side_px)


def write_checked_bundle(store: Store, name: str) -> Bundle:
    side_px, codes = side_of(name), store.taxonomy.codes
    operating = OperatingPoints(conformal_thresholds={code: 0.84 + 0.01 * row for row, code in enumerate(codes)})
    bare = write_random_bundle(store, name, side_px=side_px)
    pixels = foreign_images(side_px, 40)[0]
    found = reference_outputs(plain_network(bare), pixels, bare.document.geometry)
    # Random deep networks give nearly the same features for all images, and whitening would magnify rounding: the
    # training images that are planted here differ as much as features are large.
    random = np.random.default_rng(3)
    pooled, early = (v * random.uniform(0.5, 1.5, v.shape).astype(np.float32) for v in (found.pooled, found.early))
    train, val = (Described(pixels[part], pooled[part], early[part]) for part in (slice(0, 30), slice(30, None)))
    document, arrays = fit_suitability(train, val, smallest_side_px=20)
    return write_random_bundle(store, name, side_px=side_px, arrays=arrays, suitability=document, operating=operating)


def weights_hash(graph: nn.Module) -> str:
    """A hash of all that a graph computes with, to find what was made of it before; sums of them may be NaN."""
    return hashlib.sha256(b"".join(values.numpy().tobytes() for values in graph.state_dict().values())).hexdigest()
