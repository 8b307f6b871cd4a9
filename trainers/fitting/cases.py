"""The confirmed cases of a fitted model: which training images may be shown beside predictions, and their vectors."""

import numpy as np
from rich.progress import Progress

from images.cache import PixelCache
from records.bundles import Bundle
from records.cases import CONFIRMED_RANK, MAX_CASES, Cases, remove_cases, write_cases
from records.datasets import DatasetVersion
from records.store import Store, find_images
from records.types import Consent, Split
from trainers.fitting.loop import TrainedModel
from trainers.fitting.suitability import outputs_of
from trainers.fitting.workers import compute_threads
from vision.inference.suitability import image_checks_of


def add_cases(
    store: Store, dataset: DatasetVersion, trained: TrainedModel, bundle: Bundle, progress: Progress | None = None
) -> Bundle:
    """Write the confirmed cases beside a bundle, if there are any.

    Args:
        store: with the images.
        dataset: the version that the model was trained on.
        trained: its network.
        bundle: of the model.
        progress: gets a task that counts the images.
    Returns:
        The bundle; its id is the same with cases and without.
    """
    checks, image_ids = image_checks_of(bundle), case_ids(store, dataset)
    if checks is None or not image_ids:
        return bundle
    # With streaming, training has decoded none of them here.
    PixelCache(store.home.cache, trained.geometry.frame).ensure(store, image_ids)
    with compute_threads(trained.num_threads):
        outputs = outputs_of(trained, store, image_ids, progress=progress, what="Reading confirmed cases")
        vectors = checks.features.project(outputs.pooled)
    rows = dataset.split(Split.TRAIN).set_index("image_id").loc[image_ids]
    cases = Cases(
        image_ids=tuple(image_ids),
        classes=np.array([store.taxonomy.index_of(str(code)) for code in rows["label"]], dtype=np.int64),
        ranks=rows["label_rank"].to_numpy(dtype=np.int64),
        vectors=vectors.astype(np.float32),
    )
    write_cases(bundle.path, cases)
    # An erasure, or consent that was lowered, may have come before the file did.
    remove_cases(bundle.path, set(image_ids).difference(case_ids(store, dataset)))
    return bundle


def case_ids(store: Store, dataset: DatasetVersion) -> list[str]:
    """Return the images of the train split with a confirmed diagnosis whose consent allows display; sorted."""
    rows = dataset.split(Split.TRAIN)
    confirmed = [str(image_id) for image_id in rows.loc[rows["label_rank"] <= CONFIRMED_RANK, "image_id"]]
    shown = [image.id for image in find_images(store, confirmed) if image.consent is Consent.DISPLAY]
    # Ids are hashes, so the first ones of many are a random sample.
    return sorted(shown)[:MAX_CASES]
