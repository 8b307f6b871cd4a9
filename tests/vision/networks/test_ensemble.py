"""An ensemble is one network: weighted logits, exact maps on one grid, and the same outputs in every engine."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam

from records.bundles import Bundle, BundleDocument, Geometry, write_bundle
from records.errors import ConfigError
from records.store import Store
from trainers.fitting.combine import ensemble_of
from trainers.fitting.suitability import reference_outputs
from vision.calibration.suitability import Described, fit_suitability
from vision.explanations.closed_form import closed_form_of
from vision.export.folder import export_model
from vision.inference.golden import golden_arrays
from vision.inference.graph import LOGITS, MAPS, ForwardGraph
from vision.inference.loaded import load_model, plain_network, reference_logits
from vision.networks import MODELS
from vision.networks.ensemble import Resampling
from vision.networks.registry import ModelSettings

SIDE = 64
GEOMETRIES = {
    "custom_cnn": Geometry(side_px=SIDE, scaling="min_max"),
    "custom_cnn_base": Geometry(side_px=SIDE, mean=(0.7, 0.6, 0.5), std=(0.2, 0.25, 0.3)),
    "efficientnet_lite0": Geometry(side_px=SIDE, mean=(0.7, 0.6, 0.5), std=(0.2, 0.25, 0.3)),
    "mobilenet_v3": Geometry(side_px=SIDE, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.4)),
    "squeezenet": Geometry(side_px=SIDE),
}
"""Heads of one map per class, one that pools and applies a linear layer, one of several layers; two grids of maps."""


@pytest.fixture(scope="module")
def members(model_store: Store, make_bundle: Callable[..., Bundle]) -> dict[str, Bundle]:
    return {name: make_bundle(model_store, name, 0, SIDE, geometry=GEOMETRIES[name]) for name in GEOMETRIES}


def write_ensemble(store: Store, members: list[Bundle], weights: list[float], **changes: Any) -> Bundle:
    architecture, network = ensemble_of(members, weights)
    geometry = Geometry.model_validate(architecture.options["geometry"])
    pixels = np.random.default_rng(2).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)
    found = reference_outputs(network, pixels, geometry)
    # Random networks describe all images alike; what is planted differs as much as features are large.
    random = np.random.default_rng(3)
    pooled, early = (v * random.uniform(0.5, 1.5, v.shape).astype(np.float32) for v in (found.pooled, found.early))
    train, val = (Described(pixels[part], pooled[part], early[part]) for part in (slice(0, 30), slice(30, None)))
    limits, arrays = fit_suitability(train, val, smallest_side_px=20)
    document = members[0].document.model_copy(
        update={"architecture": architecture, "geometry": geometry, "suitability": limits, **changes}
    )
    golden = golden_arrays(network, geometry, document.views)
    stored = {name: value.numpy() for name, value in network.state_dict().items()}
    return write_bundle(store, BundleDocument.model_validate(document.model_dump()), stored, golden, arrays)


def test_logits_are_the_weighted_mean_behind_each_members_own_scaling(members: dict[str, Bundle]) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (3, SIDE, SIDE, 3), dtype=np.uint8)
    for names, weights, first in (
        (("efficientnet_lite0", "mobilenet_v3"), [0.6, 0.4], "efficientnet_lite0"),
        (("custom_cnn", "mobilenet_v3", "custom_cnn_base"), [0.5, 0.3, 0.2], "mobilenet_v3"),
    ):
        chosen = [members[name] for name in names]
        architecture, network = ensemble_of(chosen, weights)
        geometry = Geometry.model_validate(architecture.options["geometry"])
        assert geometry == GEOMETRIES[first]
        alone = [reference_logits(plain_network(one), pixels, one.document.geometry) for one in chosen]
        expected = sum(weight * logits for weight, logits in zip(weights, alone, strict=True))
        assert reference_logits(network, pixels, geometry) == pytest.approx(expected, abs=1e-4)


def test_maps_are_captums_for_every_kind_of_head_and_grid(members: dict[str, Bundle]) -> None:
    for names, has_one_grid in (
        (("efficientnet_lite0", "mobilenet_v3"), True),
        (("mobilenet_v3", "squeezenet"), False),
    ):
        architecture, network = ensemble_of([members[name] for name in names], [0.8, 0.2])
        (_, *one), (_, *other) = (member["map"] for member in architecture.options["members"])
        assert (one == other) == has_one_grid
        form = closed_form_of(network.get_submodule("head"))
        assert form is not None
        inputs = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        maps = form.maps(network.get_submodule("features")(inputs))
        captum = LayerGradCam(network, network.get_submodule(MODELS["ensemble"].target_layer))
        for index in range(7):
            expected = torch.relu(captum.attribute(inputs, target=index))[:, 0].detach()
            assert torch.allclose(maps[:, index], expected, atol=1e-5 * float(expected.max()) + 1e-9)


@pytest.mark.parametrize("other", ["custom_cnn_base", pytest.param("mobilenet_v3", marks=pytest.mark.soak)])
def test_an_ensemble_is_loaded_and_compiled_as_any_model(
    model_store: Store, members: dict[str, Bundle], other: str
) -> None:
    combined = write_ensemble(
        model_store,
        [members[other], members["custom_cnn" if other == "custom_cnn_base" else "squeezenet"]],
        [0.7, 0.3],
        views=2,
    )
    pixels = np.random.default_rng(4).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    model = load_model(combined, precision="fp32")
    assert model.check_golden() < 1e-3
    assert model.gradcam_is_exact
    output = model.predict(pixels, gradcam=True)
    expected = reference_logits(plain_network(combined), pixels, model.geometry, 2)
    assert output.logits == pytest.approx(expected, abs=1e-3)
    graph = ForwardGraph(plain_network(combined), model.geometry, None, 2).eval()
    with torch.inference_mode():
        found = graph(torch.from_numpy(pixels))
    assert found[LOGITS].numpy() == pytest.approx(output.logits, abs=1e-3)
    assert found[MAPS].numpy() == pytest.approx(output.maps, abs=1e-3)


@pytest.mark.soak
@pytest.mark.engines
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_ensemble_of_two_grids_is_exported(
    model_store: Store, members: dict[str, Bundle], format: str, tmp_path: Any
) -> None:
    pytest.importorskip("onnxruntime" if format == "onnx" else "openvino")
    combined = write_ensemble(model_store, [members["mobilenet_v3"], members["squeezenet"]], [0.7, 0.3], views=2)
    exported = export_model(combined, tmp_path / "graph", format)
    assert {"maps", "ood_score", "prediction_set"} <= set(exported.outputs)


def test_a_finer_map_has_the_same_means() -> None:
    maps = torch.rand(2, 3, 3, 4, dtype=torch.float32)
    for grid in ((3, 4), (7, 4), (8, 9), (6, 8)):
        finer = Resampling((3, 4), grid)(maps)
        assert finer.shape[-2:] == grid
        assert torch.allclose(finer.mean(dim=(2, 3)), maps.mean(dim=(2, 3)), atol=1e-6)
    # Whole factors repeat each position.
    assert torch.allclose(Resampling((3, 4), (6, 8))(maps)[..., ::2, ::2], maps)


def test_an_ensemble_is_not_offered_for_training() -> None:
    assert "ensemble" not in set(MODELS)
    with pytest.raises(ValueError, match="relook models combine"):
        ModelSettings(name="ensemble")


def test_a_coarse_map_of_classes_is_refused(members: dict[str, Bundle]) -> None:
    with pytest.raises(ConfigError, match="reads more of a map than its mean"):
        ensemble_of([members["custom_cnn"], members["squeezenet"]], [0.5, 0.5])
