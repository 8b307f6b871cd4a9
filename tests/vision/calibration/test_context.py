"""Context adds log p(class | context) - log p(class); what is missing or was never seen adds nothing, to the bit."""

import numpy as np
import pytest
from pydantic import ValidationError

from records.bundles import Calibration
from records.context import ContextColumn, ContextHead
from records.errors import DataError, TaxonomyError
from records.taxonomy import Taxonomy, load_taxonomy
from vision.calibration.context import (
    context_logits,
    fit_calibration_in_context,
    fit_context,
    predict_in_context,
)
from vision.calibration.scaling import apply_calibration, fit_calibration
from vision.metrics.metrics import one_vs_rest_auc

TAXONOMY = Taxonomy.model_validate(
    {"name": "two", "version": 1, "classes": [{"code": c, "name": c, "malignant": c == "b"} for c in "ab"]}
)
COLUMNS = (ContextColumn(name="age", kind="numeric"), ContextColumn(name="sex"), ContextColumn(name="device"))


def people(count: int, seed: int = 0) -> tuple[list[dict[str, object]], np.ndarray]:
    """Class b is old and mostly male; the device says nothing; some values are missing."""
    random = np.random.default_rng(seed)
    labels = (random.random(count) < 0.3).astype(np.int64)
    known: list[dict[str, object]] = []
    for label in labels:
        known.append(
            {
                "age": None if random.random() < 0.1 else float(np.clip(random.normal(30 + 35 * label, 8), 1, 90)),
                "sex": None
                if random.random() < 0.1
                else str(random.choice(["Male", "female"], p=[0.4 + 0.4 * label, 0.6 - 0.4 * label])),
                "device": str(random.choice(["x1", "x2"])),
            }
        )
    return known, labels


@pytest.fixture(scope="module")
def head() -> ContextHead:
    known, labels = people(1500)
    return fit_context(COLUMNS, known, labels, TAXONOMY)  # type: ignore[arg-type]


def test_one_column_gives_the_log_odds_of_its_table() -> None:
    known = [{"sex": "male"}] * 400 + [{"sex": "female"}] * 400
    labels = np.array([1] * 240 + [0] * 160 + [1] * 80 + [0] * 320)
    head = fit_context([ContextColumn(name="sex")], known, labels, TAXONOMY)
    added, _ = context_logits(head, [{"sex": "male"}, {"sex": "FEMALE "}], 2)
    # log p(b | sex) - log p(a | sex), less the same of the shares; a weak prior pulls it towards 0.
    expected = np.log([240 / 160, 80 / 320]) - np.log(320 / 480)
    assert added[:, 1] - added[:, 0] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "known",
    [
        {}, {"age": None, "sex": ""}, {"sex": "diverse"}, {"age": 130.0}, {"age": float("nan")}, {"age": "old"},
        {"device": "x9"}, {"localization": "back"}, {"sex": "  ", "age": -1.0, "device": None},
    ],
)  # fmt: skip
def test_missing_and_unseen_values_change_nothing_to_the_bit(head: ContextHead, known: dict[str, object]) -> None:
    logits = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
    calibration = Calibration(temperature=1.3, bias=[0.1, -0.1])
    others: list[dict[str, object]] = [{"age": 70.0, "sex": "male"}, known, {"sex": "female"}, known]
    found = predict_in_context(logits, calibration, head, others)  # type: ignore[arg-type]
    alone = apply_calibration(logits, calibration)
    assert (found.without == alone).all()
    assert (found.probabilities[[1, 3]] == alone[[1, 3]]).all()
    assert (found.probabilities[[0, 2]] != alone[[0, 2]]).all()
    assert found.uses[0].used == ("age", "sex")
    assert found.uses[1].used == ()
    given = [name for name, value in known.items() if value not in (None, "", "  ") and value == value]
    assert list(found.uses[1].unknown) == [name for name in ("age", "sex", "device") if name in given]


def test_a_numeric_column_is_interpolated_and_not_extrapolated(head: ContextHead) -> None:
    ages = next(part for part in head.columns if part.name == "age")
    low, high = ages.knots[0], ages.knots[-1]
    inside = context_logits(head, [{"age": age} for age in np.linspace(low, high, 50)], 2)[0]
    assert np.abs(np.diff(inside[:, 1] - inside[:, 0])).max() < 1.0
    assert (context_logits(head, [{"age": low - 0.5}, {"age": high + 0.5}], 2)[0] == 0.0).all()
    at_ends = context_logits(head, [{"age": low}, {"age": str(high)}], 2)[0]
    assert at_ends == pytest.approx(np.array([ages.heights[0], ages.heights[-1]]))


