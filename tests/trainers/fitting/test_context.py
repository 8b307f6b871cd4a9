"""A training with context and views: the bundle holds both, evaluation reads them, the report shows the difference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from records.bundles import Bundle, read_bundle
from records.context import context_of_image
from records.datasets import DatasetVersion, build_version
from records.errors import ConfigError
from records.store import Store, find_images
from records.taxonomy import Taxonomy
from records.types import Split
from trainers.evaluation.evaluate import evaluate, predict_split
from trainers.evaluation.measure import measure_model
from trainers.evaluation.report.words import warnings_of
from trainers.evaluation.slices import with_context
from trainers.fitting.context import fitted_context
from trainers.fitting.fit import fit
from trainers.fitting.training_data import DataPlan
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings
from vision.inference.loaded import load_model

SETTINGS = TrainersSettings(
    model=ModelSettings(side_px=32),
    epochs=1,
    batch_size=16,
    precision="fp32",
    workers=WorkersSettings(threads=1, use_gpu=False),
    augmentation="none",
    context=True,
    views=2,
)


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


@pytest.fixture(scope="module")
def fitted(filled_store: Store, dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fit(filled_store, SETTINGS, dataset, run_dir=tmp_path_factory.mktemp("fit"), use_ray=False)


def test_the_bundle_holds_head_and_views_and_evaluation_uses_them(
    filled_store: Store, dataset: DatasetVersion, fitted: Bundle
) -> None:
    document = read_bundle(fitted.path, expected_id=fitted.id).document
    assert document.context is not None
    assert {part.name for part in document.context.columns} <= {"age", "sex", "localization"}
    assert document.views == 2
    found = predict_split(filled_store, fitted, dataset, Split.VAL, actor="test")
    images = find_images(filled_store, found.image_ids)
    assert found.known == [context_of_image(image) for image in images]
    assert found.without_context is not None
    assert found.probabilities.shape == found.without_context.shape
    moved = np.abs(found.probabilities - found.without_context).max()
    assert (moved > 0) == (document.context.weight > 0)
    # The facts in the bundle are those of the same predictions.
    again = evaluate(found, document.taxonomy, document.operating, priors=document.calibration.priors)
    assert again.balanced_accuracy == pytest.approx(document.metrics["val"]["balanced_accuracy"], abs=1e-6)


def test_report_and_figures_are_with_and_without_context(filled_store: Store, fitted: Bundle, tmp_path: Path) -> None:
    with Progress(disable=True) as bar:
        evaluation = measure_model(filled_store, fitted, report=tmp_path / "report", precision="fp32", progress=bar)
    context = evaluation.context
    assert context is not None
    assert set(context.auc_of_context) == set(fitted.document.taxonomy.codes)
    assert all(
        report.balanced_accuracy_without_context is not None
        for reports in evaluation.slices.values() for report in reports.values()
    )  # fmt: skip
    assert "What the context adds" in (tmp_path / "report" / "report.html").read_text()


def test_a_class_that_context_alone_decides_is_named(
    filled_store: Store, dataset: DatasetVersion, fitted: Bundle
) -> None:
    document = fitted.document
    found = predict_split(
        filled_store, fitted, dataset, Split.TRAIN, actor="test", model=load_model(fitted, precision="fp32")
    )
    assert found.without_context is not None
    index = document.taxonomy.index_of("nv")
    # The image says nothing, and the context gives every label of one class.
    even = np.full_like(found.probabilities, 1 / found.probabilities.shape[1])
    told = even.copy()
    told[:, index] += 0.5
    told /= told.sum(axis=1, keepdims=True)
    owed = replace(found, probabilities=told, without_context=np.roll(told, 1, axis=1))
    evaluation = with_context(evaluate(owed, document.taxonomy, document.operating), owed, document)
    assert evaluation.context is not None
    assert "nv" in evaluation.context.decided_by_context
    assert evaluation.context.label_by_context["nv"] == 1.0
    assert any("context" in sentence for sentence in warnings_of(evaluation, document.taxonomy))


def test_context_without_columns_in_the_taxonomy_is_refused_before_training(
    filled_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Taxonomy.model_validate({**filled_store.taxonomy.model_dump(), "context": []})
    store = replace(filled_store, taxonomy=bare)
    plan = DataPlan(image_ids=["0" * 64], labels=np.array([0]), num_train=1)
    with pytest.raises(ConfigError, match="names no context"):
        fitted_context(store, plan, True)
    assert fitted_context(store, plan, False) is None
