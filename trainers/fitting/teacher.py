"""Models that others are made of: what they were trained on, and what a teacher says about a student's images.

An ensemble and a student know what their members and their teacher have seen. So an image that one of these was trained
on cannot judge them, and `require_unseen` refuses a model that would make it do so.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from rich.progress import Progress

from images.cache import PixelCache
from records.bundles import Bundle, Teacher
from records.datasets import DatasetVersion, load_dataset
from records.errors import ConfigError, RefusedError, UnknownIdError
from records.ids import sha256_hex
from records.models import find_bundle
from records.store import Store
from records.types import Split
from trainers.fitting.training_data import DataPlan
from trainers.fitting.workers import compute_threads, threads_of
from trainers.optimization.distillation import Lesson
from trainers.settings import TrainersSettings
from vision.inference.loaded import plain_network, reference_logits

_BATCH = 64


def require_unseen(store: Store, bundle: Bundle, dataset: DatasetVersion, role: str) -> None:
    """Refuse a model that was trained on what a dataset version holds out, itself or through what it was made of.

    Args:
        store: with the versions that the models were trained on.
        bundle: the model.
        dataset: whose splits other than train have to be unseen.
        role: what the model is to be, for the sentence: `teacher` or `member`.
    Raises:
        TaxonomyError: it is a model of another taxonomy.
        RefusedError: it has seen them, or nobody can tell.
    """
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"{role} {bundle.id[:12]}")
    held_out = dataset.rows[dataset.rows["split"] != Split.TRAIN.value]
    for model_id, dataset_id in _seen_by(store, bundle, role):
        if dataset_id == dataset.id:
            continue
        try:
            trained_on = load_dataset(store, dataset_id).split(Split.TRAIN)
        except UnknownIdError as error:
            raise RefusedError(
                f"{role} {bundle.id[:12]} cannot be used: model {model_id[:12]} was trained on dataset "
                f"{dataset_id[:12]}, which is not in this home, so nobody can tell whether it has seen images that "
                f"dataset {dataset.id[:12]} holds out"
            ) from error
        # Groups too: another image of the same lesion tells the class as well.
        is_seen = held_out["image_id"].isin(trained_on["image_id"]) | held_out["group_id"].isin(trained_on["group_id"])
        if is_seen.any():
            splits = ", ".join(sorted(set(held_out.loc[is_seen, "split"])))
            raise RefusedError(
                f"{role} {bundle.id[:12]} cannot be used: model {model_id[:12]} was trained on {int(is_seen.sum())} "
                f"images, or others of their groups, that dataset {dataset.id[:12]} holds out ({splits}); what is made "
                "of it could not be judged on them: train it on a version of the same splits"
            )


def _seen_by(store: Store, bundle: Bundle, role: str) -> Iterator[tuple[str, str]]:
    """Yield every model whose training a model owes something to, with its dataset version."""
    waiting, done = [bundle], set[str]()
    while waiting:
        one = waiting.pop()
        document = one.document
        yield one.id, document.dataset_id
        done.add(one.id)
        made_of = [document.parent_model_id, *(member.model_id for member in document.members)]
        made_of += [document.teacher.model_id] if document.teacher is not None else []
        for model_id in made_of:
            if model_id is None or model_id in done:
                continue
            try:
                waiting.append(find_bundle(store, model_id))
            except UnknownIdError as error:
                raise RefusedError(
                    f"{role} {bundle.id[:12]} cannot be used: it was made of model {model_id[:12]}, which is not in "
                    "this home, so nobody can tell what that one was trained on"
                ) from error


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
    cache = PixelCache(store.home.cache, geometry.side_px)
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
