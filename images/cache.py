"""The pixel cache: every image decoded once, memory-mapped, shared by all trials and workers of a node.

The cache of one frame and decode version is a folder of segments. A segment is two files: `NAME.u8` with N rows of
S x S x 3 bytes, and `NAME.ids` with N image ids of 32 bytes. Both are written under a temporary name and renamed, the
ids last, so a visible segment is complete. Two concurrent writers at worst store a row twice. The folder may be
deleted at any time.
"""

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from images.decode import DECODE_VERSION, decode_frame
from images.fetched import forget_fetched
from images.parallel import chunks_of, map_in_order
from records.arrays import IntArray, UInt8Array
from records.durable import make_folders, write_file
from records.erasure import Place, erased_ids
from records.errors import ContractError, DataError, UnavailableError
from records.frames import Frame
from records.ids import new_id
from records.store import Store, find_images, read_image
from records.types import Image

SEGMENT_BYTES = 32 * 2**20
"""A segment is written when it holds this much, so a killed run loses no more than that."""

_ID_BYTES = 32
_STALE_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass
class PixelRows:
    """Cached pixels of a list of images, in its order. Pickled, it holds paths, not pixels.

    Args:
        side_px: S.
        paths: segment files.
        segment_of: [N] index into `paths`.
        row_of: [N] row within the segment.
    """

    side_px: int
    paths: tuple[Path, ...]
    segment_of: IntArray = field(repr=False)
    row_of: IntArray = field(repr=False)
    _maps: list[UInt8Array | None] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        """Return N."""
        return len(self.row_of)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory maps; the receiver maps the same files."""
        return {**self.__dict__, "_maps": []}

    def take(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> UInt8Array:
        """Copy rows out of the cache.

        Args:
            indices: [n] positions in the list, 0 to N - 1; repeats are allowed.
        Returns:
            [n, S, S, 3], writable.
        """
        index = np.asarray(indices, dtype=np.int64)
        segments, rows = self.segment_of[index], self.row_of[index]
        out = np.empty((len(index), self.side_px, self.side_px, 3), dtype=np.uint8)
        # One gather per segment: a batch of shuffled rows touches few files and many rows in each.
        for segment in np.unique(segments):
            here = segments == segment
            out[here] = self._map(int(segment))[rows[here]]
        return out

    def _map(self, segment: int) -> UInt8Array:
        if not self._maps:
            self._maps = [None] * len(self.paths)
        mapped = self._maps[segment]
        if mapped is None:
            whole = np.memmap(self.paths[segment], dtype=np.uint8, mode="r")
            mapped = whole.view(np.ndarray).reshape(-1, self.side_px, self.side_px, 3)
            self._maps[segment] = mapped
        return mapped


class PixelCache:
    """The cache of one frame. Opening it reads only the ids: 10,000 images take a few milliseconds.

    Args:
        folder: the cache folder of the home.
        frame: as a network takes it, of side S.
    """

    def __init__(self, folder: Path, frame: Frame) -> None:
        self.frame, self.side_px = frame, frame.side_px
        self.folder = folder / f"{frame.name}-v{DECODE_VERSION}"
        self._paths: list[Path] = []
        self._seen: set[str] = set()
        self._place: dict[str, tuple[int, int]] = {}
        self._refresh()

    def __contains__(self, image_id: object) -> bool:
        """Return whether the image's pixels are cached."""
        return image_id in self._place

    def __len__(self) -> int:
        """Return how many images are cached."""
        return len(self._place)

    def missing(self, image_ids: Iterable[str]) -> list[str]:
        """Return the ids that are not cached yet, once each, in their order."""
        self._refresh()
        return [image_id for image_id in dict.fromkeys(image_ids) if image_id not in self._place]

    def append(self, image_ids: Sequence[str], pixels: UInt8Array) -> None:
        """Add decoded images as one segment.

        Args:
            image_ids: [N] image ids.
            pixels: [N, S, S, 3].
        Raises:
            ContractError: the shapes do not fit.
            UnavailableError: the disk is full or the folder cannot be written.
        """
        if pixels.dtype != np.uint8 or pixels.shape != (len(image_ids), self.side_px, self.side_px, 3):
            raise ContractError(
                f"a cache of {self.side_px} px takes uint8 [{len(image_ids)}, {self.side_px}, {self.side_px}, 3], "
                f"not {pixels.dtype} {list(pixels.shape)}"
            )
        if not len(image_ids):
            return
        name = new_id()
        # Pixels first: `_refresh` looks for ids, so a segment appears only once both files are there.
        _publish(self.folder / f"{name}.u8", np.ascontiguousarray(pixels).data)
        _publish(self.folder / f"{name}.ids", b"".join(bytes.fromhex(image_id) for image_id in image_ids))
        self._refresh()

    def ensure(self, store: Store, image_ids: Iterable[str], progress: Progress | None = None) -> int:
        """Decode the images that are missing and return their number.

        What was decoded before an error or a kill is kept. Raises UnknownIdError if an image is not in the ledger,
        DataError if its file is gone or does not decode, IntegrityError if its file was altered.
        """
        wanted = list(image_ids)
        erased = self._drop_erased(store)
        if gone := sorted(erased.intersection(wanted)):
            raise DataError(f"image {gone[0][:12]} was erased; load the dataset again, which leaves it out")
        missing = self.missing(wanted)
        if not missing:
            return 0
        self._drop_stale_files()
        images = find_images(store, missing)

        def decode(chunk: Sequence[Image]) -> UInt8Array:
            return np.stack([decode_frame(read_image(store, image), self.frame) for image in chunk])

        task = progress.add_task(f"Decoding at {self.side_px} px", total=len(missing)) if progress else None
        writer = SegmentWriter(self)
        chunks = chunks_of(images)
        try:
            for chunk, pixels in zip(chunks, map_in_order(decode, chunks), strict=True):
                writer.add([image.id for image in chunk], pixels)
                if progress and task is not None:
                    progress.advance(task, len(chunk))
        finally:
            writer.flush()
            # An erasure may have blanked the cache while these images were decoded.
            self._drop_erased(store)
        return len(missing)

    def _drop_erased(self, store: Store) -> set[str]:
        """Blank the images that were erased, on whatever node, and return the ids of all erased images."""
        self._refresh()
        with store.ledger.read() as tx:
            erased = erased_ids(tx)
        if here := erased & self._place.keys():
            blank_pixels(self.folder.parent, here)
            for image_id in here:
                del self._place[image_id]
        return erased

    def rows(self, image_ids: Sequence[str]) -> PixelRows:
        """Return the pixels of [N] cached images without reading them; ContractError if one is not cached."""
        absent = self.missing(image_ids)
        if absent:
            raise ContractError(f"image {absent[0][:12]} is not cached at {self.side_px} px; call ensure first")
        places = np.array([self._place[image_id] for image_id in image_ids], dtype=np.int64).reshape(-1, 2)
        return PixelRows(self.side_px, tuple(self._paths), places[:, 0], places[:, 1])

    def pixels(self, image_id: str) -> UInt8Array:
        """Return the pixels of one cached image, [S, S, 3]; safe from several threads."""
        segment, row = self._place[image_id]
        here = PixelRows(self.side_px, (self._paths[segment],), np.zeros(1, np.int64), np.array([row]))
        return np.asarray(here.take([0])[0], dtype=np.uint8)

    def _refresh(self) -> None:
        """Add the segments that appeared since the last call."""
        if not self.folder.is_dir():
            return
        for ids_path in sorted(self.folder.glob("*.ids")):
            if ids_path.name not in self._seen:
                self._seen.add(ids_path.name)
                self._take_in(ids_path)

    def _take_in(self, ids_path: Path) -> None:
        pixels_path = ids_path.with_suffix(".u8")
        ids = ids_path.read_bytes()
        count, rest = divmod(len(ids), _ID_BYTES)
        expected = count * self.side_px**2 * 3
        found = pixels_path.stat().st_size if pixels_path.is_file() else 0
        if rest or found != expected or not count:
            _log.warning(
                "cache segment %s holds %d bytes for %d images where %d belong; it is deleted and its images "
                "are decoded again",
                pixels_path, found, count, expected,
            )  # fmt: skip
            ids_path.unlink(missing_ok=True)
            pixels_path.unlink(missing_ok=True)
            return
        segment = len(self._paths)
        self._paths.append(pixels_path)
        for row in range(count):
            image_id = ids[row * _ID_BYTES : (row + 1) * _ID_BYTES].hex()
            # The first segment wins; a second row of an image holds the same pixels.
            self._place.setdefault(image_id, (segment, row))

    def _drop_stale_files(self) -> None:
        """Remove the files of killed writers: temporary ones, and pixels without ids."""
        if not self.folder.is_dir():
            return
        # Young files may belong to a writer that is still at work in another process.
        oldest = time.time() - _STALE_S
        for path in self.folder.iterdir():
            unfinished = path.suffix == ".new" or (path.suffix == ".u8" and not path.with_suffix(".ids").exists())
            if unfinished and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


