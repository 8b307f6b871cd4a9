"""The Models tab: registered models with their metrics and reports, and the controls of the rollout for admins.

In: models and rollout of the API. Out: HTML. The buttons call the API's routes with the visitor's key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from records.errors import RelookError, UnknownIdError
from records.models import SERVED
from records.types import RolloutStage
from serving.client import Client
from serving.page.api import PageApi
from serving.page.prediction_view import coverage_text
from serving.page.render import problem_html, render, share
from serving.page.toolkit import gr
from serving.schemas import ModelDetails, ModelInfo, RolloutInfo, RolloutRequest
from serving.words import RULE_WORDS

TRAFFIC_SHARES = {
    "0 % (shadow)": 0,
    "1 %": 1,
    "10 %": 10,
    "50 %": 50,
    "100 % (promote)": 100,
}
NOT_CHANGED = "Rollout not changed"
_ROLLED_BACK = "rolled back on the page"
_STAGES = {
    "shadow": "The candidate predicts on the same images; its predictions are compared and not returned.",
    "canary": "The candidate also predicts the images of its traffic share; the more cautious prediction is returned.",
    "promoted": "The candidate is the champion now.",
    "rolled_back": "The candidate was rolled back.",
}


@dataclass(frozen=True)
class Seen:
    """What a page shows: a button means this, and not what is current when it is clicked.

    Args:
        rollout: the rollout, in progress or just ended.
        champion_id: the model that serves.
    """

    rollout: RolloutInfo | None = None
    champion_id: str | None = None


class ModelHandlers:
    """Event handlers of the tab. Gradio may call them from several threads.

    Args:
        api: access to the API.
    """

    def __init__(self, api: PageApi) -> None:
        self._api = api

    def load(self, visitor: gr.Request) -> tuple[Any, ...]:
        """Return the list of models, the dropdown, the rollout, empty detail views, and what is shown."""
        try:
            with self._api.client(visitor) as client:
                models = client.models().items
                seen = _look(client)
        except RelookError as error:
            return problem_html(str(error), "Models could not be loaded"), gr.update(), "", "", "", Seen()
        choices = [(f"{model.id[:12]}, {model.status}, {model.architecture}", model.id) for model in models]
        return models_html(models), gr.Dropdown(choices=choices, value=None), rollout_html(seen.rollout), "", "", seen

    def show(self, model_id: str | None, visitor: gr.Request) -> tuple[str, Any, str]:
        """Return a model's metrics, the button for its report, and an empty report."""
        if not model_id:
            return "", gr.update(visible=False), ""
        try:
            with self._api.client(visitor) as client:
                # Not from the cache of `PageApi`: a model's status changes during a rollout.
                details = client.model_details(model_id)
        except RelookError as error:
            return problem_html(str(error), "Model could not be loaded"), gr.update(visible=False), ""
        return details_html(details, self._api.names), gr.update(visible=details.has_report), ""

    def report(self, model_id: str | None, visitor: gr.Request) -> str:
        """Return a model's report in a sandboxed frame."""
        if not model_id:
            return ""
        try:
            with self._api.client(visitor) as client:
                return render("report", report=client.report(model_id))
        except RelookError as error:
            return problem_html(str(error), "Report could not be loaded")

    def roll_out(
        self, model_id: str | None, percent: int, reason: str, seen: Seen, visitor: gr.Request
    ) -> tuple[str, str, Seen]:
        """Change or promote the rollout that the page shows, or start one; the API refuses if it has changed since.

        Args:
            model_id: of the candidate.
            percent: traffic share, 0 to 100; 0 is shadow, 100 promotes.
            reason: required for a model that has not passed the gate; may be empty otherwise.
            seen: what the page shows.
            visitor: request with a key of the scope admin.
        Returns:
            The rollout, an alert if the API refused, and what is shown now.
        """
        if not model_id:
            return rollout_html(seen.rollout), problem_html("choose a model first", NOT_CHANGED), seen
        try:
            with self._api.client(visitor) as client:
                shown = None if seen.rollout is None or seen.rollout.ended_at else seen.rollout.id
                wanted = RolloutRequest(
                    model=model_id,
                    percent=percent,
                    rollout=shown,
                    champion=None if shown else seen.champion_id,
                    reason=reason.strip() or None,
                )
                return _shown(client.roll_out(wanted))
        except RelookError as error:
            return self._refused(str(error), visitor)

    def roll_back(self, reason: str, seen: Seen, visitor: gr.Request) -> tuple[str, str, Seen]:
        """Roll the rollout back that the page shows.

        Args:
            reason: for the audit log; may be empty.
            seen: what the page shows.
            visitor: request with a key of the scope admin.
        Returns:
            The rollout, an alert if the API refused, and what is shown now.
        """
        if seen.rollout is None:
            return self._refused("the page showed no rollout in progress", visitor)
        try:
            with self._api.client(visitor) as client:
                # From the response: a rollout that has ended is no longer the one that the API reports as current.
                return _shown(client.roll_back(seen.rollout.id, reason.strip() or _ROLLED_BACK))
        except RelookError as error:
            return self._refused(str(error), visitor)

    def _refused(self, why: str, visitor: gr.Request) -> tuple[str, str, Seen]:
        alert = problem_html(why, NOT_CHANGED)
        try:
            with self._api.client(visitor) as client:
                seen = _look(client)
        except RelookError as error:
            return problem_html(str(error), "Rollout could not be loaded"), alert, Seen()
        return rollout_html(seen.rollout), alert, seen


