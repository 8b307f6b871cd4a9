"""Views: flips and turns are a group, maps come back, and every path averages the same logits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from records.bundles import Bundle, write_bundle
from records.store import Store
from vision.inference.golden import golden_arrays
from vision.inference.graph import LOGITS, MAPS, ForwardGraph
from vision.inference.loaded import load_model, plain_network, reference_logits
from vision.views import MAX_VIEWS, turned_back, viewed


def test_the_views_are_eight_different_ones_and_each_is_turned_back() -> None:
    image = torch.arange(18.0).reshape(2, 3, 3)
    seen = {tuple(viewed(image, view).flatten().tolist()) for view in range(MAX_VIEWS)}
    assert len(seen) == MAX_VIEWS
    for view in range(MAX_VIEWS):
        assert torch.equal(turned_back(viewed(image, view), view), image)
    assert torch.equal(viewed(image, 0), image)


def with_views(store: Store, bundle: Bundle, views: int) -> Bundle:
    document = bundle.document.model_copy(update={"views": views})
    golden = golden_arrays(plain_network(bundle), document.geometry, views)
    return write_bundle(store, document, bundle.weights(), golden)


@pytest.mark.parametrize("views", [2, 8])
def test_loaded_reference_and_graph_average_the_same_logits_and_maps(
    model_store: Store, random_bundle: Callable[..., Bundle], views: int
) -> None:
    plain = random_bundle("custom_cnn", 0, 32)
    bundle = with_views(model_store, plain, views)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    model = load_model(bundle, precision="fp32")
    assert model.check_golden() < 1e-3
    output = model.predict(pixels, gradcam=True)
    expected = reference_logits(plain_network(bundle), pixels, bundle.document.geometry, views)
    assert output.logits == pytest.approx(expected, abs=1e-3)
    graph = ForwardGraph(plain_network(bundle), model.geometry, None, views).eval()
    with torch.inference_mode():
        found = graph(torch.from_numpy(pixels))
    assert found[LOGITS].numpy() == pytest.approx(output.logits, abs=1e-3)
    assert found[MAPS].numpy() == pytest.approx(output.maps, abs=1e-3)
    alone = load_model(plain, precision="fp32").predict(pixels).logits
    assert np.abs(alone - output.logits).max() > 1e-3


def test_with_all_views_a_turned_image_gets_the_same_logits_and_a_turned_map(
    model_store: Store, random_bundle: Callable[..., Bundle]
) -> None:
    model = load_model(with_views(model_store, random_bundle("custom_cnn", 0, 32), 8), precision="fp32")
    pixels = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    expected = model.predict(pixels, gradcam=True)
    for turned, back in ((np.rot90, np.rot90), (np.flip, np.flip)):
        image = np.ascontiguousarray(turned(pixels[0], axes=(0, 1)) if turned is np.rot90 else pixels[0][:, ::-1])[None]
        found = model.predict(image, gradcam=True)
        assert found.logits == pytest.approx(expected.logits, abs=1e-3)
        maps = np.rot90(expected.maps, axes=(2, 3)) if back is np.rot90 else expected.maps[..., ::-1]
        assert found.maps == pytest.approx(maps, abs=1e-3)


def test_one_view_leaves_document_and_logits_as_they_were(
    model_store: Store, random_bundle: Callable[..., Bundle]
) -> None:
    plain = random_bundle("custom_cnn", 0, 32)
    document = plain.document.model_dump(mode="json")
    assert "views" not in document
    assert "context" not in document
    assert write_bundle(model_store, plain.document, plain.weights(), plain.golden()).id == plain.id
