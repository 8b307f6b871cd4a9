"""The parts of the page as HTML: the model, an answer with why an annotator is asked, and what became of a flag.

In: bodies of `serving.schemas`. Out: HTML. Everything that came from outside is escaped. The words are
those of decision support; none is a verdict.
"""

from collections.abc import Sequence
from html import escape

from records.types import Decision, ReviewState
from serving.page.certainty import NOT_KNOWN, scores_text, set_text
from serving.schemas import Event, FlagAnswer, PredictionAnswer, ReviewStatus, ServedModelInfo
from serving.schemas_registry import ModelDetails
from serving.words import DECISION_TITLES, DISCLAIMER

_STATE_WORDS = {
    ReviewState.NEW: "The question is written down and goes to the annotators next",
    ReviewState.PUSHED: "The question is before the annotators",
    ReviewState.ANSWERED: "An annotator has answered",
    ReviewState.CLOSED: "The question is closed",
    ReviewState.WITHDRAWN: "The question was taken back",
}


def header_html(model: ServedModelInfo | None, detail: str = "", signed_in: str = "") -> str:
    """Show what answers here, plainly if it is provisional, and who is signed in.

    Args:
        model: that answers, or None.
        detail: why none does.
        signed_in: who asks and what they may do, or empty.
    Returns:
        HTML.
    """
    head = (
        "<div class='rl-head'><h1>Relook</h1>"
        "<p>A second look at images, and an annotator where the model is unsure.</p></div>"
        f"<div class='rl-notice'><b>{escape(DISCLAIMER)}</b> It shows how likely each class is for an image and "
        "where the model looked. It does not replace an examination.</div>"
    )
    if model is None:
        detail = escape(detail[:1].upper() + detail[1:]).rstrip(".")
        return f"{head}<div class='rl-notice warn' role='alert'>{detail}.</div>"
    kind = " warn" if model.status == "provisional" else ""
    return (
        f"{head}<div class='rl-notice{kind}' id='rl-model'><b>Model <code>{escape(model.id[:12])}</code>, "
        f"{escape(model.status)}.</b> {escape(model.status_text)}</div>"
        f"{f'<p class=rl-small id=rl-caller>{escape(signed_in)}</p>' if signed_in else ''}"
    )


def waiting_html() -> str:
    """Show what will appear where the answer will be."""
    return (
        "<div class='rl-card'><h2>No image yet</h2><p>Choose an image or one of the generated examples, then press "
        "<b>Ask the model</b>.</p><p class='rl-small'>The answer comes with the probability of every class, a map "
        "of where the model looked, and what happens next.</p></div>"
    )


def problem_html(sentence: str, title: str = "There is no answer for this image") -> str:
    """Show one sentence about what could not be done.

    Args:
        sentence: of an error.
        title: what there is not.
    Returns:
        HTML.
    """
    sentence = sentence.rstrip(".")
    return (
        f"<div class='rl-card rl-decision problem' role='alert'><h2>{escape(title)}</h2>"
        f"<p>{escape(sentence[:1].upper() + sentence[1:])}.</p></div>"
    )


def answer_html(
    answer: PredictionAnswer, names: dict[str, str], malignant: frozenset[str], details: ModelDetails | None = None
) -> str:
    """Show an answer: decision, why an annotator is asked, probabilities, and how sure such an answer is.

    Args:
        answer: to show.
        names: class code to name.
        malignant: codes of the malignant classes.
        details: of the model that answered, None if nothing is known of it.
    Returns:
        HTML.
    """
    parts = [_decision_card(answer, names)]
    if answer.probabilities is not None:
        parts.append(_probability_card(answer, names, malignant, details))
    return "".join(parts)


def flag_html(flag: FlagAnswer) -> str:
    """Show what became of an objection."""
    due = f" It should be seen by {flag.review.due:%Y-%m-%d %H:%M} UTC." if flag.review.due else ""
    return (
        "<div class='rl-card rl-decision review' role='status'><h2>Thank you</h2>"
        f"<p>{escape(flag.text)}{due}</p><p class='rl-small'>What the annotators say appears on this page, here and "
        "under <b>History</b>.</p></div>"
    )


def fate_html(review: ReviewStatus | None, events: Sequence[Event], names: dict[str, str]) -> str:
    """Show where the question to the annotators is, and what they said.

    Args:
        review: of the answer, or None if nobody was asked.
        events: what happened to the answer, oldest first.
        names: class code to name.
    Returns:
        HTML; empty while there is nothing to tell.
    """
    said = [event_text(event, names) for event in events]
    if review is None and not said:
        return ""
    state = "" if review is None else f"<p class='rl-small'>{state_text(review)}</p>"
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    title = "What the annotators say" if items else "With the annotators"
    told = f"<ul>{items}</ul>" if items else ""
    return f"<div class='rl-card rl-fate' role='status'><h3>{title}</h3>{told}{state}</div>"


