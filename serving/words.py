"""Texts for people: reasons, decisions and model states as plain sentences.

In: stored records. Out: text that depends only on these records, so that a prediction has the same text whenever it is
read. The texts give probabilities and next steps, never a verdict on a patient.
"""

from collections.abc import Mapping

from records.taxonomy import Taxonomy
from records.types import Decision, FlagReason, ModelStatus, Prediction, ReasonCode
from vision.inference.suitability import QualityReason

DISCLAIMER = "Decision support, not a diagnosis."

DECISION_TITLES: dict[Decision, str] = {
    Decision.ANSWERED: "Answered without review",
    Decision.REVIEW: "Needs review by an annotator",
    Decision.URGENT: "Needs urgent review by an annotator",
    Decision.RETAKE: "Retake the image",
}

FLAG_WORDS: dict[FlagReason, str] = {
    FlagReason.WRONG_LABEL: "The label is wrong",
    FlagReason.UNSURE: "I am not sure about it",
    FlagReason.BAD_IMAGE: "The image is not usable",
    FlagReason.OTHER: "Something else",
}


CONFIRMED_BY = {0: "histopathology", 1: "confocal microscopy or follow-up"}
"""How a diagnosis was confirmed, by the rank of its label."""

QUALITY_WORDS: dict[str | None, str] = {
    QualityReason.TOO_SMALL: "The image has too few pixels; take it from closer or with a better camera.",
    QualityReason.TOO_DARK: "The image is too dark; take it again with more light.",
    QualityReason.TOO_BRIGHT: "The image is too bright; take it again with less light.",
    QualityReason.BLURRED: "The image is blurred; hold still, focus, and take it again.",
    QualityReason.UNLIKE_TRAINING: "This does not look like the kind of image that the model was trained with.",
}


def reason_text(code: ReasonCode, prediction: Prediction, taxonomy: Taxonomy) -> str:
    """Return one sentence for a reason of a stored prediction; class names are those of `taxonomy`."""
    names = {c.code: c.name for c in taxonomy.classes}
    match code:
        case ReasonCode.LOW_CONFIDENCE if is_most_likely(prediction.label, prediction.probabilities):
            return f"Even the most likely class has a probability of only {_percent(prediction.confidence)}."
        case ReasonCode.LOW_CONFIDENCE:
            return f"The label has a probability of only {_percent(prediction.confidence)}."
        case ReasonCode.PREDICTION_SET if not prediction.prediction_set:
            return "No class has a probability as high as is usual for its calibration images."
        case ReasonCode.PREDICTION_SET if prediction.label not in (None, *prediction.prediction_set):
            held = ", ".join(names.get(c, c) for c in prediction.prediction_set)
            return (
                f"The label, {names.get(prediction.label or '', prediction.label)}, is not among the classes that "
                f"cannot be excluded ({held}): its probability is lower than is usual for images of its class."
            )
        case ReasonCode.PREDICTION_SET:
            held = ", ".join(names.get(c, c) for c in prediction.prediction_set)
            return f"These classes cannot be told apart with enough certainty: {held}."
        case ReasonCode.BAD_IMAGE if prediction.quality_reason in QUALITY_WORDS:
            return QUALITY_WORDS[prediction.quality_reason]
        case ReasonCode.REFER | ReasonCode.URGENT:
            return _referral_text(code, prediction, taxonomy)
        case _:
            return _FIXED[code]


def is_most_likely(label: str | None, probabilities: Mapping[str, float] | None) -> bool:
    """Return whether no class has a larger probability than the label; some decision rules name a rarer class."""
    return label is None or not probabilities or probabilities.get(label, 1.0) >= max(probabilities.values())


RULE_WORDS: dict[str, str] = {
    "natural": "the most likely class",
    "even": "the class that would be the most likely one if all classes came equally often",
    "cost": "the class whose expected cost is smallest, where missing a dangerous class costs more",
}


def status_text(status: str) -> str:
    """Return what the status of the serving model means, in one sentence."""
    if status == ModelStatus.PROVISIONAL:
        return (
            "This model is provisional: it has not passed the checks that a champion must pass, "
            "so its predictions must be used with particular caution."
        )
    if status == ModelStatus.CHAMPION:
        return "This model has passed the checks that every champion must pass."
    return f"This model is {status}."


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.0f} %"


def _referral_text(code: ReasonCode, prediction: Prediction, taxonomy: Taxonomy) -> str:
    probabilities = prediction.probabilities or {}
    names = {c.code: c.name for c in taxonomy.classes}
    parts = [f"{names[k.code]} {_percent(probabilities.get(k.code))}" for k in taxonomy.key_classes]
    if taxonomy.malignant_codes:
        p_malignant = min(1.0, sum(probabilities.get(c, 0.0) for c in taxonomy.malignant_codes))
        parts.append(f"all malignant classes together {_percent(p_malignant)}")
    measured = ", ".join(parts)
    if code is ReasonCode.URGENT:
        return f"The probability of a malignant class is at or above the threshold for urgent review ({measured})."
    return f"A probability is at or above its review threshold ({measured})."


_FIXED: dict[ReasonCode, str] = {
    ReasonCode.OUT_OF_DISTRIBUTION: "The image is unlike the images that the model was trained with.",
    ReasonCode.NON_FINITE: "The model could not compute a prediction for this image.",
    ReasonCode.FLAGGED: "A user flagged the prediction.",
    ReasonCode.AUDIT_SAMPLE: "The image was drawn at random to check the quality of predictions.",
    ReasonCode.SELECTED: "A label for this image is expected to improve the model.",
    ReasonCode.LABEL_NOISE: "The stored label and the model's prediction differ.",
    ReasonCode.ADJUDICATION: "Two labels of this image differ.",
    ReasonCode.INCIDENT: "A prediction like this one turned out to be wrong.",
    ReasonCode.DRIFT: "Images of this source have changed, so more of them are drawn at random for a check.",
    ReasonCode.GOLD: "The diagnosis is known; annotators are compared with it.",
    ReasonCode.BAD_IMAGE: "The quality of the image is too low for a prediction.",
}
