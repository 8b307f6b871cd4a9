"""The parts of the page: values are escaped, and no text sounds like a verdict."""

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from images.synth import render as render_image
from serving.label_value import LabelValueInfo
from serving.page.api import caller_text
from serving.page.heat_map import draw_layers, heat_map_html
from serving.page.history import history_html
from serving.page.label_value import value_html
from serving.page.models import details_html, models_html, rollout_html
from serving.page.prediction_view import (
    NOT_KNOWN,
    accuracy_text,
    event_text,
    flag_html,
    header_html,
    prediction_html,
    review_html,
    set_text,
)
from serving.page.render import problem_html, render
from serving.page.rounds import rounds_html
from serving.schemas import (
    CallerInfo,
    Event,
    Explanation,
    FlagResponse,
    ModelDetails,
    ModelInfo,
    PredictionResponse,
    ReviewStatus,
    RolloutInfo,
    RoundInfo,
    ScoreBand,
)
from tests.serving.label_values import measured_labels, round_value

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)
NAMES = {"nv": "Melanocytic nevus", "mel": "Melanoma"}
EVIL = "<script>alert(1)</script>"
NOW = "2026-01-01T00:00:00Z"
BAND = ScoreBand(low=0.8, high=0.9, lesions=50, right=40, right_ci=(0.66, 0.9))


def prediction(**changes: object) -> PredictionResponse:
    given = {
        "id": "0" * 32, "request_id": "r", "created_at": NOW, "image_id": "i",
        "model": {"id": "m" * 64, "status": "provisional"}, "label": "nv", "confidence": 0.9,
        "probabilities": {"nv": 0.9, "mel": 0.1}, "prediction_set": ["nv"], "decision": "answered", "reasons": [],
        "review": None, "explanation": None, "engine": "torch",
    }  # fmt: skip
    return PredictionResponse.model_validate(given | changes)


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
    guardrail = {"name": "errors", "observations": 9, "events": 1, "limit": 0.01, "evidence": 0.1, "threshold": 3.0}
    given = {
        "id": "r", "created_at": NOW, "champion_id": "a" * 64, "candidate_id": "b" * 64, "stage": "canary",
        "percent": 10, "guardrails": [guardrail], "ended_at": None, "why": None,
    }  # fmt: skip
    return RolloutInfo.model_validate(given | changes)


def a_round(number: int, **changes: object) -> RoundInfo:
    given: dict[str, Any] = dict.fromkeys(RoundInfo.model_fields) | {"number": number, "started_at": NOW}
    return RoundInfo.model_validate(given | changes)


def a_label_value(last_round: dict[str, Any] | None) -> LabelValueInfo:
    record = measured_labels(last_round)
    return LabelValueInfo(**record.model_dump(exclude={"id", "figures"}), **record.figures)


def model_info(**changes: object) -> ModelInfo:
    given = {
        "id": "m" * 64, "status": "champion", "architecture": "custom_cnn", "dataset_id": "d", "round": None,
        "created_at": NOW, "status_changed_at": NOW,
    }  # fmt: skip
    return ModelInfo.model_validate(given | changes)


def every_part() -> list[str]:
    """One of each part, with a script wherever a caller, a table or a setting may put text."""
    evil = prediction(decision="review", reasons=[{"code": "refer", "text": EVIL}], model={"id": EVIL, "status": EVIL})
    flag = FlagResponse.model_validate({"id": "f", "prediction_id": "0" * 32, "review": {"state": "new"}, "text": EVIL})
    names = NAMES | {"nv": EVIL}
    return [
        prediction_html(evil, names, frozenset({"mel"}), details()),
        problem_html(EVIL),
        header_html(None, EVIL),
        flag_html(flag),
        review_html(None, [event("amended", label=EVIL, by=EVIL)], NAMES),
        history_html([evil], {evil.id: [event("confirmed", label="nv", by="annotator")]}, names),
        heat_map_html(explanation(target="nv"), names, None),
        models_html([model_info(architecture=EVIL)]),
        details_html(details(status_text=EVIL), names),
        rollout_html(rollout(why=EVIL)),
        rounds_html([a_round(1, why=EVIL)]),
        value_html(a_label_value({**round_value(), "changed": {EVIL: 1}}), {"mel": EVIL}),
    ]


def test_values_are_escaped() -> None:
    for html in every_part():
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_no_part_sounds_like_a_verdict() -> None:
    assert not VERDICTS.search("".join(every_part()))


@pytest.mark.parametrize("decision", ["answered", "review", "urgent", "retake"])
def test_no_decision_sounds_like_a_verdict(decision: str) -> None:
    html = prediction_html(prediction(decision=decision), NAMES, frozenset({"mel"}))
    assert not VERDICTS.search(html + render("no_image") + header_html(None, "no model"))
    assert f"rl-decision {decision}" in html


