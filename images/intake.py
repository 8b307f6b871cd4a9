"""The work of an import on each image: read, strip metadata, hash, store, decode once into the caches.

Input: files, or images in archives. Output: one `TakenIn` each, in order, with the stored image or the reason why it
cannot be used. Images whose pixels are cached are not decoded again, so a second run continues where the first one
stopped.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from images.cache import PixelCache, SegmentWriter
from images.decode import decode_frames
from images.dicom import DicomTags, read_dicom
from images.members import ImageFile
from images.near_duplicates import HASH_FRAME, perceptual_hash
from images.parallel import chunks_of, map_in_order
from records.arrays import UInt8Array
from records.errors import ContractError, ImageError, UnavailableError
from records.frames import Frame
from records.ids import sha256_hex
from records.images import image_size, is_dicom, sniff, strip_metadata
from records.store import Store

ERASED = "erased"
"""Code of the refusal of an image that was erased on request."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakenIn:
    """A stored and cached image, or the reason why there is none.

    Args:
        path: the file.
        refusal: one sentence; None if the image can be used.
        code: code of the refusal, see Quarantined.
        image_id: SHA-256 of the stored bytes.
        uri: location of the stored bytes.
        format: jpeg, png or webp.
        width_px: as stored.
        height_px: as stored.
        perceptual_hash: 16 hex characters.
        decoded: True if it was decoded now.
        tags: of a DICOM file.
    """

    path: ImageFile
    refusal: str | None = None
    code: str = "unreadable"
    image_id: str = ""
    uri: str = ""
    format: str = ""
    width_px: int = 0
    height_px: int = 0
    perceptual_hash: str = ""
    decoded: bool = False
    tags: DicomTags | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Read:
    taken: TakenIn
    decoded: dict[Frame, UInt8Array] = field(default_factory=dict, repr=False)


class Intake:
    """Reads and decodes images on all cores.

    Args:
        store: its blobs and caches are filled.
        frames: to cache; `HASH_FRAME`, which finding near-duplicates needs, is always added.
        in_place: True leaves the files where they are, unchanged, and stores only their location.
        known_hashes: image id to perceptual hash, of images that need not be hashed again.
        erased: ids of images that were erased on request and must not be stored again.
    """

    def __init__(
        self,
        store: Store,
        frames: Sequence[Frame],
        *,
        in_place: bool,
        known_hashes: Mapping[str, str],
        erased: frozenset[str] = frozenset(),
    ) -> None:
        if not all(frame.side_px >= 1 for frame in frames):
            raise ContractError(f"the sides of frames must be at least 1 px, not {list(frames)}")
        self._store, self._in_place = store, in_place
        self._known_hashes, self._erased = known_hashes, erased
        self._caches = {frame: PixelCache(store.home.cache, frame) for frame in {*frames, HASH_FRAME}}

    def run(self, paths: Sequence[ImageFile], progress: Progress | None = None) -> Iterator[TakenIn]:
        """Yield one result per path, in order; what was stored before an error or a kill is kept."""
        writers = {frame: SegmentWriter(cache) for frame, cache in self._caches.items()}
        task = progress.add_task("Reading images", total=len(paths)) if progress else None
        try:
            for chunk in map_in_order(self._read_chunk, chunks_of(paths)):
                for read in chunk:
                    for frame, pixels in read.decoded.items():
                        writers[frame].add([read.taken.image_id], pixels[None])
                    yield read.taken
                if progress and task is not None:
                    progress.advance(task, len(chunk))
        # Also after an error or an early end of the caller: decoded rows that are still in memory are not lost.
        finally:
            for writer in writers.values():
                writer.flush()

    def _read_chunk(self, paths: Sequence[ImageFile]) -> list[_Read]:
        return [self._read(path) for path in paths]

    def _read(self, path: ImageFile) -> _Read:
        try:
            return self._take_in(path, path.read_bytes())
        except ImageError as error:
            return _Read(TakenIn(path, refusal=str(error)))
        except OSError as error:
            return _Read(TakenIn(path, refusal=f"the file cannot be read ({error.strerror})"))
        except UnavailableError:
            raise
        except Exception as error:  # noqa: BLE001 - one file must not end an import of thousands
            _log.exception("an image was left out of an import")
            return _Read(TakenIn(path, refusal=f"the file cannot be read ({type(error).__name__}, which is logged)"))

    def _take_in(self, path: ImageFile, data: bytes) -> _Read:
        in_place = path if self._in_place and isinstance(path, Path) else None
        tags = None
        if is_dicom(data):
            if in_place is not None:
                raise ImageError("a DICOM file says who the patient is and is not read in place; leave out --in-place")
            found = read_dicom(data)
            data, tags = found.png, found.tags
        # A file in place belongs to its owner and keeps its metadata; its id is then the hash of the file itself.
        stored = strip_metadata(data) if in_place is None else data
        kind, (width_px, height_px) = sniff(stored), image_size(stored)
        image_id = sha256_hex(stored)
        if image_id in self._erased:
            return _Read(TakenIn(path, "this image was erased on request and is not stored again", ERASED))
        needed = [frame for frame, cache in self._caches.items() if image_id not in cache]
        # Decoded before it is stored: an image that does not decode must not leave a blob behind.
        decoded = decode_frames(stored, needed) if needed else {}
        blobs = self._store.blobs
        uri = blobs.uri(blobs.put(stored)) if in_place is None else in_place.resolve().as_uri()
        return _Read(
            TakenIn(
                path=path,
                image_id=image_id,
                uri=uri,
                format=kind,
                width_px=width_px,
                height_px=height_px,
                perceptual_hash=self._hash(image_id, decoded),
                decoded=bool(decoded),
                tags=tags,
            ),
            decoded,
        )

    def _hash(self, image_id: str, decoded: Mapping[Frame, UInt8Array]) -> str:
        known = self._known_hashes.get(image_id)
        if known is not None:
            return known
        square = decoded.get(HASH_FRAME)
        return perceptual_hash(self._caches[HASH_FRAME].pixels(image_id) if square is None else square)
