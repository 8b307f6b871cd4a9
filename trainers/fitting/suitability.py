"""What fitting adds to a bundle beside weights and calibration: limits of suitable images, faithfulness of heat maps.

It reads a sample of train, and val. Everything is computed the plain way (fp32, nothing folded).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from images.cache import PixelCache
from records.arrays import Float32Array, UInt8Array
from records.bundles import Architecture, Calibration, Geometry, SuitabilityLimits
from records.datasets import DatasetVersion
from records.store import Store, find_images
from records.types import Split
from trainers.evaluation.faithfulness import FACTS_IMAGES, faithfulness_facts
from trainers.fitting.loop import TrainedModel
from vision.calibration.suitability import PER_CLASS, Described, fit_suitability
from vision.inference.described import early_statistics, first_convolution, pooled_features
from vision.metrics.bootstrap import stratified_sample
from vision.preprocess import check_pixels, scale_pixels, to_tensor
from vision.views import mean_of_views, viewed

SCORING_BATCH = 64


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network for N images."""

    logits: Float32Array
    """[N, C]"""
    pooled: Float32Array
    """[N, D], see `pooled_features`"""
    early: Float32Array
    """[N, 2 K], see `early_statistics`"""


def outputs_of(
    trained: TrainedModel,
    store: Store,
    image_ids: list[str],
    views: int = 1,
    *,
    progress: Progress | None = None,
    what: str = "Scoring images",
) -> Outputs:
    """Run the network on cached images, in batches.

    Args:
        trained: the network and its geometry.
        store: with the pixel cache.
        image_ids: [N], N >= 1, decoded already.
        views: over which the logits are averaged; features are those of the image itself.
        progress: gets a task that counts the images.
        what: name of the task.
    Returns:
        Logits and features.
    """
    pixels = PixelCache(store.home.cache, trained.geometry.frame).rows(image_ids)
    task = None if progress is None else progress.add_task(what, total=len(pixels))
    parts = []
    for start in range(0, len(pixels), SCORING_BATCH):
        rows = np.arange(start, min(start + SCORING_BATCH, len(pixels)))
        parts.append(reference_outputs(trained.network, pixels.take(rows), trained.geometry, views))
        if progress is not None and task is not None:
            progress.advance(task, len(rows))
    return Outputs(
        logits=np.concatenate([part.logits for part in parts]),
        pooled=np.concatenate([part.pooled for part in parts]),
        early=np.concatenate([part.early for part in parts]),
    )


def reference_outputs(network: nn.Module, pixels: UInt8Array, geometry: Geometry, views: int = 1) -> Outputs:
    """Compute logits and features the plain way: fp32, nothing folded.

    Args:
        network: in evaluation mode, on the CPU, with the parts `features` and `head`.
        pixels: [N, S, S, 3].
        geometry: of the network.
        views: over which the logits are averaged.
    Returns:
        The outputs; the logits are those of `reference_logits`.
    """
    check_pixels(pixels, geometry.side_px)
    with torch.inference_mode():
        inputs = scale_pixels(to_tensor(pixels), geometry)
        features = network.get_submodule("features")(inputs)
        others = [network(viewed(inputs, view)) for view in range(1, views)]
        logits = mean_of_views([network.get_submodule("head")(features), *others])
        early = early_statistics(first_convolution(network), inputs)
        return Outputs(logits.numpy().astype(np.float32), pooled_features(features).numpy(), early.numpy())


def suitability_of(
    store: Store,
    dataset: DatasetVersion,
    trained: TrainedModel,
    val_ids: list[str],
    val: Outputs,
    progress: Progress | None = None,
) -> tuple[SuitabilityLimits, dict[str, NDArray[Any]]]:
    """Fit which images suit a trained network.

    Args:
        store: with the images, decoded already.
        dataset: the version it was trained on.
        trained: the network.
        val_ids: [m] images of the val split.
        val: outputs for them.
        progress: gets a task that counts the images.
    Returns:
        Thresholds for the document, and arrays for the bundle.
    """
    train_ids = sample_of_train(store, dataset)
    cache = PixelCache(store.home.cache, trained.geometry.frame)
    images = find_images(store, [*train_ids, *val_ids])
    train = outputs_of(trained, store, train_ids, progress=progress, what="Scoring a sample of train")
    return fit_suitability(
        Described(cache.rows(train_ids).take(np.arange(len(train_ids))), train.pooled, train.early),
        Described(cache.rows(val_ids).take(np.arange(len(val_ids))), val.pooled, val.early),
        smallest_side_px=min(min(image.width_px, image.height_px) for image in images),
    )


def faithfulness_of(
    store: Store, trained: TrainedModel, architecture: Architecture, calibration: Calibration, val_ids: list[str]
) -> dict[str, float | int | None]:
    """Measure how faithful the heat maps of a trained network are, on a few val images.

    Args:
        store: with the pixel cache.
        trained: the network.
        architecture: what it is.
        calibration: of its logits.
        val_ids: [m] images of the val split, decoded already.
    Returns:
        See `trainers.evaluation.faithfulness.faithfulness_facts`.
    """
    pixels = PixelCache(store.home.cache, trained.geometry.frame).rows(val_ids)
    few = pixels.take(np.arange(min(FACTS_IMAGES, len(val_ids))))
    return faithfulness_facts(trained.network, architecture, trained.geometry, calibration, few)


def sample_of_train(store: Store, dataset: DatasetVersion) -> list[str]:
    """Choose training images, at most `PER_CLASS` of a class, from as many groups as possible."""
    rows = dataset.split(Split.TRAIN)
    labels = np.array([store.taxonomy.index_of(str(code)) for code in rows["label"]], dtype=np.int64)
    _, group_index = np.unique(rows["group_id"].to_numpy(dtype=str), return_inverse=True)
    chosen = stratified_sample(labels, group_index, PER_CLASS)
    return [str(image_id) for image_id in rows["image_id"].to_numpy()[chosen]]
