"""Views and context of one model: rows of the table, and val and test as one."""

from pathlib import Path

import numpy as np
import pytest

from bench.train import levers
from images.importer import open_dataset
from records.bundles import Calibration
from records.frames import Frame
from records.store import Store, find_images
from records.types import AuditEvent, Split
from tests.models import write_random_bundle
from vision.inference.loaded import plain_network, reference_logits


def test_rows_of_views_and_splits_as_one(filled_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "DRAWS", 20)
    dataset = open_dataset(filled_store, None)
    codes = filled_store.taxonomy.codes
    calibration = Calibration(temperature=1.0, bias=[0.0] * 7, priors=dict.fromkeys(codes, 1 / 7))
    bundle = write_random_bundle(filled_store, "custom_cnn", side_px=32, dataset_id=dataset.id, calibration=calibration)
    val = levers.as_served(filled_store, bundle, Split.VAL, tmp_path)
    logits = levers.view_logits(bundle, filled_store, val.image_ids, tmp_path / "views.npy")
    pixels = (
        levers.PixelCache(filled_store.home.cache, Frame(32)).rows(val.image_ids).take(np.arange(len(val.image_ids)))
    )
    for views in levers.VIEWS:
        whole = reference_logits(plain_network(bundle), pixels, bundle.document.geometry, views)
        assert np.allclose(logits[:views].mean(axis=0), whole, atol=1e-5)
    rows = levers.levers(bundle, val, logits)
    assert [(row["context"], row["views"]) for row in rows] == [(False, views) for views in levers.VIEWS]
    assert all(row["ece_if_perfect"][0] < row["ece_if_perfect"][1] for row in rows)
    # Features of all images but two, that tell the classes apart.
    images = [image for part in Split for image in find_images(filled_store, dataset.split(part)["image_id"].tolist())]
    label = dict(zip(dataset.rows["image_id"], dataset.rows["label"], strict=True))
    known = [image for image in images if image.id in label and image.id not in val.image_ids[:2]]
    features = np.array([[label[image.id] == code for code in codes] for image in known], dtype=np.float32)
    np.savez(tmp_path / "f.npz", ids=np.array([image.source_id for image in known]), features=features)
    found = levers.frozen(bundle, filled_store, val, logits, tmp_path / "f.npz")
    assert [(row["features"], row["images"]) for row in found] == [
        (name, len(val.labels) - 2) for name in ("frozen", "trained")
    ]
    assert found[0]["equal_prevalence"] > 0.9 > found[1]["equal_prevalence"]
    test = levers.as_served(filled_store, bundle, Split.TEST, tmp_path)
    both = levers.joined([val, test])
    assert both.image_ids == val.image_ids + test.image_ids
    assert both.probabilities.shape == (len(both.labels), 7)
    # What is kept is read again, and test is read once.
    again = levers.as_served(filled_store, bundle, Split.TEST, tmp_path)
    assert np.array_equal(again.probabilities, test.probabilities)
    with filled_store.ledger.read() as tx:
        assert [event.details["model_id"] for event in tx.find(AuditEvent) if event.action == "test.read"].count(
            bundle.id
        ) == 1


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    sure = np.tile([0.9, 0.1], (1000, 1))
    mean, high = levers.ece_if_perfect(sure)
    # Of 1,000 labels a share of 0.9 is right, give or take 0.0095.
    assert 0.006 < mean < 0.009
    assert 0.017 < high < 0.021
