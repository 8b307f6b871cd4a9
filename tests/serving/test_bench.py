"""Load measurements: images differ, refusals are counted, what cannot be measured has a reason."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from pydantic import ValidationError
from rich.progress import Progress

from bench.serve.explain import explain_figures
from bench.serve.load import Images, Load, Reply, Target, ask, closed_loop, open_loop, unlike
from bench.serve.peers import Peers
from bench.serve.subject import Bare, write_for_peers
from records.errors import DataError
from records.store import Store
from records.types import Image, Prediction, ReviewItem
from serving.client import Client
from serving.settings import ServingSettings
from vision.inference.loaded import load_model

PREDICTIONS = "/v1/predictions"


def test_unlike_images_look_the_same_and_are_other_files(make_image: Callable[..., bytes]) -> None:
    made = [unlike(make_image(0), number) for number in (0, 1, 2, 3, 1 << 23)]
    assert made[0] == make_image(0)
    assert len(set(made)) == len(made)
    shown = [np.asarray(PillowImage.open(io.BytesIO(data)), dtype=float) for data in made]
    assert max(np.abs(other - shown[0]).mean() for other in shown) < 1.0
    with pytest.raises(DataError, match="baseline JPEG"):
        unlike(b"\x89PNG", 1)


def test_loads_count_predictions(service: Any, make_image: Callable[..., bytes]) -> None:
    images = Images([make_image(number) for number in range(3)])
    target = Target(service.settings.port, PREDICTIONS)
    with service.store.ledger.read() as tx:
        before = tx.count(Prediction)
    asked = ask(target, images, 12, 4).require_success("the service")
    closed = closed_loop(target, images, 2, 0.5)
    opened = open_loop(target, images, 20.0, 0.5, 4)
    assert len(asked.answered) == 12
    assert len(opened.replies) == 10
    assert opened.percentile_ms(50) is not None
    assert closed.per_second == len(closed.answered) / 0.5
    with service.store.ledger.read() as tx:
        # A closed loop counts only responses in time; the callers' last predictions may be later.
        late = tx.count(Prediction) - before - len(asked.answered) - len(closed.answered) - len(opened.answered)
    assert 0 <= late <= 2


def test_a_load_with_refusals_is_no_figure(service: Any, make_image: Callable[..., bytes]) -> None:
    nowhere = ask(Target(service.settings.port, "/v1/nothing"), Images([make_image(0)]), 4, 2)
    assert nowhere.share_of(404) == 1.0
    assert nowhere.percentile_ms(50) is None
    with pytest.raises(DataError, match=r"nobody failed 4 of 4 requests \(status \[404\]\)"):
        nowhere.require_success("nobody")
    with pytest.raises(DataError, match="0 of 0"):
        Load([], 1.0).require_success("nobody")


def test_latency_counts_from_when_a_request_was_due() -> None:
    load = Load([Reply(1.0, 1.25, 200), Reply(2.0, 2.75, 200), Reply(2.0, 9.0, 429, retry_after=True)], 2.0)
    assert load.percentile_ms(50) == pytest.approx(500.0)
    assert load.per_second == 1.0
    assert load.share_of(429) == pytest.approx(1 / 3)


def test_peers_that_cannot_run_are_none_with_a_reason(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    unnamed = Peers(None, tmp_path / "network.pt", tmp_path)
    with unnamed.running(Images([make_image(0)])) as found:
        assert found == {}
    assert set(unnamed.reasons) == {"litserve", "bentoml", "fastapi"}
    assert "unless --peers names" in unnamed.reasons["litserve"]
    assert unnamed.gradcam_rate(2, 0.1) is None
    absent = Peers(tmp_path, tmp_path / "network.pt", tmp_path)
    assert absent.gradcam_rate(2, 0.1) is None
    assert "has no environment 'pytorch_grad_cam'" in absent.reasons["pytorch_grad_cam"]


def test_peers_get_the_served_network_without_our_code(store: Store, tools: Any, tmp_path: Path) -> None:
    import torch

    model = load_model(tools.make_bundle(store), precision="fp32")
    write_for_peers(model, tmp_path / "network.pt")
    found = torch.load(tmp_path / "network.pt", weights_only=False)
    kinds = {type(module).__module__.partition(".")[0] for module in found["network"].modules()}
    assert kinds == {"torch"}
    pixels = Bare(model, 3, 1).pixels
    with torch.inference_mode():
        logits = found["network"](model.inputs(pixels)).numpy()
    np.testing.assert_allclose(logits, model.predict(pixels).logits, rtol=1e-4, atol=1e-5)


def test_explanations_have_figures(store: Store, tools: Any, tmp_path: Path) -> None:
    model = load_model(tools.make_bundle(store), precision="fp32")
    peers = Peers(None, tmp_path / "network.pt", tmp_path)
    figures = explain_figures(model, Bare(model, 2, 1).pixels, peers, 1, 0.01, 1, Progress(disable=True))
    assert figures["gradcam_over_predict"] > 0
    assert figures["gradcam_over_pytorch_grad_cam"] is None
    assert "--peers" in figures["reasons"]["pytorch_grad_cam"]


def test_a_service_that_keeps_nothing_predicts_and_stores_nothing(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))
    settings = ServingSettings(port=tools.free_port(), keep=False)
    with tools.run_service(store, settings) as running, Client(running.url) as client:
        predictions = [client.predict(make_image(number), explain="gradcam") for number in range(6)]
    assert all(prediction.decision for prediction in predictions)
    assert any(prediction.explanation for prediction in predictions)
    assert all(prediction.review is None for prediction in predictions)
    with store.ledger.read() as tx:
        assert [tx.count(kind) for kind in (Prediction, Image, ReviewItem)] == [0, 0, 0]


def test_keeping_nothing_is_for_this_machine_alone() -> None:
    with pytest.raises(ValidationError, match="needs a host on loopback"):
        ServingSettings(host="0.0.0.0", keep=False)
