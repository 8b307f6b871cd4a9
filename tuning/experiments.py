"""The dissertation's experiments as rows that a search tries: what each trains, and what was published of it.

In: a name. Out: rows of overrides of TrainersSettings, in the order in which they are tried. The published
figures are of "Explainability in Deep Learning Vision Models" (BITS Pilani, 2023): accuracies on its own
test images, and F1 from its literature table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainers.settings import TrainersSettings
from tuning.space import with_overrides


@dataclass(frozen=True)
class Experiment:
    """One row.

    Args:
        name: for people.
        tables: the tables that it stands in; one training may answer several questions.
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
    "Here no lesion is on two splits; there images of one lesion are, and the data were oversampled before the "
    "split, so that test images were trained on as well (187 test images of df, of which there are 115 in all).",
    "Here validation images keep the shares that the classes have; there every class had the same share. An accuracy "
    "is the share of right answers among such different images, so balanced accuracy stands beside it.",
    "Here the best epoch is chosen on the images that are reported, which flatters; the test split stays unread.",
    "One seed per row: the intervals resample lesions and say nothing of what another seed would give.",
)


def experiment_settings(name: str, base: TrainersSettings) -> list[TrainersSettings]:
    """Return what the rows of a search train.

    Args:
        name: in `EXPERIMENTS`, or empty for none.
        base: the given settings.
    Returns:
        One per row.
    """
    return [with_overrides(base, row.overrides) for row in EXPERIMENTS.get(name, ())]
