"""The web page (Gradio): upload, answer with its map, flag.

In: the address of the API, which it asks like any other caller, so the page can do nothing that the API
does not allow. Out: a Gradio layout, which `routes.page` mounts. Nothing on it comes from another host;
uploads are deleted after minutes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from records.errors import DataError, PictureError, RelookError
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Consent, FlagReason
from serving.access.keys import has_keys
from serving.client import Client
from serving.page_html import answer_html, flag_html, header_html, problem_html, waiting_html
from serving.schemas import Context, FlagRequest
from serving.settings import ServingSettings
from serving.words import FLAG_WORDS
from trainers.data.synth import render

UPLOAD_LIFE_S = 600
ACCENT = "#0b6e6e"
_EXAMPLE_SEED = 2024
_CONSENT_WORDS = {
    Consent.TRAINING: "Experts may see it, and models may learn from it",
    Consent.REVIEW: "Experts may see it",
    Consent.NONE: "Neither; do not store it",
}
_RETRY_S = 10.0


class _Handlers:
    """What the page does. Every method may run in several threads."""

    def __init__(self, url: str, taxonomy: Taxonomy, folder: Path) -> None:
        self._url = url
        self._client = Client(url, retry_s=_RETRY_S)
        self._folder = folder.resolve()
        self._names = {c.code: c.name for c in taxonomy.classes}
        self._malignant = frozenset(taxonomy.malignant_codes)

    @contextmanager
    def _asking(self, key: str | None) -> Iterator[Client]:
        """Give a client with the visitor's key; it is kept nowhere. A hidden field sends None."""
        token = (key or "").strip()
        if not token:
            yield self._client
            return
        with Client(self._url, token, retry_s=_RETRY_S) as client:
            yield client

    def header(self, key: str | None) -> str:
        try:
            with self._asking(key) as client:
                return header_html(client.model())
        except RelookError as error:
            return header_html(None, str(error))

    def ask(self, upload: dict[str, Any] | None, consent: str, key: str | None) -> tuple[str, str | None, Any, str]:
        if upload is None:
            return waiting_html(), None, gr.update(visible=False), ""
        try:
            context = Context(consent=_consent(consent))
            with self._asking(key) as client:
                answer = client.predict(self._uploaded(upload), explain="gradcam", context=context)
        except RelookError as error:
            return problem_html(str(error).rstrip(".")), None, gr.update(visible=False), ""
        html = answer_html(answer, self._names, self._malignant)
        return html, answer.id, gr.update(visible=True), ""

    def _uploaded(self, upload: dict[str, Any]) -> bytes:
        path = Path(str(upload.get("path", ""))).resolve()
        if not path.is_relative_to(self._folder):
            # The browser names the file; it may name nothing but uploads and examples.
            raise PictureError("this file was not uploaded here; choose a picture")
        try:
            return path.read_bytes()
        except OSError as error:
            raise PictureError("the upload is gone; choose the picture again") from error

    def flag(self, prediction_id: str | None, reason: str, suggested: str | None, comment: str, key: str | None) -> str:
        if prediction_id is None:
            return problem_html("there is no answer to object to yet")
        request = FlagRequest(
            reason=FlagReason(reason), suggested_label=suggested or None, comment=comment.strip() or None
        )
        try:
            with self._asking(key) as client:
                return flag_html(client.flag(prediction_id, request))
        except RelookError as error:
            return problem_html(str(error).rstrip("."))


def _consent(said: str) -> Consent:
    try:
        return Consent(said)
    except ValueError as error:
        raise DataError(f"consent is one of {', '.join(Consent)}, not {said!r}") from error


