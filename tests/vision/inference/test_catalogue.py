"""Every network of the catalogue, loaded in each format: predictions, golden check, and a map by each method."""

import logging
import zlib

import numpy as np
import pytest
from torch import nn

from records.errors import ContractError
from tests.models import NETWORKS
from trainers.evaluation.faithfulness import randomisation_similarity
from vision.explanations.methods import METHODS
from vision.inference.attribution import attribute
from vision.inference.loaded import load_model
from vision.networks import MODELS

NUM_MODELS, NUM_METHODS = 14, 4
FORMATS = ("fp32", "bf16")


def pixels_for(name, count=2):
    side_px = MODELS[name].minimum_side_px
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return random.integers(0, 256, size=(count, side_px, side_px, 3), dtype=np.uint8)


@pytest.fixture
def bundle_of(random_bundle):
    return lambda name: random_bundle(name, side_px=MODELS[name].minimum_side_px)


@pytest.fixture
def on_a_cpu_with_bf16(monkeypatch):
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: True)


def test_the_tests_below_run_the_whole_catalogue():
    assert (len(MODELS), len(METHODS)) == (NUM_MODELS, NUM_METHODS)
    assert {case.values[0] for case in NETWORKS} == set(MODELS)
    assert {recipe.gradcam for recipe in MODELS.records} == {"closed_form"}


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_predicts_and_maps_every_class(name, precision, bundle_of):
    model, pixels = load_model(bundle_of(name), precision=precision), pixels_for(name)
    assert model.precision == precision
    assert np.isfinite(model.check_golden())
    output = model.predict(pixels, gradcam=True)
    assert output.probabilities.sum(axis=1) == pytest.approx(np.ones(2))
    assert output.maps.shape[:2] == (2, 7)
    assert np.isfinite(output.maps).all()
    assert (output.maps >= 0).all()
    assert np.isfinite(model.describe(pixels)).all()
    assert np.isfinite(model.dropout_samples(pixels, 2)).all()


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_explained_by_each_method(name, precision, bundle_of, monkeypatch):
    # Whether maps add up is tested on one network; on random weights more steps would only take time.
    monkeypatch.setattr("vision.explanations.gradients.MAX_IG_STEPS", 50)
    model, (image,) = load_model(bundle_of(name), precision=precision), pixels_for(name, 1)
    explained = []
    for method in METHODS.records:
        if method.needs_fp32 and precision == "bf16":
            with pytest.raises(ContractError, match="fp32"):
                attribute(model, image, method.name, 1)
            continue
        for versus in (None, 3) if method.name == "gradcam" else (3,):
            found = attribute(model, image, method.name, 1, versus)
            assert np.isfinite(found.values).all()
            assert found.values.shape == (image.shape[:2] if method.needs_fp32 else found.values.shape)
        explained.append(method.name)
    assert len(explained) == (NUM_METHODS if precision == "fp32" else 1)


@pytest.mark.parametrize("name", ["mobilenet_v3", pytest.param("convnext_tiny", marks=pytest.mark.soak)])
def test_the_report_compares_maps_of_networks_without_a_closed_form(name, bundle_of, monkeypatch):
    monkeypatch.setattr("trainers.evaluation.faithfulness.closed_form_of", lambda head: None)
    likeness = randomisation_similarity(bundle_of(name), pixels_for(name))
    assert likeness is None or 0 <= likeness <= 1


@pytest.mark.usefixtures("on_a_cpu_with_bf16")
@pytest.mark.parametrize("name", NETWORKS)
def test_auto_loads_every_network_on_a_cpu_with_bf16(name, bundle_of):
    model = load_model(bundle_of(name))
    assert model.precision in FORMATS
    model.check_golden()


@pytest.mark.usefixtures("on_a_cpu_with_bf16")
def test_auto_takes_fp32_and_says_so_where_bf16_raises(bundle_of, monkeypatch, caplog):
    layer = nn.Conv2d.forward

    def without_bf16(self, inputs):
        if str(self.weight.dtype) == "torch.bfloat16":
            raise RuntimeError('"conv" not implemented\nfor BFloat16')
        return layer(self, inputs)

    monkeypatch.setattr(nn.Conv2d, "forward", without_bf16)
    with caplog.at_level(logging.WARNING):
        model = load_model(bundle_of("squeezenet"))
    assert model.precision == "fp32"
    assert 'computes in fp32, because in bf16 it fails: "conv" not implemented for BFloat16' in caplog.text
    with pytest.raises(RuntimeError, match="BFloat16"):
        load_model(bundle_of("squeezenet"), precision="bf16").check_golden()
