"""The page as a whole: theme, header, sign-in and tabs.

In: settings and the store's taxonomy. Out: a Gradio app that is not started.
"""

import os
from pathlib import Path
from typing import Any

import gradio as gr

from images.synth import render as render_image
from records.errors import AccessError, RelookError
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Scope
from serving.access.keys import has_keys
from serving.page.api import PageApi, caller_text
from serving.page.history import HistoryHandlers, history_tab
from serving.page.models import ModelHandlers, models_tab
from serving.page.predict import PredictHandlers, predict_tab
from serving.page.prediction_view import header_html
from serving.page.rounds import RoundHandlers, rounds_tab
from serving.settings import ServingSettings

ACCENT = "#0b6e6e"
UPLOAD_LIFE_S = 600
CONCURRENT_EVENTS = 16
"""How many events of each kind run at once; the API bounds the load of what they request."""
_EXAMPLE_SEED = 2024


def page_theme() -> gr.themes.Base:
    """Return colours and fonts of the page."""
    # Fonts of the system: Gradio's themes load theirs from Google otherwise.
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
        slider_color=ACCENT,
    )


def build_page(settings: ServingSettings, store: Store) -> gr.Blocks:
    """Build the page.

    Args:
        settings: URL of the API, default consent, size and opacity of heat maps.
        store: its taxonomy names the classes; its cache folder holds uploads and examples.
    Returns:
        The Gradio app, not started.
    """
    folder = store.home.cache / "page"
    examples = write_examples(folder / "examples", store.taxonomy)
    # Gradio reads both variables later, whenever it stores an upload or would report usage.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr.set_static_paths([str(folder / "examples")])
    api = PageApi(settings.url, store.taxonomy)
    # delete_cache is (how often, from which age): an upload is deleted after 10 to 15 minutes.
    page = gr.Blocks(title="Relook", analytics_enabled=False, delete_cache=(UPLOAD_LIFE_S // 2, UPLOAD_LIFE_S))
    with page:
        header = gr.HTML(header_html(None, "connecting to the service"), elem_id="rl-header", padding=False)
        with gr.Accordion("Sign in with an API key", open=has_keys(store), elem_id="rl-sign-in") as form:
            key = gr.Textbox(
                label="API key", type="password", elem_id="rl-key", max_length=200, placeholder="rlk_...",
                info="Sent with each request, not stored.",
            )  # fmt: skip
            sign_in = gr.Button("Sign in", elem_id="rl-sign-in-button", size="sm")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Predict"):
                predict_tab(PredictHandlers(api, folder, settings.overlay_side_px), api, settings, examples, key)
            history_tab(HistoryHandlers(api), key)
            admin = models_tab(ModelHandlers(api), key)
            rounds_tab(RoundHandlers(api), key)

        def signed_in(given: str | None) -> tuple[str, Any, Any]:
            return _sign_in(api, given)

        # blur: a password manager fills the field without Enter or a click.
        for event in (page.load, key.submit, key.blur, sign_in.click):
            event(signed_in, key, [header, form, admin], api_visibility="private")
    page.queue(default_concurrency_limit=CONCURRENT_EVENTS)
    return page


def write_examples(folder: Path, taxonomy: Taxonomy) -> list[Path]:
    """Write one generated image per class, unless it is there.

    Args:
        folder: is created.
        taxonomy: its codes must be known to `images.synth`.
    Returns:
        Paths in class order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for code in taxonomy.codes:
        path = folder / f"generated_{code}.jpg"
        if not path.exists():
            path.write_bytes(render_image(code, seed=_EXAMPLE_SEED, width_px=320))
        paths.append(path)
    return paths


def _sign_in(api: PageApi, key: str | None) -> tuple[str, Any, Any]:
    """Return the header, the sign-in form (open while a key is needed), and the rollout controls."""
    hidden = gr.update(visible=False)
    try:
        with api.client(key) as client:
            caller = client.caller()
            header = header_html(client.model(), signed_in=caller_text(caller))
            return header, gr.update(open=False), gr.update(visible=Scope.ADMIN in caller.scopes)
    except AccessError as error:
        # The API's message is about a wrong key; who typed none needs to know that one is required.
        why = str(error) if (key or "").strip() else "this service requires an API key"
        return header_html(None, f"sign in to continue: {why}"), gr.update(open=True), hidden
    except RelookError as error:
        return header_html(None, f"no model is available: {error}"), gr.update(), hidden
