"""Choose the unlabelled images that annotators should see next, and write them to the outbox with their heat maps."""

from collections.abc import Callable, Mapping

import numpy as np

from cluster.pool import BATCH_SIZE, candidates, pool_of
from images.cache import PixelCache
from images.decode import decode_square
from labeling.acquisition.registry import choose, choose_mixed
from records.bundles import Bundle
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.store import Store
from records.stored import read_image
from records.types import Image, ReasonCode, ReviewItem
from vision.explanations.overlay import overlay_png
from vision.inference.loaded import load_model
from vision.inference.output import BatchOutput

OVERLAY_SIDE_PX = 384
DEFAULT_RULE = "least_confidence"


def select_images(
    store: Store,
    bundle: Bundle,
    budget: int,
    rule: str = DEFAULT_RULE,
    *,
    among: list[str] | None = None,
    mix: Mapping[str, int] | None = None,
    seed: int = 0,
    within: Callable[[Transaction, int], None] = lambda tx, selected: None,
) -> int:
    """Write review items for the unlabelled images that a rule wants asked.

    At most one image of a lesion is chosen. Answers that are not finite come first. However they are
    chosen, the answers train and never evaluate: what earlier selections left is no random sample.

    Args:
        store: with the images.
        bundle: the model whose doubt counts.
        budget: how many images at most.
        rule: its name, unless there is a mix.
        among: image ids to choose from; default: all that the store has.
        mix: how many by rule, instead of one rule and one budget.
        seed: of rules with chance in them.
        within: called with the transaction that writes the items and their number, if any are written.
    Returns:
        How many were chosen.
    Raises:
        ConfigError: there is no such rule.
    """
    images = candidates(store, among)
    if not images or budget == 0:
        return 0
    model = load_model(bundle)
    pool = pool_of(store, model, images, list(mix or {rule: budget}), seed=seed)
    chosen = (
        [row for row, _ in choose_mixed(mix, pool, seed=seed)][:budget]
        if mix
        else choose(rule, pool, budget, seed=seed)
    )
    rows = PixelCache(store.home.cache, bundle.document.geometry.side_px).rows([images[row].id for row in chosen])
    items: list[ReviewItem] = []
    for at in range(0, len(chosen), BATCH_SIZE):
        part = np.arange(at, min(at + BATCH_SIZE, len(chosen)))
        output = model.predict(rows.take(part), gradcam=True)
        items.extend(
            _item(store, images[chosen[at + i]], output, i, 1.0 - (at + i) / len(chosen)) for i in range(len(part))
        )
    with store.ledger.begin() as tx:
        tx.add(*items)
        within(tx, len(items))
    return len(items)


def _item(store: Store, image: Image, output: BatchOutput, row: int, priority: float) -> ReviewItem:
    finite = bool(output.finite[row])
    overlay = None
    if finite and output.maps is not None:
        heat_map = output.maps[row, int(output.probabilities[row].argmax())]
        pixels = decode_square(read_image(store, image), OVERLAY_SIDE_PX)
        overlay = store.blobs.put(overlay_png(pixels, heat_map))
    return ReviewItem(
        id=new_id(),
        created_at=utc_now(),
        image_id=image.id,
        reasons=[ReasonCode.SELECTED] if finite else [ReasonCode.SELECTED, ReasonCode.NON_FINITE],
        priority=priority,
        overlay_blob=overlay,
    )
