"""The parts of the page: everything from outside is escaped, and no word sounds like a verdict."""

import re

import pytest

from serving.page_html import answer_html, flag_html, header_html, problem_html, waiting_html
from serving.schemas import FlagAnswer, PredictionAnswer

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)
NAMES = {"nv": "Melanocytic nevus", "mel": "Melanoma"}
EVIL = "<script>alert(1)</script>"


def answer(**changes: object) -> PredictionAnswer:
    given = {
        "id": "0" * 32, "request_id": "r", "created_at": "2026-01-01T00:00:00Z", "image_id": "i",
        "model": {"id": "m" * 64, "status": "provisional"}, "label": "nv", "confidence": 0.9,
        "probabilities": {"nv": 0.9, "mel": 0.1}, "prediction_set": ["nv"], "decision": "answered", "reasons": [],
        "review": None, "explanation": None,
    }  # fmt: skip
    return PredictionAnswer.model_validate(given | changes)


def test_what_came_from_outside_is_escaped() -> None:
    evil = answer(decision="review", reasons=[{"code": "refer", "text": EVIL}], model={"id": EVIL, "status": EVIL})
    flag = FlagAnswer.model_validate({"id": "f", "prediction_id": "0" * 32, "review": {"state": "new"}, "text": EVIL})
    pages = [answer_html(evil, NAMES | {"nv": EVIL}, frozenset({"mel"})), problem_html(EVIL), header_html(None, EVIL)]
    for html in (*pages, flag_html(flag)):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


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
    assert "without consent" in answer_html(answer(decision="review"), NAMES, frozenset())
    nothing = answer(label=None, confidence=None, probabilities=None, prediction_set=[], decision="review")
    assert "No answer could be computed" in answer_html(nothing, NAMES, frozenset())