def models_tab(handlers: ModelHandlers) -> gr.Column:
    """Lay the tab out; selecting it loads models and rollout.

    Args:
        handlers: of the events.
    Returns:
        The rollout controls, hidden until a visitor with the scope admin signs in.
    """
    with gr.Tab("Models") as tab:
        listed = gr.HTML("", elem_id="rl-models", padding=False)
        chosen = gr.Dropdown([], value=None, label="Model", elem_id="rl-model-choice")
        shown = gr.HTML("", elem_id="rl-model-shown", padding=False)
        open_report = gr.Button("Open report", visible=False, elem_id="rl-report-open")
        report = gr.HTML("", elem_id="rl-report", padding=False)
        rollout = gr.HTML("", elem_id="rl-rollout", padding=False)
        seen = gr.State(Seen())
        # Hiding is for clarity only; the API checks the key's scope at every call.
        admin: gr.Column = gr.Column(visible=False, elem_id="rl-admin")
        with admin:
            percent = gr.Radio(
                list(TRAFFIC_SHARES.items()), value=0, label="Traffic share", elem_id="rl-share",
                info="By lesion: all images of a lesion are in the share, or none.",
            )  # fmt: skip
            reason = gr.Textbox(
                label="Reason", max_length=500, elem_id="rl-reason",
                info="Stored in the audit log; required for a model that has not passed the gate.",
            )  # fmt: skip
            with gr.Row():
                start = gr.Button("Roll out", variant="primary", elem_id="rl-rollout-start", min_width=140)
                back = gr.Button("Roll back", variant="stop", elem_id="rl-rollout-back", min_width=140)
            refused = gr.HTML("", elem_id="rl-refused", padding=False)
    tab.select(handlers.load, None, [listed, chosen, rollout, shown, report, seen], api_visibility="private")
    chosen.input(handlers.show, [chosen], [shown, open_report, report], api_visibility="private")
    open_report.click(handlers.report, [chosen], report, api_visibility="private")
    changed = [rollout, refused, seen]
    start.click(handlers.roll_out, [chosen, percent, reason, seen], changed, api_visibility="private")
    back.click(handlers.roll_back, [reason, seen], changed, api_visibility="private")
    return admin


def models_html(models: Sequence[ModelInfo]) -> str:
    """Show models, newest first, as a table."""
    return render("models", models=models)


def details_html(details: ModelDetails, names: dict[str, str]) -> str:
    """Show the metrics of a model.

    Args:
        details: of the model.
        names: class code to display name.
    Returns:
        HTML.
    """
    split = "val" if "val" in details.metrics else "calibration"
    own = details.metrics.get(split, {})
    # Of the other models, calibration holds scores and no figures.
    own = own if "per_class" in own else {}
    # Thresholds are per class, and one is for the sum of all malignant classes.
    named = names | {"malignant": "all malignant classes together"}
    return render(
        "model_details",
        details=details,
        split=split,
        own=own,
        metrics=list(_metrics(own, names)),
        names=names,
        named=named,
        coverage=coverage_text(names, details),
        rule_words=RULE_WORDS,
    )


def rollout_html(rollout: RolloutInfo | None) -> str:
    """Show a rollout with its guardrails; None says that none is in progress."""
    return render("rollout", rollout=rollout, stage="" if rollout is None else _STAGES[rollout.stage])


def _metrics(val: dict[str, Any], names: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield "Balanced accuracy", share(val.get("balanced_accuracy"), val.get("balanced_accuracy_ci"))
    yield "Accuracy", share(val.get("accuracy"), val.get("accuracy_ci"))
    yield "ROC AUC, mean of classes", share(val.get("macro_auc"))
    yield "Expected calibration error", share(val.get("ece"))
    key = val.get("key_class")
    if key:
        name = names.get(key["name"], key["name"])
        yield f"{name}: sensitivity at its review threshold", share(key.get("sensitivity"), key.get("sensitivity_ci"))
        yield f"{name}: specificity at its review threshold", share(key.get("specificity"))
    yield "Answered without review", share(val.get("answered_share"))


def _look(client: Client) -> Seen:
    try:
        running = client.rollout()
    except UnknownIdError:
        # The API responds 404 while no rollout is in progress; on the page that is a state and no error.
        serving = [model.id for model in client.models().items if model.status in SERVED]
        return Seen(None, next(iter(serving), None))
    return Seen(running, running.champion_id)


def _shown(rollout: RolloutInfo) -> tuple[str, str, Seen]:
    champion = rollout.candidate_id if rollout.stage is RolloutStage.PROMOTED else rollout.champion_id
    return rollout_html(rollout), "", Seen(rollout, champion)
