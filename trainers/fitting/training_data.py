"""The data of a run: which images it trains on, which it validates with, their decoded pixels and pixel statistics.

A `DataPlan` names images and labels and can be sent to any node; `open` makes it there into
`TrainingData`, decoding what that node has not decoded yet. A plan holds the train and val splits of a
dataset version and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from records.arrays import FloatArray, IntArray
from records.errors import ContractError, DataError
from records.ids import hash_of, sha256_hex
from records.taxonomy import Taxonomy
from records.types import Split
from trainers.fitting.checkpoints import Identity
from trainers.fitting.feeding import PixelSource, Stream
from trainers.optimization.distillation import Lesson

if TYPE_CHECKING:
    from rich.progress import Progress

    from images.cache import PixelCache
    from records.datasets import DatasetVersion
    from records.frames import Frame
    from records.store import Store
    from trainers.augmentation import Policy
    from trainers.settings import TrainersSettings


Rgb = tuple[float, float, float]

MOST_IMAGES = 2048
CHUNK = 256
SMALLEST_STD = 1e-3


def evenly_spaced(rows: IntArray, most: int) -> IntArray:
    """Pick rows that stand for all of them.

    Args:
        rows: [n], n >= 1.
        most: how many at most.
    Returns:
        [min(n, most)], ascending, evenly spaced among the sorted rows.
    """
    return np.sort(rows)[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]


def pixel_statistics(pixels: PixelSource, rows: IntArray) -> tuple[Rgb, Rgb]:
    """Compute mean and standard deviation over the values of the training images.

    Args:
        pixels: decoded images.
        rows: [n] the training rows; of more than 2048, evenly spaced ones are used.
    Returns:
        Mean and deviation of red, green and blue, of values in 0 to 1, rounded to 6 digits.
    """
    chosen = evenly_spaced(rows, MOST_IMAGES)
    values = np.arange(256) / 255.0
    # Integer histograms instead of running float sums: exact, so the result does not depend on chunk size or order.
    histogram = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(chosen), CHUNK):
        batch = pixels.take(chosen[start : start + CHUNK])
        for channel in range(3):
            histogram[channel] += np.bincount(batch[..., channel].ravel(), minlength=256)
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = shares @ values**2 - mean**2
    std = np.maximum(np.sqrt(np.maximum(variance, 0.0)), SMALLEST_STD)
    return _rgb(mean), _rgb(std)


def _rgb(values: FloatArray) -> Rgb:
    red, green, blue = (round(float(value), 6) for value in values)
    return (red, green, blue)


TRAINED_ON = {"train": (Split.TRAIN,), "train_and_val": (Split.TRAIN, Split.VAL)}
"""Splits that each value of the setting `train_splits` trains on."""


@dataclass(frozen=True)
class TrainingData:
    """Images with labels, and which of them are trained on and validated with.

    Args:
        pixels: N decoded images of the split that the settings name.
        image_ids: [N] image ids.
        labels: [N] class indices.
        train_index: [n] rows to train on.
        val_index: [m] rows to validate with; no row is in both.
        stream: of the images to train on, if `pixels` does not hold them all.
        lesson: what a teacher says about the images to train on; None without one.
    """

    pixels: PixelSource
    image_ids: list[str] = field(repr=False)
    labels: IntArray = field(repr=False)
    train_index: IntArray = field(repr=False)
    val_index: IntArray = field(repr=False)
    stream: Stream | None = field(default=None, repr=False)
    lesson: Lesson | None = field(default=None, repr=False)

    def require_usable(self, num_classes: int) -> None:
        """Refuse data that a run cannot use.

        Raises ContractError: lengths or class indices do not fit, or a row is on both splits.
        Raises DataError: one of the two splits is empty, or train has one class only.
        """
        if not len(self.pixels) == len(self.image_ids) == len(self.labels):
            raise ContractError(
                f"{len(self.pixels)} images, {len(self.image_ids)} ids and {len(self.labels)} labels do not match"
            )
        if len(self.labels) and not (self.labels.min() >= 0 and self.labels.max() < num_classes):
            raise ContractError(f"labels must be class indices from 0 to {num_classes - 1}")
        if np.intersect1d(self.train_index, self.val_index).size:
            raise ContractError("an image is both trained on and validated with")
        for name, index in (("train", self.train_index), ("val", self.val_index)):
            if not len(index):
                raise DataError(f"the dataset has no image on the {name} split; label or import more images first")
        if len(np.unique(self.labels[self.train_index])) < 2:
            raise DataError(
                f"all {len(self.train_index)} images of the train split are of one class, which leaves nothing to tell "
                "apart; import or label images of another class"
            )

    def content_hash(self) -> str:
        """Return the hash of which images are trained on and validated with, and their labels; 64 hex characters."""
        # Order is part of the identity: batches are drawn by row number.
        lines = [
            f"{split}:{self.image_ids[row]}:{self.labels[row]}"
            for split, index in (("train", self.train_index), ("val", self.val_index))
            for row in index
        ]
        return sha256_hex("\n".join(lines).encode())


@dataclass(frozen=True)
class DataPlan:
    """The images of a run, without their pixels.

    Args:
        image_ids: [N] image ids, each split in order of id, those to train on before those to validate with.
        labels: [N] class indices.
        num_train: n; the first n are trained on.
        group_ids: [N] the group of each image; empty where nobody asks for groups.
        lesson: what a teacher says about the images to train on; None without one.
    """

    image_ids: list[str] = field(repr=False)
    labels: IntArray = field(repr=False)
    num_train: int
    group_ids: list[str] = field(default_factory=list, repr=False)
    lesson: Lesson | None = field(default=None, repr=False)

    def limited(self, max_train_images: int | None) -> "DataPlan":
        """Return the plan with fewer training images: whole groups, classes in proportion, val untouched.

        Args:
            max_train_images: at most so many; None takes all. A larger part holds every smaller one.
        Returns:
            The plan.
        Raises:
            DataError: fewer images are allowed than there are classes.
            ContractError: the plan knows no groups.
        """
        if max_train_images is None or max_train_images >= self.num_train:
            return self
        if not self.group_ids:
            raise ContractError("a plan without groups cannot be limited")
        from pandas import DataFrame

        from images.grouping import grouped_subset

        n = self.num_train
        rows = DataFrame({"image_id": self.image_ids[:n], "group_id": self.group_ids[:n], "label": self.labels[:n]})
        # Always seed 0, whatever the run's seed: trials with different seeds train on the same images.
        chosen = set(grouped_subset(rows, max_train_images, seed=0)["image_id"])
        return self._of_rows([row for row, image_id in enumerate(self.image_ids) if row >= n or image_id in chosen])

    def part(self, number: int, count: int) -> "DataPlan":
        """Return the plan with one of `count` parts of the training images, 1-based: whole groups, val untouched.

        Raises ContractError: the plan knows no groups.
        """
        if count == 1:
            return self
        if not self.group_ids:
            raise ContractError("a plan without groups cannot be divided")
        # By a hash of its id a group is in the same part for every peer, whatever else its dataset holds.
        mine = [int(sha256_hex(group.encode())[:8], 16) % count == number - 1 for group in self.group_ids]
        return self._of_rows([row for row, own in enumerate(mine) if row >= self.num_train or own])

    def _of_rows(self, kept: list[int]) -> "DataPlan":
        if self.lesson is not None:
            raise ContractError("a plan is limited and divided before a teacher is asked about its images")
        return DataPlan(
            image_ids=[self.image_ids[row] for row in kept],
            labels=self.labels[kept],
            num_train=sum(row < self.num_train for row in kept),  # of rows: an image may come more than once
            group_ids=[self.group_ids[row] for row in kept],
        )

    def stream(self, store: "Store", frame: "Frame") -> TrainingData:
        """Decode what is read again and again: val, and the sample of train that statistics are measured on.

        Returns the data; Ray Data decodes the images to train on as they are needed.
        Raises DataError: an image cannot be read.
        """
        from images.streaming import stream_pixels

        sample = evenly_spaced(np.arange(self.num_train, dtype=np.int64), MOST_IMAGES)
        val = np.arange(self.num_train, len(self.image_ids), dtype=np.int64)
        pixels = stream_pixels(store, self.image_ids, np.concatenate([sample, val]), frame)
        return self._with_pixels(pixels, pixels.batches)

    def open(self, store: "Store", frame: "Frame", progress: "Progress | None" = None) -> TrainingData:
        """Decode what this node has not decoded yet, and map the pixels.

        Raises DataError: an image cannot be read.
        """
        from images.cache import PixelCache

        cache = PixelCache(store.home.cache, frame)
        cache.ensure(store, self.image_ids, progress)
        return self.mapped(cache)

    def mapped(self, cache: "PixelCache") -> TrainingData:
        """Map the pixels of a cache that has them all."""
        return self._with_pixels(cache.rows(self.image_ids))

    def _with_pixels(self, pixels: PixelSource, stream: Stream | None = None) -> TrainingData:
        rows = np.arange(len(self.image_ids), dtype=np.int64)
        return TrainingData(
            pixels,
            self.image_ids,
            self.labels,
            train_index=rows[: self.num_train],
            val_index=rows[self.num_train :],
            stream=stream,
            lesson=self.lesson,
        )


def plan_data(dataset: "DatasetVersion", taxonomy: Taxonomy, trained_on: Sequence[Split] = (Split.TRAIN,)) -> DataPlan:
    """Read the splits of a dataset version that a run trains on, and the one that it is validated with.

    Args:
        dataset: the version.
        taxonomy: of its labels.
        trained_on: splits to train on; with val among them, calibration is only watched, since nothing of a run may
            be chosen by it.
    Returns:
        The plan.
    Raises:
        TaxonomyError: the version was made with another taxonomy.
    """
    taxonomy.require_same(dataset.taxonomy_hash, f"dataset version {dataset.id[:12]}")
    watched = Split.CALIBRATION if Split.VAL in trained_on else Split.VAL
    parts = [dataset.split(split) for split in (*trained_on, watched)]
    codes = [code for part in parts for code in part["label"]]
    return DataPlan(
        image_ids=[image_id for part in parts for image_id in part["image_id"]],
        labels=np.array([taxonomy.index_of(code) for code in codes], dtype=np.int64),
        num_train=len(codes) - len(parts[-1]),
        group_ids=[group_id for part in parts for group_id in part["group_id"]],
    )


def identity_of(
    settings: "TrainersSettings",
    data: TrainingData,
    taxonomy: Taxonomy,
    policy: "Policy",
    initial_weights: "Mapping[str, NDArray[Any]] | None",
) -> Identity:
    """Return what a run on these images is made of."""
    # By their content, so that the same weights at another path give the same identity.
    start = {name: sha256_hex(np.ascontiguousarray(value).tobytes()) for name, value in (initial_weights or {}).items()}
    return Identity(
        recipe_hash=settings.recipe_hash(),
        policy_hash=policy.content_hash(),
        taxonomy_hash=taxonomy.hash,
        data_hash=data.content_hash(),
        start_hash=hash_of(start),
        teacher_id=data.lesson.teacher_id if data.lesson is not None else None,
    )
