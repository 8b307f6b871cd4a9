"""Words: every reason has a sentence, and none of them is a verdict on a patient."""

import re
from pathlib import Path

import pytest

import serving
from records.ids import utc_now
from records.taxonomy import load_taxonomy
from records.types import Decision, FlagReason, Prediction, ReasonCode
from serving.words import DECISION_TITLES, FLAG_WORDS, reason_text, status_text

TAXONOMY = load_taxonomy("ham10000")
VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)


def prediction(**changes: object) -> Prediction:
    given = {
        "id": "0" * 32, "request_id": "r", "created_at": utc_now(), "caller": "local", "image_id": "i" * 64,
        "model_id": "m" * 64, "model_status": "champion", "engine": "torch", "precision": "fp32", "num_threads": 1,
        "settings_hash": "s", "label": "nv", "confidence": 0.41, "decision": Decision.REVIEW, "latency_ms": 1.0,
        "probabilities": {"akiec": 0.1, "bcc": 0.1, "bkl": 0.1, "df": 0.05, "mel": 0.14, "nv": 0.41, "vasc": 0.1},
        "prediction_set": ["mel", "nv"],
    }  # fmt: skip
    return Prediction.model_validate(given | changes)


@pytest.mark.parametrize("code", list(ReasonCode))
def test_every_reason_is_one_sentence(code: ReasonCode) -> None:
    text = reason_text(code, prediction(reasons=[code]), TAXONOMY)
    assert text[0].isupper()
    assert text.endswith(".")
    assert not VERDICTS.search(text)


def test_reasons_name_what_was_measured() -> None:
    given = prediction()
    assert "41 %" in reason_text(ReasonCode.LOW_CONFIDENCE, given, TAXONOMY)
    assert "Melanoma, Melanocytic nevus" in reason_text(ReasonCode.PREDICTION_SET, given, TAXONOMY)
    refer = reason_text(ReasonCode.REFER, given, TAXONOMY)
    assert "Melanoma 14 %" in refer
    assert "together 34 %" in refer
    assert "No class" in reason_text(ReasonCode.PREDICTION_SET, prediction(prediction_set=[]), TAXONOMY)


def test_a_provisional_model_is_called_so() -> None:
    assert "provisional" in status_text("provisional")
    assert "not passed" in status_text("provisional")
    assert "not" not in status_text("champion")


def test_every_decision_and_flag_has_words() -> None:
    assert set(DECISION_TITLES) == set(Decision)
    assert set(FLAG_WORDS) == set(FlagReason)


def test_no_text_of_the_room_sounds_like_a_verdict() -> None:
    folder = Path(serving.__file__).parent
    checked = [
        path for path in folder.glob("*.py") if path.name in ("words.py", "page.py", "page_html.py", "answers.py")
    ]
    assert len(checked) == 4
    for path in checked:
        strings = re.findall(r'"([^"\n]*)"', path.read_text())
        assert not [text for text in strings if VERDICTS.search(text)], path.name
