"""Choose the unlabelled pictures that experts should see next, and write them to the outbox with their heat maps."""

from collections.abc import Callable

import numpy as np
import sqlalchemy as sa

from labeling.acquisition.scores import least_confidence_scores, non_finite_rows, one_per_group
from records.bundles import Bundle
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.stored import read_picture
from records.types import Consent, ExpertLabel, Image, ReasonCode, ReviewItem, SourceLabel
from trainers.data.cache import PixelCache
from trainers.data.decode import decode_square
from trainers.explanations.overlay import overlay_png
from trainers.inference.loaded import BatchOutput, load_model

BATCH_SIZE = 64
MAX_CANDIDATES = 4096
OVERLAY_SIDE_PX = 384


def select_pictures(
    store: Store,
    bundle: Bundle,
    budget: int,
    *,
    within: Callable[[Transaction, int], None] = lambda tx, selected: None,
) -> int:
    """Write review items for the unlabelled pictures that the model is least sure of.

    At most one picture of a lesion is chosen. Answers that are not finite come first.

    Args:
        store: with the pictures.
        bundle: the model whose doubt counts.
        budget: how many pictures at most.
        within: called with the transaction that writes the items and their number, if any are written.
    Returns:
        How many were chosen.
    """
    candidates = _candidates(store)
    if not candidates:
        return 0
    cache = PixelCache(store.home.cache, bundle.document.geometry.side_px)
    image_ids = [image.id for image in candidates]
    cache.ensure(store, image_ids)
    rows = cache.rows(image_ids)
    model = load_model(bundle)
    probabilities = np.concatenate(
        [model.predict(rows.take(np.arange(at, min(at + BATCH_SIZE, len(rows))))).probabilities
         for at in range(0, len(rows), BATCH_SIZE)]
    )  # fmt: skip
    scores = np.full(len(rows), np.inf)
    finite = np.setdiff1d(np.arange(len(rows)), non_finite_rows(probabilities))
    scores[finite] = least_confidence_scores(probabilities[finite])
    groups = [image.group_id or image.id for image in candidates]
    chosen = one_per_group(np.argsort(-scores, kind="stable"), groups, budget)
    output = model.predict(rows.take(chosen), gradcam=True)
    items = [_item(store, candidates[row], output, i) for i, row in enumerate(chosen)]
    with store.ledger.begin() as tx:
        tx.add(*items)
        within(tx, len(items))
    return len(items)


def _candidates(store: Store) -> list[Image]:
    """Return pictures that may be shown, have no diagnosis and are not already a question."""
    images, known = TABLES[Image], [TABLES[t].c.image_id for t in (SourceLabel, ExpertLabel, ReviewItem)]
    query = sa.select(images).where(
        images.c.consent.in_([Consent.REVIEW, Consent.TRAINING]),
        images.c.erased_at.is_(None),
        *(~sa.exists().where(column == images.c.id) for column in known),
    )
    with store.ledger.read() as tx:
        found = tx.connection.execute(query.order_by(images.c.id).limit(MAX_CANDIDATES)).mappings()
        return [Image.model_validate(dict(row)) for row in found]


def _item(store: Store, image: Image, output: BatchOutput, row: int) -> ReviewItem:
    finite = bool(output.finite[row])
    overlay = None
    if finite and output.maps is not None:
        heat_map = output.maps[row, int(output.probabilities[row].argmax())]
        picture = decode_square(read_picture(store, image), OVERLAY_SIDE_PX)
        overlay = store.blobs.put(overlay_png(picture, heat_map))
    doubt = 1.0 - float(output.probabilities[row].max()) if finite else 1.0
    return ReviewItem(
        id=new_id(),
        created_at=utc_now(),
        image_id=image.id,
        reasons=[ReasonCode.SELECTED] if finite else [ReasonCode.SELECTED, ReasonCode.NON_FINITE],
        priority=doubt,
        overlay_blob=overlay,
    )
