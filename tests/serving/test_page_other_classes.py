"""The page with classes that the generator does not know: it starts, predicts, explains and offers no examples."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import yaml
from PIL import Image as PillowImage

from images.synth import render as render_image
from records.bundles import Calibration
from records.ids import sha256_hex, utc_now
from records.images import strip_metadata
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Consent, Image
from serving.page.api import PageApi
from serving.page.examples import title_of, write_examples
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
    assert title_of(paths) == "Generated examples"


def test_examples_of_other_classes_are_those_that_everybody_may_see(store_of, tmp_path, capsys):
    store, shown, made = store_of(("cat", "mel", "dog", "owl", "fox")), tmp_path / "shown", tmp_path / "examples"
    files = {
        "cat.png": render_image("nv", seed=1), "dog/1.jpg": b"no image", "dog/2.jpg": render_image("nv", seed=2),
        "owl/a.jpg": render_image("nv", seed=3), "unknown.jpg": render_image("nv", seed=4),
    }  # fmt: skip
    for name, data in files.items():
        (shown / name).parent.mkdir(parents=True, exist_ok=True)
        (shown / name).write_bytes(data)
    paths = write_examples(made, store.taxonomy, shown, store)
    assert [path.name for path in paths] == ["shown_cat.jpg", "generated_mel.jpg", "shown_dog.jpg", "shown_owl.jpg"]
    assert title_of(paths) == "Examples"
    assert "dog/1.jpg is not shown: " in capsys.readouterr().err
    with PillowImage.open(made / "shown_dog.jpg") as image:
        assert (image.size, dict(image.getexif())) == ((320, 240), {})
    # The ledger has the last word: an erased image, and one whose consent was lowered, are shown to nobody.
    now = utc_now()
    with store.ledger.begin() as tx:
        for name, gone in (("cat.png", {"erased_at": now}), ("owl/a.jpg", {"consent_lowered_at": now})):
            tx.add(Image(id=sha256_hex(strip_metadata(files[name])), uri="", format="png", width_px=9, height_px=9,
                         provenance="test", consent=Consent.REVIEW, created_at=now, **gone))  # fmt: skip
    (shown / "dog/2.jpg").unlink()
    assert [path.name for path in write_examples(made, store.taxonomy, shown, store)] == ["generated_mel.jpg"]
    assert [path.name for path in made.iterdir()] == ["generated_mel.jpg"]
    assert capsys.readouterr().err.count("erased or its consent was lowered") == 2