def test_a_prediction_shows_decision_reasons_and_probabilities() -> None:
    html = prediction_html(prediction(), NAMES, frozenset({"mel"}))
    assert "Most likely: Melanocytic nevus, 90 %" in html
    assert html.index("Melanocytic nevus") < html.index("malignant class")
    assert "provisional" in html
    assert "without consent" not in html
    assert "Reasons" not in html
    assert NOT_KNOWN in html
    assert "without consent" in prediction_html(prediction(decision="review"), NAMES, frozenset())
    why = prediction(decision="review", reasons=[{"code": "refer", "text": "It is high."}], review={"state": "new"})
    html = prediction_html(why, NAMES, frozenset(), details())
    assert html.index("Reasons for review") < html.index("It is high.")
    nothing = prediction(label=None, confidence=None, probabilities=None, prediction_set=[], decision="review")
    assert "The model made no prediction" in prediction_html(nothing, NAMES, frozenset())


@pytest.mark.parametrize("count", [2, 20, 21, 300])
def test_many_classes_are_summed_up_and_can_be_opened(count: int) -> None:
    names = {f"c{at}": f"Class {at}" for at in range(count)}
    shares = {f"c{at}": 2.0 ** -min(at + 1, count - 1) if at < 40 else 0.0 for at in range(count)}
    seen = prediction(label="c0", confidence=0.5, probabilities=shares, prediction_set=list(names))
    pooled = details(pooled_classes=list(names)[1:])
    html = prediction_html(seen, names, frozenset({"c0", f"c{count - 1}"}), pooled)
    assert html.count('class="rl-bar') == count
    shown = html.partition("<details")[0]
    assert shown.count('class="rl-bar') == (count if count <= 20 else 12)
    if count <= 20:
        assert "<details" not in html
        return
    assert f"{count - 12} other classes, together < 1 %, 1 of them malignant, " in re.sub(r"&lt;", "<", html)
    assert f"{count} classes cannot be excluded: Class 0, " in html
    assert f"Class 11 and {count - 12} more." in html
    metrics = {"val": {"images": 9, "lesions": 8, "per_class": {code: {"support": 1} for code in names}}}
    page = details_html(details(metrics=metrics, pooled_classes=list(names)[1:]), names)
    assert page.index(f"Class by class ({count})") < page.index(f"Class {count - 1}</td>") < page.index("</details>")


def test_accuracy_at_a_score_comes_with_lesions_and_interval() -> None:
    text = accuracy_text(0.8, [BAND])
    assert "Of 50 lesions in the calibration split with a score from 80 to 90 %" in text
    assert "right for 40: 80 % (95 % confidence interval 66 to 90 %)" in text
    assert "uncertain" not in text
    assert "only 3 lesions, this estimate is uncertain" in accuracy_text(
        0.85, [BAND.model_copy(update={"lesions": 3, "right": 3})]
    )
    assert "No calibration image" in accuracy_text(0.9, [BAND])
    top = ScoreBand(low=0.9, high=1.0, lesions=9, right=9, right_ci=(0.6, 1.0))
    assert "from 90 to 100 %" in accuracy_text(1.0, [BAND, top])
    assert accuracy_text(0.8, []) == NOT_KNOWN


def test_a_prediction_set_is_explained_with_its_coverage() -> None:
    text = set_text(["nv", "mel"], NAMES, details())
    assert text.startswith("2 classes cannot be excluded: Melanocytic nevus, Melanoma.")
    assert "at least 90 of 100" in text
    assert "not ruled out" in text
    # One class with few calibration lesions shares its threshold with no other.
    for alone in ([], ["mel"]):
        assert "at least 90 of 100 images of each class." in set_text(["nv"], NAMES, details(pooled_classes=alone))
    every = set_text(["nv"], NAMES, details(pooled_classes=["nv", "mel"]))
    assert "at least 90 of 100 images of all classes together, not of each class" in every
    assert "images of each class" not in every
    some = set_text(["nv"], NAMES | {"df": "Dermatofibroma"}, details(pooled_classes=["mel", "df"]))
    assert "at least 90 of 100 images of each class except Melanoma and Dermatofibroma." in some
    assert "the same share holds for the images of these classes together, not for each class" in some
    assert set_text(["nv"], NAMES, None) == "One class cannot be excluded: Melanocytic nevus."
    assert "The set is empty" in set_text([], NAMES, details())


def test_every_event_is_a_sentence() -> None:
    for kind in ("amended", "confirmed", "undecided", "overdue", "recalled"):
        text = event_text(event(kind, label="mel", by="annotator"), NAMES)
        assert text.endswith("(2026-01-01 00:00 UTC).")
    assert event_text(event("amended", label="mel", by="histopathology"), NAMES).startswith("Histopathology: Mel")
    assert review_html(None, [], NAMES) == ""
    assert "Waiting for annotators" in review_html(ReviewStatus(state="pushed"), [], NAMES)  # type: ignore[arg-type]