def test_temperature_bias_and_weight_are_fitted_together(head: ContextHead) -> None:
    known, labels = people(2000, seed=5)
    logits = np.random.default_rng(2).normal(0, 1, size=(2000, 2)) + 1.5 * np.eye(2)[labels]
    calibration, fitted = fit_calibration_in_context(3.0 * logits, labels, TAXONOMY, head, known)  # type: ignore[arg-type]
    # Image and context are independent within a class here: the whole of the context counts, and what the prior on its
    # values took away.
    assert 0.9 < fitted.weight < 1.5
    assert calibration.temperature == pytest.approx(
        fit_calibration(3.0 * logits, labels, TAXONOMY).temperature, rel=0.1
    )
    found = predict_in_context(3.0 * logits, calibration, fitted, known)  # type: ignore[arg-type]
    with_context, without = (one_vs_rest_auc(labels, p)[1] for p in (found.probabilities, found.without))
    assert with_context > without + 0.02
    for probabilities in (found.probabilities, found.without):
        assert probabilities[:, 1].mean() == pytest.approx(labels.mean(), abs=0.02)


def test_context_that_says_nothing_and_context_that_val_lacks_get_no_weight() -> None:
    random = np.random.default_rng(3)
    labels = random.integers(0, 2, 800)
    known = [{"sex": str(random.choice(["male", "female"]))} for _ in labels]
    head = fit_context([ContextColumn(name="sex")], known, labels, TAXONOMY)
    logits = random.normal(size=(800, 2)) + np.eye(2)[labels]
    calibration, fitted = fit_calibration_in_context(logits, labels, TAXONOMY, head, [{}] * 800)
    assert fitted.weight == pytest.approx(0.0, abs=1e-6)
    plain = fit_calibration(logits, labels, TAXONOMY)
    assert calibration.temperature == pytest.approx(plain.temperature, rel=1e-4)
    assert calibration.bias == pytest.approx(plain.bias, abs=1e-4)
    moved = predict_in_context(logits, calibration, head, known)
    assert np.abs(moved.probabilities - moved.without).max() < 0.05


def test_the_head_is_plain_numbers_and_comes_back(head: ContextHead) -> None:
    again = ContextHead.model_validate_json(head.model_dump_json())
    assert again == head
    with pytest.raises(ValidationError):
        ContextHead.model_validate({**head.model_dump(), "version": 2})


def test_train_without_any_of_the_columns_is_refused() -> None:
    for known in ([{}] * 20, [{"sex": f"s{n}"} for n in range(20)], [{"age": 3.0}] * 3):
        with pytest.raises(DataError, match=r"trainers\.context=false"):
            fit_context(COLUMNS, known, np.zeros(len(known), dtype=np.int64), TAXONOMY)  # type: ignore[arg-type]


def test_a_taxonomy_names_columns_without_changing_its_hash(tmp_path: object) -> None:
    assert [column.name for column in load_taxonomy("ham10000").context] == ["age", "sex", "localization"]
    document = TAXONOMY.model_dump(mode="json")
    assert "context" not in document
    named = Taxonomy.model_validate({**document, "context": [{"name": "device"}, {"name": "age", "kind": "numeric"}]})
    assert named.hash == TAXONOMY.hash


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ("[{name: weight}]", "age, sex, localization, device, site"),
        ("[{name: sex}, {name: sex}]", "twice"),
        ("[{name: age, kind: number}]", "numeric"),
        ("[age]", "context"),
        ("[{kind: numeric}]", "name"),
    ],
)
def test_context_that_cannot_be_is_refused_in_one_sentence(tmp_path: object, context: str, words: str) -> None:
    path = f"{tmp_path}/t.yaml"
    with open(path, "w") as file:
        file.write(
            "name: two\nversion: 1\n"
            "classes: [{code: a, name: A, malignant: false}, {code: b, name: B, malignant: true}]\n"
            f"context: {context}\n"
        )
    with pytest.raises(TaxonomyError, match="context") as caught:
        load_taxonomy(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
