"""Batches: waiting review items made into tasks, with all that a batch needs looked up at once.

Images are read once each, a few at a time: for the confirmed cases like them, for the heat map and for the task itself.
An item that cannot be made into a task is reported and holds up no other.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from images.decode import decode_image
from images.overlay import overlay
from labeling.cases import AT_ONCE, AboutTask, CaseSource, TaskCase, case_data
from labeling.existing.fit import fitted
from labeling.project import Project
from labeling.settings import LabelingSettings
from labeling.tasks import task_document
from records.arrays import UInt8Array
from records.errors import UnavailableError, UnknownIdError
from records.frames import Frame
from records.parts import attempt, each_in_parts
from records.store import Store, read_image
from records.types import Image, Prediction, ReviewItem

_ENCODERS = 2


@dataclass(frozen=True)
class Beside:
    """What a task gets that is neither in its item nor in its prediction; `places` is by item, see `sittings`."""

    model_id: str | None = None
    cases: CaseSource | None = None
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Items by what can be done with them; `documents` are the tasks of `items`, in the same order."""

    items: list[ReviewItem]
    documents: list[dict[str, Any]]
    erased: list[ReviewItem]
    unreadable: list[str]


def item_key(item_id: str, project: Project) -> str:
    """Return the idempotency key of an item's task, made of the item's id and the project's marker."""
    return f"{item_id}{project.marker}"


def prepare(
    store: Store, waiting: Sequence[ReviewItem], project: Project, settings: LabelingSettings, beside: Beside
) -> Batch:
    """Make the tasks of review items.

    Args:
        store: with images and predictions.
        waiting: the items.
        project: that the tasks are for.
        settings: image size and quality.
        beside: what else the tasks show.
    Returns:
        Items and tasks; which cases a task is going to show is in the ledger already.
    Raises:
        UnavailableError: the blob store or the ledger does not respond.
    """
    with store.ledger.read() as tx:
        images = {i.id: i for i in tx.find(Image, where={"id": {item.image_id for item in waiting}})}
        predicted = {item.prediction_id for item in waiting if item.prediction_id is not None}
        predictions = {p.id: p for p in tx.find(Prediction, where={"id": predicted})}
    erased = {image.id for image in images.values() if image.erased_at is not None}
    batch = Batch([], [], [item for item in waiting if item.image_id in erased], [])
    making = _Making(store, project, settings, beside, images, predictions)
    wanted = [item for item in waiting if item.image_id not in erased]
    made: list[dict[str, Any] | Exception] = []
    # Decoding and encoding release the GIL. An image that cannot be read becomes a sentence in the report: one damaged
    # file must not hold up the others.
    with ThreadPoolExecutor(_ENCODERS) as pool:
        for start in range(0, len(wanted), AT_ONCE):
            made.extend(making.documents(wanted[start : start + AT_ONCE], pool))
    unavailable = [error for error in made if isinstance(error, UnavailableError)]
    # One file that cannot be read is damaged; if none can, the store is down.
    if len(unavailable) == len(made) > 1:
        raise unavailable[0]
    for item, found in zip(wanted, made, strict=True):
        if isinstance(found, Exception):
            batch.unreadable.append(f"review item {item.id}: {found or type(found).__name__}")
        else:
            batch.items.append(item)
            batch.documents.append(found)
    _note_cases(store, batch)
    return batch


