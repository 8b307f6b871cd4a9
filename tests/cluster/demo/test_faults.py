"""The harmed challenger, for taxonomies with and without a key class."""

from pathlib import Path

import numpy as np
import pytest

from cluster.demo.faults import harm_in_words, harmed_class, harmed_copy
from records.bundles import Calibration
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import DiagnosisClass, KeyClass, Taxonomy
from tests.e2e import pets
from tests.models import write_random_bundle
from vision.inference.loaded import load_model


def taxonomy_of(costs: dict[str, float], key: str | None = None) -> Taxonomy:
    classes = [DiagnosisClass(code=code, name=code, malignant=False, miss_cost=cost) for code, cost in costs.items()]
    return Taxonomy(name="t", version=1, classes=tuple(classes), key_classes=(KeyClass(code=key),) if key else ())


@pytest.mark.parametrize(
    ("costs", "key", "code"),
    [
        ({"cat": 1, "dog": 1, "owl": 1}, None, "cat"),
        ({"cat": 1, "dog": 5, "owl": 2}, None, "dog"),
        ({"cat": 1, "dog": 5, "owl": 2}, "owl", "owl"),
        ({"cat": 0, "dog": 0}, None, "cat"),
    ],
)
def test_the_key_class_is_missed_else_the_costliest(costs: dict[str, float], key: str | None, code: str) -> None:
    taxonomy = taxonomy_of(costs, key)
    assert harmed_class(taxonomy) == code
    assert f"p({code})" in harm_in_words(taxonomy)


def test_only_one_class_of_the_copy_is_suppressed(tmp_path: Path) -> None:
    pets.write_taxonomy(tmp_path / "pets.yaml")
    store = open_store(RecordsSettings(home=tmp_path / "home", taxonomy=str(tmp_path / "pets.yaml")))
    codes = store.taxonomy.codes
    bundle = write_random_bundle(
        store, "custom_cnn", class_priors=dict.fromkeys(codes, 1 / 3), calibration=Calibration(bias=[0.0] * 3)
    )
    harmed = harmed_copy(store, bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    before, after = (load_model(one).predict(pixels).probabilities for one in (bundle, harmed))
    assert (after[:, 0] < before[:, 0]).all()
    assert after[:, 1] / after[:, 2] == pytest.approx(before[:, 1] / before[:, 2], rel=1e-4)
    store.close()
