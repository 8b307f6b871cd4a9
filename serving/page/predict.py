"""The Predict tab: an image, its prediction, heat maps, a flag, and the state of the review.

In: what the visitor chose. Out: HTML made from the API's responses. What belongs to the prediction on view is kept as
`Shown` in the Gradio session, as long as the browser tab is open; the image lies in the upload folder for minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from records.errors import DataError, ImageError, RefusedError, RelookError
from records.settings import first_problem
from records.taxonomy import Taxonomy
from records.types import Consent, FlagReason, ReviewState
from serving.client import Client
from serving.page.api import PageApi
from serving.page.examples import title_of
from serving.page.heat_map import draw_layers, heat_map_html
from serving.page.prediction_view import cases_html, flag_html, prediction_html, review_html
from serving.page.render import problem_html, render
from serving.page.toolkit import gr
from serving.schemas import Context, Explanation, FlagRequest
from serving.settings import ServingSettings
from serving.words import FLAG_WORDS
from vision.explanations.methods import METHODS

REVIEW_POLL_S = 5.0
"""How often an open page asks for the state of a review, seconds."""
NO_MAP = "Heat map not available"
NOT_FLAGGED = "Prediction not flagged"

_CONSENT_TEXTS = {
    Consent.DISPLAY: "Review, training of models, and display beside similar images",
    Consent.TRAINING: "Review by annotators and training of models",
    Consent.REVIEW: "Review by annotators",
    Consent.NONE: "None: the image is not stored",
}
_TAKE_OVER_JS = "(file) => file"
_OPACITY_JS = "(value) => { document.documentElement.style.setProperty('--rl-opacity', value / 100); }"


@dataclass(frozen=True)
class Shown:
    """The prediction on view in one browser tab."""

    prediction_id: str
    label: str | None
    path: Path
    is_stored: bool


class PredictHandlers:
    """Event handlers of the tab. Gradio may call them from several threads.

    Args:
        api: access to the API.
        side_px: longer side of the heat map's layers.
    """

    def __init__(self, api: PageApi, side_px: int) -> None:
        self._api = api
        self._side_px = side_px

    def predict(
        self, upload: dict[str, Any] | None, consent: str, visitor: gr.Request, *about: str | float | None
    ) -> tuple[Any, ...]:
        """Run a prediction with its Grad-CAM map.

        Args:
            upload: Gradio's file data; `access` lets only files of the page's own folder through.
            consent: value of the radio button.
            visitor: request with their key.
            about: what is known beside the image, in the order of the taxonomy's context; empty if it is not known.
        Returns:
            Values for the outputs that `predict_tab` lists, in their order.
        """
        if upload is None:
            return _no_prediction(render("no_image"))
        try:
            wanted = _consent(consent)
            path = Path(upload["path"])
            context = _context(wanted, self._api.taxonomy, about)
            with self._api.client(visitor) as client:
                prediction = client.predict(_read(path), explain="gradcam", context=context)
                details = self._api.details(client, prediction.model.id)
        except RelookError as error:
            return _no_prediction(problem_html(str(error)))
        shown = Shown(prediction.id, prediction.label, path, is_stored=wanted is not Consent.NONE)
        html = prediction_html(prediction, self._api.names, self._api.malignant, details)
        heat_map = "" if prediction.explanation is None else self._heat_map(prediction.explanation, path)
        review = review_html(prediction.review, [], self._api.names)
        # Polling begins only where there is a review whose state can change.
        timer = gr.Timer(active=prediction.review is not None)
        return (
            html, shown, heat_map, gr.update(visible=bool(heat_map)), prediction.label, "gradcam", "", review,
            gr.update(visible=True), "", timer,
        )  # fmt: skip

    def explain(
        self, shown: Shown | None, method: str, target: str | None, versus: str | None, visitor: gr.Request
    ) -> str:
        """Draw another heat map of the prediction on view.

        Args:
            shown: the prediction on view.
            method: name of an explanation method.
            target: class code; empty is the predicted class.
            versus: class code to compare with, or empty.
            visitor: request with their key.
        Returns:
            HTML.
        """
        if shown is None:
            return problem_html("run a prediction first", NO_MAP)
        chosen = {"method": method, "target": target or shown.label, "versus": versus or None}
        try:
            with self._api.client(visitor) as client:
                return self._heat_map(_explanation(client, shown, chosen), shown.path)
        except RelookError as error:
            return problem_html(str(error), NO_MAP)

    def flag(
        self, shown: Shown | None, reason: str, suggested: str | None, comment: str, visitor: gr.Request
    ) -> tuple[str, Any]:
        """Flag the prediction on view.

        Args:
            shown: the prediction on view.
            reason: value of a `FlagReason`.
            suggested: class code, or empty.
            comment: may be empty.
            visitor: request with their key.
        Returns:
            HTML, and the timer that polls the review.
        """
        if shown is None:
            return problem_html("run a prediction first", NOT_FLAGGED), gr.Timer(active=False)
        # Gradio sends "" for an empty field; the API expects no value then.
        said = {"reason": reason, "suggested_label": suggested or None, "comment": comment.strip() or None}
        try:
            request = FlagRequest.model_validate(said)
            with self._api.client(visitor) as client:
                return flag_html(client.flag(shown.prediction_id, request)), gr.Timer(active=True)
        except ValidationError as error:
            return problem_html(": ".join(first_problem(error)), NOT_FLAGGED), gr.update()
        except RelookError as error:
            return problem_html(str(error), NOT_FLAGGED), gr.update()

    def nearest(self, shown: Shown | None, visitor: gr.Request) -> str:
        """Show the confirmed cases that are most like the image on view; empty where there are none to show."""
        if shown is None or not shown.is_stored:
            return ""
        try:
            with self._api.client(visitor) as client:
                return cases_html(client.nearest(shown.prediction_id), self._api.names)
        except RelookError:
            # They stand beside a prediction, which is shown without them, too.
            return ""

    def review(self, shown: Shown | None, visitor: gr.Request) -> tuple[Any, Any]:
        """Read the state of the review.

        Args:
            shown: the prediction on view.
            visitor: request with their key.
        Returns:
            HTML, and the timer: inactive once the state cannot change any more.
        """
        if shown is None:
            return "", gr.Timer(active=False)
        try:
            with self._api.client(visitor) as client:
                prediction = client.prediction(shown.prediction_id)
                events = client.events(prediction_ids=[shown.prediction_id]).items
        except RelookError:
            # The timer called, not the visitor: an alert would come from nowhere, and the next tick tries again.
            return gr.update(), gr.update()
        is_open = prediction.review is not None and prediction.review.state in (ReviewState.NEW, ReviewState.PUSHED)
        return review_html(prediction.review, events, self._api.names), gr.Timer(active=is_open)

    def _heat_map(self, explanation: Explanation, path: Path) -> str:
        layers = draw_layers(_read(path), explanation, self._side_px)
        return heat_map_html(explanation, self._api.names, layers)


def predict_tab(handlers: PredictHandlers, api: PageApi, settings: ServingSettings, examples: list[Path]) -> None:
    """Lay the tab out and connect its events.

    Args:
        handlers: of the events.
        api: with the classes to choose from.
        settings: with default consent and overlay opacity.
        examples: images to try; may be empty.
    """
    shown = gr.State(None)
    timer = gr.Timer(REVIEW_POLL_S, active=False)
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            image, dicom, consent, about, predict = _inputs(api.taxonomy, settings, examples)
        with gr.Column(scale=6, min_width=320):
            result = gr.HTML(render("no_image"), elem_id="rl-result", padding=False)
            review = gr.HTML("", elem_id="rl-review", padding=False)
            with gr.Column(visible=False, elem_id="rl-explanation") as map_part:
                heat_map = gr.HTML("", elem_id="rl-heat-map", padding=False)
                choices = _map_choices(api, settings)
            cases = gr.HTML("", elem_id="rl-nearest", padding=False)
            with gr.Column(visible=False, elem_id="rl-flag-form") as flag_part:
                flagged, send, fields = _flag_form(api)
    method, target, versus = choices
    outputs = [result, shown, heat_map, map_part, target, method, versus, review, flag_part, flagged, timer]
    # preprocess=False: Gradio would decode the image and fail with a message of its own; the API says what is wrong.
    predict.click(handlers.predict, [image, consent, *about], outputs, preprocess=False, api_visibility="private").then(
        handlers.nearest, [shown], cases, api_visibility="private", show_progress="hidden"
    )
    for choice in choices:
        # `input` and not `change`: a new prediction resets these fields, which must not ask for another map.
        choice.input(handlers.explain, [shown, *choices], heat_map, api_visibility="private")
    send.click(handlers.flag, [shown, *fields], [flagged, timer], api_visibility="private").then(
        handlers.review, [shown], [review, timer], api_visibility="private"
    )
    timer.tick(handlers.review, [shown], [review, timer], api_visibility="private", show_progress="hidden")
    # The upload has become a PNG, which the browser shows and passes on as an image.
    dicom.upload(None, dicom, image, js=_TAKE_OVER_JS, api_visibility="private")


def _no_prediction(html: str) -> tuple[Any, ...]:
    hidden = gr.update(visible=False)
    return html, None, "", hidden, None, "gradcam", "", "", hidden, "", gr.Timer(active=False)


def _explanation(client: Client, shown: Shown, chosen: dict[str, Any]) -> Explanation:
    if shown.is_stored:
        try:
            return client.explanation(shown.prediction_id, **chosen)
        except RefusedError:
            # The image was not stored in spite of the consent, as in a sandbox. The upload is still here.
            pass
    return client.explain_image(_read(shown.path), **chosen)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError("the upload has expired; choose the image again") from error


def _context(consent: Consent, taxonomy: Taxonomy, about: Sequence[str | float | None]) -> Context:
    """Return the context that a visitor filled in; Gradio sends an empty field as None or an empty text."""
    given = zip((column.name for column in taxonomy.context), about, strict=False)
    known = {name: value for name, value in given if value is not None and str(value).strip()}
    try:
        return Context.model_validate({"consent": consent, **known})
    except ValidationError as error:
        raise DataError(": ".join(first_problem(error))) from error


def _consent(value: str) -> Consent:
    try:
        return Consent(value)
    except ValueError as error:
        raise DataError(f"consent is one of {', '.join(Consent)}, not {value!r}") from error


def _inputs(
    taxonomy: Taxonomy, settings: ServingSettings, examples: list[Path]
) -> tuple[gr.Image, gr.UploadButton, gr.Radio, list[gr.Number | gr.Textbox], gr.Button]:
    # image_mode=None and type="filepath" keep the uploaded bytes as they are: the API gets the original file.
    image = gr.Image(
        label="Image (JPEG, PNG or WebP)",
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        height=300,
        elem_id="rl-image",
        alt_text="Image to classify",
    )
    # The image's own file dialog offers image files only, and no browser knows DICOM files.
    dicom = gr.UploadButton("Choose a DICOM file", size="sm", elem_id="rl-dicom")
    if examples:
        # Not gr.Examples, whose clicks take a route of Gradio's that runs any handler outside the queue.
        samples = gr.Dataset(
            components=[image], samples=[[str(path)] for path in examples], type="index", label=title_of(examples)
        )
        samples.click(
            lambda index: str(examples[index]), samples, image, api_visibility="private", show_progress="hidden"
        )
    consent = gr.Radio(
        choices=[(text, value.value) for value, text in _CONSENT_TEXTS.items()],
        value=settings.default_consent.value,
        label="Consent to further use of the image",
    )
    about: list[gr.Number | gr.Textbox] = []
    if taxonomy.context:
        with gr.Accordion("What is known beside the image (optional)", open=False, elem_id="rl-context-form"):
            for column in taxonomy.context:
                field = gr.Number if column.kind == "numeric" else gr.Textbox
                # A Number without a value starts at 0, which would be an age.
                about.append(field(value=None, label=column.name.capitalize(), elem_id=f"rl-context-{column.name}"))
    return image, dicom, consent, about, gr.Button("Predict", variant="primary", elem_id="rl-predict")


def _map_choices(api: PageApi, settings: ServingSettings) -> tuple[gr.Radio, gr.Dropdown, gr.Dropdown]:
    opacity = gr.Slider(
        0, 100, round(100 * settings.overlay_alpha), step=5, label="Heat map opacity, %", elem_id="rl-opacity",
        buttons=[],
    )  # fmt: skip
    # Runs in the browser alone: a round trip to the server for each step of the slider would lag.
    opacity.change(None, opacity, None, js=_OPACITY_JS, api_visibility="private")
    classes = [(c.name, c.code) for c in api.taxonomy.classes]
    method = gr.Radio(
        [(method.title, method.name) for method in METHODS.records], value="gradcam", label="Explanation method",
        info="Grad-CAM is immediate; the others take some seconds.", elem_id="rl-method",
    )  # fmt: skip
    with gr.Row():
        target = gr.Dropdown(classes, value=None, label="Target class", elem_id="rl-target", min_width=140)
        versus = gr.Dropdown(
            [("none", ""), *classes], value="", label="Compare with class", elem_id="rl-versus", min_width=140
        )
    return method, target, versus


def _flag_form(api: PageApi) -> tuple[gr.HTML, gr.Button, tuple[gr.Radio, gr.Dropdown, gr.Textbox]]:
    with gr.Accordion("Flag this prediction", open=False):
        reason = gr.Radio(
            choices=[(text, value.value) for value, text in FLAG_WORDS.items()],
            value=FlagReason.WRONG_LABEL.value,
            label="Reason",
        )
        suggested = gr.Dropdown(
            choices=[("none", ""), *((c.name, c.code) for c in api.taxonomy.classes)],
            value="",
            label="Suggested class",
            elem_id="rl-suggested",
        )
        comment = gr.Textbox(
            label="Comment for annotators", lines=2, max_length=2000, elem_id="rl-comment", placeholder="optional"
        )
        send = gr.Button("Submit flag", elem_id="rl-flag")
    flagged = gr.HTML("", elem_id="rl-flagged", padding=False)
    return flagged, send, (reason, suggested, comment)