def event_text(event: Event, names: dict[str, str]) -> str:
    """Say what happened to an answer, in one sentence.

    Args:
        event: of the answer.
        names: class code to name.
    Returns:
        The sentence, not yet escaped.
    """
    label = str(event.details.get("label") or "")
    name = names.get(label, label)
    by = str(event.details.get("by") or "annotator")
    who = "An annotator says" if by == "annotator" else f"{by.replace('_', ' ').capitalize()} says"
    when = f"{event.created_at:%Y-%m-%d %H:%M} UTC"
    match event.kind:
        case "amended":
            return f"{who} {name}: not what the model found most likely ({when})."
        case "confirmed":
            return f"{who} {name}, as the model found most likely ({when})."
        case "undecided":
            return f"An annotator could not name one of the classes ({when})."
        case "overdue":
            return f"The question was to be answered by now and is not ({when})."
        case _:
            return f"The model that answered was taken back; ask again ({when})."


def state_text(review: ReviewStatus) -> str:
    """Say where a question is, as HTML."""
    due = f", to be seen by {review.due:%Y-%m-%d %H:%M} UTC" if review.due else ""
    return f"{_STATE_WORDS[review.state]}{due}."


def _decision_card(answer: PredictionAnswer, names: dict[str, str]) -> str:
    headline = "No answer could be computed"
    if answer.label is not None and answer.confidence is not None:
        headline = f"Most likely: {escape(names[answer.label])}, {percent(answer.confidence)}"
    return (
        f"<div class='rl-card rl-decision {escape(answer.decision)}' id='rl-decision'>"
        f"<h2>{escape(DECISION_TITLES[answer.decision])}</h2><p class='rl-headline'>{headline}</p>"
        f"{_why(answer)}"
        f"<p class='rl-small'>Answered by model {escape(answer.model.id[:12])} ({escape(answer.model.status)}) at "
        f"{answer.created_at:%Y-%m-%d %H:%M:%S} UTC. Answer {escape(answer.id)}.</p></div>"
    )


def _why(answer: PredictionAnswer) -> str:
    asks = answer.decision in (Decision.REVIEW, Decision.URGENT)
    if not asks and not answer.reasons:
        return ""
    reasons = "".join(f"<li>{escape(reason.text)}</li>" for reason in answer.reasons)
    review = ""
    if asks and answer.review is None:
        review = "<p>No annotator is asked by this service, because the image came without consent to review.</p>"
    title = "Why an annotator is asked" if asks else "Why"
    return f"<div id='rl-why'><h3>{title}</h3>{f'<ul>{reasons}</ul>' if reasons else ''}{review}</div>"


def _probability_card(
    answer: PredictionAnswer, names: dict[str, str], malignant: frozenset[str], details: ModelDetails | None
) -> str:
    probabilities = answer.probabilities or {}
    rows = []
    for code, probability in sorted(probabilities.items(), key=lambda item: -item[1]):
        notes = [text for text, applies in _notes(code, answer, malignant) if applies]
        small = f"<small>{', '.join(notes)}</small>" if notes else ""
        rows.append(
            f"<div class='rl-bar{' top' if code == answer.label else ''}'>"
            f"<span class='name'>{escape(names[code])}{small}</span>"
            f"<span class='track'><span class='fill' style='width:{100 * probability:.2f}%'></span></span>"
            f"<span class='value'>{percent(probability)}</span></div>"
        )
    often = NOT_KNOWN
    if details is not None and answer.confidence is not None:
        often = scores_text(answer.confidence, details.scores)
    meant = set_text(answer.prediction_set, names, details)
    return (
        f"<div class='rl-card' id='rl-probabilities'><h3>How likely each class is</h3>{''.join(rows)}"
        f"<h3>How often such scores were right</h3><p id='rl-often'>{escape(often)}</p>"
        f"<h3>Which classes cannot be excluded</h3><p id='rl-set'>{escape(meant)}</p></div>"
    )


def _notes(code: str, answer: PredictionAnswer, malignant: frozenset[str]) -> list[tuple[str, bool]]:
    return [("malignant class", code in malignant), ("not excluded", code in answer.prediction_set)]


def percent(probability: float) -> str:
    """Return a probability as HTML, without pretending that a small one is none."""
    if 0 < probability < 0.01:
        return "&lt; 1 %"
    return f"{100 * probability:.0f} %"
