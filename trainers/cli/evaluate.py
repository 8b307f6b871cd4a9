"""The verb `relook evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table

from records.command import Call, verb
from records.errors import ConfigError
from records.progress import progress
from records.types import Split

if TYPE_CHECKING:
    from trainers.evaluation.figures import Evaluation, Interval

app = typer.Typer()

_MAX_PAIRS = 20
_MAX_NOTES = 20


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
    from images.pairs import parse_columns
    from records.models import find_bundle
    from trainers.evaluation.measure import measure_model
    from trainers.tracking.server import track_evaluation

    with call.store() as store, progress() as bar:
        evaluation = measure_model(
            store,
            find_bundle(store, model),
            split=split,
            data=data,
            images=images,
            labels=labels,
            columns=parse_columns(columns),
            masks=masks,
            prevalence=_shares(prevalence) if prevalence else None,
            robustness=robustness,
            explanations=explanations,
            report=report,
            embed_images=embed_images,
            precision=call.settings.trainers.precision,
            progress=bar,
        )
    track_evaluation(call.settings.tracking, evaluation)
    call.emit(evaluation, _evaluation_tables(evaluation))


def _shares(text: str) -> dict[str, float]:
    stated = {}
    for part in text.split(","):
        code, _, share = part.partition("=")
        try:
            stated[code.strip()] = float(share)
        except ValueError as error:
            raise ConfigError(f"--prevalence {text!r} is not of the form nv=0.9,mel=0.01") from error
    return stated


def _evaluation_tables(evaluation: "Evaluation") -> Stack:
    """Lay out an evaluation: totals, classes, confusion matrix, and why figures are undefined."""
    where = f"{evaluation.split} of {evaluation.dataset_id[:12]}" if evaluation.dataset_id else "folder"
    summary = Table(show_header=False, title=f"model {evaluation.model_id[:12]} on {where}")
    summary.add_row("images, lesions", f"{evaluation.images}, {evaluation.lesions}")
    if evaluation.trained_on:
        seen = f"{evaluation.trained_on} of {evaluation.images}: the figures say nothing about unseen images"
        summary.add_row("images that it was trained on", seen)
    elif evaluation.trained_on is None and evaluation.dataset_id:
        summary.add_row("images that it was trained on", "not known: what it was trained on is not in this home")
    summary.add_row("balanced accuracy", _figure(evaluation.balanced_accuracy, evaluation.balanced_accuracy_ci))
    for rule, report in evaluation.by_rule.items():
        name = f"  label by the rule {rule}{' (in force)' if report.in_force else ''}"
        summary.add_row(name, _figure(report.balanced_accuracy, report.balanced_accuracy_ci))
    context = evaluation.context
    if context is not None:
        summary.add_row("  of the images alone, without context", _figure(context.balanced_accuracy_without))
        summary.add_row("labels that the context changed", f"{100 * context.changed_labels:.1f} %")
        if context.decided_by_context:
            summary.add_row("decided by context, hardly by the image", ", ".join(context.decided_by_context))
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
    for name, point in evaluation.points.items():
        values = f"{_figure(point.sensitivity)}, {_figure(point.specificity)}, {1 - point.answered_share:.3f}"
        title = f"point {name}{' (in force)' if point.in_force else ''}"
        summary.add_row(f"{title}: sensitivity, specificity, referred", values)
    outside = evaluation.label_outside_set
    if outside is not None:
        summary.add_row("label outside its prediction set", f"{outside.images} images ({outside.share:.3f})")
    if evaluation.coverage is not None:
        promise = f"{evaluation.coverage.overall:.3f} (target {evaluation.coverage.promise:.2f})"
        summary.add_row("prediction set contains the class", promise)
    if evaluation.split_reads is not None:
        summary.add_row(f"{evaluation.split} was read", f"{evaluation.split_reads} times")
    notes = [f"{name}: {reason}" for name, reason in evaluation.undefined.items()]
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES:] = [f"{len(notes) - _MAX_NOTES} more figures are undefined; --json and --report name them"]
    return Stack(
        summary, *_class_tables(evaluation), *notes,
        "95 % intervals, resampled by group; decision support, not a diagnosis",
    )  # fmt: skip


def _class_tables(evaluation: "Evaluation") -> list[RenderableType]:
    """Lay out the classes and the confusion matrix; of many classes, those that the most mistakes are about."""
    from trainers.evaluation.figures import drawn_classes

    codes, counts = list(evaluation.per_class), evaluation.confusion_matrix
    drawn = drawn_classes(evaluation)
    classes = Table("class", "images", "lesions", "sensitivity", "specificity", "precision")
    for code in (codes[at] for at in drawn):
        report = evaluation.per_class[code]
        classes.add_row(
            code,
            str(report.support),
            str(report.lesions),
            _figure(report.sensitivity, report.sensitivity_ci),
            _figure(report.specificity, report.specificity_ci),
            _figure(report.precision, report.precision_ci),
        )
    if len(drawn) == len(codes):
        confusion = Table("truth \\ prediction", *codes, title="confusion matrix")
        for code, row in zip(codes, counts, strict=True):
            confusion.add_row(code, *(str(count) for count in row))
        return [classes, confusion]
    pairs = sorted((-counts[a][b], a, b) for a in range(len(codes)) for b in range(len(codes)) if a != b)
    frequent = Table("truth", "prediction", "images", title="most frequent confusions")
    for negative, truth, predicted in pairs[:_MAX_PAIRS]:
        if negative:
            frequent.add_row(codes[truth], codes[predicted], str(-negative))
    said = f"{len(drawn)} of {len(codes)} classes: those that the most mistakes are about; --json and --report have all"
    return [classes, said, frequent]


def _figure(value: float | None, interval: "Interval | None" = None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
