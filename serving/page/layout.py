"""The page as a whole: theme, header, sign-in and tabs.

In: settings and the store's taxonomy. Out: a Gradio app that is not started.
"""

import os
from functools import partial
from typing import Any

from records.errors import AccessError, RelookError
from records.store import Store
from records.types import Scope
from serving.access.keys import has_keys
from serving.page.api import PageApi, caller_text, key_of
from serving.page.examples import write_examples
from serving.page.history import HistoryHandlers, history_tab
from serving.page.models import ModelHandlers, models_tab
from serving.page.predict import PredictHandlers, predict_tab
from serving.page.prediction_view import header_html
from serving.page.render import render
from serving.page.rounds import RoundHandlers, rounds_tab
from serving.page.toolkit import gr
from serving.page.uploads import PageFiles
from serving.settings import ServingSettings
from serving.tls import trust_of

ACCENT = "#0b6e6e"
MAX_WAITING = 512
"""How many events may wait; Gradio refuses further ones."""
CONCURRENT_EVENTS = 16
"""How many events of each kind run at once; the API bounds the load of what they request."""
QUEUE_POLL_S = 0.03
"""How long an event may wait before it is seen, seconds."""


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


def build_page(settings: ServingSettings, store: Store, files: PageFiles) -> gr.Blocks:
    """Build the page.

    Args:
        settings: URL of the API, default consent, size and opacity of heat maps.
        store: its taxonomy names the classes.
        files: where uploads and examples lie.
    Returns:
        The Gradio app, not started.
    """
    examples = write_examples(files.examples, store.taxonomy, settings.page_examples, store)
    # Gradio reads both variables later. The folder is where it expects uploads to be.
    os.environ["GRADIO_TEMP_DIR"] = str(files.uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr.set_static_paths([str(files.examples)])
    trust = None if settings.tls_certificate is None else partial(trust_of, settings)
    api = PageApi(settings.url, store.taxonomy, trust)
    page = gr.Blocks(title="Relook", analytics_enabled=False)
    with page:
        header = gr.HTML(header_html(None, "connecting to the service"), elem_id="rl-header", padding=False)
        with gr.Accordion("Sign in with an API key", open=has_keys(store), elem_id="rl-sign-in") as form:
            # Plain HTML whose script talks to the API: a field of Gradio would send the key along with its events.
            gr.HTML(render("sign_in"), padding=False)
            signed_in = gr.Button("Signed in", elem_id="rl-signed-in", elem_classes="rl-hidden")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Predict"):
                predict_tab(PredictHandlers(api, settings.overlay_side_px), api, settings, examples)
            history_tab(HistoryHandlers(api))
            admin = models_tab(ModelHandlers(api))
            rounds_tab(RoundHandlers(api))

        def show_caller(visitor: gr.Request) -> tuple[str, Any, Any]:
            return _caller(api, visitor)

        # The page's script clicks the hidden button when the API has accepted a key.
        for event in (page.load, signed_in.click):
            event(show_caller, None, [header, form, admin], api_visibility="private")
    page.queue(default_concurrency_limit=CONCURRENT_EVENTS, max_size=MAX_WAITING)
    # Gradio looks for events a thousand times a second and for their progress a hundred times, which took 5 % of a core
    # for a page that nobody has open.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_POLL_S
    return page


def _caller(api: PageApi, visitor: gr.Request) -> tuple[str, Any, Any]:
    """Return the header, the sign-in form (open while a key is needed), and the rollout controls."""
    hidden = gr.update(visible=False)
    try:
        with api.client(visitor) as client:
            caller = client.caller()
            header = header_html(client.model(), signed_in=caller_text(caller))
            return header, gr.update(open=False), gr.update(visible=Scope.ADMIN in caller.scopes)
    except AccessError as error:
        # The API's message is about a wrong key; who typed none needs to know that one is required.
        why = str(error) if key_of(visitor) else "this service requires an API key"
        return header_html(None, f"sign in to continue: {why}"), gr.update(open=True), hidden
    except RelookError as error:
        return header_html(None, f"no model is available: {error}"), gr.update(), hidden
