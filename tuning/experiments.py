"""The dissertation's experiments as rows that a search tries: what each trains, and what was published of it.

In: a name. Out: rows of overrides of TrainersSettings, in the order in which they are tried. The published
figures are of "Explainability in Deep Learning Vision Models" (BITS Pilani, 2023): accuracies on its own
test images, and F1 from its literature table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trainers.settings import TrainersSettings
from tuning.space import with_overrides
from tuning.trials import SearchHeader, TrialResult


@dataclass(frozen=True)
class Experiment:
    """One row.

    Args:
        name: for people.
        tables: the tables that it stands in; one training may be a row of several tables.
        overrides: of the preset's TrainersSettings.
        published: what the dissertation says, 0 to 1; None where it gives no figure.
        metric: of the published figure, `accuracy` or `macro_f1`.
    """

    name: str
    tables: tuple[str, ...]
    overrides: Mapping[str, Any]
    published: float | None = None
    metric: str = "accuracy"


NETWORKS, OPTIMIZERS, SCHEDULERS = "networks", "optimizers", "schedulers"
AUGMENTATION, LITERATURE = "augmentation and training-set size", "networks of its literature table"
BASE = {"augmentation": "none"}
AUGMENTED = {"augmentation": "dissertation"}
# Without batch norm the usual step is too long for this network.
SMALL_STEP = {"optimizer.learning_rate": 0.01}


def _rows(cnn: Mapping[str, Any], resnet: Mapping[str, Any], parts: tuple[int, int]) -> tuple[Experiment, ...]:
    """Return what both searches have; `cnn` and `resnet` are splits and epochs, `parts` smaller training sets."""
    small, resnet18 = {"model.name": "custom_cnn", **cnn}, {"model.name": "resnet18", **resnet}
    resnet34 = resnet18 | {"model.name": "resnet34"}
    sizes = tuple(
        Experiment(f"custom CNN, {part} images{words}", (AUGMENTATION,), small | policy | {"max_train_images": part})
        for part in parts
        for policy, words in ((BASE, ""), (AUGMENTED, ", augmented"))
    )
    no_norm = {"model.name": "custom_cnn_base"} | SMALL_STEP
    return (
        Experiment("custom CNN + batch norm", (NETWORKS, AUGMENTATION), small | BASE, 0.723),
        Experiment("custom CNN, base", (NETWORKS,), small | BASE | no_norm, 0.678),
        Experiment("custom CNN + batch norm, augmented", (NETWORKS, AUGMENTATION), small | AUGMENTED, 0.739),
        Experiment("ResNet-18, SGD, StepLR", (NETWORKS, OPTIMIZERS, SCHEDULERS), resnet18 | BASE, 0.82),
        Experiment("ResNet-18, augmented", (NETWORKS,), resnet18 | AUGMENTED, 0.889),
        Experiment("ResNet-18, RMSprop", (OPTIMIZERS,), resnet18 | BASE | {"optimizer.name": "rmsprop"}, 0.734),
        Experiment("ResNet-18, Adam", (OPTIMIZERS,), resnet18 | BASE | {"optimizer.name": "adam"}, 0.76),
        Experiment("ResNet-18, ReduceLROnPlateau", (SCHEDULERS,), resnet18 | BASE | {"scheduler.name": "plateau"}),
        *sizes,
        Experiment("ResNet-34", (NETWORKS,), resnet34 | BASE, 0.8321),
        Experiment("ResNet-34, augmented", (NETWORKS,), resnet34 | AUGMENTED, 0.8742),
    )


def _literature() -> tuple[Experiment, ...]:
    published = (("SqueezeNet", "squeezenet", 224, 0.946), ("DenseNet-121", "densenet121", 224, 0.963))
    return tuple(
        Experiment(
            name,
            (LITERATURE,),
            AUGMENTED | {"model.name": model, "model.side_px": side_px, "epochs": 20},
            figure,
            "macro_f1",
        )
        for name, model, side_px, figure in (*published, ("Inception-v3", "inception_v3", 299, 0.957))
    )


def _whole() -> tuple[Experiment, ...]:
    rows = _rows({"model.side_px": 224, "epochs": 20}, {"model.side_px": 64, "epochs": 20}, (1500, 3000))
    return (*rows, *_literature())


# In four epochs both schedules have to come to their point.
MINI_RESNET = {
    "model.side_px": 16,
    "epochs": 4,
    "scheduler.step_size_epochs": 2,
    "scheduler.plateau_patience_epochs": 0,
}

EXPERIMENTS: Mapping[str, tuple[Experiment, ...]] = MappingProxyType(
    {
        "dissertation": _whole(),
        "dissertation_mini": _rows({"model.side_px": 56, "epochs": 8}, MINI_RESNET, (250, 500)),
    }
)

WHY_DIFFERENT = (
    "Here no lesion is on two splits; there, images of one lesion are, and the data were oversampled before the "
    "split, so that test images were trained on as well (187 test images of df, of which there are 115 in all).",
    "Here validation images keep the shares that the classes have; there every class had the same share. An accuracy "
    "is the share of correct predictions among such different images, so balanced accuracy stands beside it.",
    "Here the best epoch is chosen on the images that are reported, which flatters; the test split stays unread.",
    "One seed per row: the intervals resample lesions and say nothing of what another seed would give.",
)

WHY_DIFFERENT_LEAKY = (
    "Here the mistakes of the dissertation were made on purpose: a fifth was cut off at random after all classes had "
    "been brought to equal size, so that images that are judged were trained on as well.",
    *WHY_DIFFERENT[2:],
)


def experiment_settings(name: str, base: TrainersSettings) -> list[TrainersSettings]:
    """Return what the rows of a search train."""
    return [with_overrides(base, row.overrides) for row in EXPERIMENTS.get(name, ())]


Interval = tuple[float, float]


class ComparedRow(BaseModel):
    """One row of one table; figures are empty until its trial had all its epochs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    name: str
    trial: int | None = Field(description="number of its trial; empty if it was not tried")
    model: str
    side_px: int
    epochs: int
    max_train_images: int | None = Field(description="empty if it trained on all")
    best_epoch: int | None
    balanced_accuracy: float | None
    balanced_accuracy_ci: Interval | None
    accuracy: float | None
    accuracy_ci: Interval | None
    macro_f1: float | None
    macro_f1_ci: Interval | None
    published: float | None = Field(description="by the dissertation, on its own test images")
    metric: str = Field(description="of the published figure")
    difference: float | None = Field(description="ours less the published one, in its metric")
    failure: str | None = Field(description="why its trial failed")


