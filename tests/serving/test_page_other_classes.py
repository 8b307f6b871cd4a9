"""The page with classes that the generator does not know: it starts, predicts, explains and offers no examples."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import yaml

from images.synth import render as render_image
from records.bundles import Calibration
from records.settings import RecordsSettings
from records.store import open_store
from serving.page.api import PageApi
from serving.page.layout import write_examples
from serving.page.models import ModelHandlers
from serving.page.predict import PredictHandlers
from serving.settings import ServingSettings
from tests.models import write_random_bundle

NINE = tuple(f"s{number}" for number in range(9))
PETS = ("cat", "dog", "owl")
SOME_KNOWN = ("scar", "mel", "none", "nv")
VISITOR = SimpleNamespace(state=SimpleNamespace(key=None))


@pytest.fixture
def store_of(tmp_path):
    """(codes) -> a store whose classes they are, none of them malignant or a key class."""
    opened = []

    def make(codes):
        path = tmp_path / "mine.yaml"
        classes = [{"code": code, "name": f"Class {code}", "malignant": False} for code in codes]
        path.write_text(yaml.safe_dump({"name": "mine", "version": 1, "classes": classes}))
        opened.append(open_store(RecordsSettings(home=tmp_path / "home", taxonomy=str(path))))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def page_of(store_of, tools, tmp_path):
    """(codes) -> the running service with its page; each model has random weights."""

    def start(codes):
        store = store_of(codes)
        bundle = write_random_bundle(
            store,
            "custom_cnn",
            class_priors=dict.fromkeys(codes, 1 / len(codes)),
            calibration=Calibration(bias=[0.0] * len(codes)),
        )
        tools.serve_bundle(store, bundle)
        settings = ServingSettings(port=tools.free_port(), page_folder=tmp_path, model_poll_s=0.1)
        return tools.run_service(store, settings, page=True)

    return start


@contextmanager
def page_api(running):
    api = PageApi(running.url, running.store.taxonomy)
    # The client that visitors without a key share lives as long as its process.
    with api.client(VISITOR) as shared, shared:
        yield api


@pytest.mark.parametrize(("codes", "num_examples"), [(NINE, 0), (PETS, 0), (SOME_KNOWN, 2)])
def test_the_page_starts_and_serves_any_classes(codes, num_examples, page_of, tmp_path):
    with page_of(codes) as running, page_api(running) as api:
        html = httpx.get(f"{running.url}/").raise_for_status().text
        config = json.loads(html.split("window.gradio_config = ", 1)[1].split(";</script>", 1)[0])
        samples = [part["props"]["samples"] for part in config["components"] if part["type"] == "dataset"]
        assert [len(rows) for rows in samples] == ([num_examples] if num_examples else [])

        upload = tmp_path / "upload.jpg"
        upload.write_bytes(render_image("nv", seed=1))
        handlers = PredictHandlers(api, 64)
        html, shown, heat_map, *_ = handlers.predict({"path": str(upload)}, "none", VISITOR)
        assert "Most likely: Class" in html
        assert shown.label in codes
        assert "<img" in heat_map
        assert "<img" in handlers.explain(shown, "gradcam", codes[0], codes[-1], VISITOR)
        with api.client(VISITOR) as client:
            model_id = client.model().id
        assert model_id[:12] in ModelHandlers(api).show(model_id, VISITOR)[0]


@pytest.mark.parametrize(
    ("codes", "known"),
    [(NINE, []), (PETS, []), (SOME_KNOWN, ["mel", "nv"]), (("vasc", "akiec"), ["vasc", "akiec"])],
)
def test_examples_are_those_that_can_be_generated(codes, known, store_of, tmp_path):
    for _ in range(2):
        paths = write_examples(tmp_path / "examples", store_of(codes).taxonomy)
        assert [path.name for path in paths] == [f"generated_{code}.jpg" for code in known]
    assert sorted((tmp_path / "examples").iterdir()) == sorted(paths)
