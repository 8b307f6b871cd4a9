"""What a model was trained on: its own training images, and those of every model that it was made of.

An image that a model has seen cannot judge it, and neither can another image of its group: evaluation marks such
images, the gate leaves them out, and ensembles and students refuse what would make them be judged so.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from records.arrays import BoolArray
from records.bundles import Bundle
from records.datasets import load_dataset
from records.errors import UnknownIdError
from records.models import find_bundle
from records.store import Store


def seen_by(store: Store, bundle: Bundle, rows: pd.DataFrame) -> Iterator[tuple[str, BoolArray]]:
    """Yield the model, and every model that it was made of, each with the images that it was trained on.

    Args:
        store: with these models and the versions that they were trained on.
        bundle: the model.
        rows: N rows of a manifest.
    Yields:
        Id, and [N]: true where it was trained on the image or on another one of its group.
    Raises:
        UnknownIdError: a model or a version is not in this home, so nobody can tell.
    """
    waiting, done = [bundle], set[str]()
    known: dict[tuple[str, ...], BoolArray] = {}
    while waiting:
        one = waiting.pop()
        document = one.document
        done.add(one.id)
        # The members of an ensemble were mostly trained on one version.
        key = (document.dataset_id, *document.trained_on)
        if key not in known:
            known[key] = _is_seen(store, one, rows)
        yield one.id, known[key]
        made_of = [document.parent_model_id, *(member.model_id for member in document.members)]
        made_of += [document.teacher.model_id] if document.teacher is not None else []
        for model_id in made_of:
            if model_id is not None and model_id not in done:
                waiting.append(_found(store, model_id))


def _is_seen(store: Store, bundle: Bundle, rows: pd.DataFrame) -> BoolArray:
    dataset_id = bundle.document.dataset_id
    try:
        trained_on = load_dataset(store, dataset_id).rows
    except UnknownIdError as error:
        raise UnknownIdError(
            f"model {bundle.id[:12]} was trained on dataset {dataset_id[:12]}, which is not in this home, so nobody "
            "can tell which images it has seen"
        ) from error
    trained_on = trained_on[trained_on["split"].isin(bundle.document.trained_on)]
    # Groups too: another image of the same lesion tells the class as well.
    is_seen = rows["image_id"].isin(trained_on["image_id"]) | rows["group_id"].isin(trained_on["group_id"])
    return np.asarray(is_seen, dtype=np.bool_)


def _found(store: Store, model_id: str) -> Bundle:
    try:
        return find_bundle(store, model_id)
    except UnknownIdError as error:
        raise UnknownIdError(
            f"it was made of model {model_id[:12]}, which is not in this home, so nobody can tell what that one was "
            "trained on"
        ) from error
