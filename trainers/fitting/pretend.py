"""How much a leaky split flatters a model: the same small model, trained on three splits, scored twice each.

The train split is cut into four fifths to train on and one fifth to test on, in three ways:

- `by_lesion`: no lesion on both splits; rare classes are drawn more often afterwards, among the training images.
- `random_images`: images at random, so that most lesions of several images lie on both splits.
- `oversampled_first`: every class drawn to equal size with repeats, then cut at random, so that copies of one
  image lie on both splits.

Each model is judged on its own fifth (pretended) and on the val split, whose lesions it never saw (honest). It reads
train and val and nothing else. The epoch is chosen on val, which flatters the honest figure: gaps are rather
understated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress
from rich.table import Table

from records.arrays import IntArray
from records.datasets import DatasetVersion
from records.errors import DataError
from records.store import Store, find_images
from records.types import Split
from trainers.fitting.loop import TrainedModel, train
from trainers.fitting.training_data import DataPlan, TrainingData, plan_data
from trainers.settings import TrainersSettings
from vision.inference.loaded import reference_logits
from vision.metrics.metrics import balanced_accuracy, confusion_matrix

TEST_SHARE = 0.2
_SCORING_BATCH = 64


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Scores(_Part):
    """How a model does on some images."""

    accuracy: float = Field(ge=0, le=1)
    balanced_accuracy: float = Field(ge=0, le=1, description="over the classes that the images have")


class PretendedSplit(_Part):
    """One way to split, and what it makes of the model."""

    name: str
    train_images: int
    test_images: int = Field(description="of the fifth that the model is tested on")
    leaked_test_share: float = Field(ge=0, le=1, description="share of them whose lesion is trained on")
    pretended: Scores = Field(description="on that fifth")
    honest: Scores = Field(description="on the val split")
    gap: float = Field(description="balanced accuracy, pretended minus honest")


class PretendReport(_Part):
    """The demonstration."""

    model: str
    side_px: int
    epochs: int
    augmentation: str
    seed: int
    honest_images: int = Field(description="of the val split")
    splits: list[PretendedSplit]


@dataclass(frozen=True)
class Cut:
    """Rows to train on and rows to test on; a row may come more than once."""

    train: IntArray
    test: IntArray


def pretend(
    store: Store, settings: TrainersSettings, dataset: DatasetVersion, *, progress: Progress | None = None
) -> PretendReport:
    """Train the model of the settings on an honest split and on leaky ones, and compare.

    Raises DataError: there are too few images, or one cannot be read.
    Raises ConfigError: a setting cannot work.
    Raises DivergedError: a loss is not finite.
    """
    plan = plan_data(dataset, store.taxonomy).limited(settings.max_train_images)
    data = plan.open(store, settings.model.frame, progress)
    train_ids = plan.image_ids[: plan.num_train]
    group_of = dict(zip(dataset.split(Split.TRAIN)["image_id"], dataset.split(Split.TRAIN)["group_id"], strict=True))
    groups = np.array([group_of[image_id] for image_id in train_ids])
    lesions = np.array([image.lesion_id or image.id for image in find_images(store, train_ids)])
    labels = plan.labels[: plan.num_train]
    if len(np.unique(groups)) < 2 or not len(data.val_index):
        raise DataError("the demonstration needs at least two groups on the train split and an image on the val split")
    task = progress.add_task("Training on three splits", total=3 * settings.epochs) if progress else None

    def one_more_epoch(_: object) -> None:
        if progress and task is not None:
            progress.advance(task)

    cuts: dict[str, Callable[[], Cut]] = {
        "by_lesion": lambda: cut_by_group(groups, settings.seed),
        "random_images": lambda: cut_at_random(len(labels), settings.seed),
        "oversampled_first": lambda: cut_oversampled(labels, settings.seed),
    }
    splits = []
    for name, draw in cuts.items():
        cut = draw()
        sampler = "natural" if name == "oversampled_first" else "balanced"
        changed = settings.with_values({"sampler": sampler, "workers.count": 1})
        split_data = TrainingData(data.pixels, data.image_ids, data.labels, cut.train, data.val_index)
        trained = train(changed, split_data, store.taxonomy, on_epoch=one_more_epoch)
        splits.append(_judged(name, cut, trained, data, lesions))
    return PretendReport(
        model=settings.model.name,
        side_px=settings.model.side_px,
        epochs=settings.epochs,
        augmentation=settings.augmentation,
        seed=settings.seed,
        honest_images=len(data.val_index),
        splits=splits,
    )


def leaky_plan(plan: DataPlan, leak: str, seed: int) -> DataPlan:
    """Return a plan whose val images are a fifth of its training images, cut off as one of the leaky splits is.

    The val images of the given plan are in neither part, so that they can still tell what a model is worth.

    Args:
        plan: with groups.
        leak: random_images or oversampled_first.
        seed: of the cut.
    Returns:
        The plan, in which images may come more than once.
    """
    labels = plan.labels[: plan.num_train]
    cut = cut_at_random(len(labels), seed) if leak == "random_images" else cut_oversampled(labels, seed)
    rows = np.concatenate([cut.train, cut.test])
    return DataPlan(
        image_ids=[plan.image_ids[row] for row in rows],
        labels=plan.labels[rows],
        num_train=len(cut.train),
        group_ids=[plan.group_ids[row] for row in rows],
    )


def pretend_table(report: PretendReport) -> Table:
    """Lay out what the same model scores on each split, the honest one first."""
    title = f"{report.model} at {report.side_px} px, {report.epochs} epochs: balanced accuracy that each split pretends"
    table = Table("split", "test images with a lesion in train", "pretended", "honest", "gap", title=title)
    for split in report.splits:
        pretended, honest = split.pretended.balanced_accuracy, split.honest.balanced_accuracy
        table.add_row(
            split.name, f"{split.leaked_test_share:.1%}", f"{pretended:.3f}", f"{honest:.3f}", f"{split.gap:+.3f}"
        )
    return table


def cut_by_group(groups: NDArray[np.str_], seed: int) -> Cut:
    """Cut whole groups off, until a fifth of the images is cut.

    Args:
        groups: [N] group of each image, at least two of them.
        seed: of the order.
    Returns:
        The cut; no group is on both splits.
    """
    names, member = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    sizes = np.bincount(member)[order]
    taken = np.cumsum(sizes) <= max(TEST_SHARE * len(groups), sizes[0])
    # At least one group has to remain to train on.
    taken[-1] = False
    in_test = np.isin(member, order[taken])
    return Cut(np.flatnonzero(~in_test), np.flatnonzero(in_test))


def cut_at_random(num_images: int, seed: int) -> Cut:
    """Cut a fifth of the images off, whatever they show."""
    order = np.random.default_rng(seed).permutation(num_images)
    num_test = max(1, round(TEST_SHARE * num_images))
    return Cut(np.sort(order[num_test:]), np.sort(order[:num_test]))


def cut_oversampled(labels: IntArray, seed: int) -> Cut:
    """Draw all classes to equal size, small ones with repeats, and cut a fifth of the result off at random.

    Args:
        labels: [N] class indices.
        seed: of the draws.
    Returns:
        The cut, as many rows as there are images; a row may be on both splits.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    wanted = max(1, len(labels) // len(classes))
    drawn = []
    for code in classes:
        rows = np.flatnonzero(labels == code)
        rounds = -(-wanted // len(rows))
        drawn.append(np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:wanted])
    rows = np.concatenate(drawn)
    # The mistake that is demonstrated: repeats of one image are cut apart, so copies lie on both splits.
    places = cut_at_random(len(rows), seed)
    return Cut(np.sort(rows[places.train]), np.sort(rows[places.test]))


def _judged(
    name: str, cut: Cut, trained: TrainedModel, data: TrainingData, lesions: NDArray[np.str_]
) -> PretendedSplit:
    pretended, honest = (_scores(trained, data, rows) for rows in (cut.test, data.val_index))
    return PretendedSplit(
        name=name,
        train_images=len(cut.train),
        test_images=len(cut.test),
        leaked_test_share=round(float(np.isin(lesions[cut.test], lesions[cut.train]).mean()), 4),
        pretended=pretended,
        honest=honest,
        gap=round(pretended.balanced_accuracy - honest.balanced_accuracy, 4),
    )


def _scores(trained: TrainedModel, data: TrainingData, rows: IntArray) -> Scores:
    parts = [
        reference_logits(trained.network, data.pixels.take(rows[start : start + _SCORING_BATCH]), trained.geometry)
        for start in range(0, len(rows), _SCORING_BATCH)
    ]
    logits, labels = np.concatenate(parts), data.labels[rows]
    predicted = logits.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, logits.shape[1])
    return Scores(
        accuracy=round(float((predicted == labels).mean()), 4),
        balanced_accuracy=round(float(balanced_accuracy(confusion)), 4),
    )
