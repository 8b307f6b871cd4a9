"""Write a report folder: a self-contained `report.html`, and `metrics.json`."""

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from records.bundles import Bundle
from records.durable import make_folders, write_file
from trainers.evaluation.evaluate import SplitPredictions
from trainers.evaluation.figures import MAX_CLASSES, Evaluation, Interval
from trainers.evaluation.report import plots
from trainers.evaluation.report.mistakes import described_mistakes, drawn_mistakes
from trainers.evaluation.report.words import POINT_WORDS, RULE_WORDS, cards, listed, name_of, percent, warnings_of
from vision.inference.loaded import LoadedModel

REPORT, METRICS = "report.html", "metrics.json"

SLICE_TITLES = {
    "age": "Age, in years",
    "sex": "Sex",
    "localization": "Body site",
    "confirmation": "How the diagnosis was confirmed",
    "skin_tone": "Skin tone (estimated)",
}


def write_report(
    folder: Path,
    bundle: Bundle,
    model: LoadedModel,
    predictions: SplitPredictions,
    evaluation: Evaluation,
    *,
    embed_images: bool = False,
) -> Path:
    """Write the report of an evaluation and return the HTML file; an older report in the folder is replaced.

    With `embed_images` it shows up to twelve images with their names. No erasure reaches a report outside the home,
    and whoever may read a report in the home would see them, so only a report elsewhere may embed any.
    """
    html = render_report(bundle, model, predictions, evaluation, embed_images=embed_images)
    # A report can be written again, so it does not wait for the disk.
    make_folders(folder, sync=False)
    write_file(folder / METRICS, evaluation.model_dump_json(indent=2) + "\n", sync=False)
    write_file(folder / REPORT, html, sync=False)
    return folder / REPORT


def render_report(
    bundle: Bundle,
    model: LoadedModel,
    predictions: SplitPredictions,
    evaluation: Evaluation,
    *,
    embed_images: bool = False,
) -> str:
    """Return the report as HTML; arguments as for `write_report`."""
    # StrictUndefined: a value missing from the context fails instead of rendering as nothing.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "figure": _figure, "listed": listed}
    template = resources.files("trainers.evaluation.report").joinpath("report.html").read_text(encoding="utf-8")
    document = bundle.document
    return environment.from_string(template).render(
        evaluation=evaluation,
        document=document,
        model_id=bundle.id,
        where=_where(evaluation),
        cards=cards(evaluation, document.taxonomy),
        warnings=warnings_of(evaluation, document.taxonomy),
        rules=RULE_WORDS,
        points=POINT_WORDS,
        names={code: name_of(code, document.taxonomy) for code in document.taxonomy.codes},
        malignant=set(document.taxonomy.malignant_codes),
        plots=_plots(bundle, predictions, evaluation),
        is_wide=len(evaluation.per_class) > plots.NARROW,
        left_out=_left_out(evaluation),
        slices=[
            (SLICE_TITLES.get(name, name), evaluation.slice_notes.get(name), plots.slices_plot(reports, evaluation))
            for name, reports in evaluation.slices.items()
        ],
        faithfulness=document.explanation.get("faithfulness"),
        mistakes=(
            drawn_mistakes(predictions, model, document.operating)
            if embed_images
            else described_mistakes(predictions, document.taxonomy, document.operating)
        ),
    )


def _plots(bundle: Bundle, predictions: SplitPredictions, evaluation: Evaluation) -> dict[str, str]:
    labels, probabilities = predictions.labels, predictions.probabilities
    drawn = {
        "confusion": plots.confusion_plot(evaluation),
        "roc": plots.roc_plot(labels, probabilities, evaluation),
        "precision_recall": plots.precision_recall_plot(labels, probabilities, evaluation),
        "reliability": plots.reliability_plot(evaluation),
    }
    if evaluation.referral is not None:
        drawn["referral"] = plots.referral_plot(evaluation, evaluation.referral)
    # Curves are optional in a bundle's metrics.
    training = bundle.document.metrics.get("training", {}).get("curves")
    if training:
        drawn["training"] = plots.training_plot(training)
    if evaluation.robustness is not None:
        drawn["robustness"] = plots.robustness_plot(evaluation.robustness)
    if evaluation.explanations is not None:
        drawn["replacement"] = plots.replacement_plot(evaluation.explanations)
    return drawn


def _where(evaluation: Evaluation) -> str:
    if evaluation.dataset_id is None:
        return "a folder of labelled images"
    return f"the {evaluation.split} split of dataset {evaluation.dataset_id[:12]}"


def _left_out(evaluation: Evaluation) -> str | None:
    """Say which classes the figures draw, where they cannot draw all."""
    count = len(evaluation.per_class)
    if count <= MAX_CLASSES:
        return None
    first = "the key class and " if evaluation.key_class is not None else ""
    return (
        f"Of {count} classes, the confusion matrix draws {MAX_CLASSES} and the curves {plots.MAX_CURVES}: {first}"
        f"those that the most mistakes are about. Its row and column `{plots.OTHERS}` sum up the other "
        f"{count - MAX_CLASSES}; the table above and metrics.json have all."
    )


def _figure(value: float | None, interval: Interval | None = None) -> Any:
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
