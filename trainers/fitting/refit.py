"""A refit: when val has chosen the epoch, a second training from the start, on train and val, for so many epochs.

The second training repeats the recipe of the first: the same schedule, stopped after the epoch that val chose. No split
chooses anything in it, and what follows its logits is fitted on calibration, which it has not seen. Gate and test stay
unseen, so the model is judged by them as any other.
"""

from typing import TYPE_CHECKING, Any

from records.models import register
from trainers.fitting.epoch_report import EpochBar, OnEpoch, OnStep
from trainers.fitting.fit import fit
from trainers.optimization.schedulers import SCHEDULERS, plateau_factors
from trainers.settings import TrainersSettings

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from records.bundles import Bundle, BundleDocument
    from records.datasets import DatasetVersion
    from records.store import Store

FOLDER = "refit"
"""Folder of the second training, in that of the first."""


def fit_and_register(
    store: "Store",
    settings: TrainersSettings,
    dataset: "DatasetVersion",
    *,
    run_dir: "Path",
    use_ray: bool,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    start_from: "Bundle | None" = None,
    distill_from: "Bundle | None" = None,
    progress: "Progress | None" = None,
    round_number: int | None = None,
) -> "Bundle":
    """Train a model, and with `settings.refit` another one on more images; register what was made.

    Args:
        store: with the images; it gets the bundles.
        settings: the recipe.
        dataset: the version.
        run_dir: of the training; one that was killed goes on, also within the second training.
        use_ray: see `fit`.
        on_epoch: called after every epoch of the first training.
        on_step: called while steps are taken.
        start_from: a bundle to fine-tune.
        distill_from: a teacher.
        progress: bars are added to it.
        round_number: the round that makes the model.
    Returns:
        The model, that of the second training if there are two.
    Raises:
        RelookError: see `fit`.
    """
    made_of: dict[str, Any] = {
        "start_from": start_from,
        "distill_from": distill_from,
        "progress": progress,
        "use_ray": use_ray,
    }
    first_recipe = settings.with_values({"refit": False})
    bundle = fit(store, first_recipe, dataset, run_dir=run_dir, on_epoch=on_epoch, on_step=on_step, **made_of)
    if settings.refit:
        # The first one stays a model of its own: its figures on val are the evidence for the epochs.
        with store.ledger.begin() as tx:
            register(tx, bundle)
        recipe = refit_settings(first_recipe, bundle.document)
        if progress is not None:
            bar = EpochBar(progress, recipe.stop_after_epoch or recipe.epochs, what="refit", split="calibration")
            on_step = bar.on_step
        bundle = fit(
            store, recipe, dataset, run_dir=run_dir / FOLDER, on_epoch=None if progress is None else bar,
            on_step=on_step, first_fit=bundle, **made_of,
        )  # fmt: skip
    with store.ledger.begin() as tx:
        register(tx, bundle, round_number=round_number)
    return bundle


def refit_settings(settings: TrainersSettings, first: "BundleDocument") -> TrainersSettings:
    """Return the recipe that repeats a training on train and val.

    Args:
        settings: of the first training.
        first: its bundle.
    Returns:
        The same schedule up to the epoch that val chose; a plateau is replaced by the cuts that val made.
    """
    training = first.metrics["training"]
    values: dict[str, Any] = {
        "train_splits": "train_and_val",
        "best_epoch_by": "last",
        "stop_after_epoch": training["best_epoch"],
        "early_stop_patience_epochs": None,
    }
    if SCHEDULERS[settings.scheduler.name].moves == "score":
        scores = [point["val_balanced_accuracy"] for point in training["curves"]]
        factors = plateau_factors(settings.scheduler, scores)
        values |= {
            "scheduler.name": "step",
            "scheduler.step_size_epochs": settings.epochs,
            "scheduler.learning_rate_factors": factors,
        }
    return settings.with_values(values)
