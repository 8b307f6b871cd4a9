"""Training images decoded by Ray Data while they are trained on, and never stored decoded.

For data whose decoded copy would not fit on a node's disk. The pipeline reads stored images in the order in which an
epoch needs them, decodes them in tasks on any node, and returns them in that order, so a streamed run sees the same
pixels as a cached one. Each worker streams its own shard. Images that are read repeatedly stay in the pixel cache: the
val split, and the sample that statistics are measured on.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from images.cache import PixelCache, PixelRows
from images.decode import decode_frame
from records.arrays import IntArray, UInt8Array
from records.errors import ContractError, RelookError, error_class
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, find_images, open_store, read_image

IMAGES_PER_TASK = 128
"""Placing a task takes tens of milliseconds, so each decodes enough images to make that small."""


@dataclass(frozen=True)
class StreamedPixels:
    """Pixels of N images, of which few are cached and the others are decoded when needed.

    Args:
        image_ids: [N] image ids.
        frame: as the network takes it, of side S.
        records: settings with which every node opens the same store.
        kept: [N] position of an image in `cached`; -1 where it is not cached.
        cached: the pixels of the cached ones.
    """

    image_ids: list[str] = field(repr=False)
    frame: Frame
    records: RecordsSettings
    kept: IntArray = field(repr=False)
    cached: PixelRows = field(repr=False)

    def __len__(self) -> int:
        """Return N."""
        return len(self.image_ids)

    def take(self, indices: Any) -> UInt8Array:
        """Copy cached rows, [n] positions to [n, S, S, 3], writable; ContractError if one is not cached."""
        places = self.kept[np.asarray(indices, dtype=np.int64)]
        if len(places) and places.min() < 0:
            raise ContractError("an image that is not cached cannot be taken at random; use `batches`")
        return self.cached.take(places)

    def batches(self, parts: Sequence[IntArray]) -> Iterator[UInt8Array]:
        """Decode images in order; Ray has to be initialized.

        Args:
            parts: positions, one array per batch; repeats are decoded again.
        Yields:
            [n, S, S, 3] per part, writable.
        Raises:
            DataError: an image's file is gone or does not decode.
            IntegrityError: an image's file was altered.
        """
        wanted = [self.image_ids[position] for part in parts for position in part]
        yield from _cut(_decoded(wanted, self.frame, self.records), [len(part) for part in parts])


def stream_pixels(store: Store, image_ids: list[str], kept: IntArray, frame: Frame) -> StreamedPixels:
    """Cache a part of the images, and leave the others to be streamed.

    Args:
        store: its settings have to open the same store on every node.
        image_ids: [N] image ids.
        kept: positions of the images to cache.
        frame: as the network takes it, of side S.
    Returns:
        The pixels.
    Raises:
        DataError: an image to cache cannot be read.
    """
    cache = PixelCache(store.home.cache, frame)
    ids = [image_ids[position] for position in kept]
    cache.ensure(store, ids)
    places = np.full(len(image_ids), -1, dtype=np.int64)
    places[kept] = np.arange(len(kept))
    return StreamedPixels(image_ids, frame, store.settings, places, cache.rows(ids))


def _decoded(image_ids: list[str], frame: Frame, records: RecordsSettings) -> Iterator[UInt8Array]:
    """Run the pipeline and yield pixels in order, in pieces of any length."""
    starts = range(0, len(image_ids), IMAGES_PER_TASK)
    tables = [pa.table({"image_id": image_ids[start : start + IMAGES_PER_TASK]}) for start in starts]
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        images = ray.data.from_arrow(tables).map_batches(
            functools.partial(_decode, frame=frame, records=records),
            batch_size=None,
            batch_format="numpy",
            # The training workers may hold every CPU that Ray counts and wait for these tasks: asking for one here
            # would deadlock. `concurrency` bounds the tasks instead.
            num_cpus=0,
            concurrency=min(len(tables), _cpus()),
        )
    for batch in images.iter_batches(batch_size=None, batch_format="numpy"):
        if batch["failure"][0]:
            raise error_class(str(batch["failure"][0]))(str(batch["message"][0]))
        yield np.asarray(batch["pixels"], dtype=np.uint8)


def _decode(batch: dict[str, NDArray[Any]], *, frame: Frame, records: RecordsSettings) -> dict[str, NDArray[Any]]:
    """Decode one block. An error is returned beside black pixels: Ray would keep only the text of a raised one."""
    ids = [str(image_id) for image_id in batch["image_id"]]
    kind, message = "", ""
    try:
        store = _store(records)
        pixels = np.stack([decode_frame(read_image(store, image), frame) for image in find_images(store, ids)])
    except RelookError as error:
        kind, message = type(error).__name__, str(error)
        pixels = np.zeros((len(ids), frame.side_px, frame.side_px, 3), dtype=np.uint8)
    return {"pixels": pixels, "failure": np.full(len(ids), kind), "message": np.full(len(ids), message)}


# Task processes are reused, and opening a store for every block would dominate.
@functools.lru_cache(maxsize=1)
def _store(records: RecordsSettings) -> Store:
    return open_store(records)


def _cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def _cut(pieces: Iterator[UInt8Array], lengths: Sequence[int]) -> Iterator[UInt8Array]:
    """Cut a stream of pixel arrays into parts of the given lengths."""
    waiting: list[UInt8Array] = []
    held = 0
    for length in lengths:
        while held < length:
            piece = next(pieces)
            waiting.append(piece)
            held += len(piece)
        joined = np.concatenate(waiting)  # copies, since arrays from Ray's object store are read-only
        yield joined[:length]
        waiting, held = [joined[length:]], held - length
