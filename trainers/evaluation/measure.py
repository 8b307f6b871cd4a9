"""One whole evaluation of a model: predict, measure, probe on request, and write the report.

`relook evaluate` and `relook.evaluate` of the Python interface both call it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records.datasets import load_dataset
from records.errors import ConfigError
from records.types import Split
from trainers.evaluation.evaluate import SplitPredictions, evaluate, predict_split
from trainers.evaluation.figures import Evaluation
from trainers.evaluation.folder import predict_folder
from trainers.evaluation.probing import measure_explanations, measure_robustness, sample_of
from trainers.evaluation.report.write import write_report
from trainers.evaluation.robustness import work_of
from trainers.evaluation.slices import with_context, with_slices
from vision.calibration.scaling import stated_prevalence
from vision.inference.loaded import load_model
from vision.precision import PrecisionChoice

if TYPE_CHECKING:
    from rich.progress import Progress

    from records.bundles import Bundle
    from records.store import Store


def measure_model(
    store: "Store",
    bundle: "Bundle",
    *,
    split: Split = Split.VAL,
    data: str | None = None,
    images: Path | None = None,
    labels: Path | None = None,
    columns: Mapping[str, str] | None = None,
    masks: Path | None = None,
    prevalence: Mapping[str, float] | None = None,
    robustness: bool = False,
    explanations: bool = False,
    report: Path | None = None,
    embed_images: bool = False,
    precision: PrecisionChoice = "auto",
    progress: "Progress",
) -> Evaluation:
    """Measure a model on a split of a dataset, or on any folder of labelled images.

    Args:
        store: with the images.
        bundle: the model.
        split: to measure on; reads of gate and test are audited.
        data: dataset id; default: the dataset of the model.
        images: a folder of labelled images to measure on instead, together with `labels`.
        labels: the table of `images`.
        columns: names of the table's columns where they differ from the usual ones.
        masks: folder of lesion masks.
        prevalence: class shares to re-weight to; those that are left out share the rest.
        robustness: attack a sample with FGSM and PGD, too.
        explanations: measure how faithful the heat maps are, too.
        report: folder to write report.html and metrics.json to.
        embed_images: show the worst mistakes in the report, which has to be outside the home.
        precision: number format of the network.
        progress: bars are added to it.
    Returns:
        The figures, with their intervals.
    Raises:
        ConfigError: options do not fit together, or a folder is missing.
        DataError: the split is empty, or the folder of images cannot be used.
    """
    _require_together(store, images, labels, masks, report, embed_images)
    document = bundle.document
    priors = document.calibration.priors
    shares = stated_prevalence(dict(prevalence), priors) if prevalence else None
    loaded = load_model(bundle, precision=precision)
    if images is not None and labels is not None:
        found = predict_folder(loaded, images, labels, columns=columns, progress=progress, masks=masks)
    else:
        dataset = load_dataset(store, data or document.dataset_id)
        found = predict_split(store, bundle, dataset, split, actor="cli", model=loaded, progress=progress, masks=masks)
    # Thresholds are used as served; a stated prevalence re-weights only the figures without thresholds.
    evaluation = evaluate(found, document.taxonomy, document.operating, prevalence=shares, priors=priors)
    evaluation = with_slices(evaluation, found, document.taxonomy, document.operating)
    evaluation = with_context(evaluation, found, document)
    evaluation = _probed(evaluation, bundle, found, progress, robustness=robustness, explanations=explanations)
    if report is not None:
        write_report(report, bundle, loaded, found, evaluation, embed_images=embed_images)
    return evaluation


def _require_together(
    store: "Store", images: Path | None, labels: Path | None, masks: Path | None, outside: Path | None, embeds: bool
) -> None:
    if (images is None) != (labels is None):
        raise ConfigError("--images and --labels belong together: a folder of images and its table")
    if masks is not None and not masks.is_dir():
        raise ConfigError(f"--masks {masks} is no folder; give one with a mask per image")
    if embeds and (outside is None or outside.resolve().is_relative_to(store.home.root.resolve())):
        raise ConfigError(
            "--embed-images needs --report with a folder outside the home: reports in it can be read by every key, "
            "and hold no image"
        )


def _probed(
    evaluation: Evaluation,
    bundle: "Bundle",
    predictions: SplitPredictions,
    bar: "Progress",
    *,
    robustness: bool,
    explanations: bool,
) -> Evaluation:
    """Add the measurements that need many forward passes, where requested."""
    found: dict[str, Any] = {}
    if robustness:
        task = bar.add_task("Attacking", total=work_of(len(sample_of(predictions))))
        found["robustness"] = measure_robustness(bundle, predictions, lambda done: bar.advance(task, done))
    if explanations:
        bar.add_task("Measuring heat maps", total=None)
        found["explanations"] = measure_explanations(bundle, predictions)
    return evaluation.model_copy(update=found)
