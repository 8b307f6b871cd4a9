"""Sentences of the report's first screen, for readers without a background in statistics.

In: an `Evaluation`. Out: cards and warnings that give natural frequencies (so many of 100) with their basis. No
sentence says that an image or a person has nothing to fear.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from records.taxonomy import Taxonomy
from trainers.evaluation.figures import Evaluation, Interval, KeyClassReport

FEW_LESIONS = 50
_ONE_CLASS = (
    "All images are of one class: to name it is always right, so that accuracy, balanced accuracy and F1 say nothing "
    "about telling classes apart."
)
NOTABLE_GAP = 0.10
RULE_WORDS = {
    "natural": "the most probable class",
    "even": "the most probable class if all classes came equally often",
    "cost": "the class of the smallest expected cost",
}
POINT_WORDS = {
    "proven": "proven on the calibration split",
    "target": "estimated on held-out lesions",
}


@dataclass(frozen=True)
class Card:
    """A headline number with its meaning."""

    figure: str
    title: str
    text: str


def cards(evaluation: Evaluation, taxonomy: Taxonomy) -> list[Card]:
    """Return at most four cards, the most important first."""
    found = []
    key = evaluation.key_class
    if key is not None and key.sensitivity is not None:
        found.append(_key_card(key, name_of(key.name, taxonomy)))
    found.append(
        Card(
            _of_100(evaluation.balanced_accuracy),
            "right, every class counting alike",
            f"The label ({RULE_WORDS[evaluation.rule]}) was the right one for {_of_100(evaluation.balanced_accuracy)} "
            f"images ({_range(evaluation.balanced_accuracy_ci)}) if each of the {_num_present(evaluation)} classes "
            f"came equally often; for {_of_100(evaluation.accuracy)} as they came here.",
        )
    )
    if evaluation.answered_share is not None and evaluation.mean_set_size is not None:
        found.append(
            Card(
                _of_100(evaluation.answered_share),
                "images left to the model alone",
                f"The rules would leave {_of_100(evaluation.answered_share)} images to the model and send the "
                f"others to an annotator. {evaluation.mean_set_size:.1f} classes are in the prediction set on average.",
            )
        )
    found.append(
        Card(
            f"{100 * evaluation.ece:.0f} points",
            "between confidence and accuracy",
            f"Where the model is 80 % sure it should be right 80 times of 100. On average it is "
            f"{100 * evaluation.ece:.1f} points off that.",
        )
    )
    return found


def warnings_of(evaluation: Evaluation, taxonomy: Taxonomy) -> list[str]:
    """Return what must be known before a figure is used, one sentence each, the most serious first."""
    return [
        *_about_training_images(evaluation),
        *_about_key_class(evaluation, taxonomy),
        *_about_classes(evaluation, taxonomy),
        *_about_context(evaluation, taxonomy),
        *_about_coverage(evaluation, taxonomy),
        *_about_labels_outside(evaluation),
        *_about_slices(evaluation),
        *_about_maps(evaluation),
        *_about_the_split(evaluation),
    ]


def name_of(code: str, taxonomy: Taxonomy) -> str:
    """Return the name of a class."""
    return taxonomy.classes[taxonomy.index_of(code)].name


def listed(texts: Sequence[str], most: int = 12) -> str:
    """Write texts as a list; of many, the first and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def percent(value: float | None) -> str:
    """Write a share as a whole percentage; `undefined` for None."""
    return "undefined" if value is None else f"{100 * value:.0f} %"


def _key_card(key: KeyClassReport, name: str) -> Card:
    text = (
        f"Of 100 lesions that are {name.lower()}, about {100 * (key.sensitivity or 0):.0f} are referred to an annotator"
        f" ({_range(key.sensitivity_ci)}; measured on {key.lesions})."
    )
    if key.specificity is not None:
        text += f" Of 100 that are not, {100 * (1 - key.specificity):.0f} are referred as well."
    return Card(_of_100(key.sensitivity or 0.0), f"{name.lower()} lesions referred", text)


def _about_training_images(evaluation: Evaluation) -> list[str]:
    if not evaluation.trained_on:
        return []
    return [
        f"The model was trained on {evaluation.trained_on} of these {evaluation.images} images, or on others of their "
        "groups: these figures say nothing about how it does on images that it has not seen."
    ]


def _about_key_class(evaluation: Evaluation, taxonomy: Taxonomy) -> list[str]:
    key = evaluation.key_class
    if key is None or key.sensitivity is None:
        return [evaluation.undefined.get("key_class.sensitivity", "No key class: nothing says which class to watch.")]
    name, found = name_of(key.name, taxonomy), []
    if key.sensitivity < key.floor:
        found.append(f"{name}: {percent(key.sensitivity)} referred is below the floor of {percent(key.floor)}.")
    target = evaluation.points.get("target")
    if target is not None and target.in_force:
        found.append(f"{name}: the referral aims at {percent(target.aim)}, an estimate that proves no floor.")
    elif not key.proven:
        found.append(f"{name}: the calibration split had too few lesions, or too hard ones, to prove the floor.")
    if key.lesions < FEW_LESIONS:
        found.append(f"{name}: only {key.lesions} lesions were looked at, so that its figures are coarse.")
    report = evaluation.per_class[key.name]
    if report.sensitivity is not None and report.sensitivity < 0.5:
        found.append(
            f"{name}: it is the label of only {percent(report.sensitivity)} of its images; "
            "it is the referral that finds it, not the label."
        )
    return found


