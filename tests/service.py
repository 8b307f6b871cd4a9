"""Tiny real models, and the real service in this process, for the tests of serving and of security."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bench.drills.service_process import LocalService
from images.synth import render
from records.bundles import (
    Architecture,
    Bundle,
    BundleDocument,
    Calibration,
    Geometry,
    OperatingPoints,
    ReferPoint,
    write_bundle,
)
from records.frames import Crop
from records.models import register, serve_model, serving_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ModelStatus, Scope
from serving.access.keys import create_key
from serving.app import create_app
from serving.client import Client
from serving.explainer import Explainer
from serving.http_server import HttpServer, limits_of
from serving.predictor import Predictor
from serving.settings import ServingSettings
from serving.tls import certificate_of
from tests.ports import free_port

SIDE_PX = 64


def refer_point(threshold: float) -> ReferPoint:
    """An operating point; only its threshold matters here."""
    return ReferPoint(
        threshold=threshold, sensitivity_floor=0.9, proven=True, sensitivity=1.0, sensitivity_lower_bound=0.9,
        specificity=0.5, lesions=40,
    )  # fmt: skip


def operating_points(codes: tuple[str, ...], *, refer: float = 0.2, q: float = 0.7) -> OperatingPoints:
    """Operating points that answer a clear image and refer an unclear one."""
    return OperatingPoints(
        refer={"mel": refer_point(refer)},
        refer_malignant=refer_point(min(1.0, 2 * refer)),
        urgent_threshold=0.9,
        conformal_thresholds=dict.fromkeys(codes, q),
    )


def make_bundle(
    store: Store,
    seed: int = 0,
    *,
    bias: dict[str, float] | None = None,
    status_of_images: str = "finite",
    golden_logits: Any = None,
    metrics: dict[str, Any] | None = None,
    crop: Crop = Crop.CENTER,
) -> Bundle:
    """Write a bundle with the custom CNN's random weights.

    With `status_of_images="overflow"` it is finite on its (black) golden images only, and
    `golden_logits` replaces the logits stored for them.
    """
    import torch

    from vision.inference.loaded import reference_logits
    from vision.networks import build_model

    taxonomy = store.taxonomy
    torch.manual_seed(seed)
    network = build_model("custom_cnn", len(taxonomy.codes)).eval()
    geometry = Geometry(side_px=SIDE_PX, crop=crop)
    inputs = np.random.default_rng(seed).integers(0, 256, (4, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    if status_of_images == "overflow":
        inputs[:] = 0
        with torch.no_grad():
            weight = network.get_parameter("features.block1.conv.weight")
            weight.copy_(weight.abs() / weight.abs().max() * 3e38)
    document = BundleDocument(
        taxonomy=taxonomy,
        taxonomy_hash=taxonomy.hash,
        architecture=Architecture(name="custom_cnn"),
        geometry=geometry,
        class_priors=dict.fromkeys(taxonomy.codes, 1 / len(taxonomy.codes)),
        calibration=Calibration(bias=[(bias or {}).get(c, 0.0) for c in taxonomy.codes]),
        operating=operating_points(taxonomy.codes),
        dataset_id="d" * 64,
        config={},
        code_version="test",
        num_threads=1,
        metrics=metrics or {},
        explanation={},
    )
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    logits = reference_logits(network, inputs, geometry) if golden_logits is None else golden_logits
    return write_bundle(store, document, weights, {"inputs": inputs, "logits": logits})


def serve_bundle(store: Store, bundle: Bundle, status: ModelStatus = ModelStatus.CHAMPION) -> None:
    """Make a bundle the one that serves."""
    with store.ledger.begin() as tx:
        register(tx, bundle)
        serve_model(tx, bundle.id, status, replaces=serving_id(tx))


@dataclass(frozen=True)
class RunningService:
    """A service that can be reached over HTTP, and what it stores into."""

    url: str
    store: Store
    settings: ServingSettings


@contextmanager
def run_service(store: Store, settings: ServingSettings, page: bool = False) -> Iterator[RunningService]:
    """Run the whole app over real HTTP in a thread of this process, without Ray."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="service", daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=600)

    async def build() -> tuple[Predictor, HttpServer]:
        predictor = Predictor(store, settings)
        await predictor.start()
        service = LocalService(store, settings, predictor, Explainer(store, settings))
        web_page = None
        if page:
            from serving.routes.page import page_app

            web_page = page_app(settings, store)
        app = create_app(service, web_page)
        limits = limits_of(settings, app.on_response)
        server = HttpServer(app, settings.host, settings.port, limits, certificate=certificate_of(settings))
        await server.start()
        return predictor, server

    predictor, server = run(build())
    try:
        yield RunningService(settings.url, store, settings)
    finally:
        run(server.stop())
        run(predictor.stop())
        run(_cancel_leftovers())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=600)
        loop.close()


def make_key(store: Store, name: str, *scopes: Scope, organisation: str | None = None, sandbox: bool = False) -> str:
    """Create a key and return its token; the organisation has the key's name unless it is given."""
    return create_key(
        store, name=name, organisation=organisation or name, scopes=scopes, actor="test", sandbox=sandbox
    )[1]


class ServingTools:
    """The helpers of this file under one name."""

    make_bundle = staticmethod(make_bundle)
    serve_bundle = staticmethod(serve_bundle)
    run_service = staticmethod(run_service)
    make_key = staticmethod(make_key)
    free_port = staticmethod(free_port)
    side_px = SIDE_PX


async def _cancel_leftovers() -> None:
    """Cancel tasks of the page that run for ever."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    """Generated images by number: an equal number gives an equal image."""
    made: dict[int, bytes] = {}

    def make(number: int = 0) -> bytes:
        if number not in made:
            codes = ("nv", "mel", "bcc", "bkl", "akiec", "df", "vasc")
            made[number] = render(codes[number % len(codes)], seed=11, number=number)
        return made[number]

    return make


@pytest.fixture(scope="session")
def service_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store of the in-process service: one champion with random weights."""
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("served")))
    # With this bias the random network answers some images and sends others to review.
    serve_bundle(opened, make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store like that of the in-process service, for the tests of one file that change it or its settings."""
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("kept")))
    serve_bundle(opened, make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def service(service_store: Store) -> Iterator[RunningService]:
    """One in-process service for all tests that do not change its model."""
    settings = ServingSettings(port=free_port(), max_upload_mb=1.0, model_poll_s=0.1)
    with run_service(service_store, settings) as running:
        yield running


@pytest.fixture(scope="session")
def tools() -> ServingTools:
    """The helpers of this file as a fixture."""
    return ServingTools()


@pytest.fixture
def client(service: RunningService) -> Iterator[Client]:
    """A client of the in-process service that does not repeat requests."""
    with Client(service.url, retry_s=0.0) as opened:
        yield opened