class Comparison(BaseModel):
    """All rows, and what keeps the two splits from being comparable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[ComparedRow, ...]
    groups: int | None = Field(description="lesions that the intervals rest on")
    why_different: tuple[str, ...]


def compare(header: SearchHeader, trials: Sequence[TrialResult]) -> Comparison | None:
    """Set the trials of a search beside what was published.

    Returns the rows, table after table; None for a search that tried none of them.
    """
    rows = EXPERIMENTS.get(header.experiments, ())
    if not rows:
        return None
    tables = list(dict.fromkeys(table for row in rows for table in row.tables))
    figures = [trial.figures for trial in trials if trial.figures is not None]
    return Comparison(
        rows=tuple(_row(table, row, header, trials) for table in tables for row in rows if table in row.tables),
        groups=figures[0].groups if figures else None,
        why_different=WHY_DIFFERENT if header.leak == "none" else WHY_DIFFERENT_LEAKY,
    )


def _row(table: str, row: Experiment, header: SearchHeader, trials: Sequence[TrialResult]) -> ComparedRow:
    settings: dict[str, Any] = header.base | dict(row.overrides)
    trial = next((trial for trial in trials if header.base | trial.overrides == settings), None)
    measured: dict[str, Any] = dict.fromkeys(
        f"{name}{end}" for name in ("balanced_accuracy", "accuracy", "macro_f1") for end in ("", "_ci")
    )
    figures = None if trial is None else trial.figures
    if figures is not None:
        measured = figures.model_dump(exclude={"epoch", "groups"})
    ours = measured[row.metric]
    return ComparedRow(
        table=table,
        name=row.name,
        trial=None if trial is None else trial.number,
        model=settings["model.name"],
        side_px=settings["model.side_px"],
        epochs=min(settings["epochs"], header.trial_epochs),
        max_train_images=settings["max_train_images"],
        best_epoch=None if figures is None else figures.epoch,
        **measured,
        published=row.published,
        metric=row.metric,
        difference=None if ours is None or row.published is None else ours - row.published,
        failure=None if trial is None else trial.error,
    )