def build_page(settings: ServingSettings, store: Store) -> gr.Blocks:
    """Lay the page out; nothing is served by this.

    Args:
        settings: address of the API and default consent.
        store: its taxonomy names the classes, its home keeps uploads for minutes and the examples.
    Returns:
        The page.
    """
    folder = store.home.cache / "page"
    examples = write_examples(folder / "examples", store.taxonomy)
    # Gradio reads these whenever it stores an upload or would call home.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr.set_static_paths([str(folder / "examples")])
    handlers = _Handlers(settings.url, store.taxonomy, folder)
    page = gr.Blocks(title="Relook", analytics_enabled=False, delete_cache=(UPLOAD_LIFE_S // 2, UPLOAD_LIFE_S))
    with page:
        header = gr.HTML(header_html(None, "asking the service"), elem_id="rl-header", padding=False)
        key = gr.Textbox(
            label="Your key", type="password", elem_id="rl-key", visible=has_keys(store), max_length=200,
            placeholder="rlk_...", info="This service answers only whoever has a key; it is not kept.",
        )  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                picture, consent, ask = _question(settings, examples)
            with gr.Column(scale=6, min_width=320):
                prediction_id = gr.State(None)
                result = gr.HTML(waiting_html(), elem_id="rl-result", padding=False)
                with gr.Column(visible=False, elem_id="rl-flag-form") as form:
                    flagged = _flag_form(handlers, store.taxonomy, prediction_id, key)
        # Not preprocessed: Gradio would open the file and fail with its own words, and the API has better ones.
        outputs = [result, prediction_id, form, flagged]
        ask.click(handlers.ask, [picture, consent, key], outputs, preprocess=False, api_visibility="private")
        key.blur(handlers.header, key, header, api_visibility="private")
        page.load(handlers.header, key, header, api_visibility="private")
    return page


def page_theme() -> gr.themes.Base:
    """Return the page's colours and its fonts, which every system has."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=sans, font_mono=mono)
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill=ACCENT,
        button_primary_background_fill_hover="#095a5a",
        button_primary_background_fill_dark=ACCENT,
        checkbox_background_color_selected=ACCENT,
        checkbox_border_color_selected=ACCENT,
    )


def write_examples(folder: Path, taxonomy: Taxonomy) -> list[Path]:
    """Draw one generated picture per class, once.

    Args:
        folder: where they are kept.
        taxonomy: pictures are drawn for the classes that the generator knows.
    Returns:
        Their paths, in class order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for code in taxonomy.codes:
        path = folder / f"generated_{code}.jpg"
        if not path.exists():
            path.write_bytes(render(code, seed=_EXAMPLE_SEED, width_px=320))
        paths.append(path)
    return paths


def _question(settings: ServingSettings, examples: list[Path]) -> tuple[gr.Image, gr.Radio, gr.Button]:
    picture = gr.Image(
        label="Picture (JPEG, PNG or WebP)",
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        height=300,
        elem_id="rl-picture",
        alt_text="The picture to ask about",
    )
    gr.Examples([[str(path)] for path in examples], inputs=[picture], label="Generated examples")
    consent = gr.Radio(
        choices=[(words, value.value) for value, words in _CONSENT_WORDS.items()],
        value=settings.default_consent.value,
        label="What may be done with the picture beyond answering",
    )
    return picture, consent, gr.Button("Ask the model", variant="primary", elem_id="rl-ask")


def _flag_form(handlers: _Handlers, taxonomy: Taxonomy, prediction_id: gr.State, key: gr.Textbox) -> gr.HTML:
    with gr.Accordion("Something is wrong with this answer", open=False):
        reason = gr.Radio(
            choices=[(words, value.value) for value, words in FLAG_WORDS.items()],
            value=FlagReason.WRONG_LABEL.value,
            label="What is wrong",
        )
        suggested = gr.Dropdown(
            choices=[("no suggestion", "")] + [(c.name, c.code) for c in taxonomy.classes],
            value="",
            label="What it is in your opinion",
            elem_id="rl-suggested",
        )
        comment = gr.Textbox(
            label="Comment for the expert", lines=2, max_length=2000, elem_id="rl-comment", placeholder="optional"
        )
        send = gr.Button("Send to an expert", elem_id="rl-flag")
    flagged = gr.HTML("", elem_id="rl-flagged", padding=False)
    send.click(handlers.flag, [prediction_id, reason, suggested, comment, key], flagged, api_visibility="private")
    return flagged
