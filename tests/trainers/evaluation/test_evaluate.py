"""Evaluations against hand numbers, and splits read from a real ledger with their audit."""

import json
import time

import numpy as np
import pytest

from images.importer import open_dataset
from records import audit
from records.bundles import OperatingPoints, ReferPoint
from records.datasets import DatasetVersion
from records.errors import ContractError, DataError, TaxonomyError
from records.taxonomy import Taxonomy, load_taxonomy
from records.types import AuditEvent, Split
from trainers.evaluation.evaluate import SplitPredictions, evaluate, predict_split
from vision.calibration.operating import exact_interval
from vision.inference.loaded import load_model

TAXONOMY = load_taxonomy("ham10000")
CODES = list(TAXONOMY.codes)
MEL, NV = CODES.index("mel"), CODES.index("nv")


def operating_points(threshold=0.3, q=0.8):
    return OperatingPoints(
        refer={
            "mel": ReferPoint(
                threshold=threshold, sensitivity_floor=0.9, proven=True, sensitivity=0.95,
                sensitivity_lower_bound=0.9, specificity=0.6, lesions=60,
            )
        },
        conformal_thresholds=dict.fromkeys(CODES, q),
    )  # fmt: skip


def predictions_of(rows, lesion_ids=None):
    """Rows of (truth, {class: p}); what is left of 1 goes to vasc."""
    probabilities = np.zeros((len(rows), 7))
    for i, (_, given) in enumerate(rows):
        for code, p in given.items():
            probabilities[i, CODES.index(code)] = p
        probabilities[i, CODES.index("vasc")] += 1 - sum(given.values())
    ids = lesion_ids or [None] * len(rows)
    images = [f"image{i:03}" for i in range(len(rows))]
    return SplitPredictions(
        model_id="m" * 64,
        image_ids=images,
        group_ids=[lesion or image for lesion, image in zip(ids, images, strict=True)],
        lesion_ids=ids,
        labels=np.array([CODES.index(truth) for truth, _ in rows]),
        logits=np.log(probabilities + 1e-9).astype(np.float32),
        probabilities=probabilities,
    )


