"""The decision rule: which class is the label, what its prediction set has to do with it, and the operating points."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from records.arrays import FloatArray, IntArray
from records.bundles import DecisionRule, OperatingPoints, Rule, content_id, read_bundle
from records.errors import ConfigError, ContractError, IntegrityError
from records.taxonomy import DiagnosisClass, KeyClass, Taxonomy, load_taxonomy
from vision.calibration.decision import RULES, decision_rule, labels_of, sets_of
from vision.calibration.operating import answered, at_point, fit_operating_points, gather_lesions
from vision.calibration.scaling import reweight
from vision.inference.graph import DecisionGraph, ForwardGraph
from vision.inference.loaded import load_model, plain_network

TAXONOMY = load_taxonomy("ham10000")
CODES = TAXONOMY.codes
SHARES = dict(zip(CODES, (0.03, 0.05, 0.11, 0.01, 0.11, 0.67, 0.02), strict=True))
rows = st.lists(st.floats(1e-6, 1.0), min_size=7, max_size=7).map(lambda v: np.array(v) ** 3 / np.sum(np.array(v) ** 3))


def drawn(count: int, seed: int) -> tuple[FloatArray, IntArray]:
    """Calibrated probabilities of a network with some skill, and labels at the shares above."""
    random = np.random.default_rng(seed)
    shares = np.array(list(SHARES.values()))
    labels = random.choice(7, size=count, p=shares)
    evidence = random.normal(size=(count, 7)) + 2.0 * np.eye(7)[labels]
    # Bayes: unit normal evidence of mean 2 in the true class has the log likelihood ratio 2 x.
    return softmax(2.0 * evidence + np.log(shares), axis=1), labels


def fitted(probabilities: FloatArray, labels: IntArray, rule: Rule) -> OperatingPoints:
    ids = [f"{number:064x}" for number in range(len(labels))]
    lesions = gather_lesions(ids, [None] * len(ids), labels, probabilities)
    return fit_operating_points(lesions, probabilities, TAXONOMY, decision=decision_rule(rule, TAXONOMY, SHARES))


@given(rows)
def test_natural_is_the_most_probable_class(row: FloatArray) -> None:
    assert labels_of(row[None], decision_rule("natural", TAXONOMY, SHARES))[0] == row.argmax()


@given(rows)
def test_even_is_the_most_probable_class_at_equal_shares(row: FloatArray) -> None:
    equal = reweight(row[None], SHARES, dict.fromkeys(CODES, 1.0))
    label = labels_of(row[None], decision_rule("even", TAXONOMY, SHARES))[0]
    assert equal[0, label] == pytest.approx(equal.max())


@given(rows)
def test_cost_is_the_label_of_the_smallest_expected_cost(row: FloatArray) -> None:
    costs = np.array([one.miss_cost for one in TAXONOMY.classes])
    expected = [sum(row[other] * costs[other] for other in range(7) if other != label) for label in range(7)]
    label = labels_of(row[None], decision_rule("cost", TAXONOMY, SHARES))[0]
    assert expected[label] == pytest.approx(min(expected))


def test_rows_that_no_weight_can_order_are_left_as_they_are() -> None:
    decision = DecisionRule(rule="cost", weights=[0.0, 2.0])
    assert labels_of(np.array([[1.0, 0.0], [0.5, 0.5], [np.nan, 0.5]]), decision).tolist() == [0, 1, 0]


def test_a_class_without_a_share_is_never_the_label_of_even() -> None:
    decision = decision_rule("even", TAXONOMY, {**SHARES, "df": 0.0})
    assert decision.weights[CODES.index("df")] == 0.0
    assert labels_of(np.eye(7)[[CODES.index("nv")]] * 0.4 + 0.6 / 7, decision)[0] != CODES.index("df")


def test_cost_without_costs_is_refused() -> None:
    free = Taxonomy(
        name="free", version=1,
        classes=tuple(DiagnosisClass(code=code, name=code, malignant=False, miss_cost=0.0) for code in "ab"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="every miss_cost of taxonomy free is 0"):
        decision_rule("cost", free, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("rule", RULES)
def test_sets_keep_their_promise_under_every_rule(rule: Rule) -> None:
    operating = fitted(*drawn(4000, 1), rule)
    probabilities, labels = drawn(4000, 2)
    held = sets_of(probabilities, TAXONOMY, operating)[np.arange(4000), labels]
    by_class = {code: held[labels == index].mean() for index, code in enumerate(CODES)}
    # The rarest class has about 40 images.
    assert min(by_class.values()) > 0.70, by_class
    assert held.mean() > 0.87


def test_a_label_outside_its_set_is_rare_under_even_and_cost() -> None:
    probabilities, labels = drawn(4000, 3)
    outside, plain = {}, fitted(probabilities, labels, "natural")
    for rule in RULES:
        operating = fitted(probabilities, labels, rule)
        assert operating.conformal_thresholds == plain.conformal_thresholds
        sets = sets_of(probabilities, TAXONOMY, operating)
        is_outside = ~sets[np.arange(4000), labels_of(probabilities, operating.decision)]
        outside[rule] = is_outside.mean()
        # Whatever lies outside is not answered without an annotator, and only empty sets are left without their label.
        assert not answered(probabilities, TAXONOMY, operating)[is_outside].any()
        assert rule == "natural" or not sets[is_outside].any()
    assert outside["natural"] > 0.03
    assert outside["even"] < outside["natural"] / 3, outside
    assert outside["cost"] < outside["natural"] / 3, outside


def test_an_empty_set_stays_empty_whatever_the_rule_names() -> None:
    operating = fitted(*drawn(500, 1), "cost").model_copy(update={"conformal_thresholds": dict.fromkeys(CODES, 0.0)})
    assert not sets_of(np.full((1, 7), 1 / 7), TAXONOMY, operating).any()
    assert not answered(np.full((1, 7), 1 / 7), TAXONOMY, operating).any()


def test_the_target_finds_its_share_and_refers_fewer_others() -> None:
    probabilities, labels = drawn(1500, 4)
    ids = [f"{number:064x}" for number in range(1500)]
    first, second = (
        gather_lesions(ids[part], [None] * 750, labels[part], probabilities[part])
        for part in (slice(750), slice(750, None))
    )
    proven = fit_operating_points(first, probabilities[:750], TAXONOMY, val=second)
    target = fit_operating_points(
        first, probabilities[:750], TAXONOMY, val=second, decision=DecisionRule(point="target")
    )
    assert target.refer["mel"].sensitivity >= 0.93
    assert target.refer["mel"].lesions == proven.refer["mel"].lesions + int((second.labels == CODES.index("mel")).sum())
    assert target.refer["mel"].threshold > proven.refer["mel"].threshold
    assert proven.refer["mel"].proven
    assert proven.decision.other.refer == target.refer
    assert at_point(proven, "target") == target
    assert at_point(target, "proven") == proven
    assert at_point(OperatingPoints(), "target") is None
    with pytest.raises(ContractError, match="no val"):
        fit_operating_points(first, probabilities[:750], TAXONOMY, decision=DecisionRule(point="target"))


def test_a_floor_above_the_target_replaces_it() -> None:
    high = TAXONOMY.model_copy(update={"key_classes": (KeyClass(code="mel", sensitivity_floor=0.99),)})
    probabilities, labels = drawn(1000, 5)
    ids = [f"{number:064x}" for number in range(1000)]
    lesions = gather_lesions(ids, [None] * 1000, labels, probabilities)
    found = fit_operating_points(lesions, probabilities, high, val=lesions, decision=DecisionRule(point="target"))
    assert found.refer["mel"].sensitivity_floor == 0.99
    assert found.refer["mel"].sensitivity >= 0.99


def test_a_bundle_of_before_means_what_it_meant(random_bundle, tmp_path: Path) -> None:
    bundle = random_bundle("custom_cnn")
    text = json.loads((bundle.path / "bundle.json").read_text())
    # Nothing was chosen, so nothing was written: such a bundle has the bytes, and the id, that it had before.
    assert "decision" not in text["operating"]
    assert read_bundle(bundle.path).document.operating.decision == DecisionRule()


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        ({"version": 2, "rule": "even", "weights": [1.0] * 7}, "version"),
        ({"rule": "even"}, "does not fit the weights"),
        ({"rule": "even", "weights": [1.0, 2.0]}, "2 weights for 7 classes"),
        ({"rule": "cost", "weights": [-1.0] * 7}, "weights"),
        ({"rule": "loudest", "weights": [1.0] * 7}, "rule"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(random_bundle, tmp_path: Path, decision: dict, said: str) -> None:
    import shutil

    folder = tmp_path / "altered"
    shutil.copytree(random_bundle("custom_cnn").path, folder)
    text = json.loads((folder / "bundle.json").read_text())
    text["operating"]["decision"] = decision
    (folder / "bundle.json").write_text(json.dumps(text))
    with pytest.raises(IntegrityError, match=said):
        read_bundle(folder, content_id(folder))


@pytest.mark.parametrize("rule", RULES)
def test_an_exported_graph_makes_the_same_sets(model_store, make_bundle, rule: Rule) -> None:
    plain = make_bundle(model_store, "custom_cnn", side_px=32)
    pixels = np.random.default_rng(7).integers(0, 256, size=(24, 32, 32, 3), dtype=np.uint8)
    probabilities = load_model(plain, precision="fp32").predict(pixels).probabilities
    # Between two probabilities of each class, so that rounding excludes no other images, and some sets lack the label.
    middle = np.sort(probabilities, axis=0)[11:13].mean(axis=0)
    operating = OperatingPoints(
        conformal_thresholds=dict(zip(CODES, (1.0 - middle).tolist(), strict=True)),
        decision=decision_rule(rule, TAXONOMY, SHARES),
    )
    document = plain.document.model_copy(update={"operating": operating})
    graph = DecisionGraph(ForwardGraph(plain_network(plain), document.geometry, None), document, None).eval()
    with torch.no_grad():
        found = graph(torch.tensor(pixels))["prediction_set"].numpy()
    assert (found == sets_of(probabilities, TAXONOMY, operating)).all()