def test_layers_are_the_image_and_a_map_that_is_transparent_where_nothing_counted() -> None:
    layers = draw_layers(render_image("mel", seed=1), explanation(), 64)
    kind, data = layers.heat.split(",")
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert kind == "data:image/png;base64"
    assert heat.shape == (64, 64, 4)
    # The bottom left counted for nothing, and the bottom right against the class: neither is drawn.
    assert heat[63, 0, 3] < 10
    assert heat[63, 63, 3] < 10
    assert heat[0, 63, 3] > 200
    image = Image.open(io.BytesIO(base64.b64decode(layers.image.split(",")[1])))
    assert image.size == (64, 64)
    html = heat_map_html(explanation(versus="nv"), NAMES, layers)
    assert "Melanoma compared with Melanocytic nevus" in html
    assert layers.image in html
    assert layers.heat in html


def test_a_heat_map_names_its_method_and_its_faithfulness() -> None:
    html = heat_map_html(
        explanation(faithfulness={"images": 16, "deletion_auc": 0.3, "deletion_shuffled_auc": 0.5}), NAMES, None
    )
    assert "2 x 2 grid, in closed form." in html
    assert "changed the prediction more than masking other regions" in html
    found = explanation(method="integrated_gradients", exact=False, layer=None, steps=100, completeness_error=0.012)
    assert "by differentiation, 100 steps, completeness error 1.2 %." in heat_map_html(found, NAMES, None)


def test_a_model_names_the_sensitivity_of_its_key_class() -> None:
    key = {"name": "mel", "sensitivity": 0.91, "sensitivity_ci": [0.8, 0.97], "specificity": 0.7}
    shown = details_html(
        details(metrics={"val": {"images": 9, "lesions": 8, "per_class": {}, "key_class": key}}), NAMES
    )
    assert "Melanoma: sensitivity at its review threshold" in shown
    assert "91" in shown
    assert "Melanoma: specificity at its review threshold" in shown


def test_models_rollouts_and_rounds_name_splits_and_numbers() -> None:
    html = details_html(details(), NAMES)
    assert "Validation split: 9 images of 8 lesions" in html
    assert "50.0 %" in html
    assert "not available" in html
    assert "80 to 90 %" in html
    assert "No metrics are stored" in details_html(details(metrics={}, scores=[]), NAMES)
    assert "No rollout in progress" in rollout_html(None)
    assert "canary, 10 %" in rollout_html(rollout())
    assert "No models yet" in models_html([])
    assert "No rounds yet" in rounds_html([])
    measured = {"labels_from_annotators": 7, "balanced_accuracy": 0.6, "balanced_accuracy_ci": (0.5, 0.7)}
    html = rounds_html([a_round(1, **measured), a_round(2)])
    assert "round 1: 7 labels, 60 %" in html
    assert "60.0 % (50 to 70 %)" in html
    assert html.index("<td>2</td>") < html.index("<td>1</td>")


def test_what_labels_bought_is_shown_with_intervals() -> None:
    assert "Run <code>relook labels value</code>" in value_html(None, NAMES)
    html = value_html(a_label_value(round_value()), {"mel": "melanoma"})
    assert "720 labels: 60.0 % (54.0 to 66.0)" in html
    assert "+1.2 points (+0.4 to +2.0)" in html
    assert "predicted 59.0 % (56.0 to 62.0) for all of them; found: 60.0 %." in html
    text = " ".join(html.split())
    assert "Annotations of round 2: 41 images got their first label; changed labels: 3 x nv -&gt; mel." in text
    assert "17 images of val are decided right only with them, 6 only without." in text
    melanoma, other = html.split("<td>melanoma</td>")[1].split("<td>df</td>")
    assert "<td>yes</td>" in melanoma
    assert "+4.5 points (+1.5 to +7.5)" in melanoma
    assert "too few labels to tell" in other
    assert "not measurable" in other
    assert "<td>yes</td>" not in other
    assert "No label of this version came from a round" in value_html(a_label_value(None), NAMES)


def test_the_caller_is_named_with_organisation_and_scopes() -> None:
    caller = {"id": "k", "organisation": "clinic", "scopes": ["predict", "flag"], "sandbox": True}
    text = caller_text(CallerInfo.model_validate(caller))
    assert text.startswith("Signed in. Organisation: clinic. Scopes: predict, flag.")
    assert "Sandbox" in text
    assert caller_text(CallerInfo.model_validate(caller | {"id": "local"})).startswith("No key is needed")