def random_predictions(count, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.choice(7, size=count, p=[0.05, 0.08, 0.12, 0.02, 0.12, 0.58, 0.03])
    logits = generator.normal(size=(count, 7)) + 2 * np.eye(7)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    lesions = [f"L{i // 2}" for i in range(count)]
    images = [f"{i:05}" for i in range(count)]
    return SplitPredictions("m" * 64, images, lesions, list(lesions), labels, logits.astype(np.float32), probabilities)


def test_the_key_class_is_counted_per_lesion_by_the_mean_probability():
    rows = [
        ("mel", {"mel": 0.5, "nv": 0.5}), ("mel", {"mel": 0.2, "nv": 0.8}),  # lesion A: 0.35, referred
        ("mel", {"mel": 0.1, "nv": 0.9}),                                    # lesion B: 0.10, missed
        ("nv", {"mel": 0.4, "nv": 0.6}), ("nv", {"mel": 0.0, "nv": 1.0}),    # lesion C: 0.20, not referred
        ("nv", {"mel": 0.3, "nv": 0.7}),                                     # lesion D: 0.30, referred
        ("bcc", {"bcc": 1.0}),                                               # no lesion id: its own lesion
    ]  # fmt: skip
    result = evaluate(predictions_of(rows, ["A", "A", "B", "C", "C", "D", None]), TAXONOMY, operating_points())
    assert (result.images, result.lesions, result.groups) == (7, 5, 5)
    key = result.key_class
    assert (key.name, key.threshold, key.lesions, key.floor, key.proven) == ("mel", 0.3, 2, 0.9, True)
    assert key.sensitivity == 1 / 2
    assert key.specificity == 2 / 3
    # Per image, by the most probable class (0.5 against 0.5 goes to the first in class order, mel).
    assert result.per_class["mel"].sensitivity == 1 / 3
    assert result.per_class["mel"].specificity == 1.0
    assert result.per_class["nv"].sensitivity == 1.0
    assert result.per_class["nv"].specificity == 2 / 4
    assert result.per_class["nv"].precision == 3 / 5
    assert result.accuracy == 5 / 7
    assert result.balanced_accuracy == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert result.confusion_matrix[MEL][NV] == 2
    assert [result.per_class[c].support for c in ("mel", "nv", "bcc")] == [3, 3, 1]
    assert [result.per_class[c].lesions for c in ("mel", "nv", "bcc")] == [2, 2, 1]


def test_what_is_undefined_is_null_with_its_reason_and_never_nan():
    result = evaluate(predictions_of([("nv", {"nv": 0.9}), ("bkl", {"nv": 0.8})]), TAXONOMY, operating_points())
    text = result.model_dump_json()
    assert "NaN" not in text
    loaded = json.loads(text)
    assert loaded["per_class"]["mel"]["sensitivity"] is None
    assert loaded["per_class"]["mel"]["sensitivity_ci"] is None
    assert loaded["per_class"]["bkl"]["precision"] is None
    assert loaded["key_class"]["sensitivity"] is None
    reasons = loaded["undefined"]
    assert reasons["per_class.mel.sensitivity"] == "no image of mel"
    assert reasons["per_class.bkl.precision"] == "no image was predicted as bkl"
    assert reasons["key_class.sensitivity"] == "no lesion of mel"
    assert "over bkl, nv only" in reasons["balanced_accuracy"]
    assert result.per_class["bkl"].sensitivity == 0.0


def test_one_class_alone_has_no_auc_and_no_specificity():
    result = evaluate(predictions_of([("mel", {"mel": 0.9}), ("mel", {"mel": 0.8})]), TAXONOMY, operating_points())
    assert result.macro_auc is None
    assert result.per_class["mel"].specificity is None
    assert result.key_class.specificity is None
    assert result.undefined["key_class.specificity"] == "every lesion is mel"


def test_without_operating_points_their_figures_are_undefined():
    result = evaluate(predictions_of([("mel", {"mel": 0.9}), ("nv", {"nv": 0.8})]), TAXONOMY, None)
    assert (result.answered_share, result.mean_set_size) == (None, None)
    assert (result.key_class.threshold, result.key_class.sensitivity) == (None, None)
    assert "no operating point" in result.undefined["key_class.sensitivity"]
    assert result.undefined["answered_share"] == "the model has no operating points"


def test_a_taxonomy_without_key_class_says_so():
    plain = Taxonomy(**{**TAXONOMY.model_dump(), "key_classes": ()})
    result = evaluate(predictions_of([("mel", {"mel": 0.9})]), plain, operating_points())
    assert result.key_class is None
    assert "declares no key class" in result.undefined["key_class"]


def test_answered_share_and_set_size_by_hand():
    rows = [("nv", {"nv": 0.9, "bkl": 0.1}), ("nv", {"nv": 0.6, "bkl": 0.4}), ("nv", {"nv": 0.6, "mel": 0.4})]
    result = evaluate(predictions_of(rows), TAXONOMY, operating_points(q=0.7))
    assert result.mean_set_size == pytest.approx((1 + 2 + 2) / 3)
    assert result.answered_share == pytest.approx(2 / 3)


def test_intervals_hold_the_estimate_and_are_exact_at_the_ends():
    predictions = random_predictions(600)
    result = evaluate(predictions, TAXONOMY, operating_points())
    for name in ("balanced_accuracy", "accuracy"):
        low, high = getattr(result, f"{name}_ci")
        assert low < getattr(result, name) < high
    low, high = result.key_class.sensitivity_ci
    assert low <= result.key_class.sensitivity <= high
    perfect = evaluate(predictions_of([("nv", {"nv": 0.9})] * 20), TAXONOMY, operating_points())
    assert perfect.accuracy_ci == pytest.approx(exact_interval(20, 20))
    assert perfect.per_class["nv"].sensitivity_ci[0] < 0.9


def test_a_stated_prevalence_moves_predictions_and_leaves_thresholds_alone():
    found = random_predictions(300)
    priors = dict.fromkeys(CODES, 1 / 7)
    plain = evaluate(found, TAXONOMY, operating_points())
    stated = evaluate(
        found, TAXONOMY, operating_points(), prevalence=dict.fromkeys(CODES, 0.02) | {"nv": 0.88}, priors=priors
    )
    assert stated.per_class["nv"].sensitivity > plain.per_class["nv"].sensitivity
    assert stated.prevalence["nv"] == 0.88
    assert (stated.key_class, stated.answered_share) == (plain.key_class, plain.answered_share)


def test_at_equal_prevalence_every_class_has_the_same_say():
    # A quarter of the weight of a class with a tenth of the other's share is the better bet, then.
    found = predictions_of([("mel", {"mel": 0.25, "nv": 0.75}), ("nv", {"mel": 0.05, "nv": 0.95})])
    priors = dict.fromkeys(CODES, 0.0) | {"mel": 0.1, "nv": 0.8, "vasc": 0.1}
    report = evaluate(found, TAXONOMY, None, priors=priors)
    assert report.balanced_accuracy == 0.5
    even = report.at_equal_prevalence
    assert (even.balanced_accuracy, even.sensitivity["mel"], even.sensitivity["nv"]) == (1.0, 1.0, 1.0)
    assert even.sensitivity["bcc"] is None
    assert evaluate(found, TAXONOMY, None).at_equal_prevalence is None


def test_coverage_counts_one_image_per_lesion():
    rows = [("nv", {"nv": 0.9}), ("nv", {"nv": 0.1, "mel": 0.9}), ("mel", {"mel": 0.1, "nv": 0.9})]
    coverage = evaluate(predictions_of(rows, ["A", "A", None]), TAXONOMY, operating_points(q=0.5)).coverage
    assert (coverage.overall, coverage.per_class["nv"], coverage.per_class["mel"]) == (0.5, 1.0, 0.0)
    assert coverage.per_class["bcc"] is None


def test_one_lesion_half_right_does_not_look_certain():
    result = evaluate(predictions_of([("mel", {"mel": 0.9}), ("mel", {"nv": 0.9})], ["A", "A"]), TAXONOMY, None)
    assert result.per_class["mel"].sensitivity == 0.5
    assert result.per_class["mel"].sensitivity_ci == pytest.approx(exact_interval(0, 1))


def test_equal_input_gives_equal_figures_in_any_order():
    predictions = random_predictions(200)
    order = np.random.default_rng(1).permutation(200)
    shuffled = SplitPredictions(
        "m" * 64, [predictions.image_ids[i] for i in order], [predictions.group_ids[i] for i in order],
        [predictions.lesion_ids[i] for i in order], predictions.labels[order], predictions.logits[order],
        predictions.probabilities[order],
    )  # fmt: skip
    one, other = (evaluate(p, TAXONOMY, operating_points()) for p in (predictions, shuffled))
    assert one.model_dump(exclude={"ece"}) == other.model_dump(exclude={"ece"})
    assert one.ece == pytest.approx(other.ece)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_refused(bad):
    predictions = random_predictions(10)
    predictions.probabilities[3, 2] = bad
    with pytest.raises(ContractError, match="row 3 of 10"):
        evaluate(predictions, TAXONOMY, operating_points())


def test_nothing_cannot_be_evaluated():
    with pytest.raises(ContractError, match="at least one"):
        evaluate(predictions_of([]), TAXONOMY, None)


def test_a_thousand_images_are_evaluated_in_seconds():
    predictions = random_predictions(1000)
    started = time.process_time()
    evaluate(predictions, TAXONOMY, operating_points())
    # Processor time, and many times what it takes: a busy machine fails no test.
    assert time.process_time() - started < 10


# ------------------------------------------------------------------ splits


@pytest.fixture(scope="module")
def bundle(filled_store, make_bundle):
    return make_bundle(filled_store, "custom_cnn", side_px=32)


@pytest.fixture(scope="module")
def dataset(filled_store):
    return open_dataset(filled_store, None)


def reads(store):
    with store.ledger.read() as tx:
        return [(e.actor, e.action, e.subject) for e in tx.find(AuditEvent) if e.action.endswith(".read")]


def test_val_is_predicted_in_order_and_leaves_no_audit_event(filled_store, bundle, dataset):
    before = reads(filled_store)
    predictions = predict_split(filled_store, bundle, dataset, Split.VAL, "test")
    rows = dataset.split(Split.VAL)
    assert predictions.image_ids == rows["image_id"].tolist()
    assert predictions.group_ids == rows["group_id"].tolist()
    assert [CODES[label] for label in predictions.labels] == rows["label"].tolist()
    assert all(predictions.lesion_ids)
    assert predictions.split_reads is None
    assert reads(filled_store) == before


@pytest.mark.parametrize("split", [Split.GATE, Split.TEST])
def test_every_read_of_a_guarded_split_is_audited_and_counted(split, filled_store, bundle, dataset):
    before = reads(filled_store)
    first = predict_split(filled_store, bundle, dataset, split, "round 1")
    second = predict_split(filled_store, bundle, dataset, split, "round 2")
    assert reads(filled_store)[len(before) :] == [
        ("round 1", f"{split.value}.read", dataset.id),
        ("round 2", f"{split.value}.read", dataset.id),
    ]
    assert second.split_reads == first.split_reads + 1
    assert audit.verify(filled_store.ledger, filled_store.home) == []
    assert evaluate(second, TAXONOMY, None).split_reads == second.split_reads


def test_a_loaded_model_gives_the_same_predictions_and_another_one_is_refused(
    filled_store, bundle, dataset, make_bundle
):
    model = load_model(bundle)
    ours = predict_split(filled_store, bundle, dataset, Split.VAL, "test", model=model)
    assert (ours.probabilities == predict_split(filled_store, bundle, dataset, Split.VAL, "test").probabilities).all()
    other = make_bundle(filled_store, "custom_cnn", 1, 32)
    with pytest.raises(ContractError, match="is not the one"):
        predict_split(filled_store, other, dataset, Split.VAL, "test", model=model)


def test_an_empty_split_and_a_foreign_taxonomy_are_refused_before_anything_is_read(filled_store, bundle, dataset):
    before = reads(filled_store)
    empty = DatasetVersion(dataset.id, dataset.taxonomy_hash, dataset.rows[dataset.rows["split"] != "test"])
    with pytest.raises(DataError, match="split test"):
        predict_split(filled_store, bundle, empty, Split.TEST, "test")
    foreign = DatasetVersion(dataset.id, "f" * 64, dataset.rows)
    with pytest.raises(TaxonomyError, match="taxonomy"):
        predict_split(filled_store, bundle, foreign, Split.TEST, "test")
    assert reads(filled_store) == before
