"""The handlers of the page's events, with a client that answers from memory."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from records.errors import RefusedError
from serving.page.history import HistoryHandlers
from serving.page.models import ModelHandlers, Seen
from serving.page.predict import PredictHandlers, Shown
from tests.serving.test_page import NAMES, details, event, explanation, prediction

VISITOR: Any = None


def api_of(**client: Any) -> Any:
    """Access to an API whose client has these methods."""
    return SimpleNamespace(
        names=NAMES, malignant=frozenset({"mel"}), client=lambda visitor: nullcontext(SimpleNamespace(**client)),
        details=lambda client, model: details(),
    )  # fmt: skip


def refuse(*args: object, **options: object) -> None:
    raise RefusedError("the image was not stored")


def test_an_empty_choice_shows_nothing_and_asks_nothing() -> None:
    models = ModelHandlers(api_of())
    assert (
        models.show(None, VISITOR)[0] == models.report("", VISITOR) == HistoryHandlers(api_of()).open("", VISITOR) == ""
    )
    _, alert, seen = models.roll_out("", 10, "", Seen(), VISITOR)
    assert "Choose a model first" in alert
    assert seen == Seen()


def test_without_a_prediction_there_is_nothing_to_explain_flag_or_review() -> None:
    handlers = PredictHandlers(api_of(), 64)
    assert "Run a prediction first" in handlers.explain(None, "gradcam", None, None, VISITOR)
    said, timer = handlers.flag(None, "wrong_label", None, "", VISITOR)
    assert "Run a prediction first" in said
    assert timer.active is False
    html, timer = handlers.review(None, VISITOR)
    assert (html, timer.active) == ("", False)
    assert "No prediction yet" in handlers.predict(None, "none", VISITOR)[0]


def test_a_refusal_is_an_alert_and_a_poll_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"of a photo")
    shown = Shown("0" * 32, "nv", path, is_stored=False)
    handlers = PredictHandlers(api_of(flag=refuse, nearest=refuse, prediction=refuse, explain_image=refuse), 64)
    assert "was not stored" in handlers.flag(shown, "wrong_label", None, "", VISITOR)[0]
    assert "was not stored" in handlers.explain(shown, "gradcam", None, None, VISITOR)
    assert handlers.nearest(replace(shown, is_stored=True), VISITOR) == ""
    assert handlers.review(shown, VISITOR)[0] == {"__type__": "update"}


def test_a_stored_prediction_is_opened_with_its_map_and_events() -> None:
    stored, events = prediction(), SimpleNamespace(items=[event("confirmed", label="nv", by="annotator")])
    client = {"prediction": lambda id: stored, "events": lambda **asked: events}
    opened = HistoryHandlers(api_of(**client, explanation=lambda id: explanation(target="nv"))).open("0" * 32, VISITOR)
    assert "Melanocytic nevus" in opened
    assert "AAAA" in opened, "the heat map"
    without = HistoryHandlers(api_of(**client, explanation=refuse)).open("0" * 32, VISITOR)
    assert "was not stored" in without
    assert "AAAA" not in without
    unlabelled = client | {"prediction": lambda id: prediction(label=None, confidence=None, probabilities=None)}
    assert "AAAA" not in HistoryHandlers(api_of(**unlabelled, explanation=refuse)).open("0" * 32, VISITOR)
    refused = HistoryHandlers(api_of(prediction=refuse)).open("0" * 32, VISITOR)
    assert "Prediction could not be loaded" in refused


def test_an_empty_history_asks_for_no_events() -> None:
    page = SimpleNamespace(items=[], next=None)
    listed = HistoryHandlers(api_of(predictions=lambda **asked: page, events=refuse)).newest(VISITOR)
    assert "alert" not in listed[0]
