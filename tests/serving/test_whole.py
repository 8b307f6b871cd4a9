"""A bundle that sees the whole image: one answer by HTTP, command line, batch, replay and graph, and maps over all."""

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from typer.testing import CliRunner

from cluster.cli import app
from cluster.incidents.evidence import examine
from records.bundles import Bundle
from records.frames import Crop
from records.models import register
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Arm, Image, ModelStatus, Prediction, ReviewItem
from serving.access.keys import admin_token
from serving.bulk import predict_folder
from serving.client import Client
from serving.direct import Model
from serving.incidents.page import _shown
from serving.schemas import Context, RolloutRequest
from serving.settings import ServingSettings
from tests.service import RunningService
from vision.export import folder as export_folder
from vision.export.folder import export_model
from vision.inference.loaded import load_model

SIDE_PX = 64


def striped(seed: int = 0) -> bytes:
    """A PNG of 200 x 150 whose outer eighths differ from its centre square."""
    image = np.random.default_rng(seed).integers(90, 160, (150, 200, 3), dtype=np.uint8)
    image[:, :25] = (200, 30, 60)
    image[:, 175:] = (20, 60, 220)
    file = io.BytesIO()
    PillowImage.fromarray(image).save(file, "PNG")
    return file.getvalue()


CENTRE = (25, 0, 175, 150)
"""The centre square of a `striped` image."""


def squeezed(data: bytes, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """What the model has to see, all of it or a part, by Pillow alone."""
    image = PillowImage.open(io.BytesIO(data))
    return np.asarray(image.resize((SIDE_PX, SIDE_PX), PillowImage.Resampling.BICUBIC, box=box))


def size_of(png: bytes | str) -> tuple[int, int]:
    """Width and height of a PNG, as bytes or as base64."""
    with PillowImage.open(io.BytesIO(base64.b64decode(png) if isinstance(png, str) else png)) as image:
        return image.size


@pytest.fixture(scope="module")
def served(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bundle, RunningService]]:
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("whole") / "home"))
    bundle = tools.make_bundle(store, crop=Crop.WHOLE)
    tools.serve_bundle(store, bundle)
    with tools.run_service(store, ServingSettings(port=tools.free_port(), precision="fp32")) as running:
        yield bundle, running
    store.close()


@pytest.fixture
def wanted(served: tuple[Bundle, RunningService]) -> dict[str, float]:
    bundle, _ = served
    values = load_model(bundle, precision="fp32").predict(squeezed(striped())[None]).probabilities[0]
    return dict(zip(bundle.document.taxonomy.codes, values.tolist(), strict=True))


@pytest.fixture
def stored(served: tuple[Bundle, RunningService]) -> Iterator[tuple[Store, Client, Any]]:
    _, running = served
    with Client(running.url, retry_s=0.0) as client:
        yield running.store, client, client.predict(striped(), explain="gradcam", context=Context(consent="review"))