def _about_classes(evaluation: Evaluation, taxonomy: Taxonomy) -> list[str]:
    absent = [code for code, report in evaluation.per_class.items() if report.support == 0]
    weak = [
        f"{name_of(code, taxonomy)} ({percent(report.sensitivity)} of {report.support})"
        for code, report in evaluation.per_class.items()
        if report.sensitivity is not None and report.sensitivity < 0.4
    ]
    found = [f"No image of {listed([name_of(code, taxonomy) for code in absent])} was looked at."] if absent else []
    if _num_present(evaluation) == 1:
        found.insert(0, _ONE_CLASS)
    return found + ([f"Seldom recognised: {listed(weak)}."] if weak else [])


def _about_context(evaluation: Evaluation, taxonomy: Taxonomy) -> list[str]:
    context = evaluation.context
    if context is None or not context.decided_by_context:
        return []
    names = listed([name_of(code, taxonomy) for code in context.decided_by_context])
    columns = ", ".join(context.columns)
    return [
        f"Decided by context and hardly by the image: {names}. {columns} alone tell these classes better than the "
        "image does, or most of their labels would be others without them; look at the image before one is believed."
    ]


def _about_coverage(evaluation: Evaluation, taxonomy: Taxonomy) -> list[str]:
    coverage = evaluation.coverage
    if coverage is None:
        return []
    short = [
        f"{name_of(code, taxonomy)} ({percent(share)})"
        for code, share in coverage.per_class.items()
        # Pooled classes were promised coverage together, so a single one may lie below.
        if share is not None and code not in coverage.pooled_classes and share < coverage.promise - NOTABLE_GAP
    ]
    if not short:
        return []
    return [f"Prediction sets hold the right class less often than promised ({percent(coverage.promise)}): "
            f"{listed(short)}."]  # fmt: skip


def _about_labels_outside(evaluation: Evaluation) -> list[str]:
    found = evaluation.label_outside_set
    if found is None:
        return []
    said = []
    if found.images:
        others = "" if found.accuracy_of_others is None else f", {percent(found.accuracy_of_others)} of all others"
        said.append(
            f"The label lies outside its own prediction set for {found.images} of {evaluation.images} images: its "
            "probability is lower than is usual for images of that class. They go to an annotator; "
            f"{percent(found.accuracy)} of these labels were right{others}."
        )
    if found.joined:
        said.append(
            f"The rule `{evaluation.rule}` names a class whose probability is lower than is usual for its images for "
            f"{found.joined} of {evaluation.images} images, and adds it to the prediction set; "
            f"{percent(found.accuracy_of_joined)} of these labels were right."
        )
    return said


def _about_slices(evaluation: Evaluation) -> list[str]:
    found = []
    for field, reports in evaluation.slices.items():
        low = [
            f"{value} ({percent(report.balanced_accuracy)})"
            for value, report in reports.items()
            # Balanced accuracy over fewer classes is another metric and cannot be compared with the whole.
            if report.classes == _num_present(evaluation)
            and report.balanced_accuracy_ci[1] < evaluation.balanced_accuracy
        ]
        if low:
            found.append(f"Below the average by more than chance, by {field.replace('_', ' ')}: {', '.join(low)}.")
    return found


def _about_maps(evaluation: Evaluation) -> list[str]:
    quality = evaluation.explanations
    found: list[str] = []
    if quality is None:
        return found
    if quality.insertion.gain_ci[0] <= 0 and quality.deletion.gain_ci[0] <= 0:
        found.append("The heat maps are no better than shuffled ones at ranking pixels.")
    energy = quality.mask_energy
    if energy is not None and energy.energy_ci[0] <= energy.area:
        found.append("The heat maps lie no more on the lesion than an even map would.")
    if quality.randomisation_similarity is not None and quality.randomisation_similarity > 0.5:
        found.append("The heat maps look much like those of an untrained network; they show edges, not reasons.")
    return found


def _about_the_split(evaluation: Evaluation) -> list[str]:
    found = []
    if evaluation.split == "val" and not evaluation.trained_on:
        found.append("These images chose the epoch and the calibration, so that the figures flatter a little.")
    if evaluation.split == "calibration":
        found.append("These images chose the thresholds, so that the figures flatter a little.")
    if evaluation.split_reads is not None and evaluation.split_reads > 1:
        found.append(
            f"The {evaluation.split} split was read {evaluation.split_reads} times; "
            "each read makes its figures less independent."
        )
    if evaluation.prevalence is not None:
        found.append("Predictions were re-weighted to a stated prevalence; referral and sets are those of the service.")
    return found


def _num_present(evaluation: Evaluation) -> int:
    return sum(report.support > 0 for report in evaluation.per_class.values())


def _of_100(share: float) -> str:
    return f"{100 * share:.0f} of 100"


def _range(interval: Interval | None) -> str:
    return "no interval" if interval is None else f"95 % interval {100 * interval[0]:.0f} to {100 * interval[1]:.0f}"
