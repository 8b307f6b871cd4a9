"""The verb `relook evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group as Stack
from rich.progress import Progress
from rich.table import Table

from records.command import Call, verb
from records.errors import ConfigError
from records.progress import progress
from records.types import Split

if TYPE_CHECKING:
    from records.bundles import Bundle
    from trainers.evaluation.evaluate import SplitPredictions
    from trainers.evaluation.figures import Evaluation, Interval

app = typer.Typer()


@verb(app, "evaluate")
def evaluate_command(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix, bundle path, champion or candidate.")],
    images: Annotated[Path | None, typer.Option(help="Folder of labelled images, with --labels.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Table of --images: image_id, dx (lesion_id, age, sex, ..).")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Columns of the table: image=..,dx=..,lesion=..")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset id; default: the dataset of the model.")] = None,
    split: Annotated[Split, typer.Option(help="Split to measure on; reads of gate and test are audited.")] = Split.VAL,
    masks: Annotated[Path | None, typer.Option(help="Folder of lesion masks, <image_id>_segmentation.png.")] = None,
    prevalence: Annotated[str | None, typer.Option(help="Class shares to re-weight to: nv=0.9,mel=0.01.")] = None,
    robustness: Annotated[bool, typer.Option("--robustness", help="Attack a sample with FGSM and PGD.")] = False,
    explanations: Annotated[bool, typer.Option("--explanations", help="Measure how faithful heat maps are.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder to write report.html and metrics.json to.")] = None,
    embed_images: Annotated[
        bool, typer.Option("--embed-images", help="Show the worst mistakes in --report, which has to be elsewhere.")
    ] = False,
) -> None:
    """Measure a model on a split of a dataset, or on any folder of labelled images."""
    from records.datasets import load_dataset
    from records.models import find_bundle
    from trainers.cli.data import parse_columns
    from trainers.evaluation.evaluate import evaluate, predict_split
    from trainers.evaluation.folder import predict_folder
    from trainers.evaluation.report.write import write_report
    from trainers.evaluation.slices import with_slices
    from vision.inference.loaded import load_model

    if (images is None) != (labels is None):
        raise ConfigError("--images and --labels belong together: a folder of images and its table")
    if masks is not None and not masks.is_dir():
        raise ConfigError(f"--masks {masks} is no folder; give one with a mask per image")
    settings = call.settings
    with call.store() as store, progress() as bar:
        if embed_images and (report is None or report.resolve().is_relative_to(store.home.root.resolve())):
            raise ConfigError(
                "--embed-images needs --report with a folder outside the home: reports in it can be read by every key, "
                "and hold no image"
            )
        bundle = find_bundle(store, model)
        document = bundle.document
        shares = _prevalence(prevalence, document.calibration.priors) if prevalence else None
        loaded = load_model(bundle, precision=settings.trainers.precision)
        if images is not None and labels is not None:
            found = predict_folder(loaded, images, labels, columns=parse_columns(columns), progress=bar, masks=masks)
        else:
            dataset = load_dataset(store, data or document.dataset_id)
            found = predict_split(store, bundle, dataset, split, actor="cli", model=loaded, progress=bar, masks=masks)
        # Thresholds are used as served; a stated prevalence re-weights only the figures without thresholds.
        evaluation = evaluate(
            found, document.taxonomy, document.operating, prevalence=shares, priors=document.calibration.priors
        )
        evaluation = with_slices(evaluation, found, document.taxonomy, document.operating)
        evaluation = _probed(evaluation, bundle, found, bar, robustness=robustness, explanations=explanations)
        # Inside of the store's block: the report draws images, which it reads from the blobs.
        if report is not None:
            write_report(report, bundle, loaded, found, evaluation, embed_images=embed_images)
    call.emit(evaluation, _evaluation_tables(evaluation))


def _prevalence(text: str, priors: dict[str, float]) -> dict[str, float]:
    from vision.calibration.scaling import stated_prevalence

    stated = {}
    for part in text.split(","):
        code, _, share = part.partition("=")
        try:
            stated[code.strip()] = float(share)
        except ValueError as error:
            raise ConfigError(f"--prevalence {text!r} is not of the form nv=0.9,mel=0.01") from error
    return stated_prevalence(stated, priors)


def _probed(
    evaluation: "Evaluation",
    bundle: "Bundle",
    predictions: "SplitPredictions",
    bar: Progress,
    *,
    robustness: bool,
    explanations: bool,
) -> "Evaluation":
    """Add the measurements that need many forward passes, where requested."""
    from trainers.evaluation.probing import measure_explanations, measure_robustness, sample_of
    from trainers.evaluation.robustness import work_of

    found: dict[str, Any] = {}
    if robustness:
        task = bar.add_task("Attacking", total=work_of(len(sample_of(predictions))))
        found["robustness"] = measure_robustness(bundle, predictions, lambda done: bar.advance(task, done))
    if explanations:
        bar.add_task("Measuring heat maps", total=None)
        found["explanations"] = measure_explanations(bundle, predictions)
    return evaluation.model_copy(update=found)


def _evaluation_tables(evaluation: "Evaluation") -> Stack:
    """Lay out an evaluation: totals, classes, confusion matrix, and why figures are undefined."""
    where = f"{evaluation.split} of {evaluation.dataset_id[:12]}" if evaluation.dataset_id else "folder"
    summary = Table(show_header=False, title=f"model {evaluation.model_id[:12]} on {where}")
    summary.add_row("images, lesions", f"{evaluation.images}, {evaluation.lesions}")
    summary.add_row("balanced accuracy", _figure(evaluation.balanced_accuracy, evaluation.balanced_accuracy_ci))
    even = evaluation.at_equal_prevalence
    if even is not None:
        summary.add_row("  at equal class shares", _figure(even.balanced_accuracy, even.balanced_accuracy_ci))
    summary.add_row("accuracy", _figure(evaluation.accuracy, evaluation.accuracy_ci))
    summary.add_row("macro F1", _figure(evaluation.macro_f1, evaluation.macro_f1_ci))
    summary.add_row("macro AUC", _figure(evaluation.macro_auc))
    summary.add_row("calibration error", _figure(evaluation.ece))
    summary.add_row("decided without an annotator", _figure(evaluation.answered_share))
    summary.add_row("classes per prediction set", _figure(evaluation.mean_set_size))
    key = evaluation.key_class
    if key is not None:
        summary.add_row(f"{key.name} sensitivity, per lesion", _figure(key.sensitivity, key.sensitivity_ci))
        summary.add_row(f"{key.name} specificity, per lesion", _figure(key.specificity, key.specificity_ci))
        proof = "proven on calibration" if key.proven else "not proven on calibration"
        summary.add_row(f"{key.name} referred from", f"{_figure(key.threshold)} (floor {key.floor:.2f} {proof})")
        summary.add_row(
            f"{key.name} specificity at 95 % sensitivity",
            _figure(key.specificity_at_95_sensitivity, key.specificity_at_95_sensitivity_ci),
        )
    if evaluation.coverage is not None:
        promise = f"{evaluation.coverage.overall:.3f} (target {evaluation.coverage.promise:.2f})"
        summary.add_row("prediction set contains the class", promise)
    if evaluation.split_reads is not None:
        summary.add_row(f"{evaluation.split} was read", f"{evaluation.split_reads} times")
    classes = Table("class", "images", "lesions", "sensitivity", "specificity", "precision")
    for code, report in evaluation.per_class.items():
        classes.add_row(
            code,
            str(report.support),
            str(report.lesions),
            _figure(report.sensitivity, report.sensitivity_ci),
            _figure(report.specificity, report.specificity_ci),
            _figure(report.precision, report.precision_ci),
        )
    codes = list(evaluation.per_class)
    confusion = Table("truth \\ prediction", *codes, title="confusion matrix")
    for code, row in zip(codes, evaluation.confusion_matrix, strict=True):
        confusion.add_row(code, *(str(count) for count in row))
    notes = [f"{name}: {reason}" for name, reason in evaluation.undefined.items()]
    return Stack(
        summary, classes, confusion, *notes, "95 % intervals, resampled by group; decision support, not a diagnosis"
    )


def _figure(value: float | None, interval: "Interval | None" = None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
