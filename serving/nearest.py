"""The nearest confirmed cases beside a prediction: images of the train split that may be shown, with their diagnoses.

In: a model and an image. Out: `FoundCase` values with the images drawn. What a bundle holds is only a proposal:
whether an image may be shown is read from the ledger each time, so consent that was lowered and images that were erased
count at once.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from images.decode import decode_frame
from images.overlay import image_png
from records.arrays import UInt8Array
from records.cases import FILE, Cases, read_cases
from records.errors import DataError, ImageError, UnknownIdError
from records.frames import Frame
from records.store import Store, read_image
from records.types import Consent, Image
from serving.messages import FoundCase
from vision.inference.cases import nearest_of, vectors_of
from vision.inference.loaded import LoadedModel

LOOKED_UP = 50
"""Cases whose rows are read at once."""
MODELS_KEPT = 3


class CaseFinder:
    """Finds confirmed cases. Thread-safe.

    Args:
        store: with ledger and images.
        side_px: longer side of the images that are returned.
    """

    def __init__(self, store: Store, side_px: int) -> None:
        self._store = store
        self._side_px = side_px
        self._known: dict[Path, tuple[tuple[int, int], Cases | None]] = {}
        self._loading = threading.Lock()

    def find(
        self, loaded: LoadedModel, folder: Path, about: Sequence[tuple[Image, UInt8Array]], limit: int
    ) -> list[list[FoundCase]]:
        """Return the nearest cases of each image, one of each group.

        Args:
            loaded: the model.
            folder: of its bundle.
            about: the images, each with its [S, S, 3] pixels as the model sees it. An image is no case of its own, and
                neither are others of its group.
            limit: number of cases of each, at most.
        Returns:
            The nearest first, for each image; empty if the model has no cases that may be shown.
        Raises:
            IntegrityError: the bundle's cases cannot be read.
        """
        cases = self._cases(folder)
        if cases is None or loaded.checks is None or not about:
            return [[] for _ in about]
        vectors = vectors_of(loaded, np.stack([pixels for _, pixels in about]))
        found = [nearest_of(loaded, cases, vector) for vector in vectors]
        # For this call only: nothing of an erased image stays in memory, and consent is read again by the next one.
        looking = _Looking(self._store, loaded.geometry.frame.shown(self._side_px))
        looking.look_up([cases.image_ids[row] for order, _ in found for row in order[:LOOKED_UP]])
        return [
            self._chosen(loaded, cases, own, order.tolist(), distances.tolist(), limit, looking)
            for (own, _), (order, distances) in zip(about, found, strict=True)
        ]

    def _chosen(
        self,
        loaded: LoadedModel,
        cases: Cases,
        own: Image,
        order: Sequence[int],
        distances: Sequence[float],
        limit: int,
        looking: "_Looking",
    ) -> list[FoundCase]:
        codes, found = loaded.taxonomy.codes, list[FoundCase]()
        seen = {own.group_id} - {None}
        for place, row in enumerate(order):
            if len(found) == limit:
                break
            if place % LOOKED_UP == 0:
                looking.look_up([cases.image_ids[one] for one in order[place : place + LOOKED_UP]])
            image = looking.allowed[cases.image_ids[row]]
            if image is None or image.id == own.id or image.group_id in seen:
                continue
            png = looking.drawn(image)
            if png is None:
                continue
            seen |= {image.group_id} - {None}
            label, rank = codes[int(cases.classes[row])], int(cases.ranks[row])
            found.append(FoundCase(image.id, label, rank, distances[place], png))
        return found

    def _cases(self, folder: Path) -> Cases | None:
        try:
            found = (folder / FILE).stat()
        except OSError:
            return None
        stamp = (found.st_mtime_ns, found.st_ino)
        with self._loading:
            known = self._known.get(folder)
            if known is None or known[0] != stamp:
                # Read again when an erasure took rows out: nothing of an erased image stays in memory.
                known = self._known[folder] = (stamp, read_cases(folder))
            while len(self._known) > MODELS_KEPT:
                del self._known[next(iter(self._known))]
            return known[1]


class _Looking:
    """What one call reads of images: those that may be shown now, and their drawings, each once."""

    def __init__(self, store: Store, frame: Frame) -> None:
        self._store = store
        self._frame = frame
        self._drawn: dict[str, bytes | None] = {}
        self.allowed: dict[str, Image | None] = {}

    def look_up(self, image_ids: Sequence[str]) -> None:
        """Read which of these images may be shown."""
        missing = [image_id for image_id in dict.fromkeys(image_ids) if image_id not in self.allowed]
        if missing:
            wanted = {"id": missing, "consent": Consent.DISPLAY, "erased_at": None}
            with self._store.ledger.read() as tx:
                found = {image.id: image for image in tx.find(Image, where=wanted)}
            self.allowed.update((image_id, found.get(image_id)) for image_id in missing)

    def drawn(self, image: Image) -> bytes | None:
        """Return an image as a PNG; None if it cannot be read."""
        if image.id not in self._drawn:
            try:
                png = image_png(decode_frame(read_image(self._store, image), self._frame))
            except (DataError, ImageError, UnknownIdError):
                # A file that was imported in place and is gone, or an erasure at this moment: there are other cases.
                png = None
            self._drawn[image.id] = png
        return self._drawn[image.id]
