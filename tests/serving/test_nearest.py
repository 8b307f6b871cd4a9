"""Confirmed cases beside a prediction: the nearest ones that may be shown, and no others."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from cluster.task_cases import TaskCases
from images.decode import decode_frame
from images.importer import import_folder
from images.synth import synthesize
from records.bundles import Bundle, content_id
from records.cases import FILE, Cases, read_cases, remove_cases, write_cases
from records.consent import lower_consent
from records.datasets import load_dataset
from records.erasure import RECORDS_PLACES, erase_images
from records.errors import ContractError, IntegrityError, RefusedError, UnknownIdError
from records.frames import Frame
from records.models import register, serve_model
from records.settings import RecordsSettings
from records.store import Store, find_images, open_store, read_image
from records.types import Confirmation, Consent, DatasetRecord, Image, ModelStatus, Prediction, SourceLabel, Split
from serving.client import Client
from serving.explainer import Explainer
from serving.page.api import PageApi
from serving.page.predict import PredictHandlers, Shown
from serving.schemas import Context
from serving.settings import ServingSettings
from tests.vision.checked import write_checked_bundle
from trainers.fitting.cases import add_cases, case_ids
from vision.inference.loaded import LoadedModel, load_model, plain_network


@pytest.fixture(scope="module")
def shown_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Generated images, half of which may be displayed; a served model with its cases."""
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("nearest") / "home"))
    for number, consent in enumerate((Consent.DISPLAY, Consent.TRAINING)):
        folder = tmp_path_factory.mktemp("images") / "data"
        synthesize(folder, lesions=30, seed=5 + number, width_px=80)
        import_folder(store, folder, consent=consent, frames=(Frame(64),))
    yield store
    store.close()


def fitted(store: Store) -> tuple[Bundle, Any]:
    """Write a bundle with random weights whose cases are those of the newest dataset version."""
    with store.ledger.read() as tx:
        newest = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)[0]
    dataset = load_dataset(store, newest.id)
    bundle = write_checked_bundle(store, "custom_cnn")
    trained: Any = SimpleNamespace(network=plain_network(bundle), geometry=bundle.document.geometry, num_threads=1)
    return add_cases(store, dataset, trained, bundle), dataset


@pytest.fixture(scope="module")
def bundle(shown_store: Store) -> Bundle:
    found, _ = fitted(shown_store)
    with shown_store.ledger.begin() as tx:
        register(tx, found)
        serve_model(tx, found.id, ModelStatus.CHAMPION, replaces=None)
    return found


@pytest.fixture(scope="module")
def running(shown_store: Store, bundle: Bundle, tools: Any) -> Iterator[Any]:
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1)
    with tools.run_service(shown_store, settings) as found:
        yield found


@pytest.fixture
def http(running: Any) -> Iterator[Client]:
    with Client(running.url, retry_s=0.0) as client:
        yield client


def test_cases_are_the_confirmed_training_images_that_may_be_displayed(shown_store: Store, bundle: Bundle) -> None:
    cases, (_, dataset) = read_cases(bundle.path), fitted(shown_store)
    assert cases is not None
    assert len(cases.image_ids) >= 10
    train = dataset.split(Split.TRAIN).set_index("image_id")
    images = find_images(shown_store, list(cases.image_ids))
    assert {image.consent for image in images} == {Consent.DISPLAY}
    assert set(cases.image_ids) <= set(train.index)
    with shown_store.ledger.read() as tx:
        labels = {row.image_id: row for row in tx.find(SourceLabel)}
    sure = {Confirmation.HISTOPATHOLOGY, Confirmation.CONFOCAL, Confirmation.FOLLOW_UP}
    assert {labels[image_id].confirmation for image_id in cases.image_ids} <= sure
    named = [shown_store.taxonomy.codes[number] for number in cases.classes]
    assert named == [labels[image_id].label for image_id in cases.image_ids]
    missing = {image_id for image_id in train.index if labels[image_id].confirmation in sure} - set(cases.image_ids)
    assert {image.consent for image in find_images(shown_store, sorted(missing))} == {Consent.TRAINING}
    assert bundle.id == content_id(bundle.path), "cases are no part of what the model is"


