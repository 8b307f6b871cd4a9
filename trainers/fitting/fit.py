"""From a dataset version to a calibrated bundle: decode, train, calibrate, write.

It reads train (to train), val (to choose the epoch, temperature and bias) and calibration (operating
points and prediction sets), and no other split. With `train_splits=train_and_val` it trains on val, too, and
calibration gives temperature and bias. A run folder that holds an unfinished run of the same settings and data goes
on; the same run done twice gives the same bundle. Nothing is registered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from images.cache import PixelCache
from records.arrays import Float32Array, FloatArray, IntArray
from records.bundles import (
    Architecture,
    Bundle,
    BundleDocument,
    Calibration,
    Member,
    OperatingPoints,
    Teacher,
    write_bundle,
)
from records.context import ContextHead, Known, context_of_image
from records.datasets import DatasetVersion
from records.errors import ConfigError, ContractError, DataError
from records.store import Store, find_images
from records.taxonomy import Taxonomy
from records.types import Split
from trainers.augmentation import Policy, load_policy
from trainers.evaluation.evaluate import SplitPredictions, evaluate
from trainers.fitting.cases import add_cases
from trainers.fitting.context import calibrated, cross_fitted, fitted_context, probabilities_of
from trainers.fitting.epoch_report import MetricsLog, OnEpoch, OnStep, epochs_in
from trainers.fitting.job import Job, job_of
from trainers.fitting.loop import TrainedModel
from trainers.fitting.starting import StartingWeights, starting_weights
from trainers.fitting.suitability import Outputs, faithfulness_of, outputs_of, sample_of_train, suitability_of
from trainers.fitting.teacher import require_unseen, taught
from trainers.fitting.training_data import TRAINED_ON, DataPlan, plan_data
from trainers.fitting.workers import SingleWorker, compute_threads
from trainers.optimization.strategies import require_peers_known, strategy_of
from trainers.settings import TrainersSettings
from trainers.tracking.tensorboard import FOLDER, EventFiles
from vision.calibration.decision import DecisionSettings, decision_rule, labels_of
from vision.calibration.operating import fit_operating_points, gather_lesions, no_lesions
from vision.explanations.closed_form import closed_form_of
from vision.inference.golden import golden_arrays
from vision.metrics.metrics import score_bands
from vision.networks import MODELS

CURVES = ("epoch", "train_loss", "val_loss", "val_balanced_accuracy")
FITTED_ON = (Split.VAL, Split.CALIBRATION)
METRICS_FILE = "metrics.jsonl"
"""Appears in a run's folder with the first epoch; a run that failed before it left nothing to resume."""


@dataclass(frozen=True)
class SplitLogits:
    """Logits and features of one split, in order of image id."""

    image_ids: list[str]
    group_ids: list[str]
    lesion_ids: list[str | None]
    labels: IntArray
    outputs: Outputs
    known: list[Known]
    """[N] the context of each image"""

    @property
    def logits(self) -> Float32Array:
        """[N, C]"""
        return self.outputs.logits

    def probabilities(self, calibration: Calibration, context: ContextHead | None) -> FloatArray:
        """[N, C], calibrated, with the context if there is a head for it"""
        return probabilities_of(self.logits.astype(np.float64), calibration, context, self.known)


