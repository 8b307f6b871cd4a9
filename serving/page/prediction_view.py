"""A prediction on the page: decision, reasons, probabilities, how often such scores were right, and the review's state.

In: bodies of `serving.schemas`. Out: HTML and sentences. How often scores were right is measured on the calibration
split, which is used neither to train the network nor to calibrate its probabilities. Texts say how likely, how often
and what happens next; they give no diagnosis, and never say that an image or a person has nothing to fear.
"""

from collections.abc import Mapping, Sequence

from records.types import Decision, ReviewState
from serving.page.render import render, utc_minute
from serving.schemas import (
    Event,
    FlagResponse,
    ModelDetails,
    NearestCases,
    PredictionResponse,
    ReviewStatus,
    ScoreBand,
    ServedModelInfo,
)
from serving.words import DECISION_TITLES, DISCLAIMER, RULE_WORDS, is_most_likely

FEW_LESIONS = 20
MAX_CLASSES = 20
"""Classes of which all probabilities are shown, and names in a sentence."""
MAX_BARS = 12
NOT_KNOWN = "How often scores like this one were right is not known for this model."

_STATE_TEXTS = {
    ReviewState.NEW: "Queued for review in Label Studio",
    ReviewState.PUSHED: "Waiting for annotators in Label Studio",
    ReviewState.ANSWERED: "Annotated",
    ReviewState.WITHDRAWN: "Withdrawn",
}


def header_html(model: ServedModelInfo | None, detail: str = "", signed_in: str = "") -> str:
    """Show the model that serves and who is signed in.

    Args:
        model: the served model, or None.
        detail: why there is none.
        signed_in: see `api.caller_text`; may be empty.
    Returns:
        HTML.
    """
    return render("header", disclaimer=DISCLAIMER, model=model, detail=detail, signed_in=signed_in)


def prediction_html(
    prediction: PredictionResponse,
    names: dict[str, str],
    malignant: frozenset[str],
    details: ModelDetails | None = None,
) -> str:
    """Show a prediction: decision, reasons for review, probabilities and how often such scores were right.

    Args:
        prediction: body of the API.
        names: class code to display name.
        malignant: codes of the malignant classes.
        details: of the model that made it; None if they cannot be read.
    Returns:
        HTML.
    """
    accuracy = NOT_KNOWN
    likely = sorted((prediction.probabilities or {}).items(), key=lambda pair: -pair[1])
    # A person reads a dozen; the others can be opened.
    count = len(likely) if len(likely) <= MAX_CLASSES else MAX_BARS
    if details is not None and prediction.confidence is not None:
        accuracy = accuracy_text(prediction.confidence, details.scores)
    return render(
        "prediction",
        prediction=prediction,
        title=DECISION_TITLES[prediction.decision],
        is_review=prediction.decision in (Decision.REVIEW, Decision.URGENT),
        names=names,
        malignant=malignant,
        accuracy=accuracy,
        shown=likely[:count],
        others=likely[count:],
        label_text=label_text(prediction, names, details),
        context_text=context_text(prediction, names),
        malignant_others=[probability for code, probability in likely[count:] if code in malignant],
        prediction_set=set_text(prediction.prediction_set, names, details, prediction.label),
    )


def label_text(prediction: PredictionResponse, names: Mapping[str, str], details: ModelDetails | None) -> str | None:
    """Say why the label is not the most likely class; None if it is.

    Args:
        prediction: body of the API.
        names: class code to display name.
        details: of the model that made it; None if they cannot be read.
    Returns:
        One or two sentences.
    """
    probabilities = prediction.probabilities or {}
    if is_most_likely(prediction.label, probabilities):
        return None
    first = max(probabilities, key=lambda code: probabilities[code])
    said = f"{names.get(first, first)} is more likely, {100 * probabilities[first]:.0f} %."
    return said if details is None else f"{said} This model names {RULE_WORDS[details.rule]}."


def context_text(prediction: PredictionResponse, names: Mapping[str, str]) -> str | None:
    """Say what the context changed.

    Args:
        prediction: body of the API.
        names: class code to display name.
    Returns:
        Some sentences; None if nothing was given that the model uses.
    """
    effect = prediction.context_effect
    if effect is None or prediction.label is None or prediction.probabilities is None:
        return None
    unknown = f" It has not seen such a value of {', '.join(effect.unknown)}, which changed nothing." * bool(
        effect.unknown
    )
    if not effect.used:
        return unknown.strip()
    name = names.get(effect.label_without, effect.label_without)
    alone = 100 * effect.confidence_without
    if effect.label_without != prediction.label:
        return f"{', '.join(effect.used)} changed the label: the image alone would be {name}, {alone:.0f} %.{unknown}"
    now = 100 * prediction.probabilities[prediction.label]
    return f"{', '.join(effect.used)} moved {name} from {alone:.0f} % by the image alone to {now:.0f} %.{unknown}"


def cases_html(found: NearestCases, names: dict[str, str]) -> str:
    """Show confirmed cases beside a prediction; empty if there are none."""
    return render("cases", cases=found.cases, names=names) if found.cases else ""


def flag_html(flag: FlagResponse) -> str:
    """Confirm a flag, with the date until which it is due."""
    return render("flag", flag=flag)


