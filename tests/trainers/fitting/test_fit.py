"""From a dataset version to a bundle: what it holds, that it repeats, and which splits were read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from records import datasets
from records.bundles import Bundle, read_bundle
from records.datasets import DatasetVersion, build_version
from records.errors import ConfigError, DataError
from records.store import Store
from records.types import AuditEvent, Split
from trainers.evaluation.evaluate import predict_split
from trainers.fitting.fit import fit
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings
from vision.inference.golden import golden_images
from vision.inference.loaded import load_model
from vision.networks import MODELS

SETTINGS = TrainersSettings(
    model=ModelSettings(side_px=32),
    epochs=2,
    batch_size=16,
    precision="fp32",
    workers=WorkersSettings(threads=1, use_gpu=False),
    augmentation="flips",
)


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


@pytest.fixture(scope="module")
def fitted(
    filled_store: Store, dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path]:
    run_dir = tmp_path_factory.mktemp("fit")
    return fit(filled_store, SETTINGS, dataset, run_dir=run_dir, use_ray=False), run_dir


def test_the_bundle_says_what_it_is(fitted: tuple[Bundle, Path], dataset: DatasetVersion, filled_store: Store) -> None:
    bundle = read_bundle(fitted[0].path, expected_id=fitted[0].id)
    document = bundle.document
    assert document.dataset_id == dataset.id
    assert TrainersSettings.model_validate(document.config) == SETTINGS
    assert (document.architecture.name, document.architecture.options) == ("custom_cnn", {"dropout": 0.01})
    assert document.explanation["target_layer"] == MODELS["custom_cnn"].target_layer
    assert document.explanation["gradcam"] == "closed_form"
    facts = document.explanation["faithfulness"]
    assert facts["images"] + facts["constant_maps"] <= 16
    assert [point["epoch"] for point in document.metrics["training"]["curves"]] == [1, 2]
    counts = dataset.split(Split.TRAIN)["label"].value_counts()
    assert document.class_priors["nv"] == pytest.approx(counts["nv"] / counts.sum())
    assert document.calibration.priors["nv"] == pytest.approx((dataset.split(Split.VAL)["label"] == "nv").mean())
    assert set(document.operating.refer) == {"mel"}
    assert document.suitability is not None
    assert document.suitability.quality.min_side_px == 32
    assert bundle.suitability() is not None
    assert set(document.operating.conformal_thresholds) == set(filled_store.taxonomy.codes)
    assert document.metrics["training"]["epochs"] == 2
    assert document.metrics["training"]["augmentation"]["name"] == "flips"
    assert 0 <= document.metrics["val"]["balanced_accuracy"] <= 1
    bands = document.metrics["calibration"]["scores"]
    images = dataset.split(Split.CALIBRATION)
    assert 0 < sum(band["lesions"] for band in bands) <= len(images)
    assert all(0 <= band["right"] <= band["lesions"] for band in bands)


def test_the_golden_images_are_generated_and_answered_the_same(fitted: tuple[Bundle, Path]) -> None:
    bundle, _ = fitted
    assert np.array_equal(bundle.golden()["inputs"], golden_images(bundle.document.geometry))
    assert load_model(bundle, precision="fp32").check_golden() < 1e-3


def test_metrics_are_a_line_per_epoch(fitted: tuple[Bundle, Path]) -> None:
    lines = [json.loads(line) for line in (fitted[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    best = max(lines, key=lambda line: (line["val_balanced_accuracy"], -line["val_loss"]))
    assert best["epoch"] == fitted[0].document.metrics["training"]["best_epoch"]


def test_the_loaded_model_answers_val_as_the_bundle_says(
    fitted: tuple[Bundle, Path], dataset: DatasetVersion, filled_store: Store
) -> None:
    bundle, _ = fitted
    predictions = predict_split(filled_store, bundle, dataset, Split.VAL, actor="test")
    hits = predictions.probabilities.argmax(axis=1) == predictions.labels
    assert hits.mean() == pytest.approx(bundle.document.metrics["val"]["accuracy"])


def test_a_finished_run_gives_the_same_bundle_again(
    fitted: tuple[Bundle, Path], dataset: DatasetVersion, filled_store: Store, tmp_path: Path
) -> None:
    bundle, run_dir = fitted
    assert fit(filled_store, SETTINGS, dataset, run_dir=run_dir, use_ray=False).id == bundle.id
    fed = SETTINGS.with_values({"workers.feeders": 1, "workers.checkpoint_every_steps": 3})
    assert fit(filled_store, fed, dataset, run_dir=tmp_path, use_ray=False).id == bundle.id


def test_gate_and_test_are_not_read(dataset: DatasetVersion, filled_store: Store, tmp_path: Path) -> None:
    read: list[Split] = []

    class Watched(DatasetVersion):
        def split(self, split: Split) -> pd.DataFrame:
            read.append(split)
            return super().split(split)

    with filled_store.ledger.read() as tx:
        before = tx.count(AuditEvent, {"action": ["gate.read", "test.read"]})
    fit(
        filled_store,
        SETTINGS,
        Watched(dataset.id, dataset.taxonomy_hash, dataset.rows),
        run_dir=tmp_path,
        use_ray=False,
    )
    assert set(read) == {Split.TRAIN, Split.VAL, Split.CALIBRATION}
    with filled_store.ledger.read() as tx:
        assert tx.count(AuditEvent, {"action": ["gate.read", "test.read"]}) == before


def test_fine_tuning_names_its_parent(
    fitted: tuple[Bundle, Path], dataset: DatasetVersion, filled_store: Store, tmp_path: Path
) -> None:
    parent, _ = fitted
    settings = SETTINGS.model_copy(update={"epochs": 1})
    child = fit(filled_store, settings, dataset, run_dir=tmp_path, use_ray=False, start_from=parent)
    assert child.document.parent_model_id == parent.id
    other = settings.with_values({"model.name": "resnet18"})
    with pytest.raises(ConfigError, match=r"to start from is 'custom_cnn'; set trainers.model.name=custom_cnn"):
        fit(filled_store, other, dataset, run_dir=tmp_path, use_ray=False, start_from=parent)


def test_stopping_early_still_gives_a_bundle(dataset: DatasetVersion, filled_store: Store, tmp_path: Path) -> None:
    bundle = fit(filled_store, SETTINGS, dataset, run_dir=tmp_path, use_ray=False, on_epoch=lambda _: True)
    assert bundle.document.metrics["training"]["epochs"] == 1


def test_an_empty_split_is_named(dataset: DatasetVersion, filled_store: Store, tmp_path: Path) -> None:
    rows = dataset.rows[dataset.rows["split"] != Split.CALIBRATION.value]
    lacking = DatasetVersion(datasets.content_id(rows, dataset.taxonomy_hash), dataset.taxonomy_hash, rows)
    with pytest.raises(DataError, match="has no image on the calibration split; import more lesions"):
        fit(filled_store, SETTINGS, lacking, run_dir=tmp_path, use_ray=False)


def test_two_workers_need_ray(dataset: DatasetVersion, filled_store: Store, tmp_path: Path) -> None:
    settings = SETTINGS.with_values({"workers.count": 2})
    with pytest.raises(
        ConfigError, match=r"more than one worker, and streaming, need Ray: set trainers.workers.count=1"
    ):
        fit(filled_store, settings, dataset, run_dir=tmp_path, use_ray=False)
