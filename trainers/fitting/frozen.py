"""Training on features: where nothing before the head ever changes, features are computed once per fit.

That is so if every weight of `features` is frozen and the policy shows images as they are; then an image has the same
features in every epoch. They lie in a file without a name in the folder of the checkpoint, and go when the process
ends: no later fit can find old ones, and nothing of an image is left to erase.
"""

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import dropwhile, takewhile
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from records.arrays import Float32Array
from records.bundles import Geometry
from records.durable import explained
from trainers.augmentation import Policy
from trainers.fitting.memory import first_that_fits, halvings
from trainers.fitting.training_data import TrainingData
from trainers.fitting.workers import WorkerGroup
from vision.precision import Precision, autocast
from vision.preprocess import scale_pixels, to_tensor

AT_ONCE = 128
POOLING = (nn.AdaptiveAvgPool2d, nn.Flatten)
"""Layers without weights or chance that a head may begin with; what they give is smaller than a feature map."""


@dataclass(frozen=True)
class FeatureRows:
    """Features of N images in place of their pixels; a `PixelSource`."""

    values: Float32Array = field(repr=False)
    """[N, ...]"""

    def __len__(self) -> int:
        """Return N."""
        return len(self.values)

    def take(self, indices: Any) -> Float32Array:
        """Return a writable copy of rows, [n, ...]."""
        rows: Float32Array = self.values[np.asarray(indices, dtype=np.int64)]
        return rows


def front_and_rest(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Cut a network behind its features and the pooling that its head begins with; both parts share its weights."""
    features, head = network.get_submodule("features"), network.get_submodule("head")
    layers = list(head.named_children()) if type(head) is nn.Sequential else [("head", head)]
    first = takewhile(_is_pooling, layers)
    return nn.Sequential(features, *(layer for _, layer in first)), nn.Sequential(
        OrderedDict(dropwhile(_is_pooling, layers))
    )


def _is_pooling(layer: tuple[str, nn.Module]) -> bool:
    return isinstance(layer[1], POOLING)


def without_frozen(
    network: nn.Module, data: TrainingData, geometry: Geometry, policy: Policy, precision: Precision, group: WorkerGroup
) -> tuple[nn.Module, TrainingData, Geometry | None]:
    """Return what is left to train, and on what: the head on features if these cannot change, else all as it is.

    Args:
        network: on the group's device, frozen as the settings say.
        data: with the pixels of all its images; of a stream nothing is computed before.
        geometry: how they become input.
        policy: of augmentation.
        precision: of the forward pass.
        group: several workers compute features in every step.
    Returns:
        A network that shares its weights with the one given, the same images with the rows that it takes, and how
        these become input; None if they are input as they are.
    Raises:
        UnavailableError: the features cannot be written, for example because the disk is full.
    """
    is_frozen = not any(parameter.requires_grad for parameter in network.get_submodule("features").parameters())
    if not (is_frozen and policy.changes_nothing and data.stream is None and group.world_size == 1):
        return network, data, geometry
    front, left = front_and_rest(network)
    front.eval()

    def compute(at_once: int, rows: range) -> Float32Array:
        parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        with torch.no_grad(), autocast(precision, str(group.device)):
            found: list[Tensor] = [
                front(scale_pixels(to_tensor(data.pixels.take(part)).to(group.device), geometry)) for part in parts
            ]
        return torch.cat(found).float().contiguous().cpu().numpy()

    folder = group.kept_in or Path(gettempdir())
    shape: tuple[int, ...] = ()
    at_once = AT_ONCE
    with ExitStack() as stack:
        with explained(folder / "features"):
            file = stack.enter_context(TemporaryFile(dir=folder))
        for start in range(0, len(data.pixels), AT_ONCE):
            rows = range(start, min(start + AT_ONCE, len(data.pixels)))
            values, at_once = first_that_fits(partial(compute, rows=rows), halvings(at_once))
            with explained(folder / "features"):
                file.write(values.data)
                file.flush()
            shape = values.shape[1:]
        # The map outlives the file, which has no name: the disk is free again when the run ends, however it does.
        mapped = np.memmap(file, dtype=np.float32, mode="r", shape=(len(data.pixels), *shape))
    return left, replace(data, pixels=FeatureRows(mapped.view(np.ndarray))), None
