"""The tab that asks: an image, the answer, where the model looked, an objection, and what the annotators say.

In: what a visitor chose. Out: HTML from the API's answers. What belongs to one answer is kept as `Asked` for as long
as the visitor's page is open; the image itself lies in the upload folder for minutes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from records.errors import DataError, ImageError, RefusedError, RelookError
from records.types import Consent, FlagReason, ReviewState
from serving.client import Client
from serving.page.answer_html import answer_html, fate_html, flag_html, problem_html, waiting_html
from serving.page.layers import draw_layers
from serving.page.map_html import METHOD_NAMES, map_html
from serving.page.visitor import Visitors
from serving.schemas import Context, Explanation, FlagRequest
from serving.settings import ServingSettings
from serving.words import FLAG_WORDS

FATE_EVERY_S = 5.0
"""How often an open page asks what became of its question, seconds."""
NO_MAP = "There is no such map"

_CONSENT_WORDS = {
    Consent.TRAINING: "Annotators may see it, and models may learn from it",
    Consent.REVIEW: "Annotators may see it",
    Consent.NONE: "Neither; do not store it",
}
_OPACITY_JS = "(value) => { document.documentElement.style.setProperty('--rl-opacity', value / 100); }"


@dataclass(frozen=True)
class Asked:
    """An answer that a visitor looks at."""

    prediction_id: str
    label: str | None
    path: Path
    is_stored: bool


class AskHandlers:
    """What the tab does. Every method may run in several threads.

    Args:
        visitors: that ask.
        folder: uploads and examples lie in it; nothing else is read.
        settings: with the side of drawings.
    """

    def __init__(self, visitors: Visitors, folder: Path, settings: ServingSettings) -> None:
        self._visitors = visitors
        self._folder = folder.resolve()
        self._side_px = settings.overlay_side_px

    def ask(self, upload: dict[str, Any] | None, consent: str, key: str | None) -> tuple[Any, ...]:
        """Ask about an image.

        Args:
            upload: of the browser: a file that it names.
            consent: what may be done with the image.
            key: of the visitor.
        Returns:
            Answer, its `Asked`, map, class choice, and what is visible now.
        """
        if upload is None:
            return _nothing(waiting_html())
        try:
            wanted = _consent(consent)
            path = self._uploaded(upload)
            with self._visitors.asking(key) as client:
                answer = client.predict(_bytes_of(path), explain="gradcam", context=Context(consent=wanted))
                details = self._visitors.details(client, answer.model.id)
        except RelookError as error:
            return _nothing(problem_html(str(error)))
        asked = Asked(answer.id, answer.label, path, is_stored=wanted is not Consent.NONE)
        html = answer_html(answer, self._visitors.names, self._visitors.malignant, details)
        drawn = "" if answer.explanation is None else self._drawn(answer.explanation, path)
        fate = fate_html(answer.review, [], self._visitors.names)
        return (
            html, asked, drawn, gr.update(visible=bool(drawn)), answer.label, "gradcam", "", fate,
            gr.update(visible=True), "", gr.Timer(active=answer.review is not None),
        )  # fmt: skip

    def explain(self, asked: Asked | None, method: str, target: str | None, versus: str | None, key: str | None) -> str:
        """Draw another map of the same answer.

        Args:
            asked: the answer.
            method: how.
            target: class code; empty is the answer's label.
            versus: class code that it is held against, or empty.
            key: of the visitor.
        Returns:
            HTML.
        """
        if asked is None:
            return problem_html("there is no answer to explain yet", NO_MAP)
        chosen = {"method": method, "target": target or asked.label, "versus": versus or None}
        try:
            with self._visitors.asking(key) as client:
                return self._drawn(_explained(client, asked, chosen), asked.path)
        except RelookError as error:
            return problem_html(str(error), NO_MAP)

    def flag(
        self, asked: Asked | None, reason: str, suggested: str | None, comment: str, key: str | None
    ) -> tuple[str, Any]:
        """Send an objection to the annotators.

        Args:
            asked: the answer.
            reason: of the objection.
            suggested: class code, or empty.
            comment: for the annotator.
            key: of the visitor.
        Returns:
            What became of it, and the timer that looks after it.
        """
        title = "Nothing was sent"
        if asked is None:
            return problem_html("there is no answer to object to yet", title), gr.Timer(active=False)
        request = FlagRequest(
            reason=FlagReason(reason), suggested_label=suggested or None, comment=comment.strip() or None
        )
        try:
            with self._visitors.asking(key) as client:
                return flag_html(client.flag(asked.prediction_id, request)), gr.Timer(active=True)
        except RelookError as error:
            return problem_html(str(error), title), gr.update()

    def fate(self, asked: Asked | None, key: str | None) -> tuple[Any, Any]:
        """Look what became of the question that an answer or an objection raised.

        Args:
            asked: the answer.
            key: of the visitor.
        Returns:
            HTML, and the timer: off once there is nothing to wait for.
        """
        if asked is None:
            return "", gr.Timer(active=False)
        try:
            with self._visitors.asking(key) as client:
                answer = client.prediction(asked.prediction_id)
                events = client.events(prediction_ids=[asked.prediction_id]).items
        except RelookError:
            # Nobody pressed anything: what was shown stays, and the next look comes soon.
            return gr.update(), gr.update()
        waits = answer.review is not None and answer.review.state in (ReviewState.NEW, ReviewState.PUSHED)
        return fate_html(answer.review, events, self._visitors.names), gr.Timer(active=waits)

    def _drawn(self, explanation: Explanation, path: Path) -> str:
        layers = draw_layers(_bytes_of(path), explanation, self._side_px)
        return map_html(explanation, self._visitors.names, layers)

    def _uploaded(self, upload: dict[str, Any]) -> Path:
        path = Path(str(upload.get("path", ""))).resolve()
        if not path.is_relative_to(self._folder):
            # The browser names the file; it may name nothing but uploads and examples.
            raise ImageError("this file was not uploaded here; choose an image")
        return path


def ask_tab(
    handlers: AskHandlers, visitors: Visitors, settings: ServingSettings, examples: list[Path], key: gr.Textbox
) -> None:
    """Lay the tab out.

    Args:
        handlers: what it does.
        visitors: with the classes.
        settings: with the default consent.
        examples: images to try.
        key: field of the visitor's key.
    """
    asked = gr.State(None)
    timer = gr.Timer(FATE_EVERY_S, active=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            image, consent, ask = _question(settings, examples)
        with gr.Column(scale=6, min_width=320):
            result = gr.HTML(waiting_html(), elem_id="rl-result", padding=False)
            fate = gr.HTML("", elem_id="rl-fate", padding=False)
            with gr.Column(visible=False, elem_id="rl-look") as look:
                drawn = gr.HTML("", elem_id="rl-drawn", padding=False)
                choices = _map_choices(visitors, settings)
            with gr.Column(visible=False, elem_id="rl-flag-form") as form:
                flagged, send, said = _flag_form(visitors)
    method, target, versus = choices
    # Not preprocessed: Gradio would open the file and fail with its own words, and the API has better ones.
    outputs = [result, asked, drawn, look, target, method, versus, fate, form, flagged, timer]
    ask.click(handlers.ask, [image, consent, key], outputs, preprocess=False, api_visibility="private", api_name="ask")
    for choice in choices:
        choice.input(handlers.explain, [asked, *choices, key], drawn, api_visibility="private")
    send.click(handlers.flag, [asked, *said, key], [flagged, timer], api_visibility="private").then(
        handlers.fate, [asked, key], [fate, timer], api_visibility="private"
    )
    timer.tick(handlers.fate, [asked, key], [fate, timer], api_visibility="private", show_progress="hidden")


def _nothing(html: str) -> tuple[Any, ...]:
    hidden = gr.update(visible=False)
    return html, None, "", hidden, None, "gradcam", "", "", hidden, "", gr.Timer(active=False)


def _explained(client: Client, asked: Asked, chosen: dict[str, Any]) -> Explanation:
    if asked.is_stored:
        try:
            return client.explanation(asked.prediction_id, **chosen)
        except RefusedError:
            # Kept by nobody after all, as in a sandbox: the upload is still here.
            pass
    return client.explain_image(_bytes_of(asked.path), **chosen)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError("the upload is gone; choose the image again") from error


def _consent(said: str) -> Consent:
    try:
        return Consent(said)
    except ValueError as error:
        raise DataError(f"consent is one of {', '.join(Consent)}, not {said!r}") from error


def _question(settings: ServingSettings, examples: list[Path]) -> tuple[gr.Image, gr.Radio, gr.Button]:
    image = gr.Image(
        label="Image (JPEG, PNG or WebP)",
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        height=300,
        elem_id="rl-image",
        alt_text="The image to ask about",
    )
    gr.Examples([[str(path)] for path in examples], inputs=[image], label="Generated examples")
    consent = gr.Radio(
        choices=[(words, value.value) for value, words in _CONSENT_WORDS.items()],
        value=settings.default_consent.value,
        label="What may be done with the image beyond answering",
    )
    return image, consent, gr.Button("Ask the model", variant="primary", elem_id="rl-ask")


def _map_choices(visitors: Visitors, settings: ServingSettings) -> tuple[gr.Radio, gr.Dropdown, gr.Dropdown]:
    opacity = gr.Slider(
        0, 100, round(100 * settings.overlay_alpha), step=5, label="Strength of the map over the image, %",
        elem_id="rl-opacity", buttons=[],
    )  # fmt: skip
    opacity.change(None, opacity, None, js=_OPACITY_JS, api_visibility="private")
    classes = [(c.name, c.code) for c in visitors.taxonomy.classes]
    method = gr.Radio(
        [(name, code) for code, name in METHOD_NAMES.items()], value="gradcam", label="How the map is computed",
        info="Grad-CAM comes at once; the others take seconds.", elem_id="rl-method",
    )  # fmt: skip
    with gr.Row():
        target = gr.Dropdown(classes, value=None, label="For which class", elem_id="rl-target", min_width=140)
        versus = gr.Dropdown(
            [("no other", ""), *classes], value="", label="Held against", elem_id="rl-versus", min_width=140
        )
    return method, target, versus


def _flag_form(visitors: Visitors) -> tuple[gr.HTML, gr.Button, tuple[gr.Radio, gr.Dropdown, gr.Textbox]]:
    with gr.Accordion("Something is wrong with this answer", open=False):
        reason = gr.Radio(
            choices=[(words, value.value) for value, words in FLAG_WORDS.items()],
            value=FlagReason.WRONG_LABEL.value,
            label="What is wrong",
        )
        suggested = gr.Dropdown(
            choices=[("no suggestion", "")] + [(c.name, c.code) for c in visitors.taxonomy.classes],
            value="",
            label="What it is in your opinion",
            elem_id="rl-suggested",
        )
        comment = gr.Textbox(
            label="Comment for the annotator", lines=2, max_length=2000, elem_id="rl-comment", placeholder="optional"
        )
        send = gr.Button("Send to an annotator", elem_id="rl-flag")
    flagged = gr.HTML("", elem_id="rl-flagged", padding=False)
    return flagged, send, (reason, suggested, comment)
