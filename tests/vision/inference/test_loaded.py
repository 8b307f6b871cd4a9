"""A loaded model: equal to the plain network, to its golden logits, to itself in any batch and any thread."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam

from images.decode import DECODE_VERSION
from records.bundles import Bundle, Calibration, write_bundle
from records.errors import ConfigError, ContractError, IntegrityError
from vision.calibration.scaling import apply_calibration
from vision.explanations.methods import METHODS
from vision.inference.attribution import attribute
from vision.inference.loaded import load_model, load_weights, plain_network, reference_logits
from vision.networks import MODELS
from vision.preprocess import scale_pixels, to_tensor

NAMES = ("custom_cnn", "custom_cnn_base", "mobilenet_v3")


def random_pixels(count, side_px=64, seed=5):
    return np.random.default_rng(seed).integers(0, 256, size=(count, side_px, side_px, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(random_bundle):
    return load_model(random_bundle("custom_cnn"), precision="fp32")


@pytest.mark.parametrize("name", NAMES)
def test_it_predicts_like_the_plain_network(name, random_bundle, make_network):
    bundle = random_bundle(name)
    model, pixels = load_model(bundle, precision="fp32"), random_pixels(3)
    output = model.predict(pixels)
    expected = reference_logits(make_network(name, 7, 0), pixels, bundle.document.geometry)
    assert output.logits == pytest.approx(expected, rel=1e-4, abs=1e-4 * float(np.abs(expected).max()))
    assert output.probabilities == pytest.approx(apply_calibration(output.logits, bundle.document.calibration))
    assert output.probabilities.dtype == np.float64
    assert output.maps is None
    assert output.finite.all()
    assert model.check_golden() < 1e-3
    assert (model.model_id, model.precision) == (bundle.id, "fp32")


@pytest.mark.parametrize("name", ["custom_cnn", "mobilenet_v3"])
def test_its_maps_equal_captums_on_the_plain_network(name, random_bundle, make_network):
    bundle = random_bundle(name)
    pixels = random_pixels(2)
    maps = load_model(bundle, precision="fp32").predict(pixels, gradcam=True).maps
    network = make_network(name, 7, 0)
    inputs = scale_pixels(to_tensor(pixels), bundle.document.geometry)
    layer = network.get_submodule(MODELS[name].target_layer)
    for target in (0, 4):
        expected = LayerGradCam(network, layer).attribute(inputs, target=target, relu_attributions=True)
        expected = expected[:, 0].detach().numpy()
        # Folding rounds differently before the maps are made; the closed form itself is held to 1e-5 elsewhere.
        assert np.abs(maps[:, target] - expected).max() <= 1e-4 * expected.max()


def test_bf16_stays_within_its_stated_tolerance(random_bundle):
    model = load_model(random_bundle("custom_cnn"), precision="bf16")
    output = model.predict(random_pixels(2), gradcam=True)
    assert model.precision == "bf16"
    assert model.check_golden() > 0
    assert output.logits.dtype == np.float32
    assert np.isfinite(output.maps).all()


@pytest.fixture
def sensitive_bundle(random_bundle, model_store, make_network):
    """A sound model whose last feature map is a small difference of large numbers, which bf16 cannot hold."""
    bundle, network = random_bundle("custom_cnn"), make_network("custom_cnn", 7, 0)
    with torch.no_grad():
        network.features.classifier.bias += 1000
        network.head.norm.running_mean += 1000
    inputs = bundle.golden()["inputs"]
    golden = {"inputs": inputs, "logits": reference_logits(network, inputs, bundle.document.geometry)}
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    return write_bundle(model_store, bundle.document, weights, golden)


def test_auto_takes_fp32_for_a_model_that_bf16_would_change(sensitive_bundle, random_bundle, monkeypatch):
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device: True)
    assert load_model(random_bundle("custom_cnn")).precision == "bf16"
    model = load_model(sensitive_bundle)
    assert model.precision == "fp32"
    assert model.check_golden() < 1e-2
    with pytest.raises(IntegrityError, match="allowed in bf16"):
        load_model(sensitive_bundle, precision="bf16").check_golden()


@pytest.mark.parametrize("name", ["custom_cnn", "mobilenet_v3"])
def test_a_batch_of_eight_equals_eight_singles(name, random_bundle):
    model, pixels = load_model(random_bundle(name, side_px=32), precision="fp32"), random_pixels(8, 32)
    together = model.predict(pixels, gradcam=True)
    alone = [model.predict(pixels[i : i + 1], gradcam=True) for i in range(8)]
    scale = float(np.abs(together.logits).max())
    assert np.concatenate([o.logits for o in alone]) == pytest.approx(together.logits, abs=1e-5 * scale)
    scale = float(together.maps.max())
    assert np.concatenate([o.maps for o in alone]) == pytest.approx(together.maps, abs=1e-5 * scale)


def test_permuting_the_batch_permutes_the_predictions(model):
    pixels, order = random_pixels(5), np.array([3, 0, 4, 1, 2])
    assert model.predict(pixels[order]).logits == pytest.approx(model.predict(pixels).logits[order], abs=1e-4)


def test_two_threads_get_what_each_would_get_alone(random_bundle):
    model = load_model(random_bundle("custom_cnn"), precision="fp32")
    batches = [random_pixels(2, seed=seed) for seed in range(12)]
    alone = [model.predict(batch, gradcam=True) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda batch: model.predict(batch, gradcam=True), batches))
    for one, other in zip(alone, together, strict=True):
        assert (one.logits == other.logits).all()
        assert (one.maps == other.maps).all()


def explained_by(model, pixels, method, target):
    """Maps of several images, [N, h, w], by the function that explains one."""
    found = [attribute(model, image, method, int(one)) for image, one in zip(pixels, target, strict=True)]
    return np.stack([one.values for one in found])


def test_threads_that_predict_and_differentiate_do_not_disturb_each_other(model, monkeypatch):
    monkeypatch.setattr("vision.explanations.gradients.MAX_IG_STEPS", 50)
    pixels, target = random_pixels(2), np.array([1, 5])
    expected_maps = explained_by(model, pixels, "integrated_gradients", target)
    expected = model.predict(pixels, gradcam=True)
    with ThreadPoolExecutor(2) as pool:
        explained = pool.submit(explained_by, model, pixels, "integrated_gradients", target)
        for _ in range(5):
            assert (model.predict(pixels, gradcam=True).maps == expected.maps).all()
        assert explained.result() == pytest.approx(expected_maps)


def test_a_process_that_predicts_keeps_what_it_frees_and_gives_back_large_blocks(random_bundle, monkeypatch):
    asked = []
    monkeypatch.setattr("vision.inference.loaded.keep_freed_memory", lambda **options: asked.append(options))
    load_model(random_bundle("custom_cnn"), precision="fp32")
    assert asked == [{}]


def test_no_image_is_a_valid_batch(model):
    output = model.predict(random_pixels(0), gradcam=True)
    assert output.logits.shape == (0, 7)
    assert output.maps.shape[:2] == (0, 7)


def poisoned(bundle: Bundle) -> Bundle:
    """The same bundle, one of whose weights is NaN."""

    class Poisoned(Bundle):
        def weights(self):
            weights = super().weights()
            weights["head.norm.weight"] = weights["head.norm.weight"].copy()
            weights["head.norm.weight"][2] = np.nan
            return weights

    return Poisoned(bundle.path, bundle.id, bundle.document)


def test_logits_that_are_not_finite_give_no_map_and_no_error(random_bundle):
    model = load_model(poisoned(random_bundle("custom_cnn")), precision="fp32")
    output = model.predict(random_pixels(2), gradcam=True)
    assert np.isnan(output.logits[:, 2]).all()
    assert np.isnan(output.probabilities).all()
    assert np.isnan(output.maps).all()
    assert not output.finite.any()
    with pytest.raises(IntegrityError, match="must not be served"):
        model.check_golden()


def test_a_model_that_predicts_differently_than_stored_is_refused(random_bundle):
    bundle = random_bundle("custom_cnn")
    other = bundle.document.geometry.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    changed = replace(bundle, document=bundle.document.model_copy(update={"geometry": other}))
    with pytest.raises(IntegrityError, match="golden"):
        load_model(changed, precision="fp32").check_golden()


def test_weights_of_another_architecture_are_refused(random_bundle, make_network):
    with pytest.raises(IntegrityError, match="do not fit"):
        load_weights(make_network("custom_cnn_base", 7, 0), random_bundle("custom_cnn").weights(), "0" * 64)


def test_an_unknown_precision_is_refused(random_bundle):
    with pytest.raises(ConfigError, match="fp16"):
        load_model(random_bundle("custom_cnn"), precision="fp16")


@pytest.mark.parametrize("pixels", [random_pixels(1, 32), random_pixels(1).astype(np.float32), random_pixels(1)[0]])
def test_pixels_of_another_geometry_are_refused(model, pixels):
    with pytest.raises(ContractError, match="64, 64, 3"):
        model.predict(pixels)


def test_the_calibration_of_the_bundle_is_applied(random_bundle):
    bundle = random_bundle("custom_cnn")
    flat = Calibration(temperature=1e6, bias=[0.0] * 7)
    model = load_model(replace(bundle, document=bundle.document.model_copy(update={"calibration": flat})))
    assert model.predict(random_pixels(1)).probabilities == pytest.approx(np.full((1, 7), 1 / 7), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_the_class_it_is_asked_about(model, method):
    pixels = random_pixels(2)
    maps = explained_by(model, pixels, method, np.array([0, 4]))
    swapped = explained_by(model, pixels, method, np.array([4, 0]))
    assert maps.shape == ((2, 2, 2) if method == "gradcam" else (2, 64, 64))
    assert np.isfinite(maps).all()
    assert (maps != swapped).any()


def test_explain_refuses_what_it_cannot_do(model, random_bundle):
    with pytest.raises(ContractError, match="there are gradcam"):
        explained_by(model, random_pixels(1), "tea_leaves", np.array([0]))
    low = load_model(random_bundle("custom_cnn"), precision="bf16")
    with pytest.raises(ContractError, match="fp32"):
        explained_by(low, random_pixels(1), "occlusion", np.array([0]))


def test_it_names_its_layer(model):
    assert model.target_layer == "features.classifier"
    assert model.gradcam_is_exact


def test_a_model_of_another_decoder_is_refused(random_bundle):
    bundle = random_bundle("custom_cnn")
    other = bundle.document.geometry.model_copy(update={"decode_version": DECODE_VERSION + 1})
    changed = replace(bundle, document=bundle.document.model_copy(update={"geometry": other}))
    sentence = f"decoder {DECODE_VERSION + 1}, and this release has decoder {DECODE_VERSION}; train the model again"
    for load in (load_model, plain_network):
        with pytest.raises(IntegrityError, match=sentence):
            load(changed)
