"""The History tab: earlier predictions, newest first, with their annotations; any of them can be opened again.

In: predictions and events of the API, which decides whose predictions the visitor's key may read. Out: HTML.
"""

from collections import defaultdict
from typing import Any

from records.errors import RefusedError, RelookError
from serving.client import Client
from serving.page.api import PageApi
from serving.page.heat_map import heat_map_html
from serving.page.prediction_view import event_text, prediction_html, review_html, state_text
from serving.page.render import problem_html, render
from serving.page.toolkit import gr
from serving.schemas import Event, PredictionResponse
from serving.words import DECISION_TITLES

PAGE_SIZE = 20


class HistoryHandlers:
    """Event handlers of the tab. Gradio may call them from several threads.

    Args:
        api: access to the API.
    """

    def __init__(self, api: PageApi) -> None:
        self._api = api

    def newest(self, visitor: gr.Request) -> tuple[Any, ...]:
        """Show the newest predictions; see `older`."""
        return self.older(None, visitor)

    def older(self, after: str | None, visitor: gr.Request) -> tuple[Any, ...]:
        """Show a page of predictions.

        Args:
            after: cursor from the page before; None begins with the newest.
            visitor: request with their key.
        Returns:
            The list, the dropdown of its predictions, the next cursor, the button for it, and an empty detail view.
        """
        try:
            with self._api.client(visitor) as client:
                page = client.predictions(after=after, limit=PAGE_SIZE)
                events = _events_of(client, page.items)
        except RelookError as error:
            return problem_html(str(error), "Predictions could not be loaded"), gr.update(), None, gr.update(), ""
        html = history_html(page.items, events, self._api.names)
        choices = [(_title(prediction, self._api.names), prediction.id) for prediction in page.items]
        # The detail view is emptied: its prediction may not be on this page, and the dropdown no longer names it.
        return html, gr.Dropdown(choices=choices, value=None), page.next, gr.update(visible=page.next is not None), ""

    def open(self, prediction_id: str | None, visitor: gr.Request) -> str:
        """Show a stored prediction with its review, events and heat map.

        Args:
            prediction_id: None or empty shows nothing.
            visitor: request with their key.
        Returns:
            HTML.
        """
        if not prediction_id:
            return ""
        api = self._api
        try:
            with api.client(visitor) as client:
                prediction = client.prediction(prediction_id)
                details = api.details(client, prediction.model.id)
                events = _events_of(client, [prediction])[prediction.id]
                heat_map = _stored_map(client, prediction, api.names)
        except RelookError as error:
            return problem_html(str(error), "Prediction could not be loaded")
        html = prediction_html(prediction, api.names, api.malignant, details)
        return html + review_html(prediction.review, events, api.names) + heat_map


def history_tab(handlers: HistoryHandlers) -> None:
    """Lay the tab out; selecting it loads the newest predictions.

    Args:
        handlers: of the events.
    """
    with gr.Tab("History") as tab:
        after = gr.State(None)
        listed = gr.HTML("", elem_id="rl-history", padding=False)
        with gr.Row():
            refresh = gr.Button("Refresh", elem_id="rl-history-refresh", min_width=140)
            older = gr.Button("Older predictions", visible=False, elem_id="rl-history-older", min_width=140)
        chosen = gr.Dropdown([], value=None, label="Open prediction", elem_id="rl-history-choice")
        shown = gr.HTML("", elem_id="rl-history-shown", padding=False)
    outputs = [listed, chosen, after, older, shown]
    tab.select(handlers.newest, None, outputs, api_visibility="private")
    refresh.click(handlers.newest, None, outputs, api_visibility="private")
    older.click(handlers.older, [after], outputs, api_visibility="private")
    # `input` and not `change`, which would also fire when a new list empties the choice.
    chosen.input(handlers.open, [chosen], shown, api_visibility="private")


def history_html(predictions: list[PredictionResponse], events: dict[str, list[Event]], names: dict[str, str]) -> str:
    """Show predictions as a list.

    Args:
        predictions: newest first.
        events: by the id of the prediction, oldest first.
        names: class code to display name.
    Returns:
        HTML.
    """
    rows = [
        {
            "prediction": prediction,
            "title": DECISION_TITLES[prediction.decision],
            "events": [event_text(event, names) for event in events.get(prediction.id, [])],
            "state": None if prediction.review is None else state_text(prediction.review),
        }
        for prediction in predictions
    ]
    return render("history", rows=rows, names=names)


def _title(prediction: PredictionResponse, names: dict[str, str]) -> str:
    label = "no label" if prediction.label is None else names.get(prediction.label, prediction.label)
    return f"{prediction.created_at:%Y-%m-%d %H:%M:%S}, {label}"


def _events_of(client: Client, predictions: list[PredictionResponse]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = defaultdict(list)
    # An empty list of ids would not be sent, and the API would then return the events of all predictions.
    if predictions:
        for event in client.events(prediction_ids=[prediction.id for prediction in predictions], limit=200).items:
            found[event.prediction_id].append(event)
    return found


def _stored_map(client: Client, prediction: PredictionResponse, names: dict[str, str]) -> str:
    if prediction.label is None:
        return ""
    try:
        return heat_map_html(client.explanation(prediction.id), names, None)
    except RefusedError as error:
        # The image was not stored or was erased. The prediction is still worth showing, so this is a note, no alert.
        return render("refused", sentence=str(error))