def fit(
    store: Store,
    settings: TrainersSettings,
    dataset: DatasetVersion,
    *,
    run_dir: Path,
    use_ray: bool,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    start_from: Bundle | None = None,
    distill_from: Bundle | None = None,
    first_fit: Bundle | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Train a model on a dataset version and write its bundle; `settings.refit` is not read, see `fit_and_register`.

    Args:
        store: with the images; the bundle goes under its home.
        settings: the recipe, and how this machine executes it.
        dataset: the version.
        run_dir: for checkpoint and `metrics.jsonl`; if it holds this run, unfinished, the run goes on.
        use_ray: train in the Ray session that runs already; needed for more than one worker.
        on_epoch: called after every epoch; True stops training, and the best epoch so far is calibrated.
        on_step: called while steps are taken, every few seconds at least.
        start_from: a bundle of the same architecture whose weights are fine-tuned; default: fresh weights.
        distill_from: the teacher whose probabilities are learned beside the labels; default: the labels alone.
        first_fit: of a refit, the bundle whose val chose the epochs.
        progress: bars are added to it.
    Returns:
        The bundle.
    Raises:
        DataError: train, val or calibration is empty, or an image cannot be read.
        ConfigError: a setting cannot work.
        TaxonomyError: store, dataset, the bundle to start from and the teacher do not share one taxonomy.
        RefusedError: the folder holds another run, or the teacher, or the bundle to start from, was trained on what the
            dataset holds out.
        DivergedError: a loss or a logit is not finite.
    """
    policy, num_classes = load_policy(settings.augmentation), len(store.taxonomy.codes)
    start = None if start_from is not None else starting_weights(settings.model, num_classes, settings.seed)
    initial_weights = start.values if start is not None else _weights_of(store, start_from, settings, dataset)
    trained_on, plan = TRAINED_ON[settings.train_splits], _plan_of(dataset, store.taxonomy, settings)
    # Before the training: a rule that the taxonomy has no costs for would be refused after it.
    decision_rule(settings.decision.rule, store.taxonomy, dict.fromkeys(store.taxonomy.codes, 1.0))
    context = fitted_context(store, plan, settings.context)
    plan, teacher = taught(store, plan, distill_from, dataset, settings, progress)
    _decode(store, dataset, plan, settings, progress)
    run_dir.mkdir(parents=True, exist_ok=True)
    events = EventFiles(run_dir / FOLDER, settings.flat(), told=epochs_in(run_dir / METRICS_FILE))
    log = MetricsLog(run_dir / METRICS_FILE, on_epoch, events)
    job = job_of(store, settings, plan, run_dir, policy, initial_weights)
    trained = _trained(job, store, dataset.id, use_ray, log, on_step)
    # A run that was killed between a checkpoint and its report may have written an epoch twice, or not at all.
    log.complete(trained.reports)
    facts = _training_facts(trained, policy, plan, first_fit)
    origin = _origin_of(settings, facts, start, start_from, teacher, trained_on)
    choices = Choices(views=settings.views, decision=settings.decision, context=context)
    return write_fitted(store, dataset, plan, trained, origin, choices, progress)


def _plan_of(dataset: DatasetVersion, taxonomy: Taxonomy, settings: TrainersSettings) -> DataPlan:
    require_peers_known(settings.workers)
    plan = plan_data(dataset, taxonomy, TRAINED_ON[settings.train_splits])
    require_splits(dataset)
    return plan.limited(settings.max_train_images).part(*settings.workers.peers.share)


def _trained(
    job: Job, store: Store, dataset_id: str, use_ray: bool, on_epoch: OnEpoch, on_step: OnStep | None
) -> TrainedModel:
    settings, plan = job.settings, job.plan
    if strategy_of(settings.workers).peers:
        from trainers.fitting.peers import train_with_peers

        return train_with_peers(job, plan.open(store, settings.model.frame), dataset_id, on_epoch, on_step)
    if use_ray:
        from trainers.fitting.distributed import fit_distributed

        return fit_distributed(job, on_epoch=on_epoch, on_step=on_step)
    if settings.needs_ray:
        raise ConfigError(
            f"trainers.workers.count is {settings.workers.count} and trainers.workers.data_source "
            f"{settings.workers.data_source}; more than one worker, and streaming, need Ray: set "
            "trainers.workers.count=1 and trainers.workers.data_source=cache to train without it"
        )
    group = SingleWorker(job.run_dir, settings.workers.use_gpu)
    return job.train(plan.open(store, settings.model.frame), group, on_epoch, on_step)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a bundle says of how its network was made.

    Args:
        architecture: of the network.
        config: settings that made it.
        training: facts about the training; none depends on the clock.
        trained_on: the splits that it was trained on.
        parent_model_id: the model that it was started from.
        teacher: the model that it was distilled from.
        members: of an ensemble.
    """

    architecture: Architecture
    config: dict[str, Any]
    training: dict[str, Any]
    trained_on: tuple[Split, ...] = (Split.TRAIN,)
    parent_model_id: str | None = None
    teacher: Teacher | None = None
    members: tuple[Member, ...] = ()


def _origin_of(
    settings: TrainersSettings,
    training: dict[str, Any],
    start: StartingWeights | None,
    start_from: Bundle | None,
    teacher: Teacher | None,
    trained_on: tuple[Split, ...],
) -> Origin:
    return Origin(
        trained_on=trained_on,
        architecture=Architecture(name=settings.model.name, options=settings.model.options),
        config=settings.kept(),
        training=training | {"weights": start.facts() if start is not None else None},
        parent_model_id=start_from.id if start_from is not None else None,
        teacher=teacher,
    )


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a network is used.

    Args:
        views: whose logits are averaged.
        decision: label and operating point.
        context: its head, without its weight; None: images alone.
    """

    views: int
    decision: DecisionSettings
    context: ContextHead | None


def write_fitted(
    store: Store,
    dataset: DatasetVersion,
    plan: DataPlan,
    trained: TrainedModel,
    origin: Origin,
    choices: Choices,
    progress: Progress | None = None,
) -> Bundle:
    """Calibrate a network, fit its thresholds and checks, and write its bundle with its cases; not registered.

    Args:
        store: with val, calibration and a sample of train decoded.
        dataset: the version.
        plan: the images that it was trained on.
        trained: the network.
        origin: how it was made.
        choices: how it is used.
        progress: bars are added to it.
    Returns:
        The bundle.
    """
    taxonomy = store.taxonomy
    with compute_threads(trained.num_threads):
        unseen = [split for split in FITTED_ON if split not in origin.trained_on]
        held = {split: _logits_of(store, dataset, split, trained, choices.views, progress) for split in unseen}
        split, first = next(iter(held.items()))  # val; calibration, if val was trained on
        logits = first.logits.astype(np.float64)
        calibration, context = calibrated(logits, first.labels, taxonomy, choices.context, first.known)
        golden = golden_arrays(trained.network, trained.geometry, choices.views)
        faithfulness = faithfulness_of(store, trained, origin.architecture, calibration, first.image_ids)
        suitability, arrays = suitability_of(store, dataset, trained, first.image_ids, first.outputs, progress)
    found = _probabilities(held, calibration, context, choices.context, taxonomy)
    operating, scores = _operating_points(held, found, calibration, taxonomy, choices.decision)
    metrics: dict[str, Any] = {"training": origin.training, "calibration": {"scores": scores}}
    metrics.setdefault(split.value, {}).update(_figures(split, first, found[split], calibration, operating, taxonomy))
    document = BundleDocument(
        taxonomy=taxonomy,
        taxonomy_hash=taxonomy.hash,
        architecture=origin.architecture,
        geometry=trained.geometry,
        class_priors=_class_shares(plan, taxonomy),
        calibration=calibration,
        context=context,
        views=choices.views,
        operating=operating,
        suitability=suitability,
        dataset_id=dataset.id,
        trained_on=[split.value for split in origin.trained_on],
        parent_model_id=origin.parent_model_id,
        members=list(origin.members),
        teacher=origin.teacher,
        config=origin.config,
        code_version=version("relook"),
        num_threads=trained.num_threads,
        metrics=metrics,
        explanation={**_explanation_facts(trained, origin.architecture), "faithfulness": faithfulness},
    )
    bundle = write_bundle(store, document, trained.weights(), golden, arrays)
    return add_cases(store, dataset, trained, bundle, progress)


def _class_shares(plan: DataPlan, taxonomy: Taxonomy) -> dict[str, float]:
    counts = np.bincount(plan.labels[: plan.num_train], minlength=len(taxonomy.codes))
    return {code: float(count / plan.num_train) for code, count in zip(taxonomy.codes, counts, strict=True)}


def _explanation_facts(trained: TrainedModel, architecture: Architecture) -> dict[str, Any]:
    has_none = closed_form_of(trained.network.get_submodule("head")) is None
    layer = MODELS[architecture.name].target_layer
    return {"target_layer": layer, "gradcam": "autograd" if has_none else "closed_form"}


def _logits_of(
    store: Store, dataset: DatasetVersion, split: Split, trained: TrainedModel, views: int, progress: Progress | None
) -> SplitLogits:
    # Guards the split contract in code: a bundle whose thresholds saw gate or test images could not be judged on
    # them.
    if split not in FITTED_ON:
        raise ContractError(f"fitting must not read the {split.value} split")
    rows = dataset.split(split)
    image_ids = [str(image_id) for image_id in rows["image_id"]]
    images = find_images(store, image_ids)
    return SplitLogits(
        image_ids=image_ids,
        group_ids=[str(group_id) for group_id in rows["group_id"]],
        lesion_ids=[image.lesion_id for image in images],
        labels=np.array([store.taxonomy.index_of(str(code)) for code in rows["label"]], dtype=np.int64),
        outputs=outputs_of(
            trained, store, image_ids, views, progress=progress, what=f"Scoring the {split.value} split"
        ),
        known=[context_of_image(image) for image in images],
    )


def _probabilities(
    held: Mapping[Split, SplitLogits],
    calibration: Calibration,
    context: ContextHead | None,
    unfitted: ContextHead | None,
    taxonomy: Taxonomy,
) -> dict[Split, FloatArray]:
    """Return calibrated probabilities of each split; cross-fitted ones where the calibration was fitted on them."""
    if Split.VAL in held:
        return {split: logits.probabilities(calibration, context) for split, logits in held.items()}
    own = held[Split.CALIBRATION]
    logits = own.logits.astype(np.float64)
    return {Split.CALIBRATION: cross_fitted(logits, own.labels, own.group_ids, taxonomy, unfitted, own.known)}


def _operating_points(
    held: Mapping[Split, SplitLogits],
    found: Mapping[Split, FloatArray],
    calibration: Calibration,
    taxonomy: Taxonomy,
    settings: DecisionSettings,
) -> tuple[OperatingPoints, list[dict[str, Any]]]:
    """Fit rule and thresholds, and count how often labels were right by their scores, on one image per lesion."""
    # One image per lesion: several images of one lesion are not independent, and would narrow the intervals.
    lesions = {
        split: gather_lesions(logits.image_ids, logits.lesion_ids, logits.labels, found[split])
        for split, logits in held.items()
    }
    own, probabilities = lesions[Split.CALIBRATION], found[Split.CALIBRATION]
    decision = decision_rule(settings.rule, taxonomy, calibration.priors, settings.point)
    first = probabilities[own.first_image_index]
    operating = fit_operating_points(
        own,
        probabilities,
        taxonomy,
        decision=decision,
        val=lesions.get(Split.VAL, no_lesions(len(taxonomy.codes))),
        target_sensitivity=settings.target_sensitivity,
    )
    return operating, score_bands(first, own.labels, labels_of(first, decision))


def _training_facts(trained: TrainedModel, policy: Policy, plan: DataPlan, first_fit: Bundle | None) -> dict[str, Any]:
    """Facts about the training. None depends on the clock, so that equal runs give bundles with equal ids."""
    return {
        # Of a refit: the model whose val chose the epochs. The fields of val below are of calibration then.
        **({} if first_fit is None else {"first_fit": first_fit.id}),
        **({} if trained.peers is None else {"peers": trained.peers}),
        "epochs": len(trained.reports),
        "best_epoch": trained.best_epoch,
        "train_images": plan.num_train,
        "val_images": len(plan.labels) - plan.num_train,
        "curves": [report.model_dump(mode="json", include=set(CURVES)) for report in trained.reports],
        "augmentation": {"hash": policy.content_hash(), **policy.model_dump(mode="json")},
    }


def _figures(
    split: Split,
    logits: SplitLogits,
    probabilities: FloatArray,
    calibration: Calibration,
    operating: OperatingPoints,
    taxonomy: Taxonomy,
) -> dict[str, Any]:
    """Optimistic figures: val chose epoch, temperature and bias; calibration, without val, chose the thresholds."""
    predictions = SplitPredictions(
        model_id="",
        image_ids=logits.image_ids,
        group_ids=logits.group_ids,
        lesion_ids=logits.lesion_ids,
        labels=logits.labels,
        logits=logits.logits,
        probabilities=probabilities,
        split=split,
    )
    report = evaluate(predictions, taxonomy, operating, priors=calibration.priors)
    return report.model_dump(mode="json", exclude={"model_id", "dataset_id", "split_reads", "referral", "trained_on"})


def _weights_of(
    store: Store, start_from: Bundle | None, settings: TrainersSettings, dataset: DatasetVersion
) -> dict[str, NDArray[Any]] | None:
    if start_from is None:
        return None
    store.taxonomy.require_same(start_from.document.taxonomy_hash, f"model {start_from.id[:12]}")
    architecture = start_from.document.architecture.name
    if start_from.document.members:
        listed = ", ".join(member.model_id[:12] for member in start_from.document.members)
        raise ConfigError(
            f"model {start_from.id[:12]} is an ensemble, which is not trained as a whole; start from one of its "
            f"members ({listed})"
        )
    if architecture != settings.model.name:
        raise ConfigError(
            f"trainers.model.name is {settings.model.name!r}, and model {start_from.id[:12]} to start from is "
            f"{architecture!r}; set trainers.model.name={architecture}"
        )
    require_unseen(store, start_from, dataset, "model to start from", where_known=True)
    return start_from.weights()


def require_splits(dataset: DatasetVersion) -> None:
    """Raise DataError if a split that fitting reads has no image."""
    for split in (Split.TRAIN, *FITTED_ON):
        if dataset.split(split).empty:
            raise DataError(
                f"dataset version {dataset.id[:12]} has no image on the {split.value} split; import more lesions"
            )


def _decode(
    store: Store, dataset: DatasetVersion, plan: DataPlan, settings: TrainersSettings, progress: Progress | None
) -> None:
    """Decode everything that fitting reads in one pass; with streaming, only a sample of train."""
    train = [] if settings.workers.data_source == "stream" else plan.image_ids[: plan.num_train]
    splits = [str(image_id) for split in FITTED_ON for image_id in dataset.split(split)["image_id"]]
    PixelCache(store.home.cache, settings.model.frame).ensure(
        store, [*train, *sample_of_train(store, dataset), *splits], progress
    )
