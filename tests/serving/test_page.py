"""The parts of the page: everything from outside is escaped, and no word sounds like a verdict."""

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from images.synth import render
from serving.page.answer_html import (
    answer_html,
    event_text,
    fate_html,
    flag_html,
    header_html,
    problem_html,
    waiting_html,
)
from serving.page.certainty import NOT_KNOWN, scores_text, set_text
from serving.page.history import history_html
from serving.page.layers import draw_layers
from serving.page.map_html import map_html
from serving.page.models_html import details_html, models_html, rollout_html
from serving.page.rounds import rounds_html
from serving.page.visitor import caller_text
from serving.schemas import Event, Explanation, FlagAnswer, ModelInfo, PredictionAnswer, ReviewStatus, RolloutInfo
from serving.schemas_registry import CallerInfo, ModelDetails, RoundInfo, ScoreBand

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)
NAMES = {"nv": "Melanocytic nevus", "mel": "Melanoma"}
EVIL = "<script>alert(1)</script>"
NOW = "2026-01-01T00:00:00Z"
BAND = ScoreBand(low=0.8, high=0.9, lesions=50, right=40, right_ci=(0.66, 0.9))


def answer(**changes: object) -> PredictionAnswer:
    given = {
        "id": "0" * 32, "request_id": "r", "created_at": NOW, "image_id": "i",
        "model": {"id": "m" * 64, "status": "provisional"}, "label": "nv", "confidence": 0.9,
        "probabilities": {"nv": 0.9, "mel": 0.1}, "prediction_set": ["nv"], "decision": "answered", "reasons": [],
        "review": None, "explanation": None,
    }  # fmt: skip
    return PredictionAnswer.model_validate(given | changes)


def details(**changes: object) -> ModelDetails:
    given = {
        "id": "m" * 64, "status": "champion", "architecture": "custom_cnn", "dataset_id": "d", "round": 2,
        "created_at": NOW, "status_changed_at": NOW, "status_text": "It has passed.", "classes": [], "scores": [BAND],
        "promise": 0.9, "pooled_classes": ["mel"], "refer": {"mel": 0.2}, "faithfulness": None, "has_report": False,
        "metrics": {"val": {"images": 9, "lesions": 8, "balanced_accuracy": 0.5, "per_class": {"nv": {"support": 9}}}},
    }  # fmt: skip
    return ModelDetails.model_validate(given | changes)


def event(kind: str, **told: object) -> Event:
    return Event.model_validate(
        {"id": "e", "created_at": NOW, "kind": kind, "prediction_id": "0" * 32, "details": told}
    )


def explanation(**changes: object) -> Explanation:
    given = {
        "method": "gradcam", "exact": True, "layer": "features", "target": "mel", "shape": [2, 2],
        "values": [[0.0, 1.0], [0.0, -3.0]], "png_base64": "AAAA",
    }  # fmt: skip
    return Explanation.model_validate(given | changes)


def rollout(**changes: object) -> RolloutInfo:
    harm = {"name": "errors", "looked": 9, "seen": 1, "tolerated": 0.01, "evidence": 0.1, "limit": 3.0}
    given = {
        "id": "r", "created_at": NOW, "champion_id": "a" * 64, "candidate_id": "b" * 64, "stage": "canary",
        "percent": 10, "harms": [harm], "ended_at": None, "why": None,
    }  # fmt: skip
    return RolloutInfo.model_validate(given | changes)


def a_round(number: int, **changes: object) -> RoundInfo:
    given: dict[str, Any] = dict.fromkeys(RoundInfo.model_fields) | {"number": number, "started_at": NOW}
    return RoundInfo.model_validate(given | changes)


def model_info(**changes: object) -> ModelInfo:
    given = {
        "id": "m" * 64, "status": "champion", "architecture": "custom_cnn", "dataset_id": "d", "round": None,
        "created_at": NOW, "status_changed_at": NOW,
    }  # fmt: skip
    return ModelInfo.model_validate(given | changes)


def every_part() -> list[str]:
    """One of each part, with what a caller may have written in it."""
    evil = answer(decision="review", reasons=[{"code": "refer", "text": EVIL}], model={"id": EVIL, "status": EVIL})
    flag = FlagAnswer.model_validate({"id": "f", "prediction_id": "0" * 32, "review": {"state": "new"}, "text": EVIL})
    names = NAMES | {"nv": EVIL}
    return [
        answer_html(evil, names, frozenset({"mel"}), details()),
        problem_html(EVIL),
        header_html(None, EVIL),
        flag_html(flag),
        fate_html(None, [event("amended", label=EVIL, by=EVIL)], NAMES),
        history_html([evil], {evil.id: [event("confirmed", label="nv", by="annotator")]}, names),
        map_html(explanation(target="nv"), names, None),
        models_html([model_info(architecture=EVIL)]),
        details_html(details(status_text=EVIL), names),
        rollout_html(rollout(why=EVIL)),
        rounds_html([a_round(1, why=EVIL)]),
    ]


def test_what_came_from_outside_is_escaped() -> None:
    for html in every_part():
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_no_part_sounds_like_a_verdict() -> None:
    assert not VERDICTS.search("".join(every_part()))


@pytest.mark.parametrize("decision", ["answered", "review", "urgent", "retake"])
def test_no_decision_sounds_like_a_verdict(decision: str) -> None:
    html = answer_html(answer(decision=decision), NAMES, frozenset({"mel"}))
    assert not VERDICTS.search(html + waiting_html() + header_html(None, "no model"))
    assert f"rl-decision {decision}" in html


