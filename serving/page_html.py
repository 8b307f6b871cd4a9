"""The parts of the page as HTML: the model, an answer, and what became of a flag.

In: bodies of `serving.schemas`. Out: HTML. Everything that came from outside is escaped. The words are
those of decision support; none is a verdict.
"""

from html import escape

from records.types import Decision
from serving.schemas import Explanation, FlagAnswer, PredictionAnswer, ServedModelInfo
from serving.words import DECISION_TITLES, DISCLAIMER

_METHOD_NAMES = {"gradcam": "Grad-CAM"}


def header_html(model: ServedModelInfo | None, detail: str = "") -> str:
    """Show what answers here, and plainly if it is provisional.

    Args:
        model: that answers, or None.
        detail: why none does.
    Returns:
        HTML.
    """
    head = (
        "<div class='rl-head'><h1>Relook</h1>"
        "<p>A second look at pictures, and an expert where the model is unsure.</p></div>"
        f"<div class='rl-notice'><b>{escape(DISCLAIMER)}</b> It shows how likely each class is for a picture and "
        "where the model looked. It does not replace an examination.</div>"
    )
    if model is None:
        return f"{head}<div class='rl-notice warn' role='alert'>No model answers now: {escape(detail)}</div>"
    kind = " warn" if model.status == "provisional" else ""
    return (
        f"{head}<div class='rl-notice{kind}' id='rl-model'><b>Model <code>{escape(model.id[:12])}</code>, "
        f"{escape(model.status)}.</b> {escape(model.status_text)}</div>"
    )


def waiting_html() -> str:
    """Show what will appear where the answer will be."""
    return (
        "<div class='rl-card'><h2>No picture yet</h2><p>Choose a picture or one of the generated examples, then press "
        "<b>Ask the model</b>.</p><p class='rl-small'>The answer comes with the probability of every class, a map "
        "of where the model looked, and what happens next.</p></div>"
    )


def problem_html(sentence: str) -> str:
    """Show one sentence about why there is no answer."""
    return (
        "<div class='rl-card rl-decision problem' role='alert'><h2>There is no answer for this picture</h2>"
        f"<p>{escape(sentence[:1].upper() + sentence[1:])}.</p></div>"
    )


def answer_html(answer: PredictionAnswer, names: dict[str, str], malignant: frozenset[str]) -> str:
    """Show an answer: decision with reasons, probabilities, map.

    Args:
        answer: with its explanation, if there is one.
        names: class code to name.
        malignant: codes of the malignant classes.
    Returns:
        HTML.
    """
    parts = [_decision_card(answer, names)]
    if answer.probabilities is not None:
        parts.append(_probability_card(answer, names, malignant))
    if answer.explanation is not None:
        parts.append(_map_card(answer.explanation, names))
    return "".join(parts)


def flag_html(flag: FlagAnswer) -> str:
    """Show what became of an objection."""
    due = f" It should be seen by {flag.review.due:%Y-%m-%d %H:%M} UTC." if flag.review.due else ""
    return (
        "<div class='rl-card rl-decision review' role='status'><h2>Thank you</h2>"
        f"<p>{escape(flag.text)}{due}</p>"
        f"<p class='rl-small'>State of the question: {escape(flag.review.state)}.</p></div>"
    )


def _decision_card(answer: PredictionAnswer, names: dict[str, str]) -> str:
    headline = "No answer could be computed"
    if answer.label is not None and answer.confidence is not None:
        headline = f"Most likely: {escape(names[answer.label])}, {_percent(answer.confidence)}"
    reasons = "".join(f"<li>{escape(reason.text)}</li>" for reason in answer.reasons)
    review = ""
    if answer.review is not None:
        due = f", to be seen by {answer.review.due:%Y-%m-%d %H:%M} UTC" if answer.review.due else ""
        review = f"<p>A question about it is on its way to the experts (state: {escape(answer.review.state)}{due}).</p>"
    elif answer.decision in (Decision.REVIEW, Decision.URGENT):
        review = "<p>No expert is asked by this service, because the picture came without consent to review.</p>"
    return (
        f"<div class='rl-card rl-decision {escape(answer.decision)}' id='rl-decision'>"
        f"<h2>{escape(DECISION_TITLES[answer.decision])}</h2><p class='rl-headline'>{headline}</p>"
        f"{f'<ul>{reasons}</ul>' if reasons else ''}{review}"
        f"<p class='rl-small'>Answered by model {escape(answer.model.id[:12])} ({escape(answer.model.status)}) at "
        f"{answer.created_at:%Y-%m-%d %H:%M:%S} UTC. Answer {escape(answer.id)}.</p></div>"
    )


def _probability_card(answer: PredictionAnswer, names: dict[str, str], malignant: frozenset[str]) -> str:
    probabilities = answer.probabilities or {}
    rows = []
    for code, probability in sorted(probabilities.items(), key=lambda item: -item[1]):
        notes = [text for text, applies in _notes(code, answer, malignant) if applies]
        small = f"<small>{', '.join(notes)}</small>" if notes else ""
        rows.append(
            f"<div class='rl-bar{' top' if code == answer.label else ''}'>"
            f"<span class='name'>{escape(names[code])}{small}</span>"
            f"<span class='track'><span class='fill' style='width:{100 * probability:.2f}%'></span></span>"
            f"<span class='value'>{_percent(probability)}</span></div>"
        )
    held = len(answer.prediction_set)
    return (
        f"<div class='rl-card' id='rl-probabilities'><h3>How likely each class is</h3>{''.join(rows)}"
        f"<p class='rl-small'>{held} of {len(probabilities)} classes cannot be excluded with the promised certainty."
        "</p></div>"
    )


def _notes(code: str, answer: PredictionAnswer, malignant: frozenset[str]) -> list[tuple[str, bool]]:
    return [("malignant class", code in malignant), ("not excluded", code in answer.prediction_set)]


def _map_card(explanation: Explanation, names: dict[str, str]) -> str:
    name = escape(names[explanation.target])
    rows, columns = explanation.shape
    return (
        f"<div class='rl-card' id='rl-map'><h3>Where the model looked for {name}</h3><div class='rl-map'>"
        f"<img alt='Heat map over the picture: where the model found evidence for {name}' "
        f"src='data:image/png;base64,{explanation.png_base64}'><div>"
        "<p>The more yellow, the more that place counted for this class. Where nothing counted, the picture is "
        "left as it is.</p><div class='rl-scale'></div><div class='rl-ends rl-small'><span>little</span>"
        "<span>most</span></div><p class='rl-small'>A map shows what counted for the model, not whether it is right. "
        f"Method {_METHOD_NAMES[explanation.method]}, {rows} x {columns} positions, "
        f"{'exact' if explanation.exact else 'differentiated'}.</p></div></div></div>"
    )


def _percent(probability: float) -> str:
    if 0 < probability < 0.01:
        return "&lt; 1 %"
    return f"{100 * probability:.0f} %"