def review_html(review: ReviewStatus | None, events: Sequence[Event], names: dict[str, str]) -> str:
    """Show the state of a prediction's review and what happened to the prediction since.

    Args:
        review: None if no review item was created.
        events: of the prediction, oldest first.
        names: class code to display name.
    Returns:
        HTML; empty if there is neither review nor event.
    """
    if review is None and not events:
        return ""
    state = None if review is None else state_text(review)
    return render("review", events=[event_text(event, names) for event in events], state=state)


def event_text(event: Event, names: dict[str, str]) -> str:
    """Describe an event in one sentence.

    Args:
        event: of a prediction.
        names: class code to display name.
    Returns:
        The sentence, not escaped.
    """
    label = str(event.details.get("label") or "")
    name = names.get(label, label)
    source = str(event.details.get("by") or "annotator").replace("_", " ").capitalize()
    match event.kind:
        case "amended" | "confirmed" if not label:
            text = "A diagnosis was reported, and erased with the image"
        case "amended":
            text = f"{source}: {name}, which differs from the prediction"
        case "confirmed":
            text = f"{source}: {name}, which agrees with the prediction"
        case "undecided":
            text = "Annotator: no class could be assigned"
        case "overdue":
            text = "The review is overdue"
        case _:
            text = "The model that made this prediction was rolled back; run the prediction again"
    return f"{text} ({utc_minute(event.created_at)})."


def state_text(review: ReviewStatus) -> str:
    """Describe the state of a review, with the date until which it is due."""
    due = f", due {utc_minute(review.due)}" if review.due else ""
    return f"{_STATE_TEXTS[review.state]}{due}."


def accuracy_text(confidence: float, scores: Sequence[ScoreBand]) -> str:
    """Say how often the label was right at about this confidence.

    Args:
        confidence: probability of the label.
        scores: bands of the calibration split.
    Returns:
        One or two sentences.
    """
    if not scores:
        return NOT_KNOWN
    # Bands are half open; the last one also holds a confidence of exactly 1.
    band = next((b for b in scores if b.low <= confidence < b.high or confidence == b.high == 1.0), None)
    if band is None:
        return "No calibration image had a score like this one, so how often such scores are right is not known."
    low, high = (100 * end for end in band.right_ci)
    # The share alone looks precise even if two lesions are behind it, so their number is named with the interval.
    few = f" With only {band.lesions} lesions, this estimate is uncertain." if band.lesions < FEW_LESIONS else ""
    return (
        f"Of {band.lesions} lesions in the calibration split with a score from {100 * band.low:.0f} to "
        f"{100 * band.high:.0f} %, the label was right for {band.right}: "
        f"{100 * band.right / band.lesions:.0f} % (95 % confidence interval {low:.0f} to {high:.0f} %).{few}"
    )


def set_text(
    prediction_set: Sequence[str], names: Mapping[str, str], details: ModelDetails | None, label: str | None = None
) -> str:
    """Explain a prediction set and its coverage.

    Args:
        prediction_set: codes of the classes that cannot be excluded.
        names: class code to display name.
        details: of the model that made the prediction; None leaves the coverage out.
        label: of the prediction; if it is not in the set, the text says what that means.
    Returns:
        Some sentences.
    """
    if not prediction_set:
        return "The set is empty: no class has a probability as high as is usual for its calibration images."
    held = _listed([names.get(code, code) for code in prediction_set])
    count = "One class" if len(prediction_set) == 1 else f"{len(prediction_set)} classes"
    begun = f"{count} cannot be excluded: {held}."
    if label is not None and label not in prediction_set:
        begun += (
            f" The label, {names.get(label, label)}, is not among them: its probability is lower than is usual for "
            "images of its class, so the image is an unusual one of it, or of a class in the set; an annotator decides."
        )
    if details is None:
        return begun
    return (
        f"{begun} {coverage_text(names, details)} This requires that images resemble the calibration data. "
        "A class outside the set is unlikely, not ruled out."
    )


def coverage_text(names: Mapping[str, str], details: ModelDetails) -> str:
    """Say how often prediction sets contain the true class.

    Args:
        names: class code to display name.
        details: of the model.
    Returns:
        One or two sentences.
    """
    contain = f"Prediction sets contain the true class for at least {100 * details.promise:.0f} of 100 images"
    pooled = [names.get(code, code) for code in details.pooled_classes]
    # Classes with few calibration lesions share one threshold, so the share is promised for their images together and
    # not for each of these classes. If there is only one, it shares its threshold with no other class.
    if len(pooled) < 2:
        return f"{contain} of each class."
    if len(pooled) == len(names):
        return f"{contain} of all classes together, not of each class, because calibration lesions were few."
    few = f"{', '.join(pooled[:-1])} and {pooled[-1]}" if len(pooled) <= MAX_CLASSES else _listed(pooled)
    return (
        f"{contain} of each class except {few}. Their calibration lesions were few, so for them the same share holds "
        "for the images of these classes together, not for each class."
    )


def _listed(texts: Sequence[str]) -> str:
    """Write texts as a list; of many, the first and how many more there are."""
    if len(texts) <= MAX_CLASSES:
        return ", ".join(texts)
    return f"{', '.join(texts[:MAX_BARS])} and {len(texts) - MAX_BARS} more"