def test_the_answer_shows_what_matters() -> None:
    html = answer_html(answer(), NAMES, frozenset({"mel"}))
    assert "Most likely: Melanocytic nevus, 90 %" in html
    assert html.index("Melanocytic nevus") < html.index("malignant class")
    assert "provisional" in html
    assert "without consent" not in html
    assert "Why" not in html
    assert NOT_KNOWN in html
    assert "without consent" in answer_html(answer(decision="review"), NAMES, frozenset())
    why = answer(decision="review", reasons=[{"code": "refer", "text": "It is high."}], review={"state": "new"})
    html = answer_html(why, NAMES, frozenset(), details())
    assert html.index("Why an annotator is asked") < html.index("It is high.")
    nothing = answer(label=None, confidence=None, probabilities=None, prediction_set=[], decision="review")
    assert "No answer could be computed" in answer_html(nothing, NAMES, frozenset())


def test_how_often_such_scores_were_right_is_said_with_what_it_rests_on() -> None:
    text = scores_text(0.8, [BAND])
    assert "Of 50 lesions of the calibration data with a score from 80 to 90 %" in text
    assert "right one for 40: 80 % (95 % interval 66 to 90 %)" in text
    assert "few" not in text
    assert "3 are few" in scores_text(0.85, [BAND.model_copy(update={"lesions": 3, "right": 3})])
    assert "No calibration image" in scores_text(0.9, [BAND])
    top = ScoreBand(low=0.9, high=1.0, lesions=9, right=9, right_ci=(0.6, 1.0))
    assert "from 90 to 100 %" in scores_text(1.0, [BAND, top])
    assert scores_text(0.8, []) == NOT_KNOWN


def test_what_the_set_means_is_said() -> None:
    text = set_text(["nv", "mel"], NAMES, details())
    assert text.startswith("2 classes cannot be excluded: Melanocytic nevus, Melanoma.")
    assert "at least 90 of 100" in text
    assert "for Melanoma: for these it holds taken together" in text
    assert "not ruled out" in text
    assert "for every class: for these" in set_text(["nv"], NAMES, details(pooled_classes=["nv", "mel"]))
    assert set_text(["nv"], NAMES, None) == "One class cannot be excluded: Melanocytic nevus."
    assert "unlike" in set_text([], NAMES, details())


def test_every_event_is_a_sentence() -> None:
    for kind in ("amended", "confirmed", "undecided", "overdue", "recalled"):
        text = event_text(event(kind, label="mel", by="annotator"), NAMES)
        assert text.endswith("(2026-01-01 00:00 UTC).")
    assert event_text(event("amended", label="mel", by="histopathology"), NAMES).startswith("Histopathology says Mel")
    assert fate_html(None, [], NAMES) == ""
    assert "before the annotators" in fate_html(ReviewStatus(state="pushed"), [], NAMES)  # type: ignore[arg-type]


def test_the_layers_are_the_image_and_a_map_that_is_clear_where_nothing_counted() -> None:
    layers = draw_layers(render("mel", seed=1), explanation(), 64)
    kind, data = layers.heat.split(",")
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert kind == "data:image/png;base64"
    assert heat.shape == (64, 64, 4)
    # The bottom left counted for nothing, and the bottom right against the class: neither is drawn.
    assert heat[63, 0, 3] < 10
    assert heat[63, 63, 3] < 10
    assert heat[0, 63, 3] > 200
    make_image = Image.open(io.BytesIO(base64.b64decode(layers.image.split(",")[1])))
    assert make_image.size == (64, 64)
    html = map_html(explanation(versus="nv"), NAMES, layers)
    assert "Melanoma rather than Melanocytic nevus" in html
    assert layers.image in html
    assert layers.heat in html


def test_a_map_says_how_it_was_made_and_how_far_such_maps_can_be_believed() -> None:
    html = map_html(
        explanation(faithfulness={"images": 16, "deletion_auc": 0.3, "deletion_shuffled_auc": 0.5}), NAMES, None
    )
    assert "2 x 2 positions, exact." in html
    assert "changed the answer more than hiding other places" in html
    found = explanation(method="integrated_gradients", exact=False, layer=None, steps=100, completeness_error=0.012)
    assert "differentiated, 100 steps, its sum is 1.2 % off." in map_html(found, NAMES, None)


def test_models_rollouts_and_rounds_say_what_they_rest_on() -> None:
    html = details_html(details(), NAMES)
    assert "On 9 validation images of 8 lesions" in html
    assert "50.0 %" in html
    assert "not known" in html
    assert "80 to 90 %" in html
    assert "No figures were kept" in details_html(details(metrics={}, scores=[]), NAMES)
    assert "No candidate is on its way" in rollout_html(None)
    assert "canary, 10 %" in rollout_html(rollout())
    assert "No models yet" in models_html([])
    assert "No rounds yet" in rounds_html([])
    measured = {"labels_from_annotators": 7, "balanced_accuracy": 0.6, "balanced_accuracy_ci": (0.5, 0.7)}
    html = rounds_html([a_round(1, **measured), a_round(2)])
    assert "round 1: 7 labels, 60 %" in html
    assert "60.0 % (50 to 70 %)" in html
    assert html.index("<td>2</td>") < html.index("<td>1</td>")


def test_who_is_signed_in_is_said() -> None:
    caller = {"id": "k", "organisation": "clinic", "scopes": ["predict", "flag"], "sandbox": True}
    text = caller_text(CallerInfo.model_validate(caller))
    assert text.startswith("Signed in: organisation clinic; may ask, object.")
    assert "sandbox" in text
    assert caller_text(CallerInfo.model_validate(caller | {"id": "local"})).startswith("No key is needed")
