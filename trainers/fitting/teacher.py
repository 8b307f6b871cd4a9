"""Models that others are made of: what they were trained on, and what a teacher says about a student's images.

An ensemble and a student know what their members and their teacher have seen. So an image that one of these was trained
on cannot judge them, and `require_unseen` refuses a model that would make it do so.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.progress import Progress

from images.cache import PixelCache
from records.bundles import Bundle, Teacher
from records.datasets import DatasetVersion
from records.errors import ConfigError, RefusedError, UnknownIdError
from records.ids import sha256_hex
from records.seen import seen_by
from records.store import Store
from records.types import Split
from trainers.fitting.training_data import DataPlan
from trainers.fitting.workers import compute_threads, threads_of
from trainers.optimization.distillation import Lesson
from trainers.settings import TrainersSettings
from vision.inference.loaded import plain_network, reference_logits

_BATCH = 64


def require_unseen(
    store: Store,
    bundle: Bundle,
    dataset: DatasetVersion,
    role: str,
    *,
    may_see: Sequence[Split] = (Split.TRAIN,),
    where_known: bool = False,
) -> set[Split]:
    """Refuse a model that was trained on what a dataset version holds out, itself or through what it was made of.

    Args:
        store: with the versions that the models were trained on.
        bundle: the model.
        dataset: whose other splits have to be unseen.
        role: what the model is to be, for the sentence: `teacher` or `member`.
        may_see: splits that it may have been trained on.
        where_known: whether a model of which nobody can tell is taken.
    Returns:
        The splits that it has seen.
    Raises:
        TaxonomyError: it is a model of another taxonomy.
        RefusedError: it has seen them, or nobody can tell.
    """
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"{role} {bundle.id[:12]}")
    found: set[Split] = set()
    try:
        for model_id, is_seen in seen_by(store, bundle, dataset.rows):
            splits = {Split(value) for value in dataset.rows.loc[is_seen, "split"]}
            found |= splits
            if forbidden := splits.difference(may_see):
                count = int((dataset.rows["split"].isin([split.value for split in forbidden]) & is_seen).sum())
                raise RefusedError(
                    f"{role} {bundle.id[:12]} cannot be used: model {model_id[:12]} was trained on {count} "
                    f"images, or others of their groups, that dataset {dataset.id[:12]} holds out "
                    f"({', '.join(sorted(forbidden))}); what is made of it could not be judged on them: train it on a "
                    "version of the same splits"
                )
    except UnknownIdError as error:
        if not where_known:
            raise RefusedError(f"{role} {bundle.id[:12]} cannot be used: {error}") from error
    return found


def taught(
    store: Store,
    plan: DataPlan,
    teacher: Bundle | None,
    dataset: DatasetVersion,
    settings: TrainersSettings,
    progress: Progress | None = None,
) -> tuple[DataPlan, Teacher | None]:
    """Ask a teacher about the images to train on.

    Args:
        store: with the images.
        plan: which of them.
        teacher: the model; None leaves the plan as it is.
        dataset: the version that the student is trained on.
        settings: of the student.
        progress: gets tasks that count the images.
    Returns:
        The plan with what the teacher says, and what the student's bundle says of the teacher.
    Raises:
        TaxonomyError: the teacher has other classes.
        RefusedError: the teacher was trained on what the student is judged by.
        ConfigError: the images are streamed.
    """
    if teacher is None:
        return plan, None
    if settings.workers.data_source == "stream":
        raise ConfigError(
            "a teacher looks at every training image before the training, and trainers.workers.data_source=stream "
            "decodes them only as they are needed; set trainers.workers.data_source=cache"
        )
    require_unseen(store, teacher, dataset, "teacher")
    image_ids, geometry = plan.image_ids[: plan.num_train], teacher.document.geometry
    cache = PixelCache(store.home.cache, geometry.frame)
    cache.ensure(store, image_ids, progress)
    pixels, network = cache.rows(image_ids), plain_network(teacher)
    task = None if progress is None else progress.add_task("Asking the teacher", total=len(pixels))
    parts = []
    with compute_threads(threads_of(settings.workers)):
        for start in range(0, len(pixels), _BATCH):
            rows = np.arange(start, min(start + _BATCH, len(pixels)))
            # Without views: one pass per image, and a student sees turned images in its augmentation.
            parts.append(reference_logits(network, pixels.take(rows), geometry))
            if progress is not None and task is not None:
                progress.advance(task, len(rows))
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        raise RefusedError(
            f"teacher {teacher.id[:12]} has logits that are not finite for some training images; take another model"
        )
    said = Teacher(
        model_id=teacher.id,
        dataset_id=teacher.document.dataset_id,
        logits_sha256=sha256_hex(np.ascontiguousarray(logits, dtype="<f4").tobytes()),
    )
    return replace(plan, lesson=Lesson(teacher.id, logits)), said
