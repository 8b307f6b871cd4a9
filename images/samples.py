"""A few images to display: from the train split of a dataset, evenly over its classes, or generated ones."""

from dataclasses import dataclass, field

import numpy as np
from rich.progress import Progress

from images.cache import PixelCache
from images.decode import decode_frame
from images.importer import open_dataset
from images.synth import SHARES, render
from records.arrays import UInt8Array
from records.datasets import DatasetVersion
from records.frames import Frame
from records.ids import sha256_hex
from records.store import Store, find_images
from records.types import DatasetRecord, Split

_GENERATED_WIDTH_PX = 400


@dataclass(frozen=True)
class Sample:
    """Decoded images with their names.

    Args:
        pixels: [n, S, S, 3].
        image_ids: [n] 64 hex characters.
        names: [n] class and source id.
        source: description of where they come from.
    """

    pixels: UInt8Array = field(repr=False)
    image_ids: list[str]
    names: list[str]
    source: str


def sample_images(
    store: Store, data: str | None, count: int, frame: Frame, *, progress: Progress | None = None
) -> Sample:
    """Choose images of the train split, taking the classes in turn; the choice is deterministic.

    Args:
        store: its images are decoded.
        data: a folder or a dataset id; None takes the newest version, or generated images if there is none.
        count: how many, at least 1; fewer if the train split has fewer.
        frame: as the network takes it, of side S.
        progress: shows importing or decoding.
    Returns:
        The images.
    Raises:
        DataError: the folder cannot be imported.
        UnknownIdError: no dataset has that id.
    """
    if data is None:
        with store.ledger.read() as tx:
            if not tx.count(DatasetRecord):
                return _generated(count, frame)
    dataset = open_dataset(store, data, progress=progress)
    chosen = _classes_in_turn(dataset, count)
    cache = PixelCache(store.home.cache, frame)
    cache.ensure(store, chosen, progress)
    label_of = dict(zip(dataset.rows["image_id"], dataset.rows["label"], strict=True))
    names = [f"{label_of[image.id]} {image.source_id or image.id[:12]}" for image in find_images(store, chosen)]
    pixels = cache.rows(chosen).take(np.arange(len(chosen)))
    return Sample(pixels, chosen, names, f"train images of dataset {dataset.id[:12]}")


def _classes_in_turn(dataset: DatasetVersion, count: int) -> list[str]:
    train = dataset.split(Split.TRAIN).sort_values("image_id")
    # Numbers the images within each class, so the n-th of every class comes before the next of any.
    turn = train.groupby("label").cumcount()
    ordered = train.assign(turn=turn).sort_values(["turn", "label"])
    return [str(image_id) for image_id in ordered["image_id"][:count]]


def _generated(count: int, frame: Frame) -> Sample:
    codes = list(SHARES)
    files = [
        # At least 1.5 times as high as the square, so generated images are scaled down like real ones.
        render(codes[n % len(codes)], seed=1, number=n, width_px=max(_GENERATED_WIDTH_PX, 2 * frame.side_px))
        for n in range(count)
    ]
    return Sample(
        pixels=np.stack([decode_frame(file, frame) for file in files]),
        image_ids=[sha256_hex(file) for file in files],
        names=[f"{codes[n % len(codes)]} generated {n}" for n in range(count)],
        source="generated images",
    )
