"""The tab of earlier answers: one's own, newest first, with what the annotators said since.

In: answers and events of the API. Out: HTML. Whose answers they are is the API's decision.
"""

from html import escape
from typing import Any

import gradio as gr

from records.errors import RefusedError, RelookError
from serving.client import Client
from serving.page.answer_html import answer_html, event_text, fate_html, percent, problem_html, state_text
from serving.page.map_html import map_html
from serving.page.visitor import Visitors
from serving.schemas import Event, PredictionAnswer
from serving.words import DECISION_TITLES

PAGE_SIZE = 20


class HistoryHandlers:
    """What the tab does. Every method may run in several threads.

    Args:
        visitors: that ask.
    """

    def __init__(self, visitors: Visitors) -> None:
        self._visitors = visitors

    def newest(self, key: str | None) -> tuple[Any, ...]:
        """Show the newest answers; see `older`."""
        return self.older(None, key)

    def older(self, after: str | None, key: str | None) -> tuple[Any, ...]:
        """Show a page of answers.

        Args:
            after: id of the last answer of the page before, or None.
            key: of the visitor.
        Returns:
            The list, the choice of one of them, where the next page begins, its button, and an emptied view.
        """
        try:
            with self._visitors.asking(key) as client:
                page = client.predictions(after=after, limit=PAGE_SIZE)
                events = _events_of(client, page.items)
        except RelookError as error:
            return problem_html(str(error), "The answers cannot be shown"), gr.update(), None, gr.update(), ""
        names = self._visitors.names
        html = history_html(page.items, events, names)
        choices = [(_title(answer, names), answer.id) for answer in page.items]
        return html, gr.Dropdown(choices=choices, value=None), page.next, gr.update(visible=page.next is not None), ""

    def open(self, prediction_id: str | None, key: str | None) -> str:
        """Show one answer again, with its map and what became of it.

        Args:
            prediction_id: of the answer.
            key: of the visitor.
        Returns:
            HTML.
        """
        if not prediction_id:
            return ""
        visitors = self._visitors
        try:
            with visitors.asking(key) as client:
                answer = client.prediction(prediction_id)
                details = visitors.details(client, answer.model.id)
                events = _events_of(client, [answer])[answer.id]
                drawn = _drawn(client, answer, visitors)
        except RelookError as error:
            return problem_html(str(error), "The answer cannot be shown")
        html = answer_html(answer, visitors.names, visitors.malignant, details)
        return html + fate_html(answer.review, events, visitors.names) + drawn


def history_tab(handlers: HistoryHandlers, key: gr.Textbox) -> None:
    """Lay the tab out; choosing it loads the newest answers.

    Args:
        handlers: what it does.
        key: field of the visitor's key.
    """
    with gr.Tab("History") as tab:
        after = gr.State(None)
        listed = gr.HTML("", elem_id="rl-history", padding=False)
        with gr.Row():
            again = gr.Button("Look again", elem_id="rl-history-again", min_width=140)
            older = gr.Button("Older answers", visible=False, elem_id="rl-history-older", min_width=140)
        chosen = gr.Dropdown([], value=None, label="Show one again", elem_id="rl-history-choice")
        shown = gr.HTML("", elem_id="rl-history-shown", padding=False)
    outputs = [listed, chosen, after, older, shown]
    tab.select(handlers.newest, key, outputs, api_visibility="private")
    again.click(handlers.newest, key, outputs, api_visibility="private")
    older.click(handlers.older, [after, key], outputs, api_visibility="private")
    chosen.input(handlers.open, [chosen, key], shown, api_visibility="private")


def history_html(answers: list[PredictionAnswer], events: dict[str, list[Event]], names: dict[str, str]) -> str:
    """Show answers as a list.

    Args:
        answers: newest first.
        events: by the id of the answer, oldest first.
        names: class code to name.
    Returns:
        HTML.
    """
    if not answers:
        return "<div class='rl-card'><h2>No answers yet</h2><p>What you ask under <b>Ask</b> is listed here.</p></div>"
    rows = []
    for answer in answers:
        said = "".join(f"<li>{escape(event_text(event, names))}</li>" for event in events.get(answer.id, []))
        state = "" if answer.review is None or said else f"<div class='rl-small'>{state_text(answer.review)}</div>"
        rows.append(
            f"<li class='rl-past {escape(answer.decision)}'><div><b>{_headline(answer, names)}</b> "
            f"<span class='rl-small'>{answer.created_at:%Y-%m-%d %H:%M} UTC</span></div>"
            f"<div>{escape(DECISION_TITLES[answer.decision])}.</div>{f'<ul>{said}</ul>' if said else state}</li>"
        )
    return f"<ul class='rl-list'>{''.join(rows)}</ul>"


def _headline(answer: PredictionAnswer, names: dict[str, str]) -> str:
    if answer.label is None or answer.confidence is None:
        return "No answer"
    return f"{escape(names.get(answer.label, answer.label))}, {percent(answer.confidence)}"


def _title(answer: PredictionAnswer, names: dict[str, str]) -> str:
    label = "no answer" if answer.label is None else names.get(answer.label, answer.label)
    return f"{answer.created_at:%Y-%m-%d %H:%M:%S}, {label}"


def _events_of(client: Client, answers: list[PredictionAnswer]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {answer.id: [] for answer in answers}
    if found:
        for event in client.events(prediction_ids=list(found), limit=200).items:
            found[event.prediction_id].append(event)
    return found


def _drawn(client: Client, answer: PredictionAnswer, visitors: Visitors) -> str:
    if answer.label is None:
        return ""
    try:
        return map_html(client.explanation(answer.id), visitors.names, None)
    except RefusedError as error:
        return f"<p class='rl-small'>{escape(str(error))}.</p>"
