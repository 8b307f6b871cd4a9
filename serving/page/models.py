"""The tab of models: what was measured of each, its report, and the rollout, which admins move.

In: what the API says. Out: HTML. The buttons do what the API's routes do for the visitor's key, and nothing else.
"""

from html import escape
from typing import Any

import gradio as gr

from records.errors import RelookError, UnknownIdError
from serving.client import Client
from serving.page.answer_html import problem_html
from serving.page.models_html import details_html, models_html, rollout_html
from serving.page.visitor import Visitors
from serving.schemas import RolloutRequest

SHARES = {
    "Shadow: it answers beside the model, unseen": 0,
    "1 % of lesions": 1,
    "10 % of lesions": 10,
    "50 % of lesions": 50,
    "All: promote it": 100,
}
NOT_MOVED = "Nothing was changed"
_REASON = "taken back on the page"


class ModelHandlers:
    """What the tab does. Every method may run in several threads.

    Args:
        visitors: that ask.
    """

    def __init__(self, visitors: Visitors) -> None:
        self._visitors = visitors

    def load(self, key: str | None) -> tuple[Any, ...]:
        """Show all models and the rollout.

        Args:
            key: of the visitor.
        Returns:
            The list, the choice of one, the rollout, and emptied views.
        """
        try:
            with self._visitors.asking(key) as client:
                models = client.models().items
                rollout = _rollout(client)
        except RelookError as error:
            return problem_html(str(error), "The models cannot be shown"), gr.update(), "", "", ""
        choices = [(f"{model.id[:12]}, {model.status}, {model.architecture}", model.id) for model in models]
        return models_html(models), gr.Dropdown(choices=choices, value=None), rollout, "", ""

    def show(self, model_id: str | None, key: str | None) -> tuple[str, Any, str]:
        """Show what was measured of a model.

        Args:
            model_id: of the model.
            key: of the visitor.
        Returns:
            Its figures, the button of its report, and an emptied report.
        """
        if not model_id:
            return "", gr.update(visible=False), ""
        try:
            with self._visitors.asking(key) as client:
                details = client.model_details(model_id)
        except RelookError as error:
            return problem_html(str(error), "The model cannot be shown"), gr.update(visible=False), ""
        return details_html(details, self._visitors.names), gr.update(visible=details.has_report), ""

    def report(self, model_id: str | None, key: str | None) -> str:
        """Show a model's report in a frame that runs nothing.

        Args:
            model_id: of the model.
            key: of the visitor.
        Returns:
            HTML.
        """
        if not model_id:
            return ""
        try:
            with self._visitors.asking(key) as client:
                report = client.report(model_id)
        except RelookError as error:
            return problem_html(str(error), "There is no report")
        return f"<iframe class='rl-report' title='Report of the model' sandbox srcdoc='{escape(report)}'></iframe>"

    def move(self, model_id: str | None, share: int, reason: str, key: str | None) -> tuple[str, str]:
        """Begin a rollout, change its share, or promote.

        Args:
            model_id: of the candidate.
            share: percent of lesions.
            reason: needed for a model that the gate has not passed.
            key: of an admin.
        Returns:
            The rollout, and what was refused.
        """
        if not model_id:
            return self._rollout(key), problem_html("choose a model above first", NOT_MOVED)
        try:
            with self._visitors.asking(key) as client:
                client.roll_out(RolloutRequest(model=model_id, percent=share, reason=reason.strip() or None))
                return _rollout(client), ""
        except RelookError as error:
            return self._rollout(key), problem_html(str(error), NOT_MOVED)

    def take_back(self, reason: str, key: str | None) -> tuple[str, str]:
        """Take the candidate back, or undo the last promotion.

        Args:
            reason: one sentence, for the audit.
            key: of an admin.
        Returns:
            The rollout, and what was refused.
        """
        try:
            with self._visitors.asking(key) as client:
                return rollout_html(client.roll_back(reason.strip() or _REASON)), ""
        except RelookError as error:
            return self._rollout(key), problem_html(str(error), NOT_MOVED)

    def _rollout(self, key: str | None) -> str:
        try:
            with self._visitors.asking(key) as client:
                return _rollout(client)
        except RelookError as error:
            return problem_html(str(error), "The rollout cannot be shown")


def models_tab(handlers: ModelHandlers, key: gr.Textbox) -> gr.Column:
    """Lay the tab out; choosing it loads what there is.

    Args:
        handlers: what it does.
        key: field of the visitor's key.
    Returns:
        The part that is for admins, hidden.
    """
    with gr.Tab("Models") as tab:
        listed = gr.HTML("", elem_id="rl-models", padding=False)
        chosen = gr.Dropdown([], value=None, label="What was measured of", elem_id="rl-model-choice")
        shown = gr.HTML("", elem_id="rl-model-shown", padding=False)
        open_report = gr.Button("Open its report", visible=False, elem_id="rl-report-open")
        report = gr.HTML("", elem_id="rl-report", padding=False)
        rollout = gr.HTML("", elem_id="rl-rollout", padding=False)
        admin: gr.Column = gr.Column(visible=False, elem_id="rl-admin")
        with admin:
            share = gr.Radio(
                list(SHARES.items()), value=0, label="How far the chosen model may come", elem_id="rl-share"
            )
            reason = gr.Textbox(
                label="Reason, for the audit", max_length=500, elem_id="rl-reason",
                info="Needed for a model that the gate has not passed.",
            )  # fmt: skip
            with gr.Row():
                move = gr.Button("Move the rollout", variant="primary", elem_id="rl-move", min_width=140)
                back = gr.Button("Take it back", variant="stop", elem_id="rl-back", min_width=140)
            refused = gr.HTML("", elem_id="rl-refused", padding=False)
    tab.select(handlers.load, key, [listed, chosen, rollout, shown, report], api_visibility="private")
    chosen.input(handlers.show, [chosen, key], [shown, open_report, report], api_visibility="private")
    open_report.click(handlers.report, [chosen, key], report, api_visibility="private")
    move.click(handlers.move, [chosen, share, reason, key], [rollout, refused], api_visibility="private")
    back.click(handlers.take_back, [reason, key], [rollout, refused], api_visibility="private")
    return admin


def _rollout(client: Client) -> str:
    try:
        return rollout_html(client.rollout())
    except UnknownIdError:
        return rollout_html(None)
