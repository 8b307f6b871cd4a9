"""Confirmed cases in tasks: shown where they may be, gone when they may not; and sittings with their breaks."""

import base64
import io
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image as PillowImage

from labeling.batches import Beside, prepare
from labeling.cases import NONE_SHOWN, SIDE_PX, AboutTask, TaskCase, are_shown, forbidden_cases
from labeling.client import LabelStudioClient
from labeling.project import Project, ProjectKey
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.sittings import next_sitting
from labeling.tasks import label_config
from records.cases import Cases, write_cases
from records.consent import lower_consent
from records.erasure import RECORDS_PLACES, erase_images
from records.ids import new_id, utc_now
from records.models import bundle_folder
from records.store import Store
from records.types import Consent, Image, ModelRecord, ReviewItem, ReviewState
from tests.labeling.conftest import make_image, write_item
from tests.service import make_bundle, serve_bundle


def displayed(store: Store, number: int) -> Image:
    data = make_image(9000 + number, "PNG")
    image = Image(
        id=store.blobs.put(data), uri="", format="png", width_px=96, height_px=72, provenance="import:1",
        created_at=utc_now(), consent=Consent.DISPLAY,
    )  # fmt: skip
    image = image.model_copy(update={"uri": store.blobs.uri(image.id)})
    with store.ledger.begin() as tx:
        tx.add(image)
    return image


def add_cases(store: Store, images: Sequence[Image]) -> None:
    """Let a model serve that has these images as its confirmed cases."""
    serve_bundle(store, make_bundle(store))
    with store.ledger.read() as tx:
        (model,) = tx.find(ModelRecord)
    numbers = np.zeros(len(images), dtype=np.int64)
    vectors = np.zeros((len(images), 2), dtype=np.float32)
    write_cases(bundle_folder(store, model), Cases(tuple(image.id for image in images), numbers, numbers, vectors))


def source_of(images: Sequence[Image], store: Store) -> Any:
    """A source that finds the same images for every task."""

    def find(about: Sequence[AboutTask]) -> list[list[TaskCase]]:
        found = [
            TaskCase(image.id, code, "histopathology", 0.25 * number, store.blobs.get(image.id))
            for number, (image, code) in enumerate(zip(images, ("mel", "nv", "bcc"), strict=False), start=1)
        ]
        return [found for _ in about]

    return find


def strip_of(data: dict[str, Any]) -> PillowImage.Image:
    return PillowImage.open(io.BytesIO(base64.b64decode(data["cases"].partition(",")[2])))


def test_a_task_shows_small_images_with_diagnosis_and_distance_and_a_blind_one_none(store: Store) -> None:
    images = [displayed(store, number) for number in range(3)]
    item = write_item(store, make_image(1), None, 1.0)
    blind = write_item(store, make_image(2), None, 1.0).model_copy(update={"blind": True})
    beside = Beside(cases=source_of(images, store))
    batch = prepare(store, [item, blind], Project(id=1, marker="m", cases=True), LabelingSettings(), beside)
    shown, hidden = (document["data"] for document in batch.documents)
    assert strip_of(shown).size == (3 * SIDE_PX + 16, SIDE_PX)
    assert len(shown["cases"]) < 60_000
    names = {c.code: c.name for c in store.taxonomy.classes}
    assert shown["cases_text"].startswith(f"1: {names['mel']}, by histopathology, distance 0.25 · 2: {names['nv']}")
    assert "cases" not in hidden
    with store.ledger.read() as tx:
        assert tx.require(ReviewItem, item.id).cases == [image.id for image in images]
        assert tx.require(ReviewItem, blind.id).cases is None
    (none,) = prepare(store, [item], Project(id=1, marker="m", cases=True), LabelingSettings(), Beside()).documents
    assert none["data"]["cases_text"] == NONE_SHOWN
    (old,) = prepare(store, [item], Project(id=1, marker="m"), LabelingSettings(), beside).documents
    assert "cases" not in old["data"], "a page without the panel gets nothing for it"


