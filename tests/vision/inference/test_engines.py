"""Engines of the service: OpenVINO against torch for every network, the choice between them, and memory of a GPU."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from records.errors import ConfigError, IntegrityError, UnavailableError
from serving.settings import ServingSettings
from serving.triage import TriageRules, triage
from tests.vision.checked import side_of, weights_hash, write_checked_bundle
from tests.vision.inference.foreign import foreign_images
from vision.inference.engines import OpenVinoModel, load_engine, resolve_device
from vision.inference.graph import export_program
from vision.inference.loaded import LoadedModel, load_model
from vision.inference.output import BatchOutput
from vision.inference.suitability import assess
from vision.networks import MODELS

pytestmark = pytest.mark.engines
# Tracing and compiling take seconds for each; the others with `make soak`.
IN_SUITE = ("custom_cnn",)
CASES = [pytest.param(name, marks=() if name in IN_SUITE else pytest.mark.soak) for name in MODELS]
TOLERANCE = 1e-4
"""Of probabilities and scores; of maps, as a share of the largest value of the batch."""


@pytest.fixture(scope="module", autouse=True)
def converted_once():
    """Trace and convert each network once: it takes seconds, and most of these tests load the same bundle."""
    openvino = pytest.importorskip("openvino")
    convert, models = openvino.convert_model, {}

    def shared(graph, images):
        key = (graph.names, weights_hash(graph))
        if key not in models:
            models[key] = convert(export_program(graph, images))
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vision.inference.engines.export_program", shared)
        patch.setattr(openvino, "convert_model", lambda model: model)
        yield


@pytest.fixture(scope="module")
def small(model_store):
    return write_checked_bundle(model_store, "custom_cnn")


@pytest.fixture(scope="module")
def openvino(small):
    return load_engine(small, "openvino", precision="fp32", device="cpu", cores=2)


def decisions_of(model, output, pixels):
    rules = TriageRules(low_confidence=0.5, max_set_size=2, audit_share=0.02)
    operating = model._document.operating
    suitable = assess(model.checks, output, pixels)
    return [
        triage(row, model.taxonomy, operating, rules, 0.5, known)
        for row, known in zip(output.probabilities, suitable, strict=True)
    ]


def alike(found, expected):
    assert np.abs(found.probabilities - expected.probabilities).max() <= TOLERANCE
    assert np.abs(found.maps - expected.maps).max() <= TOLERANCE * expected.maps.max()
    assert np.abs(found.ood_scores - expected.ood_scores).max() <= TOLERANCE * max(1, expected.ood_scores.max())


@pytest.mark.parametrize("name", CASES)
def test_openvino_predicts_maps_and_decides_like_torch(name, model_store):
    bundle = write_checked_bundle(model_store, name)
    model, plain = load_engine(bundle, "openvino", precision="fp32", device="cpu"), load_model(bundle, precision="fp32")
    pixels = foreign_images(side_of(name), 9, seed=5)[0]
    found, expected = model.predict(pixels, gradcam=True), plain.predict(pixels, gradcam=True)
    assert (model.engine, model.precision, plain.engine) == ("openvino", "fp32", "torch")
    alike(found, expected)
    ours, theirs = decisions_of(model, found, pixels), decisions_of(plain, expected, pixels)
    assert [(v.decision, v.label, v.reasons, v.prediction_set) for v in ours] == [
        (v.decision, v.label, v.reasons, v.prediction_set) for v in theirs
    ]
    assert model.check_golden() <= 1e-3 * max(1.0, float(np.abs(bundle.golden()["logits"]).max()))


def test_any_batch_and_any_number_of_threads_give_the_same(openvino, small):
    pixels = foreign_images(32, 16, seed=6)[0]
    whole = openvino.predict(pixels, gradcam=True)
    alike(whole, load_model(small, precision="fp32").predict(pixels, gradcam=True))
    assert whole.num_threads == torch.get_num_threads() == 1

    def part(first):
        return openvino.predict(pixels[first : first + 4], gradcam=True)

    # Four threads and one request at a time for each: no output of one is seen by another.
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            alike(BatchOutput.joined(list(pool.map(part, range(0, 16, 4)))), whole)
    torch.set_num_threads(2)
    try:
        two = openvino.predict(pixels, gradcam=True)
    finally:
        torch.set_num_threads(1)
    assert two.num_threads == 2
    alike(two, whole)
    assert openvino.predict(pixels[:1]).maps is None


def test_explanations_by_torch_need_no_second_model(openvino, small):
    pixels = foreign_images(32, 2, seed=6)[0]
    plain = load_model(small, precision="fp32")
    assert np.allclose(openvino.describe(pixels), plain.describe(pixels), atol=1e-5)
    assert openvino.gradcam(pixels, np.array([1, 2])) == pytest.approx(
        plain.gradcam(pixels, np.array([1, 2])), rel=1e-3
    )
    assert openvino.gradcam_is_exact


def test_a_graph_that_computes_something_else_does_not_serve(small, monkeypatch, caplog):
    run = OpenVinoModel.predict

    def wrong(self, pixels, *, gradcam=False):
        found = run(self, pixels, gradcam=gradcam)
        return BatchOutput(found.logits, found.probabilities, 1, found.maps * 1.01, found.ood_scores)

    monkeypatch.setattr(OpenVinoModel, "predict", wrong)
    with pytest.raises(IntegrityError, match="heat maps differ"):
        load_engine(small, "openvino", precision="fp32")
    with caplog.at_level(logging.WARNING):
        assert load_engine(small, "auto", precision="fp32").engine == "torch"
    assert "is computed by torch: model" in caplog.text


def test_auto_takes_openvino_where_it_is_installed(small, monkeypatch, caplog):
    assert load_engine(small, "auto", precision="fp32").engine == "openvino"
    assert load_engine(small).engine == "torch"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.WARNING):
        assert load_engine(small, "auto", precision="fp32").engine == "torch"
    assert "pip install 'relook[openvino]'" in caplog.text
    with pytest.raises(ConfigError, match=r"pip install 'relook\[openvino\]'"):
        load_engine(small, "openvino")


def test_a_model_without_a_closed_form_is_left_to_torch(small, monkeypatch):
    monkeypatch.setattr("vision.inference.graph.closed_form_of", lambda head: None)
    with pytest.raises(ConfigError, match="no closed form"):
        load_engine(small, "openvino", precision="fp32")
    assert load_engine(small, "auto", precision="fp32").engine == "torch"


def test_the_precision_that_is_said_is_the_one_that_is_computed(small):
    # Where the hardware has no bf16, OpenVINO computes in fp32 whatever it is asked for.
    model = OpenVinoModel(small, "bf16", 1)
    assert model.precision == model._compiled[1].precision
    assert model.precision in ("fp32", "bf16")


@pytest.mark.parametrize("engine", ["tensorrt", "OpenVINO", ""])
def test_an_unknown_engine_is_refused(engine):
    with pytest.raises(ValueError, match="torch"):
        ServingSettings(engine=engine)


def test_engine_and_device_must_fit():
    with pytest.raises(ValueError, match="set device=cpu, or engine=torch"):
        ServingSettings(engine="openvino", device="cuda")
    with pytest.raises(ValueError, match="cpu"):
        ServingSettings(device="tpu")


def test_a_gpu_that_is_not_there_is_said(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        load_engine(small, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    assert resolve_device("cpu") == "cpu"


class Full:
    """In place of a forward pass: batches above a size do not fit into memory."""

    def __init__(self, model, fits):
        self.inner, self.fits, self.sizes = model._predict, fits, []

    def __call__(self, pixels, gradcam):
        self.sizes.append(len(pixels))
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(pixels, gradcam)


@pytest.mark.parametrize(("fits", "sizes"), [(6, [16, 8, 4, 4, 4, 4]), (1, [16, 8, 4, 2, *[1] * 16]), (16, [16])])
def test_a_batch_that_does_not_fit_is_halved_and_the_size_is_kept(small, monkeypatch, caplog, fits, sizes):
    model = load_model(small, precision="fp32")
    pixels = foreign_images(32, 16, seed=6)[0]
    expected = model.predict(pixels, gradcam=True)
    full = Full(model, fits)
    monkeypatch.setattr(model, "_predict", full)
    with caplog.at_level(logging.WARNING):
        alike(model.predict(pixels, gradcam=True), expected)
    assert full.sizes == sizes
    assert ("out of memory" in caplog.text) == (fits < 16)
    # The second batch begins with what fitted.
    full.sizes.clear()
    alike(model.predict(pixels, gradcam=True), expected)
    assert full.sizes == [size for size in sizes if size <= fits]


def test_one_image_that_does_not_fit_is_an_error_with_a_way_out(small, monkeypatch):
    model = load_model(small, precision="fp32")
    monkeypatch.setattr(model, "_predict", Full(model, 0))
    with pytest.raises(UnavailableError, match=r"serving\.device=cpu"):
        model.predict(foreign_images(32, 4)[0])


def test_a_gpu_is_warmed_up_with_the_sizes_that_batches_have(small, monkeypatch):
    model = load_model(small, precision="fp32")
    assert model.warm_sizes(16) == (1, 16)
    monkeypatch.setattr(model, "_device", "cuda")
    assert model.warm_sizes(24) == (1, 2, 4, 8, 16, 24)
    assert model.warm_sizes(1) == (1,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_predicts_like_the_cpu(small, precision):
    pixels = foreign_images(32, 16, seed=6)[0]
    expected = load_model(small, precision="fp32").predict(pixels, gradcam=True)
    model = load_engine(small, "torch", precision=precision, device="cuda")
    found = model.predict(pixels, gradcam=True)
    allowed = 2e-3 if precision == "fp32" else 0.05
    assert isinstance(model, LoadedModel)
    assert np.abs(found.probabilities - expected.probabilities).max() <= allowed
    assert np.abs(found.maps - expected.maps).max() <= allowed * expected.maps.max()
    model.check_golden()
