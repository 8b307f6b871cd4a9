"""The images to choose from: those in the store that nobody has named, or a folder that is taken in for it."""

from pathlib import Path

import numpy as np
import sqlalchemy as sa

from images.cache import PixelCache
from images.grouping import group_images
from images.intake import Intake
from labeling.acquisition.registry import Pool, rule_named
from records.arrays import Float32Array
from records.erasure import make_way
from records.errors import DataError
from records.ids import utc_now
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Annotation, Consent, Image, ReviewItem, SourceLabel
from vision.inference.loaded import LoadedModel

BATCH_SIZE = 64
MAX_CANDIDATES = 4096
MAX_KNOWN = 2048
DROPOUT_PASSES = 10
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


def take_in_folder(store: Store, folder: Path, side_px: int) -> tuple[list[str], list[str]]:
    """Store the images of a folder that the ledger does not know yet; like an import, with consent for training.

    Args:
        store: to store them in.
        folder: looked through with its subfolders.
        side_px: at which they are decoded into the cache.
    Returns:
        Ids of the images in the folder that can be used, and one sentence for each that cannot.
    Raises:
        DataError: there is no such folder, or not one image in it can be used.
    """
    if not folder.is_dir():
        raise DataError(f"--pool {str(folder)!r} is not a folder; name one with images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    with store.ledger.read() as tx:
        known = {image.id: image for image in tx.find(Image)}
    hashes = {i.id: i.perceptual_hash for i in known.values() if i.perceptual_hash is not None}
    erased = frozenset(i.id for i in known.values() if i.is_erased_for_good)
    usable: dict[str, Image] = {}
    refused: list[str] = []
    for taken in Intake(store, (side_px,), in_place=False, known_hashes=hashes, erased=erased).run(paths):
        if taken.refusal is not None:
            refused.append(f"{taken.path.name}: {taken.refusal}")
            continue
        usable[taken.image_id] = Image(
            id=taken.image_id,
            source_id=taken.path.stem,
            uri=taken.uri,
            format=taken.format,
            width_px=taken.width_px,
            height_px=taken.height_px,
            provenance="pool",
            consent=Consent.TRAINING,
            perceptual_hash=taken.perceptual_hash,
            created_at=utc_now(),
        )
    if not usable:
        why = f"; first: {refused[0]}" if refused else "; put JPEG, PNG or WebP files into it"
        raise DataError(f"not one image of {str(folder)!r} can be used{why}")
    fresh = [i for image_id, i in usable.items() if image_id not in known or known[image_id].expired_at is not None]
    with store.ledger.begin() as tx:
        make_way(tx, [image.id for image in fresh])
        tx.add(*fresh)
    if fresh:
        group_images(store, [image.id for image in fresh])
    return list(usable), refused


def candidates(store: Store, among: list[str] | None = None) -> list[Image]:
    """Return images that may be shown, have no diagnosis and are not already a question, at most 4096.

    Args:
        store: with the images.
        among: only these, of which there may be more.
    Returns:
        By id.
    """
    images, known = TABLES[Image], [TABLES[t].c.image_id for t in (SourceLabel, Annotation, ReviewItem)]
    query = sa.select(images).where(
        images.c.consent.in_([Consent.REVIEW, Consent.TRAINING]),
        images.c.erased_at.is_(None),
        *(~sa.exists().where(column == images.c.id) for column in known),
    )
    query = query.order_by(images.c.id)
    if among is None:
        query = query.limit(MAX_CANDIDATES)
    with store.ledger.read() as tx:
        found = [Image.model_validate(dict(row)) for row in tx.connection.execute(query).mappings()]
    wanted = None if among is None else set(among)
    return [image for image in found if wanted is None or image.id in wanted]


def pool_of(store: Store, model: LoadedModel, images: list[Image], rules: list[str], *, seed: int = 0) -> Pool:
    """Compute what rules need of images.

    Args:
        store: with the images.
        model: whose doubt counts.
        images: to choose from.
        rules: names of the rules that will be asked.
        seed: of passes with dropout.
    Returns:
        One row per image, in their order.
    """
    needs = {need for rule in rules for need in rule_named(rule).needs}
    cache = PixelCache(store.home.cache, model.geometry.side_px)
    ids = [image.id for image in images]
    cache.ensure(store, ids)
    rows = cache.rows(ids)
    probabilities, features, samples = [], [], []
    for at in range(0, len(ids), BATCH_SIZE):
        pixels = rows.take(np.arange(at, min(at + BATCH_SIZE, len(ids))))
        probabilities.append(model.predict(pixels).probabilities)
        if "features" in needs:
            features.append(model.describe(pixels))
        if "samples" in needs:
            samples.append(model.dropout_samples(pixels, DROPOUT_PASSES, seed=seed))
    return Pool(
        ids=ids,
        group_ids=[image.group_id or image.id for image in images],
        probabilities=np.concatenate(probabilities),
        features=np.concatenate(features) if features else None,
        samples=np.concatenate(samples, axis=1) if samples else None,
        known_features=_known_features(store, model, cache) if "features" in needs else None,
        miss_costs=np.array([c.miss_cost for c in model.taxonomy.classes]),
    )


def _known_features(store: Store, model: LoadedModel, cache: PixelCache) -> Float32Array:
    """Describe the images that have a label already, at most 2048 of them by id."""
    images, labels = TABLES[Image], [TABLES[t].c.image_id for t in (SourceLabel, Annotation)]
    labelled = sa.or_(*(sa.exists().where(column == images.c.id) for column in labels))
    query = sa.select(images.c.id).where(labelled, images.c.erased_at.is_(None)).order_by(images.c.id).limit(MAX_KNOWN)
    with store.ledger.read() as tx:
        ids = list(tx.connection.execute(query).scalars())
    cache.ensure(store, ids)
    rows = cache.rows(ids)
    parts = [rows.take(np.arange(at, min(at + BATCH_SIZE, len(ids)))) for at in range(0, len(ids), BATCH_SIZE)]
    return np.concatenate([model.describe(part) for part in parts] or [np.empty((0, 1), dtype=np.float32)])