def test_the_panel_is_there_only_where_a_model_has_cases(store: Store) -> None:
    assert not are_shown(store, LabelingSettings())
    add_cases(store, [displayed(store, 50)])
    assert are_shown(store, LabelingSettings())
    assert not are_shown(store, LabelingSettings(cases_shown=0))
    for blind, expected in ((False, ["$heatmap", "$cases"]), (True, [])):
        page = ElementTree.fromstring(label_config(store.taxonomy, blind=blind, cases=True))
        assert [one.get("value") for one in page.iter("Image")][1:] == expected
    assert "cases" not in label_config(store.taxonomy)


def test_lowered_consent_and_erasure_take_them_out_of_tasks(
    store: Store, client: LabelStudioClient, settings: LabelingSettings
) -> None:
    images = [displayed(store, 100 + number) for number in range(3)]
    add_cases(store, images)
    items = [write_item(store, make_image(10 + number), None, 2.0 - number) for number in range(2)]
    sources = [source_of(images[:2], store), source_of(images[2:], store)]
    by_item = {item.image_id: source for item, source in zip(items, sources, strict=True)}
    report = push(store, client, settings, cases=lambda about: [by_item[one[0].id]([one])[0] for one in about])
    assert (report.pushed, report.unreadable) == (2, [])
    assert report.project_id is not None

    def texts() -> dict[str, str]:
        rows = [row for page in client.list_tasks(report.project_id or 0, with_data=True) for row in page]
        return {str(row.meta["relook_item"]): str(row.data["cases_text"]) for row in rows}

    before = texts()
    assert all(text.startswith("1: ") for text in before.values())
    lower_consent(store, images[0].id, Consent.TRAINING, actor="test")
    assert set(forbidden_cases(store)) == {items[0].id}
    assert pull(store, client, settings).failed == []
    assert texts() == {items[0].id: NONE_SHOWN, items[1].id: before[items[1].id]}
    # The next push draws what may be shown now.
    assert push(store, client, settings, cases=source_of(images[1:2], store)).refreshed == 1
    assert texts()[items[0].id].startswith("1: ")
    erase_images(store, [images[2].id], actor="test", places=RECORDS_PLACES)
    assert pull(store, client, settings).failed == []
    assert texts()[items[1].id] == NONE_SHOWN
    assert forbidden_cases(store) == {}


def test_a_reader_gets_a_sitting_at_a_time_and_the_next_one_after_the_break(store: Store) -> None:
    settings = LabelingSettings(sitting_tasks=3, sitting_break_min=10.0)
    now, key = utc_now(), ProjectKey(blind=True, reader="a@x.org")
    waiting = [
        write_item(store, make_image(number), None, 9.0 - number).model_copy(
            update={"id": new_id(), "blind": True, "reader": "a@x.org"}
        )
        for number in range(7)
    ]
    with store.ledger.begin() as tx:
        tx.add(*waiting)
        for whole in (ProjectKey(), ProjectKey(blind=True)):
            assert next_sitting(tx, whole, waiting, settings, now) == (waiting, {}), "others get all of them"
        assert next_sitting(tx, key, waiting, LabelingSettings(), now) == (waiting, {})
        first, said = next_sitting(tx, key, waiting, settings, now)
        assert first == waiting[:3]
        assert [said[item.id] for item in first] == [
            "Task 1 of 3 in this sitting.",
            "Task 2 of 3 in this sitting.",
            "The last task of this sitting: take a break of 10 minutes afterwards.",
        ]
        for item in first:
            tx.update(ReviewItem, item.id, state=ReviewState.PUSHED)
        for item in first[:2]:
            tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED, answered_at=now)
        assert next_sitting(tx, key, waiting[3:], settings, now + timedelta(days=1)) == ([], {}), "one is left"
        tx.update(ReviewItem, first[2].id, state=ReviewState.ANSWERED, answered_at=now + timedelta(minutes=5))
        assert next_sitting(tx, key, waiting[3:], settings, now + timedelta(minutes=14)) == ([], {})
        second, _ = next_sitting(tx, key, waiting[3:], settings, now + timedelta(minutes=16))
        assert second == waiting[3:6]
        last, said = next_sitting(tx, key, waiting[6:], settings, now + timedelta(minutes=16))
        assert (last, list(said.values())) == (waiting[6:], [""])
    (document,) = prepare(
        store, waiting[:1], Project(1, "m"), settings, Beside(places={waiting[0].id: "Task 1 of 3 in this sitting."})
    ).documents
    assert document["data"]["why"] == "Task 1 of 3 in this sitting. Please give your diagnosis."
