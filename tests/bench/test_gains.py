"""Gains of one recipe on another: weighted figures by hand, against sklearn, and rows with their intervals."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bench.train import heads, levers
from bench.train.gains import FIGURES, Judge, sensitivity_at, weighted_auc
from bench.train.heads import Heads
from images.importer import open_dataset
from records.bundles import Calibration
from records.store import Store
from records.types import AuditEvent
from tests.models import write_random_bundle
from trainers.settings import TrainersSettings


def test_weighted_figures_are_those_of_repeated_rows() -> None:
    random = np.random.default_rng(0)
    scores, cases = random.random(40), random.random(40) < 0.4
    weights = random.integers(0, 3, (5, 40)).astype(np.float32)
    for row, found in zip(weights.astype(int), weighted_auc(scores, cases, weights), strict=True):
        assert found == pytest.approx(roc_auc_score(np.repeat(cases, row), np.repeat(scores, row)))
    for row, found in zip(weights.astype(int), sensitivity_at(scores, cases, weights, 0.72), strict=True):
        drawn, values = np.repeat(cases, row), np.repeat(scores, row)
        shares = [(values[drawn] >= at).mean() for at in values if (values[~drawn] < at).mean() >= 0.72 - 1e-9]
        assert found == pytest.approx(max(shares))


def test_a_row_says_what_a_recipe_gains(filled_store: Store) -> None:
    judge = Judge.of(filled_store, open_dataset(filled_store, None))
    right = 0.9 * np.eye(judge.num_classes)[judge.labels] + 0.1 / judge.num_classes
    blind = np.full(right.shape, 1 / judge.num_classes) + np.linspace(0, 1e-6, len(right))[:, None]
    blind /= blind.sum(axis=1, keepdims=True)
    base, same, better = (judge.row(name, [one, one]) for name, one in (("base", blind), ("same", blind), ("b", right)))
    assert [set(row) - {"name"} for row in (base, same)] == [
        {key for figure in FIGURES for key in (figure, f"{figure}_{kind}")} for kind in ("interval", "gain")
    ]
    assert same["equal_prevalence_gain"] == [0.0, 0.0, 0.0]
    assert better["equal_prevalence"] == [1.0, 1.0, 1.0]
    gain, low, high = better["macro_auc_gain"]
    assert low <= gain <= high
    assert gain == pytest.approx(1 - base["macro_auc"][0], abs=1e-3)
    assert better["sensitivity"][0] == 1.0


def test_models_of_two_recipes_are_compared_on_val_only(filled_store: Store, tmp_path: Path) -> None:
    dataset = open_dataset(filled_store, None)
    calibration = Calibration(temperature=1.0, bias=[0.0] * 7, priors=dict.fromkeys(filled_store.taxonomy.codes, 1 / 7))
    bundles = [
        write_random_bundle(
            filled_store, "custom_cnn", seed=seed, side_px=32, dataset_id=dataset.id, calibration=calibration
        )
        for seed in (11, 12)
    ]
    base, against = levers.compared(filled_store, bundles[:1], bundles[1:], tmp_path)
    assert against["macro_auc_gain"][0] == pytest.approx(against["macro_auc"][0] - base["macro_auc"][0], abs=2e-4)
    with filled_store.ledger.read() as tx:
        read = {event.details["model_id"] for event in tx.find(AuditEvent) if event.action.endswith(".read")}
    assert not read & {bundle.id for bundle in bundles}


def test_heads_share_features_and_are_read_with_views_and_context(
    filled_store: Store, toy_settings: TrainersSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "BASE", {**heads.BASE, "epochs": 2})
    dataset = open_dataset(filled_store, None)
    trainer = Heads(filled_store, dataset, toy_settings.with_values({"model.name": "resnet18", "model.side_px": 16}))
    trained = [trainer.train(values, 0) for values in ({}, {"loss.label_smoothing": 0.1}, {})]
    (features,) = trainer.kept.values()
    assert features.seconds > 0
    assert np.array_equal(trained[0][1], trained[2][1])
    assert not np.array_equal(trained[0][1], trained[1][1])
    judge = Judge.of(filled_store, dataset)
    judge.row("base", [trainer.probabilities(trained[0][1])])
    views = trainer.views(trained[0][0])
    assert views.shape == (8, len(judge.labels), 512)
    assert np.allclose(views[0], features.rows.take(trainer_val(trainer)), atol=1e-4)
    for name, found in heads.read_otherwise(trainer, [trained[0][0]], [trained[0][1]]).items():
        assert judge.row(name, found)["macro_auc"][0] > 0


def trainer_val(trainer: Heads) -> np.ndarray:
    """Return the rows of val among the images of a plan."""
    plan = heads.plan_data(trainer.dataset, trainer.store.taxonomy)
    return np.arange(plan.num_train, len(plan.labels))
