"""Every network through every verb: train with its report, evaluate, explain, predict a folder, serve.

Each network goes through all of them twice: in fp32, and trained in bf16 on a machine where `auto` means bf16. Two
cases run in the suite, the others with `make soak`; every case does the same, and the last tests count what was done.
What differs between networks is tested for all of them in the suite, too, without the verbs: in `tests/vision/networks`
each learns a step, in `tests/vision/inference` each predicts, maps and is explained in both formats and loads where
`auto` means bf16. Two steps leave batch norm with odd statistics, so some of these models do not stay themselves in
bf16: they must be served in fp32, with a note.
"""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from records.models import find_bundle, register, serve_model
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Consent, ModelStatus, Prediction
from serving.client import Client
from serving.schemas import Context
from serving.settings import ServingSettings
from tests.ports import free_port
from tests.service import run_service
from vision.explanations import gradients
from vision.explanations.methods import METHODS
from vision.networks import MODELS

FORMATS = ("fp32", "bf16")
COLOURS = {"amber": (230, 160, 40), "green": (60, 160, 70), "plum": (130, 60, 130)}
IMAGES_PER_CLASS = 10
IMAGES = IMAGES_PER_CLASS * len(COLOURS)
VERBS = ("train", "evaluate", "explain", "predict", "serve")

# Ours, in bf16; `test_timm` takes a network of timm through every verb in fp32.
IN_SUITE = {("custom_cnn", "bf16")}
pytestmark = pytest.mark.slow

CASES = [
    pytest.param(name, precision, marks=() if (name, precision) in IN_SUITE else pytest.mark.soak)
    for name in MODELS
    for precision in FORMATS
]
ran: Counter[tuple[str, bool]] = Counter()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per class, and a taxonomy; the class is the colour of a disk."""
    top, random = tmp_path_factory.mktemp("colours"), np.random.default_rng(3)
    rows, columns = np.mgrid[:80, :80]
    for code, colour in COLOURS.items():
        (top / "images" / code).mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            pixels = random.normal(200, 15, (80, 80, 3))
            pixels[np.hypot(rows - 40, columns - 40) < random.integers(15, 35)] = colour
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(top / "images" / code / f"{code}_{number}.png")
    classes = [{"code": code, "name": code.title(), "malignant": code == "plum"} for code in COLOURS]
    key = [{"code": "plum", "sensitivity_floor": 0.5}]
    document = {"name": "colours", "version": 1, "classes": classes, "key_classes": key}
    (top / "colours.yaml").write_text(yaml.safe_dump(document))
    return top


def relook(*words: object) -> dict[str, Any]:
    """Run a verb and return what it prints."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


@pytest.fixture
def home(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A home with the images; it is removed, because the weights of all networks together fill a disk."""
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RELOOK_RECORDS__TAXONOMY", str(folder / "colours.yaml"))
    # How well maps add up is tested elsewhere; on random weights more steps and samples would only take time.
    monkeypatch.setattr(gradients, "IG_STEPS", 8)
    monkeypatch.setattr(gradients, "MAX_IG_STEPS", 8)
    monkeypatch.setattr(gradients.gradient_shap, "__defaults__", (8, 0))
    yield tmp_path / "home"
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_network_goes_through_every_verb(
    name: str,
    precision: str,
    home: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("vision.precision.has_native_bf16", lambda device="cpu": precision == "bf16")
    recipe = ("--set", f"trainers.precision={precision}", "--set", "serving.precision=auto")
    model_id = _train(name, folder / "images", recipe)
    evaluated = relook("evaluate", model_id, "--split", "val", *recipe)
    assert evaluated["model_id"] == model_id
    assert evaluated["images"] > 0

    (image, *_) = sorted((folder / "images" / "plum").iterdir())
    for method in METHODS:
        out = tmp_path / f"{method}.png"
        explained = relook("explain", model_id, image, "--method", method, "--out", out, *recipe)
        assert np.isfinite(explained["values"]).all()
        assert out.stat().st_size > 1_000

    table = tmp_path / "table.csv"
    bulk = relook("predict", model_id, folder / "images", "--out", table, "--explain", "gradcam", *recipe)
    assert bulk["images"] == IMAGES
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [row["error"] for row in rows] == [""] * IMAGES

    served_in = _serve(home, folder, model_id, image)
    assert served_in == precision or (MODELS[name].batch_norm and "computes in fp32, because in bf16" in caplog.text)
    ran.update((verb, (name, precision) in IN_SUITE) for verb in VERBS)


def _train(name: str, images: Path, recipe: tuple[str, ...]) -> str:
    settings = {
        "model.name": name, "model.side_px": MODELS[name].minimum_side_px, "epochs": 1,
        "batch_size": 9,
        "workers.threads": 1, "augmentation": "none", "optimizer.name": "sgd", "optimizer.momentum": 0,
        "optimizer.learning_rate": 1e-6,
    }  # fmt: skip
    sets = [word for key, value in settings.items() for word in ("--set", f"trainers.{key}={value}")]
    trained = relook("train", "--data", images, *sets, *recipe)
    assert trained["model"] == name
    assert trained["training"]["epochs"] == 1
    assert (Path(trained["report"]) / "report.html").stat().st_size > 10_000
    model_id: str = trained["model_id"]
    return model_id


def _serve(home: Path, folder: Path, model_id: str, image: Path) -> str:
    """Serve the model over HTTP in this process: a prediction with its map, then two more maps.

    Returns the precision that it computed in.
    """
    store = open_store(RecordsSettings(home=home, taxonomy=str(folder / "colours.yaml")))
    with store.ledger.begin() as tx:
        register(tx, find_bundle(store, model_id))
        serve_model(tx, model_id, ModelStatus.CHAMPION, replaces=None)
    settings = ServingSettings(port=free_port(), precision="auto")
    with run_service(store, settings), Client(settings.url, retry_s=0.0) as client:
        predicted = client.predict(image.read_bytes(), explain="gradcam", context=Context(consent=Consent.TRAINING))
        assert predicted.model.id == model_id
        assert predicted.explanation is not None
        assert sum(predicted.probabilities.values()) == pytest.approx(1, abs=1e-3)
        # What each method computes was seen above; the service has to load the model that it needs.
        for method in ("gradcam", "occlusion"):
            assert client.explanation(predicted.id, method=method, target="plum").method == method
    with store.ledger.read() as tx:
        precision = tx.require(Prediction, predicted.id).precision
    store.close()
    return precision


def test_the_cases_are_the_whole_catalogue_in_both_formats() -> None:
    assert (len(MODELS), len(METHODS), len(CASES), len(IN_SUITE)) == (14, 4, 28, 1)
    assert {case.values for case in CASES} == {(name, precision) for name in MODELS for precision in FORMATS}
    assert {MODELS[name].gradcam for name in MODELS} == {"closed_form"}


@pytest.mark.parametrize(("in_suite", "cases"), [(True, 1), pytest.param(False, 27, marks=pytest.mark.soak)])
def test_how_many_networks_went_through_each_verb(in_suite: bool, cases: int) -> None:
    assert {verb: ran[verb, in_suite] for verb in VERBS} == dict.fromkeys(VERBS, cases)
