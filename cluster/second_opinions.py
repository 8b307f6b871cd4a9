"""Second opinions: recorded diagnoses of training images that the others contradict go back to the annotators.

A linear head on the champion's features is fitted again for each of five folds, whole groups at a time, so
no image is judged by what learned from its own lesion. What annotators answer follows the ranks of
labels: a click never replaces a histopathology result.
"""

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from cluster.pool import BATCH_SIZE
from images.cache import PixelCache
from labeling.label_noise import suspicious_rows
from records.arrays import Float32Array, FloatArray
from records.bundles import Bundle
from records.datasets import load_dataset
from records.ids import new_id, utc_now
from records.ledger.tables import TABLES
from records.store import Store
from records.types import ReasonCode, ReviewItem, Split
from vision.inference.loaded import load_model

_FOLDS = 5


def ask_second_opinions(store: Store, bundle: Bundle, dataset_id: str, budget: int) -> tuple[int, int]:
    """Write review items for the training labels that are most probably wrong.

    Args:
        store: with the images.
        bundle: whose features describe them.
        dataset_id: the version whose train split is looked through; no held-out split is touched.
        budget: how many at most, one per group.
    Returns:
        How many labels are suspicious, and how many questions were written; nothing is asked twice.
    """
    rows = load_dataset(store, dataset_id).rows
    rows = rows[rows["split"] == Split.TRAIN.value].reset_index(drop=True)
    ids = list(rows["image_id"])
    model = load_model(bundle)
    cache = PixelCache(store.home.cache, model.geometry.side_px)
    cache.ensure(store, ids)
    cached = cache.rows(ids)
    parts = [np.arange(at, min(at + BATCH_SIZE, len(ids))) for at in range(0, len(ids), BATCH_SIZE)]
    features = np.concatenate([model.describe(cached.take(part)) for part in parts])
    labels = np.array([store.taxonomy.index_of(label) for label in rows["label"]], dtype=np.intp)
    groups = rows["group_id"].to_numpy()
    finite = np.flatnonzero(np.isfinite(features).all(axis=1))
    out_of_fold = out_of_fold_probabilities(features[finite], labels[finite], groups[finite], len(store.taxonomy.codes))
    suspicious = [int(finite[row]) for row in suspicious_rows(labels[finite], out_of_fold)]
    asked = _already_asked(store, ids)
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


def out_of_fold_probabilities(
    features: Float32Array, labels: NDArray[np.intp], groups: NDArray[np.object_], num_classes: int
) -> FloatArray:
    """Return for every row what a linear head says that did not see its group.

    Args:
        features: [N, D], finite.
        labels: [N] class indices.
        groups: [N]; rows of one group are in one fold.
        num_classes: C.
    Returns:
        [N, C], rows sum to 1; 0 for classes that a fold's training rows do not have.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

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