def test_http_replay_and_review_see_all_of_it(
    served: tuple[Bundle, RunningService], stored: tuple[Store, Client, Any], wanted: dict[str, float]
) -> None:
    store, client, prediction = stored
    assert prediction.probabilities == pytest.approx(wanted, abs=1e-5)
    assert prediction.explanation.crop is Crop.WHOLE
    side_px = ServingSettings().overlay_side_px
    assert size_of(prediction.explanation.png_base64) == (side_px, side_px * 3 // 4)
    again = client.explain_image(striped(), method="occlusion", target="mel")
    assert (again.crop, size_of(again.png_base64)) == (Crop.WHOLE, (side_px, side_px * 3 // 4))
    with store.ledger.read() as tx:
        row = tx.require(Prediction, prediction.id)
        items = tx.find(ReviewItem)
        image = tx.require(Image, row.image_id)
    assert {item.crop for item in items if item.heat_map} == {Crop.WHOLE}
    evidence = examine(store, served[1].settings, row, "mel").evidence
    assert evidence.probabilities == pytest.approx(wanted, abs=1e-5)
    assert evidence.crop is Crop.WHOLE
    shown = _shown(store, image, evidence, 80)
    assert shown is not None
    assert shown.shape == (60, 80, 3)


def test_the_print_view_shows_all_of_it(stored: tuple[Store, Client, Any]) -> None:
    _, client, prediction = stored
    shown = re.findall(r'<img alt="[^"]*" src="data:image/png;base64,([^"]+)"', client.print_view(prediction.id))
    assert len(shown) == 2
    for png in shown:
        width_px, height_px = size_of(png)
        assert width_px * 3 == height_px * 4


@pytest.mark.engines
def test_another_engine_sees_all_of_it(
    served: tuple[Bundle, RunningService], wanted: dict[str, float], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    bundle, running = served
    (tmp_path / "a.png").write_bytes(striped())
    (found,) = Model(bundle, running.settings.model_copy(update={"engine": "openvino"})).predict(tmp_path / "a.png")
    assert found.probabilities == pytest.approx(wanted, abs=1e-4)


def test_a_candidate_that_sees_less_than_the_champion_sees_its_own_part(
    served: tuple[Bundle, RunningService], tools: Any
) -> None:
    bundle, running = served
    store = running.store
    square = tools.make_bundle(store, 1)
    with store.ledger.begin() as tx:
        register(tx, square, status=ModelStatus.CANDIDATE)
    with Client(running.url, admin_token(store.home), retry_s=0.0) as admin:
        admin.roll_out(RolloutRequest(model=square.id, champion=bundle.id))
        deadline = time.monotonic() + 600
        while not (shadows := _shadows(store)):
            admin.predict(striped())
            assert time.monotonic() < deadline
    seen = squeezed(striped(), CENTRE)
    values = load_model(square, precision="fp32").predict(seen[None]).probabilities[0]
    for row in shadows:
        assert row.probabilities == pytest.approx(
            dict(zip(store.taxonomy.codes, values.tolist(), strict=True)), abs=1e-5
        )


def _shadows(store: Store) -> list[Prediction]:
    with store.ledger.read() as tx:
        return tx.find(Prediction, where={"arm": Arm.SHADOW})


def test_batch_python_and_graph_give_the_same(
    served: tuple[Bundle, RunningService], wanted: dict[str, float], tmp_path: Path
) -> None:
    bundle, running = served
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(striped())
    settings = running.settings
    (row,) = predict_folder(bundle, folder, tmp_path / "out.csv", settings, explain=True).rows
    assert row["probabilities"] == pytest.approx(wanted, abs=1e-5)
    (drawn,) = (tmp_path / "out.csv.maps").iterdir()
    assert size_of(drawn.read_bytes()) == (settings.overlay_side_px, settings.overlay_side_px * 3 // 4)
    model = Model(bundle, settings)
    (found,) = model.predict(folder / "a.png")
    assert found.probabilities == pytest.approx(wanted, abs=1e-5)
    explained = model.explain(folder / "a.png")
    assert explained.heat_map.shape == explained.overlay().shape[:2] == (384, 512)


@pytest.mark.long
@pytest.mark.engines
def test_the_graph_says_how_its_squares_are_made(
    served: tuple[Bundle, RunningService], wanted: dict[str, float], tmp_path: Path
) -> None:
    bundle, _ = served
    done = export_model(bundle, tmp_path / "graph", "onnx")
    out = export_folder._run_onnx(done.folder, squeezed(striped())[None])["probabilities"][0]
    assert dict(zip(wanted, out.tolist(), strict=True)) == pytest.approx(wanted, abs=1e-4)
    assert "scale the whole image to 64 x 64 px" in (done.folder / "README.md").read_text()
    assert json.loads((done.folder / "model.json").read_text())["geometry"]["crop"] == "whole"


def test_the_command_line_sees_and_draws_all_of_it(
    served: tuple[Bundle, RunningService], wanted: dict[str, float], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle, running = served
    monkeypatch.setenv("RELOOK_HOME", str(running.store.home.root))
    (tmp_path / "a.png").write_bytes(striped())
    words = ["explain", bundle.id, str(tmp_path / "a.png"), "--out", str(tmp_path / "map.png"), "--json"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["probabilities"] == pytest.approx(wanted, abs=1e-5)
    assert size_of((tmp_path / "map.png").read_bytes()) == (512, 384)
