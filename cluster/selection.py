"""What annotators should see next: unlabelled images that an acquisition rule selects, and labels that look wrong.

In: a store, a bundle and a budget. Out: review items in the ledger, which a push turns into tasks. The pool of
unlabelled images is the store, or a folder that is imported first. Wrong labels are found by a linear head on
the model's features, cross-validated with whole groups per fold. A new annotation does not replace a label of higher
rank, such as a histopathology result.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
import pandas as pd
import sqlalchemy as sa
from numpy.typing import NDArray

from cluster.labels import resolved_labels
from images.cache import PixelCache
from images.files import is_image, list_folder
from images.grouping import group_images
from images.intake import Intake
from images.overlay import levels_of
from labeling.acquisition.registry import (
    DEFAULT_MIX,
    Pool,
    Prevalence,
    budgets_of,
    choose_mixed,
    interleaved,
    rule_named,
)
from labeling.acquisition.scores import suspicious_rows
from records.arrays import Float32Array, FloatArray, IntArray
from records.bundles import Bundle
from records.context import Value, context_of_image
from records.datasets import load_dataset
from records.erasure import remove_expired_tombstones
from records.errors import DataError
from records.frames import Crop, Frame
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.parts import each_in_parts
from records.store import Store
from records.types import Annotation, Consent, Image, ReasonCode, ReviewItem, SourceLabel, Split
from records.types.base import LINE
from vision.calibration.decision import labels_of
from vision.inference.loaded import LoadedModel, load_model
from vision.inference.output import BatchOutput

BATCH_SIZE = 64
MAX_CANDIDATES = 4096
MAX_KNOWN = 2048
DROPOUT_PASSES = 10
_FOLDS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """What a selection chose.

    Args:
        selected: number of images that wait for a push.
        rule: the acquisition rule; None for a mix.
        mix: number of images by rule; None for one rule.
        model_id: of the model that scored them.
        pool: number of usable images of the folder; None if the store was the pool.
        refused: one sentence for each file of the folder that cannot be used.
    """

    selected: int
    rule: str | None
    mix: dict[str, int] | None
    model_id: str
    pool: int | None
    refused: list[str] = field(repr=False)


def select_from(
    store: Store,
    bundle: Bundle,
    *,
    budget: int,
    rule: str | None = None,
    mix: Mapping[str, int] | None = None,
    folder: Path | None = None,
    seed: int = 0,
    prevalence: Prevalence = "equal",
) -> Selection:
    """Select images for annotators from the store, or from a folder that is imported first.

    Args:
        store: with the images; it gets the review items.
        bundle: the model whose uncertainty is used.
        budget: how many images at most, unless there is a mix.
        rule: name of the acquisition rule, unless there is a mix; without both, `DEFAULT_MIX` shares the budget.
        mix: number of images by rule.
        folder: of unlabelled images.
        seed: of rules that draw at random.
        prevalence: setting `labeling.prevalence`.
    Returns:
        What was selected.
    Raises:
        ConfigError: there is no such rule.
        DataError: the folder has no usable image.
    """
    among, refused = None, list[str]()
    wanted = _wanted(rule, mix, budget)
    # A misspelt rule is refused here, before a folder of images is read and a model loaded.
    for name in wanted:
        rule_named(name)
    if folder is not None:
        among, refused = take_in_folder(store, folder, bundle.document.geometry.frame)
    chosen = select_images(store, bundle, wanted, among=among, seed=seed, prevalence=prevalence)
    pool = None if among is None else len(among)
    is_one = rule is not None and not mix
    return Selection(chosen, rule if is_one else None, None if is_one else wanted, bundle.id, pool, refused)


def _wanted(rule: str | None, mix: Mapping[str, int] | None, budget: int) -> dict[str, int]:
    """Return the number of images by rule."""
    if mix:
        return dict(mix)
    return budgets_of(DEFAULT_MIX, budget) if rule is None else {rule: budget}


def take_in_folder(store: Store, folder: Path, frame: Frame) -> tuple[list[str], list[str]]:
    """Import the images of a folder that the ledger does not know yet, with consent for training.

    Args:
        store: to import into.
        folder: is searched with its subfolders.
        frame: for which the images are decoded into the cache.
    Returns:
        Ids of the usable images in the folder, and one sentence for each unusable one.
    Raises:
        DataError: there is no such folder, or it has no usable image.
    """
    if not folder.is_dir():
        raise DataError(f"--pool {str(folder)!r} is not a folder; name one with images")
    listing = list_folder(folder)
    paths = [path for path in listing.files if is_image(path)]
    with store.ledger.read() as tx:
        known = {image.id: image for image in tx.find(Image)}
    hashes = {i.id: i.perceptual_hash for i in known.values() if i.perceptual_hash is not None}
    erased = frozenset(i.id for i in known.values() if i.is_erased_for_good)
    usable: dict[str, Image] = {}
    refused = [f"{LINE.keep(path.name)}: {why}" for path, why in listing.unreadable]
    for taken in Intake(store, (frame,), in_place=False, known_hashes=hashes, erased=erased).run(paths):
        if taken.refusal is not None:
            refused.append(f"{LINE.keep(taken.path.name)}: {taken.refusal}")
            continue
        usable[taken.image_id] = Image(
            id=taken.image_id,
            source_id=LINE.keep(PurePath(taken.path.name).stem),
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
        raise DataError(f"no image of {str(folder)!r} can be used{why}")
    fresh = [i for image_id, i in usable.items() if image_id not in known or known[image_id].expired_at is not None]
    # An image that retention has deleted may come again: its empty row has to go first, the id is the same.
    with store.ledger.begin() as tx:
        remove_expired_tombstones(tx, [image.id for image in fresh])
        tx.add(*fresh)
    if fresh:
        group_images(store, [image.id for image in fresh])
    return list(usable), refused


def candidates(store: Store, among: list[str] | None = None) -> list[Image]:
    """Return images with consent that have neither a label nor a review item, by id.

    At most 4096 from the store, since each has to pass the network; all of `among` if it is given.
    """
    images, known = TABLES[Image], [TABLES[t].c.image_id for t in (SourceLabel, Annotation, ReviewItem)]
    query = sa.select(images).where(
        images.c.consent != Consent.NONE,
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


def pool_of(
    store: Store,
    model: LoadedModel,
    images: list[Image],
    rules: list[str],
    *,
    seed: int = 0,
    shares: Mapping[str, float] | None = None,
) -> Pool:
    """Compute what the named acquisition rules need: probabilities always, features and dropout samples on demand.

    Args:
        store: with the images.
        model: computes them.
        images: to choose from.
        rules: names in the registry.
        seed: of the dropout passes.
        shares: of the classes, at which the model was calibrated, by code.
    Returns:
        One row per image, in their order.
    """
    # Features and dropout passes multiply the cost of the pool, so only what the rules read is computed.
    needs = {need for rule in rules for need in rule_named(rule).needs}
    cache = PixelCache(store.home.cache, model.geometry.frame)
    ids = [image.id for image in images]
    cache.ensure(store, ids)
    rows = cache.rows(ids)
    probabilities, features, samples = [], [], []
    for batch in _batches(len(ids)):
        pixels = rows.take(batch)
        probabilities.append(model.predict(pixels, context=_known(images, batch.tolist())).probabilities)
        if "features" in needs:
            features.append(model.describe(pixels))
        if "samples" in needs:
            samples.append(model.dropout_samples(pixels, DROPOUT_PASSES, seed=seed))
    return Pool(
        ids=ids,
        # An image without a group is a group of its own, or all of them together would count as one lesion.
        group_ids=[image.group_id or image.id for image in images],
        probabilities=np.concatenate(probabilities),
        features=np.concatenate(features) if features else None,
        samples=np.concatenate(samples, axis=1) if samples else None,
        known_features=_known_features(store, model, cache) if "features" in needs else None,
        miss_costs=np.array([c.miss_cost for c in model.taxonomy.classes]),
        class_shares=np.array([shares[code] for code in model.taxonomy.codes]) if shares else None,
        label_counts=_label_counts(store, model.taxonomy.codes) if "label_counts" in needs else None,
    )


def _known(images: Sequence[Image], rows: Sequence[int]) -> list[dict[str, Value]]:
    return [context_of_image(images[row]) for row in rows]


def _label_counts(store: Store, codes: Sequence[str]) -> IntArray:
    """Return the number of labelled images of each class; an image that was imported with a label counts by that."""
    labels, images = TABLES[SourceLabel].c, TABLES[Image].c
    query = sa.select(labels.image_id, labels.label).order_by(labels.created_at, labels.id)
    query = query.where(sa.exists().where(images.id == labels.image_id, images.erased_at.is_(None)))
    label_of = {said.image_id: said.label for said in resolved_labels(store)}
    with store.ledger.read() as tx:
        label_of |= {row.image_id: row.label for row in tx.connection.execute(query)}
    counts = Counter(label_of.values())
    return np.array([counts[code] for code in codes], dtype=np.int64)


def _known_features(store: Store, model: LoadedModel, cache: PixelCache) -> Float32Array:
    """Return features of labelled images, at most 2048 by id, for rules that avoid what is already covered."""
    images, labels = TABLES[Image], [TABLES[t].c.image_id for t in (SourceLabel, Annotation)]
    labelled = sa.or_(*(sa.exists().where(column == images.c.id) for column in labels))
    query = sa.select(images.c.id).where(labelled, images.c.erased_at.is_(None)).order_by(images.c.id).limit(MAX_KNOWN)
    with store.ledger.read() as tx:
        ids = list(tx.connection.execute(query).scalars())
    ids = _decoded(store, cache, ids)
    rows = cache.rows(ids)
    parts = [model.describe(rows.take(batch)) for batch in _batches(len(ids))]
    return np.concatenate(parts or [np.empty((0, 1), dtype=np.float32)])


def _decoded(store: Store, cache: PixelCache, image_ids: Sequence[str]) -> list[str]:
    """Decode images and return the ids of those that could be, in order; the others are logged, one sentence each."""

    def decode(some: Sequence[str]) -> Sequence[int]:
        cache.ensure(store, some)
        return [0] * len(some)

    missing = cache.missing(image_ids)
    failed = {}
    for image_id, found in zip(missing, each_in_parts(missing, decode), strict=True):
        if isinstance(found, Exception):
            failed[image_id] = found
            logger.warning("image %s is left out: %s", image_id[:12], found)
    return [image_id for image_id in image_ids if image_id not in failed]


def _batches(num_rows: int) -> Iterator[NDArray[np.intp]]:
    for at in range(0, num_rows, BATCH_SIZE):
        yield np.arange(at, min(at + BATCH_SIZE, num_rows))


def select_images(
    store: Store,
    bundle: Bundle,
    budgets: Mapping[str, int],
    *,
    among: list[str] | None = None,
    seed: int = 0,
    prevalence: Prevalence = "equal",
    within: Callable[[Transaction, int], None] = lambda tx, selected: None,
) -> int:
    """Write review items for the unlabelled images that acquisition rules select.

    At most one image per lesion is selected, and each rule takes predictions that are not finite first. Annotations are
    used for training and never for evaluation: selected images are no random sample.

    Args:
        store: with the images.
        bundle: the model whose uncertainty is used.
        budgets: most images by rule.
        among: image ids to select from; default: those in the store.
        seed: of rules that draw at random.
        prevalence: setting `labeling.prevalence`.
        within: is called with the transaction that writes the items, and their number, if any are written.
    Returns:
        How many were selected.
    Raises:
        ConfigError: there is no such rule.
    """
    images = candidates(store, among)
    if not images or not any(budgets.values()):
        return 0
    model = load_model(bundle)
    cache = PixelCache(store.home.cache, bundle.document.geometry.frame)
    usable = set(_decoded(store, cache, [image.id for image in images]))
    images = [image for image in images if image.id in usable]
    if not images:
        return 0
    shares = bundle.document.calibration.priors
    pool = pool_of(store, model, images, list(budgets), seed=seed, shares=shares)
    # Whoever annotates only the head of the queue annotates a part of what each rule chose.
    chosen = interleaved(choose_mixed(budgets, pool, seed=seed, prevalence=prevalence))
    rows = cache.rows([images[row].id for row in chosen])
    items: list[ReviewItem] = []
    crop = model.geometry.crop
    # Heat maps are computed here and not for the pool, since only the few selected images need one.
    for batch in _batches(len(chosen)):
        output = model.predict(rows.take(batch), gradcam=True, context=_known(images, [chosen[row] for row in batch]))
        labels = labels_of(output.probabilities, model.decision)
        for i, row in enumerate(batch.tolist()):
            items.append(_item(images[chosen[row]], output, i, int(labels[i]), crop, 1.0 - row / len(chosen)))
    with store.ledger.begin() as tx:
        tx.add(*items)
        within(tx, len(items))
    return len(items)


def _item(image: Image, output: BatchOutput, row: int, label: int, crop: Crop, priority: float) -> ReviewItem:
    # Without finite probabilities there is no predicted class whose map could be shown; the item says why.
    finite = bool(output.finite[row])
    heat_map = None
    if finite and output.maps is not None:
        heat_map = levels_of(output.maps[row, label])
    return ReviewItem(
        id=new_id(),
        created_at=utc_now(),
        image_id=image.id,
        reasons=[ReasonCode.SELECTED] if finite else [ReasonCode.SELECTED, ReasonCode.NON_FINITE],
        priority=priority,
        heat_map=heat_map,
        crop=crop,
    )


def request_second_opinions(store: Store, bundle: Bundle, dataset_id: str, budget: int) -> tuple[int, int]:
    """Write review items for the training labels that are most probably wrong.

    Args:
        store: with the images.
        bundle: computes their features.
        dataset_id: its train split is searched, and no other split.
        budget: how many items at most, one per group.
    Returns:
        How many labels are suspicious, and how many review items were written; no image gets two.
    """
    rows = load_dataset(store, dataset_id).rows
    rows, features = described(store, load_model(bundle), rows[rows["split"] == Split.TRAIN.value])
    ids = list(rows["image_id"])
    labels = np.array([store.taxonomy.index_of(label) for label in rows["label"]], dtype=np.intp)
    groups = rows["group_id"].to_numpy()
    suspicious = suspicious_rows(labels, out_of_fold_probabilities(features, labels, groups, len(store.taxonomy.codes)))
    asked = _already_asked(store, ids)
    # Rows come most suspicious first, so `setdefault` keeps the most suspicious one of each group.
    chosen: dict[str, int] = {}
    for row in suspicious:
        if len(chosen) < budget and ids[row] not in asked:
            chosen.setdefault(groups[row], row)
    items = [
        ReviewItem(
            id=new_id(),
            created_at=utc_now(),
            image_id=ids[row],
            reasons=[ReasonCode.LABEL_NOISE],
            priority=1.0 - number / len(chosen),
        )
        for number, row in enumerate(chosen.values())
    ]
    with store.ledger.begin() as tx:
        tx.add(*items)
    return len(suspicious), len(items)


def described(store: Store, model: LoadedModel, rows: pd.DataFrame) -> tuple[pd.DataFrame, Float32Array]:
    """Return the rows of a manifest whose images can be decoded and described, and their features [N, D]."""
    cache = PixelCache(store.home.cache, model.geometry.frame)
    rows = rows[rows["image_id"].isin(_decoded(store, cache, list(rows["image_id"])))]
    cached = cache.rows(list(rows["image_id"]))
    parts = [model.describe(cached.take(batch)) for batch in _batches(len(rows))]
    features = np.concatenate(parts or [np.empty((0, 1), dtype=np.float32)])
    # Linear heads refuse NaN.
    finite = np.flatnonzero(np.isfinite(features).all(axis=1))
    found: pd.DataFrame = rows.iloc[finite].reset_index(drop=True)
    return found, features[finite]


def out_of_fold_probabilities(
    features: Float32Array, labels: NDArray[np.intp], groups: NDArray[np.object_], num_classes: int
) -> FloatArray:
    """Return for every row the probabilities of a linear head that was fitted without its group.

    Args:
        features: [N, D], finite.
        labels: [N] class indices.
        groups: [N]; rows of one group are in one fold, so no row is predicted from its own lesion.
        num_classes: C.
    Returns:
        [N, C], rows sum to 1; 0 for classes that a fold's training rows do not have.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # A rare class may have all its groups in one fold. The head of that fold does not know it, so its columns stay 0.
    found = np.zeros((len(labels), num_classes))
    folds = min(_FOLDS, len(set(groups)))
    for train, test in GroupKFold(folds).split(features, labels, groups):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        head.fit(features[train], labels[train])
        found[np.ix_(test, head.classes_)] = head.predict_proba(features[test])
    return found


def _already_asked(store: Store, ids: list[str]) -> set[str]:
    table = TABLES[ReviewItem].c
    query = sa.select(table.image_id, table.reasons)
    with store.ledger.read() as tx:
        rows = tx.connection.execute(query).all()
    wanted = set(ids)
    return {image_id for image_id, reasons in rows if image_id in wanted and ReasonCode.LABEL_NOISE in reasons}
