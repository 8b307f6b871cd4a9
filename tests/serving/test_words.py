"""Texts: every reason has a sentence, and none is a verdict on a patient."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serving
from records.arrays import FloatArray
from records.bundles import OperatingPoints, ReferPoint
from records.ids import utc_now
from records.taxonomy import Taxonomy, load_taxonomy
from records.types import Decision, FlagReason, Prediction, ReasonCode
from serving.page.prediction_view import prediction_html
from serving.responses import prediction_body
from serving.triage import TriageRules, triage
from serving.words import DECISION_TITLES, FLAG_WORDS, QUALITY_WORDS, reason_text, status_text
from vision.inference.suitability import NOTHING_KNOWN, Suitability

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


def test_reasons_name_their_probabilities() -> None:
    given = prediction()
    assert "41 %" in reason_text(ReasonCode.LOW_CONFIDENCE, given, TAXONOMY)
    assert "Melanoma, Melanocytic nevus" in reason_text(ReasonCode.PREDICTION_SET, given, TAXONOMY)
    refer = reason_text(ReasonCode.REFER, given, TAXONOMY)
    assert "Melanoma 14 %" in refer
    assert "together 34 %" in refer
    assert "No class" in reason_text(ReasonCode.PREDICTION_SET, prediction(prediction_set=[]), TAXONOMY)


def test_a_bad_image_says_what_is_bad_about_it() -> None:
    for reason, text in QUALITY_WORDS.items():
        assert reason_text(ReasonCode.BAD_IMAGE, prediction(quality_reason=reason), TAXONOMY) == text
    assert reason_text(ReasonCode.BAD_IMAGE, prediction(quality_reason=None), TAXONOMY) not in QUALITY_WORDS.values()


def test_without_malignant_classes_a_referral_names_the_key_classes_only() -> None:
    said = TAXONOMY.model_dump()
    none_malignant = Taxonomy.model_validate(
        {**said, "classes": [one | {"malignant": False} for one in said["classes"]]}
    )
    refer = reason_text(ReasonCode.REFER, prediction(), none_malignant)
    assert "Melanoma 14 %" in refer
    assert "malignant classes together" not in refer


def test_a_provisional_model_is_named_as_such() -> None:
    assert "provisional" in status_text("provisional")
    assert "not passed" in status_text("provisional")
    assert "not" not in status_text("champion")


def test_every_decision_and_flag_has_words() -> None:
    assert set(DECISION_TITLES) == set(Decision)
    assert set(FLAG_WORDS) == set(FlagReason)


def texts_of(path: Path) -> list[str]:
    """Every string of a module that is not a docstring; a template as a whole."""
    if path.suffix == ".html":
        return [path.read_text()]
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_no_text_of_serving_sounds_like_a_verdict() -> None:
    texts = {path: texts_of(path) for path in Path(serving.__file__).parent.rglob("*.*")
             if path.suffix in (".py", ".html")}  # fmt: skip
    assert any(path.suffix == ".html" for path in texts)
    assert sum(map(len, texts.values())) > 500
    assert not {path.name: [t for t in found if VERDICTS.search(t)] for path, found in texts.items()
                if any(map(VERDICTS.search, found))}  # fmt: skip
    assert not [c.name for c in TAXONOMY.classes if VERDICTS.search(c.name)]


points = st.builds(
    lambda mel, malignant, urgent, q: OperatingPoints(
        refer={"mel": refer_point(mel)},
        refer_malignant=refer_point(malignant),
        urgent_threshold=urgent,
        conformal_thresholds=dict.fromkeys(TAXONOMY.codes, q),
    ),
    st.floats(0.001, 1.0),
    st.floats(0.001, 1.0),
    st.none() | st.floats(0.001, 1.0),
    st.floats(0.0, 1.0),
)
rules = st.builds(TriageRules, st.floats(0, 1), st.integers(1, 7), st.floats(0, 1))
suitable = st.sampled_from([NOTHING_KNOWN, replace(NOTHING_KNOWN, is_out_of_distribution=True)])
rows = st.lists(st.floats(1e-6, 1.0), min_size=7, max_size=7).map(lambda v: np.array(v) ** 4 / np.sum(np.array(v) ** 4))


@given(rows, points, rules, st.floats(0, 1, exclude_max=True), suitable)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_nothing_above_a_threshold_goes_without_review_and_no_text_is_a_verdict(
    row: FloatArray, operating: OperatingPoints, rule: TriageRules, draw: float, suitability: Suitability
) -> None:
    verdict = triage(row, TAXONOMY, operating, rule, draw, suitability)
    stored = prediction(
        label=verdict.label, confidence=verdict.confidence, decision=verdict.decision, reasons=list(verdict.reasons),
        probabilities=dict(zip(TAXONOMY.codes, row.tolist(), strict=True)), prediction_set=list(verdict.prediction_set),
    )  # fmt: skip
    body = prediction_body(stored, None, None, TAXONOMY)
    p_malignant = sum(body.probabilities[code] for code in TAXONOMY.malignant_codes) if body.probabilities else 1.0
    assert operating.refer_malignant is not None
    # Sums of the same numbers in another order differ in their last bit.
    over = p_malignant >= operating.refer_malignant.threshold + 1e-12
    if row[TAXONOMY.index_of("mel")] >= operating.refer["mel"].threshold or over:
        assert body.decision in (Decision.REVIEW, Decision.URGENT)
        assert ReasonCode.REFER in [reason.code for reason in body.reasons]
    if body.decision is Decision.ANSWERED:
        assert not body.reasons
    names = {c.code: c.name for c in TAXONOMY.classes}
    page = prediction_html(body, names, frozenset(TAXONOMY.malignant_codes))
    assert not VERDICTS.search(body.model_dump_json() + page)


@given(rows, points, st.integers(0, 6), st.sampled_from([np.nan, np.inf, -np.inf]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_non_finite_prediction_goes_to_review_whatever_the_thresholds(
    row: FloatArray, operating: OperatingPoints, index: int, broken: float
) -> None:
    row = row.copy()
    row[index] = broken
    assert triage(row, TAXONOMY, operating, TriageRules(0.0, 7, 0.0), 0.5).decision is Decision.REVIEW


def refer_point(threshold: float) -> ReferPoint:
    return ReferPoint(
        threshold=threshold, sensitivity_floor=0.9, proven=True, sensitivity=1.0, sensitivity_lower_bound=0.9,
        specificity=0.5, lesions=40,
    )  # fmt: skip