def test_the_nearest_are_found_exactly_and_shown_with_their_diagnoses(
    http: Client, shown_store: Store, bundle: Bundle, make_image: Callable[..., bytes]
) -> None:
    prediction = http.predict(make_image(0))
    found = http.nearest(prediction.id, limit=3)
    assert (found.prediction_id, found.model_id) == (prediction.id, bundle.id)
    cases = read_cases(bundle.path)
    assert cases is not None
    model = load_model(bundle, precision="fp32")
    assert model.checks is not None
    pixels = decode_frame(make_image(0), model.geometry.frame)
    vector = model.checks.features.project(model.describe(pixels[None]))[0]
    distances = np.linalg.norm(cases.vectors - vector, axis=1) / model.checks.ood_threshold
    groups, expected = set[Any](), []
    for row in np.argsort(distances):
        (image,) = find_images(shown_store, [cases.image_ids[row]])
        if image.group_id not in groups:
            groups.add(image.group_id)
            expected.append((image.id, float(distances[row])))
    assert [case.image_id for case in found.cases] == [image_id for image_id, _ in expected[:3]]
    assert [case.distance for case in found.cases] == pytest.approx([far for _, far in expected[:3]], rel=1e-3)
    for case in found.cases:
        assert case.label in shown_store.taxonomy.codes
        assert case.confirmed_by in {"histopathology", "confocal microscopy or follow-up"}
        drawn = Pillow.open(io.BytesIO(base64.b64decode(case.png_base64)))
        assert drawn.size == (224, 224)
    assert len(http.nearest(prediction.id, limit=1).cases) == 1


