"""A refit: what it was trained on, what fits its thresholds, who says so, and who refuses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster import round_steps
from cluster.gate.run import run_gate
from cluster.label_value import value_of_labels
from cluster.round_steps import RoundContext
from cluster.settings import Settings
from records.bundles import Bundle, write_bundle
from records.datasets import DatasetVersion, build_version
from records.errors import DataError, RefusedError
from records.ids import utc_now
from records.models import find_bundle, register
from records.store import Store
from records.types import RoundRecord, Split
from trainers.evaluation.evaluate import evaluate, predict_split
from trainers.evaluation.report.words import warnings_of
from trainers.fitting.combine import combine
from trainers.fitting.context import FOLDS, cross_fitted
from trainers.fitting.fit import fit
from trainers.fitting.refit import FOLDER, fit_and_register, refit_settings
from trainers.optimization.schedulers import SchedulerSettings, plateau_factors
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings
from vision.calibration.scaling import apply_calibration, fit_calibration

SETTINGS = TrainersSettings(
    model=ModelSettings(side_px=32),
    epochs=2,
    batch_size=16,
    precision="fp32",
    workers=WorkersSettings(threads=1, use_gpu=False),
    augmentation="flips",
    refit=True,
)


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


@pytest.fixture(scope="module")
def refitted(
    filled_store: Store, dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path]:
    run_dir = tmp_path_factory.mktemp("refit")
    return fit_and_register(filled_store, SETTINGS, dataset, run_dir=run_dir, use_ray=False), run_dir


@pytest.fixture(scope="module")
def first(filled_store: Store, refitted: tuple[Bundle, Path]) -> Bundle:
    return find_bundle(filled_store, refitted[0].document.metrics["training"]["first_fit"])


def test_it_is_the_first_recipe_on_train_and_val_for_the_epochs_that_val_chose(
    refitted: tuple[Bundle, Path], first: Bundle, dataset: DatasetVersion
) -> None:
    document, best = refitted[0].document, first.document.metrics["training"]["best_epoch"]
    assert (first.document.trained_on, document.trained_on) == (["train"], ["train", "val"])
    assert document.metrics["training"]["epochs"] == best
    both = dataset.rows[dataset.rows["split"].isin(["train", "val"])]
    assert document.metrics["training"]["train_images"] == len(both)
    assert document.class_priors["nv"] == pytest.approx((both["label"] == "nv").mean())
    # Nothing is fitted on what it was trained on.
    held = dataset.split(Split.CALIBRATION)
    assert document.calibration.priors["nv"] == pytest.approx((held["label"] == "nv").mean())
    assert "val" not in document.metrics
    split, figures = document.measured
    assert (split, figures["images"], "scores" in figures) == ("calibration", len(held), False)
    # The bundle holds a recipe of its own, which gives the same model without the first one.
    recipe = TrainersSettings.model_validate(document.config)
    assert (recipe.train_splits, recipe.stop_after_epoch, recipe.epochs) == ("train_and_val", best, 2)


def test_one_that_was_killed_in_the_second_training_gives_the_same_models(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], tmp_path: Path
) -> None:
    def killed(*position: int) -> None:
        if (tmp_path / FOLDER).is_dir():
            raise KeyboardInterrupt

    settings = SETTINGS.with_values({"workers.checkpoint_every_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        fit_and_register(filled_store, settings, dataset, run_dir=tmp_path, use_ray=False, on_step=killed)
    again = fit_and_register(filled_store, settings, dataset, run_dir=tmp_path, use_ray=False)
    weights = refitted[0].weights()
    assert all(np.array_equal(value, weights[name]) for name, value in again.weights().items())


def test_gate_and_test_are_not_read(filled_store: Store, dataset: DatasetVersion, tmp_path: Path) -> None:
    read: list[Split] = []

    class Watched(DatasetVersion):
        def split(self, split: Split) -> Any:
            read.append(split)
            return super().split(split)

    watched = Watched(dataset.id, dataset.taxonomy_hash, dataset.rows)
    fit_and_register(
        filled_store, SETTINGS.with_values({"epochs": 1}), watched, run_dir=tmp_path, use_ray=False
    )  # fmt: skip
    assert set(read) == {Split.TRAIN, Split.VAL, Split.CALIBRATION}


def test_an_evaluation_counts_the_images_that_the_model_has_seen(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], first: Bundle
) -> None:
    def of(bundle: Bundle, split: Split) -> Any:
        predictions = predict_split(filled_store, bundle, dataset, split, actor="test")
        return evaluate(predictions, filled_store.taxonomy, bundle.document.operating)

    counts = {split: of(refitted[0], split).trained_on for split in (Split.CALIBRATION, Split.TEST)}
    assert counts == {Split.CALIBRATION: 0, Split.TEST: 0}
    seen, unseen = of(refitted[0], Split.VAL), of(first, Split.VAL)
    assert (seen.trained_on, unseen.trained_on) == (seen.images, 0)
    assert "say nothing about how it does" in warnings_of(seen, filled_store.taxonomy)[0]
    assert "say nothing about how it does" not in " ".join(warnings_of(unseen, filled_store.taxonomy))


def test_a_model_of_an_unknown_version_is_measured_and_marked(
    filled_store: Store, dataset: DatasetVersion, make_bundle: Callable[..., Bundle]
) -> None:
    foreign = make_bundle(filled_store, "custom_cnn", 3, 32, dataset_id="e" * 64)
    predictions = predict_split(filled_store, foreign, dataset, Split.VAL, actor="test")
    assert evaluate(predictions, filled_store.taxonomy, None).trained_on is None


def test_the_gate_compares_on_what_no_model_has_seen(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], first: Bundle
) -> None:
    def gate(challenger: Bundle) -> Any:
        settings = Settings.model_validate({"gate": {"bootstrap_resamples": 100}})
        return run_gate(filled_store, settings, challenger, dataset, actor="test")

    report = gate(refitted[0])
    images = len(dataset.split(Split.GATE))
    assert report.images == images
    assert report.checks[0].text == (
        f"{images} of {images} images of the gate split are compared on; no model was trained on them"
    )
    trained_on_it = first.document.model_copy(update={"trained_on": ["train", "gate"]})
    cheat = write_bundle(filled_store, trained_on_it, first.weights(), first.golden(), first.suitability())
    with pytest.raises(DataError, match=f"was trained on all {images} images of the gate split"):
        gate(cheat)


def test_a_round_refits_by_the_setting(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], tmp_path: Path
) -> None:
    record = RoundRecord(id="r" * 26, number=7, started_at=utc_now(), seed=0, settings_hash="0" * 64)
    earlier = {"version": {"dataset_id": dataset.id}, "tune": {"settings": SETTINGS.model_dump(mode="json")}}
    context = RoundContext(filled_store, Settings(), record, tmp_path, earlier)
    result = round_steps.fit(context)
    assert result["model_id"] == refitted[0].id
    assert result["validation_balanced_accuracy"] == refitted[0].document.measured[1]["balanced_accuracy"]
    context.results["fit"] = result
    assert round_steps.evaluate(context)["test"]["trained_on"] == 0


def test_an_ensemble_with_a_refitted_member_is_calibrated_without_val(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], first: Bundle
) -> None:
    settings = TrainersSettings(precision="fp32", workers=WorkersSettings(threads=1, use_gpu=False))
    bundle = combine(filled_store, [first, refitted[0]], [0.5, 0.5], dataset, settings)
    assert bundle.document.trained_on == ["train", "val"]
    assert bundle.document.measured[0] == "calibration"
    with filled_store.ledger.begin() as tx:
        register(tx, bundle)
    predictions = predict_split(filled_store, bundle, dataset, Split.VAL, actor="test")
    assert predictions.seen is not None
    assert predictions.seen.all()


def test_the_value_of_labels_is_measured_with_the_first_model(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], first: Bundle
) -> None:
    with pytest.raises(RefusedError, match=f"--model {first.id[:12]} is the one of its first training"):
        value_of_labels(filled_store, refitted[0], dataset)


def test_val_cannot_judge_what_comes_of_a_refitted_model(
    filled_store: Store, dataset: DatasetVersion, refitted: tuple[Bundle, Path], tmp_path: Path
) -> None:
    for role in ("start_from", "distill_from"):
        with pytest.raises(RefusedError, match=r"holds out \(val\)"):
            fit(filled_store, SETTINGS, dataset, run_dir=tmp_path, use_ray=False, **{role: refitted[0]})


def test_thresholds_rest_on_probabilities_that_have_not_seen_their_labels(filled_store: Store) -> None:
    random, taxonomy = np.random.default_rng(0), filled_store.taxonomy
    classes = len(taxonomy.codes)
    labels = np.repeat(np.arange(classes), 20)
    logits = random.normal(size=(len(labels), classes)) + 2.0 * np.eye(classes)[labels]
    groups = [f"g{number // 2:03d}" for number in range(len(labels))]
    found = cross_fitted(logits, labels, groups, taxonomy, None, [{}] * len(labels))
    assert not np.allclose(found, apply_calibration(logits, fit_calibration(logits, labels, taxonomy)), atol=1e-4)
    # Of other images, only those elsewhere are calibrated by a group: not those of its own part of the split.
    group = np.array([name == groups[0] for name in groups])
    moved = logits.copy()
    moved[group] = -moved[group]
    again = cross_fitted(moved, labels, groups, taxonomy, None, [{}] * len(labels))
    changed = ~np.isclose(found, again, rtol=0, atol=1e-9).all(axis=1)
    assert changed[group].all()
    assert 0.5 < changed.mean() < 1.0
    assert (~changed).sum() == pytest.approx(len(labels) / FOLDS, abs=len(labels) / FOLDS / 2)
    with pytest.raises(DataError, match="one group of images"):
        cross_fitted(logits, labels, ["g"] * len(labels), taxonomy, None, [{}] * len(labels))


def test_a_plateau_becomes_the_cuts_that_val_made(first: Bundle) -> None:
    plateau = SchedulerSettings(name="plateau", gamma=0.5, plateau_patience_epochs=0, learning_rate_factors=((3, 0.8),))
    # Epochs 2 and 4 gained nothing, so that epochs 3 and 5 were slower.
    assert plateau_factors(plateau, [0.5, 0.4, 0.6, 0.5]) == ((3, 0.4), (5, 0.2))
    training = {
        "best_epoch": 3,
        "curves": [{"val_balanced_accuracy": score} for score in (0.5, 0.4, 0.6, 0.5)],
    }
    chosen = SETTINGS.with_values({"scheduler": plateau.model_dump(), "refit": False, "epochs": 4})
    recipe = refit_settings(chosen, first.document.model_copy(update={"metrics": {"training": training}}))
    assert (recipe.scheduler.name, recipe.stop_after_epoch) == ("step", 3)
    assert recipe.scheduler.learning_rate_factors == ((3, 0.4), (5, 0.2))


@pytest.mark.parametrize(
    "values",
    [
        {"best_epoch_by": "macro_auc"},
        {"best_epoch_by": "last", "early_stop_patience_epochs": 2},
        {"best_epoch_by": "last", "scheduler.name": "plateau"},
        {"best_epoch_by": "last", "refit": True},
    ],
)
def test_no_split_that_is_trained_on_may_choose(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"train_splits"):
        TrainersSettings().with_values({"train_splits": "train_and_val", **values})
