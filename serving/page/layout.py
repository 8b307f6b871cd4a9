"""The whole page: its head, signing in, and its tabs.

In: settings and the store's taxonomy. Out: a Gradio layout; nothing is served by this.
"""

import os
from typing import Any

import gradio as gr

from records.errors import AccessError, RelookError
from records.store import Store
from records.types import Scope
from serving.access.keys import has_keys
from serving.page.answer_html import header_html
from serving.page.ask import AskHandlers, ask_tab
from serving.page.examples import write_examples
from serving.page.history import HistoryHandlers, history_tab
from serving.page.models import ModelHandlers, models_tab
from serving.page.rounds import RoundHandlers, rounds_tab
from serving.page.visitor import Visitors, caller_text
from serving.settings import ServingSettings

UPLOAD_LIFE_S = 600
VISITORS_AT_ONCE = 16
"""How many visitors each kind of event serves at a time; the API admits or refuses what they ask."""


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
    visitors = Visitors(settings.url, store.taxonomy)
    page = gr.Blocks(title="Relook", analytics_enabled=False, delete_cache=(UPLOAD_LIFE_S // 2, UPLOAD_LIFE_S))
    with page:
        header = gr.HTML(header_html(None, "asking the service"), elem_id="rl-header", padding=False)
        with gr.Accordion("Sign in with a key", open=has_keys(store), elem_id="rl-sign-in") as door:
            key = gr.Textbox(
                label="Your key", type="password", elem_id="rl-key", max_length=200, placeholder="rlk_...",
                info="It is sent with what you ask and kept nowhere.",
            )  # fmt: skip
            enter = gr.Button("Sign in", elem_id="rl-enter", size="sm")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Ask"):
                ask_tab(AskHandlers(visitors, folder, settings), visitors, settings, examples, key)
            history_tab(HistoryHandlers(visitors), key)
            admin = models_tab(ModelHandlers(visitors), key)
            rounds_tab(RoundHandlers(visitors), key)

        def look(given: str | None) -> tuple[str, Any, Any]:
            return _looked(visitors, store, given)

        for event in (page.load, key.submit, key.blur, enter.click):
            event(look, key, [header, door, admin], api_visibility="private")
    page.queue(default_concurrency_limit=VISITORS_AT_ONCE)
    return page


def _looked(visitors: Visitors, store: Store, key: str | None) -> tuple[str, Any, Any]:
    """Return header, door (open while a key is needed), and the admin's part."""
    hidden = gr.update(visible=False)
    try:
        with visitors.asking(key) as client:
            caller = client.caller()
            header = header_html(client.model(), signed_in=caller_text(caller))
            return header, gr.update(open=False), gr.update(visible=Scope.ADMIN in caller.scopes)
    except AccessError as error:
        wrong = str(error) if (key or "").strip() else "this service answers whoever has a key"
        return header_html(None, f"sign in first: {wrong}"), gr.update(open=True), hidden
    except RelookError as error:
        return header_html(None, f"no model answers now: {error}"), gr.update(), hidden