class SegmentWriter:
    """Collects decoded rows and writes them to a cache as segments of about `SEGMENT_BYTES`."""

    def __init__(self, cache: PixelCache) -> None:
        self._cache = cache
        self._ids: list[str] = []
        self._pixels: list[UInt8Array] = []
        self._num_bytes = 0

    def add(self, image_ids: Sequence[str], pixels: UInt8Array) -> None:
        """Add [N] ids with pixels [N, S, S, 3]; they are on disk once the segment is full, or after `flush`."""
        self._ids.extend(image_ids)
        self._pixels.append(pixels)
        self._num_bytes += pixels.nbytes
        if self._num_bytes >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are still in memory."""
        if self._ids:
            self._cache.append(self._ids, np.concatenate(self._pixels))
        self._ids, self._pixels, self._num_bytes = [], [], 0


def _publish(path: Path, content: bytes | memoryview) -> None:
    try:
        make_folders(path.parent)
        write_file(path, content)
    except UnavailableError as error:
        reason = getattr(error.__cause__, "strerror", error)
        raise UnavailableError(
            f"the pixel cache {path.parent} cannot be written ({reason}); free some space there "
            "(the whole cache may be deleted) and run it again: what is decoded is kept"
        ) from error


def blank_pixels(cache: Path, image_ids: Collection[str]) -> int:
    """Blank images in every pixel cache of a home and return how many rows that were.

    Rows are overwritten where they lie, so processes that have the segment mapped keep running. Their ids are blanked,
    too, so no reader finds an empty row.
    """
    wanted = {bytes.fromhex(image_id) for image_id in image_ids}
    blanked = 0
    for ids_path in sorted(cache.glob("*px*-v*/*.ids")):
        ids = ids_path.read_bytes()
        pixels_path = ids_path.with_suffix(".u8")
        rows = [at for at in range(0, len(ids), _ID_BYTES) if ids[at : at + _ID_BYTES] in wanted]
        if not rows or not pixels_path.is_file():
            continue
        row_bytes = pixels_path.stat().st_size * _ID_BYTES // len(ids)
        for at in rows:
            # Pixels before ids: after a kill in between, the next call still finds the row and finishes it.
            _blank(pixels_path, at // _ID_BYTES * row_bytes, row_bytes)
            _blank(ids_path, at, _ID_BYTES)
        blanked += len(rows)
    return blanked


PIXELS = Place(
    "decoded pixels",
    "cache",
    "images as a model sees them, and what interrupted imports fetched; the caches of other nodes drop them when they "
    "are next used",
    lambda store, image_ids: blank_pixels(store.home.cache, image_ids) + forget_fetched(store.home.cache, image_ids),
)


def _blank(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(length))