def test_a_task_gets_the_cases_that_the_service_shows(
    http: Client,
    shown_store: Store,
    bundle: Bundle,
    running: Any,
    make_image: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prediction = http.predict(make_image(5))
    served = http.nearest(prediction.id, limit=2).cases
    (image,) = find_images(shown_store, [prediction.image_id])
    with shown_store.ledger.read() as tx:
        row = tx.require(Prediction, prediction.id)
    data = read_image(shown_store, image)
    find = TaskCases(shown_store, running.settings, 2)
    for about in (row, None):  # without a prediction, the model that serves looks for them
        (found,) = find([(image, data, about)])
        assert [(one.image_id, one.label, one.confirmed_by) for one in found] == [
            (case.image_id, case.label, case.confirmed_by) for case in served
        ]
        assert [one.distance for one in found] == pytest.approx([case.distance for case in served], rel=1e-3)
    seen: list[int] = []
    describe = LoadedModel.describe

    def count(self: LoadedModel, pixels: Any) -> Any:
        seen.append(len(pixels))
        return describe(self, pixels)

    monkeypatch.setattr(LoadedModel, "describe", count)
    assert find([(image, data, row)] * 3)[1:] == find([(image, data, row)] * 2)
    assert seen == [3, 2], "one forward pass for all"
    several = find([(image, b"broken", row), (image, data, row), (image, data, None)])
    assert [len(one) for one in several] == [0, 2, 2], "one that cannot be decoded takes nothing from the others"
    assert [one.image_id for one in several[1]] == [case.image_id for case in served]
    assert TaskCases(shown_store, running.settings, 0)([(image, data, row)]) == [[]]
    held = (bundle.path / FILE).read_bytes()
    (bundle.path / FILE).write_bytes(b"broken")
    assert find([(image, data, row)]) == [[]], "a task is sent without them"
    (bundle.path / FILE).write_bytes(held)


def test_an_image_is_no_case_of_its_own(http: Client, shown_store: Store, bundle: Bundle) -> None:
    cases = read_cases(bundle.path)
    assert cases is not None
    (image,) = find_images(shown_store, [cases.image_ids[0]])
    prediction = http.predict(read_image(shown_store, image))
    assert prediction.image_id == image.id
    found = http.nearest(prediction.id, limit=10).cases
    groups = {one.group_id for one in find_images(shown_store, [case.image_id for case in found])}
    assert len(groups) == len(found) >= 3
    assert image.group_id not in groups


def test_who_may_not_read_a_prediction_gets_no_cases(http: Client, make_image: Callable[..., bytes]) -> None:
    unstored = http.predict(make_image(1), context=Context(consent=Consent.NONE))
    with pytest.raises(RefusedError, match="was not stored"):
        http.nearest(unstored.id)
    with pytest.raises(UnknownIdError):
        http.nearest("0" * 32)
    assert http._http.get(f"/v1/predictions/{unstored.id}/nearest", params={"limit": 11}).status_code == 422


def test_the_page_shows_them_beside_the_prediction(
    running: Any, http: Client, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    prediction = http.predict(make_image(2))
    handlers = PredictHandlers(PageApi(running.url, running.store.taxonomy, lambda: True), 224)
    visitor: Any = SimpleNamespace(state=SimpleNamespace(key=None))
    html = handlers.nearest(Shown(prediction.id, prediction.label, tmp_path, is_stored=True), visitor)
    names = {each.code: each.name for each in running.store.taxonomy.classes}
    for case in http.nearest(prediction.id).cases:
        assert case.png_base64 in html
        assert names[case.label] in html
        assert f"distance {case.distance:.2f}" in html
    assert "does not show that the prediction is right" in html
    assert handlers.nearest(None, visitor) == ""
    assert handlers.nearest(Shown("0" * 32, None, tmp_path, is_stored=True), visitor) == ""


def test_lowered_consent_and_erasure_end_the_display_at_once(
    http: Client, shown_store: Store, bundle: Bundle, make_image: Callable[..., bytes]
) -> None:
    prediction = http.predict(make_image(3))
    first, second, third = http.nearest(prediction.id).cases
    lower_consent(shown_store, first.image_id, Consent.TRAINING, actor="test")
    erase_images(shown_store, [second.image_id], actor="test", places=RECORDS_PLACES)
    left = [case.image_id for case in http.nearest(prediction.id, limit=10).cases]
    assert third.image_id in left, "another image of the first one's group may come before it"
    assert not {first.image_id, second.image_id} & set(left)
    held = read_cases(bundle.path)
    assert held is not None
    assert second.image_id not in held.image_ids
    assert bytes.fromhex(second.image_id) not in (bundle.path / FILE).read_bytes()
    assert bundle.id == content_id(bundle.path)
    # It may be shown no more, and models may be trained on it as before.
    with shown_store.ledger.read() as tx:
        image = tx.require(Image, first.image_id)
    assert image.consent.allows_training
    assert first.image_id not in case_ids(shown_store, fitted(shown_store)[1])


def test_without_cases_there_are_none_and_a_broken_file_is_named(
    shown_store: Store, bundle: Bundle, running: Any, http: Client, make_image: Callable[..., bytes]
) -> None:
    prediction = http.predict(make_image(4))
    held = (bundle.path / FILE).read_bytes()
    for broken in (held[:100], b"", held.replace(b"vectors", b"victors")):
        (bundle.path / FILE).write_bytes(broken)
        with pytest.raises(IntegrityError, match="delete the file"):
            read_cases(bundle.path)
    with pytest.raises(IntegrityError), shown_store.ledger.read() as tx:
        Explainer(shown_store, running.settings).nearest(tx.require(Prediction, prediction.id), 3)
    (bundle.path / FILE).unlink()
    assert http.nearest(prediction.id).cases == []
    assert read_cases(bundle.path) is None
    (bundle.path / FILE).write_bytes(held)
    assert len(http.nearest(prediction.id).cases) == 3


def test_cases_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    ids = tuple(f"{number:064x}" for number in range(5))
    numbers = np.arange(5, dtype=np.int64)
    cases = Cases(ids, numbers, numbers % 2, np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
    write_cases(tmp_path, cases)
    back = read_cases(tmp_path)
    assert back is not None
    assert back.image_ids == ids
    assert np.array_equal(back.vectors, cases.vectors)
    assert remove_cases(tmp_path, {ids[1], "f" * 64}) == 1
    assert remove_cases(tmp_path, {ids[1]}) == 0
    assert (read_cases(tmp_path) or cases).image_ids == (ids[0], *ids[2:])
    assert remove_cases(tmp_path, set(ids)) == 4
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ContractError, match="finite"):
        write_cases(tmp_path, Cases(ids, numbers, numbers, np.full((5, 3), np.nan, dtype=np.float32)))