@dataclass(frozen=True)
class _Making:
    """The making of a batch's tasks, with the images and predictions of its items by id."""

    store: Store
    project: Project
    settings: LabelingSettings
    beside: Beside
    images: Mapping[str, Image]
    predictions: Mapping[str, Prediction]

    def documents(self, items: Sequence[ReviewItem], pool: ThreadPoolExecutor) -> list[dict[str, Any] | Exception]:
        """Return the task of each item, or why there is none; only the images of these items are in memory."""
        image_ids = list(dict.fromkeys(item.image_id for item in items))
        contents = dict(zip(image_ids, pool.map(partial(attempt, self._read), image_ids), strict=True))
        cases = self._cases(items, contents)

        def document(item: ReviewItem) -> dict[str, Any]:
            content, alike = contents[item.image_id], cases.get(item.id, ())
            for found in (content, alike):
                if isinstance(found, Exception):
                    raise found
            return self._document(item, content, alike)  # type: ignore[arg-type]

        return list(pool.map(partial(attempt, document), items))

    def _read(self, image_id: str) -> bytes:
        if (image := self.images.get(image_id)) is None:
            raise UnknownIdError(f"its image {image_id[:12]} is not in the ledger")
        return read_image(self.store, image)

    def _prediction(self, item: ReviewItem) -> Prediction | None:
        return self.predictions.get(item.prediction_id) if item.prediction_id is not None else None

    def _cases(
        self, items: Sequence[ReviewItem], contents: Mapping[str, bytes | Exception]
    ) -> dict[str, Sequence[TaskCase] | Exception]:
        """Return the cases of tasks that are not blind, or why there are none, by review item."""
        if self.beside.cases is None or not self.project.cases:
            return {}
        about: dict[str, AboutTask] = {}
        for item in items:
            if not item.blind and isinstance(content := contents[item.image_id], bytes):
                about[item.id] = (self.images[item.image_id], content, self._prediction(item))
        return dict(zip(about, each_in_parts(list(about.values()), self.beside.cases), strict=True))

    def _document(self, item: ReviewItem, content: bytes, alike: Sequence[TaskCase]) -> dict[str, Any]:
        project, settings, image = self.project, self.settings, self.images[item.image_id]
        prediction = self._prediction(item)
        drawn, pixels = _drawn(self.store, item, content, settings.image_side_px)
        made = task_document(
            item,
            image,
            content,
            drawn,
            prediction,
            taxonomy=self.store.taxonomy,
            settings=settings,
            key=item_key(item.id, project),
            cases=case_data(alike, self.store.taxonomy, settings) if project.cases and not item.blind else None,
            place=self.beside.places.get(item.id, ""),
            pixels=pixels,
        )
        if project.page is not None:
            made = fitted(made, project.page, image, settings)
        if not item.blind:
            made["meta"]["relook_model"] = prediction.model_id if prediction is not None else self.beside.model_id
            made["meta"]["relook_cases"] = [case.image_id for case in alike]
        return made


def _drawn(store: Store, item: ReviewItem, content: bytes, side_px: int) -> tuple[UInt8Array | None, UInt8Array | None]:
    """Return an item's heat map over its image, and the image's pixels if they were needed for it.

    There is no map if the item has none, or its task shows none.
    """
    if item.blind or (item.heat_map is None and item.overlay_blob is None):
        return None, None
    if item.heat_map is None:
        return decode_image(store.blobs.get(str(item.overlay_blob)), side_px), None
    # Drawn over the pixels as they are: enlarging the drawn map costs a tenth of drawing over an enlarged image.
    pixels = decode_image(content, side_px)
    height_px, width_px = pixels.shape[:2]
    left, top, right, bottom = (int(edge_px) for edge_px in Frame(side_px, item.crop).box(width_px, height_px))
    return overlay(np.ascontiguousarray(pixels[top:bottom, left:right]), np.array(item.heat_map)), pixels


def _note_cases(store: Store, batch: Batch) -> None:
    """Write down which images the tasks are going to show, before they do: an erasure has to find them."""
    shown = {
        item.id: document["meta"].get("relook_cases") or None
        for item, document in zip(batch.items, batch.documents, strict=True)
    }
    changed = {item.id: {"cases": shown[item.id]} for item in batch.items if item.cases != shown[item.id]}
    if changed:
        with store.ledger.begin() as tx:
            tx.update_many(ReviewItem, changed)
