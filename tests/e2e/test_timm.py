"""A network of timm through every verb, from its own file of weights, as in `tests/e2e/test_catalogue.py`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from records.models import find_bundle
from records.settings import RecordsSettings
from records.store import open_store
from tests.e2e.test_catalogue import IMAGES, _serve, _train, folder, home, relook

timm = pytest.importorskip("timm")

__all__ = ["folder", "home"]

NETWORK = "timm/test_resnet"
pytestmark = pytest.mark.slow


@pytest.mark.long
def test_a_network_of_timm_goes_through_every_verb(home: Path, folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "own.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    recipe = ("--set", "trainers.precision=fp32", "--set", "serving.precision=fp32")
    started = ("--set", f"trainers.model.weights={weights}", "--set", "trainers.model.scaling=own")
    model_id = _train(NETWORK, folder / "images", (*recipe, *started))
    store = open_store(RecordsSettings(home=home, taxonomy=str(folder / "colours.yaml")))
    document = find_bundle(store, model_id).document
    store.close()
    assert document.architecture.name == NETWORK
    assert document.explanation["gradcam"] == "closed_form"
    assert document.geometry.mean == timm.get_pretrained_cfg("test_resnet").mean
    assert document.metrics["training"]["weights"]["unused"] == ["head.linear.bias", "head.linear.weight"]
    assert relook("evaluate", model_id, "--split", "val", *recipe)["images"] > 0
    (image, *_) = sorted((folder / "images" / "plum").iterdir())
    explained = relook("explain", model_id, image, "--method", "gradcam", "--out", tmp_path / "map.png", *recipe)
    assert (explained["exact"], explained["layer"]) == (True, "features.maps")
    assert np.isfinite(explained["values"]).all()
    channels = relook("explain", model_id, image, "--method", "activations", "--out", tmp_path / "layer.png", *recipe)
    assert channels["layer"] == "features.maps"
    bulk = relook("predict", model_id, folder / "images", "--out", tmp_path / "table.csv", *recipe)
    assert bulk["images"] == IMAGES
    assert _serve(home, folder, model_id, image) == "fp32"
