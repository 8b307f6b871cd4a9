"""One real Label Studio for all tests that need one, and a fresh store with generated images for each test."""

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image as PillowImage

from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio, ServerInfo
from labeling.settings import LabelingSettings
from records.home import Home, open_home
from records.ids import new_id, utc_now
from records.store import Store
from records.types import Decision, Image, Prediction, ReasonCode, ReviewItem

# Read here, since the tests run with a closed environment: a Label Studio that is installed already.
ENVIRONMENT = os.environ.get("RELOOK_LABELING__ENVIRONMENT")


def make_image(seed: int, kind: str = "JPEG", size: tuple[int, int] = (96, 72)) -> bytes:
    """A generated image: a dark spot on a light ground, another place and colour for each seed."""
    chance = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    centre = chance.uniform(0.3, 0.7, 2) * (height, width)
    inside = np.hypot(y - centre[0], x - centre[1]) < chance.uniform(0.15, 0.35) * height
    pixels = np.where(inside[..., None], chance.integers(40, 120, 3), (222, 184, 160)).astype(np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def settings() -> LabelingSettings:
    """Port 0 takes a free one; the environment may be one that exists already."""
    return LabelingSettings(
        port=0, blind_share=0.0, environment=Path(ENVIRONMENT) if ENVIRONMENT else None, start_timeout_s=600
    )


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return open_home(tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="session")
def server(
    home: Home, settings: LabelingSettings, until_last_test: Callable[[str], contextlib.ExitStack]
) -> ServerInfo:
    # Started so that webhooks may reach this machine; which project sends them is up to each test.
    local = LocalLabelStudio(home, settings.model_copy(update={"webhook_url": "http://127.0.0.1:8000"}))
    info = local.up(lambda text: print(text))

    def end() -> None:
        assert local.down()

    until_last_test("Label Studio").callback(end)
    return info


@pytest.fixture(scope="session")
def client(server: ServerInfo) -> Iterator[LabelStudioClient]:
    made = LabelStudioClient(server.url, server.token)
    yield made
    made.close()


AddItems = Callable[..., list[ReviewItem]]
AddItem = Callable[[bytes, bytes, float], ReviewItem]


@pytest.fixture
def add_item(store: Store) -> AddItem:
    """Write one review item of an image with its overlay, at a priority."""
    return lambda data, overlay, priority: write_item(store, data, overlay, priority)


@pytest.fixture
def add_items(store: Store) -> AddItems:
    """Write images, predictions and review items, as serving does; priority falls with the number."""

    def add(count: int, *, first_seed: int = 0, overlays: bool = True) -> list[ReviewItem]:
        seeds = range(first_seed, first_seed + count)
        return [
            write_item(store, make_image(seed), make_image(seed + 10_000, "PNG") if overlays else None, count - number)
            for number, seed in enumerate(seeds)
        ]

    return add


def write_item(store: Store, data: bytes, overlay: bytes | None, priority: float) -> ReviewItem:
    """Write one image with a prediction and a review item."""
    now = utc_now()
    image = Image(
        id=store.blobs.put(data),
        uri="",
        format="jpeg",
        width_px=96,
        height_px=72,
        age_years=55,
        sex="female",
        localization="back",
        provenance="served",
        created_at=now,
    )
    image = image.model_copy(update={"uri": store.blobs.uri(image.id)})
    rest = 0.4 / 6
    prediction = Prediction(
        id=new_id(),
        request_id=new_id(),
        created_at=now,
        caller="local",
        idempotency_key=new_id(),
        image_id=image.id,
        model_id="a" * 64,
        model_status="champion",
        engine="torch",
        precision="fp32",
        num_threads=1,
        settings_hash="b" * 64,
        label="mel",
        confidence=0.6,
        probabilities={code: 0.6 if code == "mel" else rest for code in store.taxonomy.codes},
        decision=Decision.REVIEW,
        reasons=[ReasonCode.LOW_CONFIDENCE],
        latency_ms=1.0,
    )
    item = ReviewItem(
        id=new_id(),
        created_at=now,
        prediction_id=prediction.id,
        image_id=image.id,
        reasons=[ReasonCode.LOW_CONFIDENCE, ReasonCode.REFER],
        priority=priority,
        overlay_blob=store.blobs.put(overlay) if overlay is not None else None,
    )
    with store.ledger.begin() as tx:
        tx.add(image, prediction, item)
    return item


def drawing_of(uri: str) -> tuple[dict[str, str], str]:
    """Return the size at which a heat map is shown, and the image in it."""
    assert uri.startswith("data:image/svg+xml;base64,")
    drawing = ElementTree.fromstring(base64.b64decode(uri.partition(",")[2]))
    (shown,) = drawing
    size = {name: drawing.attrib[name] for name in ("width", "height")}
    assert {name: shown.attrib[name] for name in size} == size
    return size, shown.attrib["href"]
