"""One whole training: its folder, the fit, the registration and the report on val.

`relook train` and `relook.train` of the Python interface both call it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from records.errors import RefusedError
from records.ids import hash_of
from records.types import Split
from trainers.evaluation.evaluate import evaluate, predict_split
from trainers.evaluation.report.write import write_report
from trainers.evaluation.slices import with_context, with_slices
from trainers.fitting.epoch_report import EpochBar
from trainers.fitting.fit import METRICS_FILE
from trainers.fitting.refit import fit_and_register
from trainers.optimization.strategies import strategy_of
from trainers.tracking.server import Tracked
from trainers.tracking.settings import TrackingSettings
from vision.inference.loaded import load_model

if TYPE_CHECKING:
    from rich.progress import Progress

    from records.bundles import Bundle
    from records.datasets import DatasetVersion
    from records.store import Store
    from trainers.settings import TrainersSettings

REPORT = "report"
"""Folder inside a bundle's folder; the bundle's id does not cover it."""


def run_folder(
    store: "Store",
    trainers: "TrainersSettings",
    dataset: "DatasetVersion",
    *,
    start_from: "Bundle | None" = None,
    distill_from: "Bundle | None" = None,
    resume: bool = False,
) -> Path:
    """Return the folder of a training, named by a hash of what is trained, so that a resumed one is the same one.

    RefusedError is raised if there is such a training and it shall not be resumed, or the other way round.
    """
    made_of = [trainers.recipe_hash(), dataset.id, start_from.id if start_from is not None else None]
    if strategy_of(trainers.workers).peers:
        made_of.append(f"part {trainers.workers.peers.part}")
    identity = hash_of(made_of if distill_from is None else [*made_of, distill_from.id])
    run_dir = store.home.runs / f"train-{identity[:12]}"
    begun = (run_dir / METRICS_FILE).is_file()
    if begun and not resume:
        raise RefusedError(
            f"these settings were trained on dataset {dataset.id[:12]} before ({run_dir}); "
            "go on with --resume, or change a setting such as --set trainers.seed=1"
        )
    if resume and not begun:
        raise RefusedError(
            f"there is no training with these settings on dataset {dataset.id[:12]} to resume; leave --resume out"
        )
    return run_dir


def train_and_register(
    store: "Store",
    trainers: "TrainersSettings",
    dataset: "DatasetVersion",
    run_dir: Path,
    *,
    start_from: "Bundle | None" = None,
    distill_from: "Bundle | None" = None,
    progress: "Progress",
    tracking: TrackingSettings | None = None,
) -> "Bundle":
    """Train a model, register its bundle and write its report.

    Args:
        store: with the images; it gets the bundle.
        trainers: the recipe; if it needs Ray, a session has to run.
        dataset: to train on.
        run_dir: from `run_folder`.
        start_from: a bundle to fine-tune.
        distill_from: a teacher, see `fit`.
        progress: bars are added to it.
        tracking: whether MLflow gets the run.
    Returns:
        The bundle, registered.
    """
    bar = EpochBar(progress, trainers.epochs)
    with Tracked(tracking, "train", run_dir.name, trainers.flat()) as tracked:
        bundle = fit_and_register(
            store,
            trainers,
            dataset,
            run_dir=run_dir,
            use_ray=trainers.needs_ray,
            on_epoch=tracked.before(bar),
            on_step=bar.on_step,
            start_from=start_from,
            distill_from=distill_from,
            progress=progress,
        )
        # Registered before the report is written: a report can be made again, a lost training cannot.
        tracked.fitted(bundle, run_dir / METRICS_FILE)
    write_own_report(store, trainers, bundle, dataset, progress)
    return bundle


def write_own_report(
    store: "Store", trainers: "TrainersSettings", bundle: "Bundle", dataset: "DatasetVersion", progress: "Progress"
) -> None:
    """Write the bundle's report on the split of its own figures, which fitting has read anyway: val, or calibration."""
    document = bundle.document
    split = Split(document.measured[0])
    model = load_model(bundle, precision=trainers.precision)
    found = predict_split(store, bundle, dataset, split, actor="cli", model=model, progress=progress)
    evaluation = with_slices(
        evaluate(found, document.taxonomy, document.operating, priors=document.calibration.priors),
        found,
        document.taxonomy,
        document.operating,
    )
    evaluation = with_context(evaluation, found, document)
    write_report(bundle.path / REPORT, bundle, model, found, evaluation)
