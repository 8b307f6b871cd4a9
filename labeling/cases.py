"""The nearest confirmed cases in a task: training images that may be shown, with their diagnoses, as one small strip.

Which images a task shows is kept with its review item. When consent is lowered or an image erased, the next pull or the
erasure itself takes the strip out of the task again, and the next push draws another one.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from PIL import Image as PillowImage

from images.decode import decode_frame
from labeling.client import LabelStudioClient
from labeling.settings import LabelingSettings
from labeling.tasks import no_image
from records.cases import FILE
from records.errors import LabelStudioRefusedError
from records.frames import Crop, Frame
from records.ledger.tables import TABLES, any_of
from records.models import bundle_folder
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Consent, Image, ModelRecord, Prediction, ReviewItem

SIDE_PX = 160
_GAP_PX = 8
_SHOWN = Frame(SIDE_PX, Crop.WHOLE).shown(SIDE_PX)
NONE_SHOWN = "No confirmed case may be shown beside this image."
TAKEN_OUT = "cases"
"""The `sent_hash` of an item whose task lost its strip; the next push refreshes the task."""


@dataclass(frozen=True)
class TaskCase:
    """A confirmed case.

    Args:
        image_id: of the training image.
        label: class code.
        confirmed_by: how the diagnosis was confirmed, for a sentence.
        distance: over the largest that counts as like the training images.
        png: the image.
    """

    image_id: str
    label: str
    confirmed_by: str
    distance: float
    png: bytes


AboutTask = tuple[Image, bytes, Prediction | None]
"""An image's row, its bytes and the prediction under review."""
CaseSource = Callable[[Sequence[AboutTask]], Sequence[Sequence[TaskCase]]]
"""Finds the cases like each of some images, the nearest first."""
AT_ONCE = 32
"""Images that a source is asked about at once: one forward pass, and so many of them in memory."""


def are_shown(store: Store, settings: LabelingSettings) -> bool:
    """Return whether the labeling page has a place for cases: only where some model has any."""
    if settings.cases_shown == 0:
        return False
    with store.ledger.read() as tx:
        models = tx.find(ModelRecord)
    return any((bundle_folder(store, model) / FILE).is_file() for model in models)


def case_data(cases: Sequence[TaskCase], taxonomy: Taxonomy, settings: LabelingSettings) -> dict[str, str]:
    """Return what a task shows of cases: a strip of images as a data URI, and a text."""
    if not cases:
        return {"cases": no_image(SIDE_PX), "cases_text": NONE_SHOWN}
    names = {c.code: c.name for c in taxonomy.classes}
    said = [
        f"{number}: {names.get(case.label, case.label)}, by {case.confirmed_by}, distance {case.distance:.2f}"
        for number, case in enumerate(cases, start=1)
    ]
    return {
        "cases": _strip_uri([case.png for case in cases], settings),
        "cases_text": f"{' · '.join(said)}. From left to right. That images are alike is no diagnosis.",
    }


def forbidden_cases(store: Store) -> dict[str, ReviewItem]:
    """Return the review items whose task shows an image that may be shown no more, by id."""
    items, images = TABLES[ReviewItem].c, TABLES[Image].c
    with store.ledger.read() as tx:
        # Two columns of all such items, whose number grows, and whole items only of those that are wanted.
        query = sa.select(items.id, items.cases).where(items.cases.is_not(None), items.task_id.is_not(None))
        shown = {row.id: row.cases for row in tx.connection.execute(query)}
        wanted = {image_id for cases in shown.values() for image_id in cases}
        mine = any_of(images.id, wanted, tx.connection.dialect)
        may = sa.and_(mine, images.consent == Consent.DISPLAY, images.erased_at.is_(None))
        allowed = set(tx.connection.scalars(sa.select(images.id).where(may)))
        found = [item_id for item_id, cases in shown.items() if not allowed.issuperset(cases)]
        return {item.id: item for item in tx.find(ReviewItem, where={"id": found})} if found else {}


def take_out(client: LabelStudioClient, items: Sequence[ReviewItem]) -> tuple[set[str], list[str]]:
    """Take the strips of review items out of their tasks; the caller notes in the ledger that they are gone.

    Args:
        client: connected.
        items: with tasks.
    Returns:
        The ids of the items whose task shows none now, and a sentence for each that Label Studio refused.
    """
    done, failed = set[str](), list[str]()
    blank = {"cases": no_image(SIDE_PX), "cases_text": NONE_SHOWN}
    for item in items:
        try:
            client.change_data(item.task_id or 0, blank)
        except LabelStudioRefusedError as error:
            failed.append(f"task {item.task_id} still shows an image that may be shown no more: {error}")
        else:
            done.add(item.id)
    return done, failed


def _strip_uri(pngs: Sequence[bytes], settings: LabelingSettings) -> str:
    """Return small images beside each other as a data URI."""
    strip = PillowImage.new("RGB", (len(pngs) * (SIDE_PX + _GAP_PX) - _GAP_PX, SIDE_PX), (255, 255, 255))
    for number, png in enumerate(pngs):
        small = PillowImage.fromarray(decode_frame(png, _SHOWN))
        left_px = number * (SIDE_PX + _GAP_PX) + (SIDE_PX - small.width) // 2
        strip.paste(small, (left_px, (SIDE_PX - small.height) // 2))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=settings.jpeg_quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
