"""The nearest confirmed cases beside a prediction: images of the train split that may be shown, with their diagnoses.

In: a model and an image. Out: `FoundCase` values with the images drawn. What a bundle holds is only a proposal:
whether an image may be shown is read from the ledger each time, so consent that was lowered and images that were erased
count at once.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

from images.decode import decode_square
from images.overlay import image_png
from records.arrays import UInt8Array
from records.cases import FILE, Cases, read_cases
from records.errors import DataError, ImageError, UnknownIdError
from records.store import Store, read_image
from records.types import Consent, Image
from serving.messages import FoundCase
from vision.inference.cases import nearest_of
from vision.inference.loaded import LoadedModel

LOOKED_UP = 50
"""Cases whose rows are read at once."""
MODELS_KEPT = 3


class CaseFinder:
    """Finds confirmed cases. Thread-safe.

    Args:
        store: with ledger and images.
        side_px: of the images that are returned.
    """

    def __init__(self, store: Store, side_px: int) -> None:
        self._store = store
        self._side_px = side_px
        self._known: dict[Path, tuple[tuple[int, int], Cases | None]] = {}
        self._loading = threading.Lock()

    def find(self, loaded: LoadedModel, folder: Path, pixels: UInt8Array, own: Image, limit: int) -> list[FoundCase]:
        """Return the nearest cases, one of each group.

        Args:
            loaded: the model.
            folder: of its bundle.
            pixels: [S, S, 3], the image as the model sees it.
            own: the image; it is no case of its own, and neither are others of its group.
            limit: number of cases, at most.
        Returns:
            The nearest first; empty if the model has no cases that may be shown.
        Raises:
            IntegrityError: the bundle's cases cannot be read.
        """
        cases = self._cases(folder)
        if cases is None or loaded.checks is None:
            return []
        codes, found = loaded.taxonomy.codes, list[FoundCase]()
        order, distances = nearest_of(loaded, cases, pixels)
        seen = {own.group_id} - {None}
        rank_of = dict(zip(order.tolist(), distances.tolist(), strict=True))
        for row, image in self._allowed(cases, order.tolist()):
            if len(found) == limit:
                break
            if image.id == own.id or image.group_id in seen:
                continue
            png = self._drawn(image)
            if png is None:
                continue
            seen |= {image.group_id} - {None}
            label, rank = codes[int(cases.classes[row])], int(cases.ranks[row])
            found.append(FoundCase(image.id, label, rank, rank_of[row], png))
        return found

    def _allowed(self, cases: Cases, order: list[int]) -> Iterator[tuple[int, Image]]:
        """Yield the cases that may be shown now, in order."""
        for start in range(0, len(order), LOOKED_UP):
            rows = order[start : start + LOOKED_UP]
            wanted = {"id": [cases.image_ids[row] for row in rows], "consent": Consent.DISPLAY, "erased_at": None}
            with self._store.ledger.read() as tx:
                images = {image.id: image for image in tx.find(Image, where=wanted)}
            for row in rows:
                if cases.image_ids[row] in images:
                    yield row, images[cases.image_ids[row]]

    def _drawn(self, image: Image) -> bytes | None:
        try:
            return image_png(decode_square(read_image(self._store, image), self._side_px))
        except (DataError, ImageError, UnknownIdError):
            # A file that was imported in place and is gone, or an erasure at this moment: there are other cases.
            return None

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
