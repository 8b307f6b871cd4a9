"""Retention: unreferenced images and predictions are deleted when due, all others stay, also if a run is killed."""

import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from records import audit
from records.datasets import build_version, load_dataset
from records.erasure import RECORDS_PLACES, erase_images, remove_expired_tombstones
from records.errors import IntegrityError, RefusedError
from records.lease import hold
from records.retention import ACTION, Retention, apply_retention, find_due
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    AuditEvent,
    EventRecord,
    Flag,
    Image,
    Outcome,
    Prediction,
    ReviewItem,
    ReviewState,
    SourceLabel,
)

Sample = Callable[..., Any]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
OLD, RECENT = NOW - timedelta(days=100), NOW - timedelta(days=10)


@pytest.fixture
def keeping(records_settings: RecordsSettings) -> Any:
    """A store that keeps images for 30 days and predictions for 60."""
    opened = open_store(records_settings.model_copy(update={"keep_images_days": 30, "keep_predictions_days": 60}))
    yield opened
    opened.close()


@pytest.fixture
def serve(sample: Sample) -> Callable[..., str]:
    """Add a served image with its predictions; returns the image's id."""

    def enter(store: Store, name: str, *predicted_at: datetime, asked: ReviewState | None = None, **image: Any) -> str:
        content = store.blobs.put(f"image {name}".encode())
        values = {"erased_at": None, "expired_at": None, "group_id": None, "created_at": OLD, "provenance": "served"}
        rows = [sample(Image, id=content, uri=store.blobs.uri(content), **{**values, **image})]
        for number, given_at in enumerate(predicted_at):
            key = f"{name}/{number}"
            rows.append(
                sample(Prediction, id=key, image_id=content, created_at=given_at, idempotency_key=key, request_id=key)
            )
        if asked is not None:
            overlay = store.blobs.put(f"overlay {name}".encode())
            item = {"id": name, "image_id": content, "prediction_id": f"{name}/0", "overlay_blob": overlay}
            item["heat_map"] = [[0, 255]]
            rows.append(sample(ReviewItem, state=asked, **item))
        with store.ledger.begin() as tx:
            tx.add(*rows)
        return content

    return enter


def run(store: Store, **options: Any) -> Retention:
    return apply_retention(store, actor="test", **{"forget": lambda ids: None, "now": NOW, **options})


def events(store: Store) -> list[AuditEvent]:
    assert audit.verify(store.ledger, store.home) == []
    with store.ledger.read() as tx:
        return tx.find(AuditEvent, where={"action": ACTION}, order_by=("number",))


def test_an_unreferenced_image_is_deleted_with_its_heat_maps(keeping: Store, serve: Callable[..., str]) -> None:
    content = serve(keeping, "a", OLD, asked=ReviewState.WITHDRAWN)
    forgotten: list[str] = []
    dry = find_due(keeping, NOW)
    assert keeping.blobs.has(content), "a dry run deletes nothing"
    assert events(keeping) == []
    told: list[tuple[int, int]] = []
    done = run(keeping, forget=forgotten.extend, advance=lambda *at: told.append(at))
    assert done == dry
    assert (done.images, done.overlays, done.predictions) == (1, 1, 1)
    assert list(keeping.blobs.ids()) == []
    assert forgotten == [content]
    assert told[-1] == (2, 2)
    with keeping.ledger.read() as tx:
        image, item = tx.require(Image, content), tx.require(ReviewItem, "a")
        assert tx.count(Prediction) == 0
    assert (image.erased_at, image.expired_at, image.lesion_id, image.age_years) == (NOW, NOW, None, None)
    assert (item.state, item.overlay_blob, item.comment) == (ReviewState.WITHDRAWN, None, None)
    assert item.heat_map is None
    (event,) = events(keeping)
    assert event.details == {**done.model_dump(mode="json"), "finished": True}


def test_the_second_run_finds_nothing_and_says_so(keeping: Store, serve: Callable[..., str]) -> None:
    serve(keeping, "a", OLD)
    run(keeping)
    again = run(keeping)
    assert (again.images, again.overlays, again.predictions) == (0, 0, 0)
    assert [event.details["images"] for event in events(keeping)] == [1, 0]


@pytest.mark.parametrize("state", [ReviewState.NEW, ReviewState.PUSHED])
def test_an_open_review_item_keeps_its_image_and_predictions(
    keeping: Store, serve: Callable[..., str], state: ReviewState
) -> None:
    serve(keeping, "a", OLD, OLD, asked=state)
    before = list(keeping.blobs.ids())
    done = run(keeping)
    assert (done.images, done.predictions, done.images_needed, done.predictions_needed) == (0, 0, 1, 2)
    assert list(keeping.blobs.ids()) == before


@pytest.mark.parametrize("kind", [SourceLabel, Annotation, Outcome])
def test_an_image_with_a_label_or_outcome_stays(
    keeping: Store, serve: Callable[..., str], sample: Sample, kind: type[SourceLabel | Annotation | Outcome]
) -> None:
    image = serve(keeping, "a", OLD, asked=ReviewState.ANSWERED)
    with keeping.ledger.begin() as tx:
        tx.add(sample(kind, image_id=image, **({"deleted": False} if kind is Annotation else {})))
    done = run(keeping)
    assert (done.images, done.predictions, done.images_needed, done.predictions_needed) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", [Flag, EventRecord])
def test_a_prediction_that_something_refers_to_outlives_its_image(
    keeping: Store, serve: Callable[..., str], sample: Sample, kind: type[Flag | EventRecord]
) -> None:
    serve(keeping, "a", OLD)
    with keeping.ledger.begin() as tx:
        tx.add(sample(kind, prediction_id="a/0"))
    done = run(keeping)
    assert (done.images, done.predictions, done.predictions_needed) == (1, 0, 1)
    with keeping.ledger.read() as tx:
        assert tx.require(Prediction, "a/0").context == {}, "and says nothing of the person any more"


def test_an_image_that_was_sent_again_is_kept_from_then_on(keeping: Store, serve: Callable[..., str]) -> None:
    image = serve(keeping, "a", OLD, RECENT)
    assert run(keeping).images == 0
    assert keeping.blobs.has(image)
    with keeping.ledger.read() as tx:
        assert [prediction.id for prediction in tx.find(Prediction)] == ["a/1"]


def test_imported_images_and_recent_ones_are_kept(keeping: Store, serve: Callable[..., str]) -> None:
    serve(keeping, "imported", provenance="import:1")
    serve(keeping, "pool", provenance="pool")
    serve(keeping, "fresh", RECENT, created_at=RECENT)
    serve(keeping, "erased", erased_at=OLD)
    assert run(keeping) == find_due(keeping, NOW)
    assert len(list(keeping.blobs.ids())) == 4


def test_a_dataset_version_keeps_its_images_even_without_a_label_in_the_ledger(
    keeping: Store, serve: Callable[..., str], add_labelled: Callable[..., None], image_id: Callable[[object], str]
) -> None:
    add_labelled(keeping, range(20), source="served")
    version = build_version(keeping).version
    with keeping.ledger.begin() as tx:
        tx.connection.exec_driver_sql("DELETE FROM source_labels")
    assert run(keeping).images_needed == 20
    assert load_dataset(keeping, version.id).num_images == 20
    (keeping.home.datasets / version.id / "manifest.parquet").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        run(keeping)


def test_by_default_everything_is_kept(
    new_store: Callable[..., AbstractContextManager[Store]], serve: Callable[..., str]
) -> None:
    with new_store("all") as store:
        serve(store, "a", OLD)
        done = run(store)
        assert (done.images_before, done.predictions_before, done.images) == (None, None, 0)
        assert len(list(store.blobs.ids())) == 1
        assert events(store) == []


def test_images_alone_may_go(
    new_store: Callable[..., AbstractContextManager[Store]], serve: Callable[..., str]
) -> None:
    with new_store("one", keep_images_days=30) as store:
        serve(store, "a", OLD)
        done = run(store)
        assert (done.images, done.predictions, done.predictions_before) == (1, 0, None)
        with store.ledger.read() as tx:
            assert tx.count(Prediction) == 1


def test_an_expired_image_may_be_added_again_and_an_erased_one_may_not(
    keeping: Store, serve: Callable[..., str]
) -> None:
    expired, erased = serve(keeping, "a", OLD), serve(keeping, "b", OLD)
    run(keeping)
    erase_images(keeping, [erased], actor="key 1", places=RECORDS_PLACES)
    with keeping.ledger.begin() as tx:
        remove_expired_tombstones(tx, [expired, erased])
    with keeping.ledger.read() as tx:
        assert tx.get(Image, expired) is None
        assert tx.require(Image, erased).expired_at is None
        assert tx.count(AuditEvent, where={"action": "image.erased", "subject": erased}) == 1


def test_two_runs_exclude_each_other(keeping: Store) -> None:
    with hold(keeping.ledger, "records.retention"), pytest.raises(RefusedError, match="another process"):
        run(keeping)


def test_predictions_are_kept_as_long_as_images() -> None:
    with pytest.raises(ValidationError, match="at least as long as its image"):
        RecordsSettings(keep_images_days=30, keep_predictions_days=29)


KILLED = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
import records.retention as retention
from records.blobs import BlobStore
from records.settings import RecordsSettings
from records.store import open_store

home, place = Path(sys.argv[1]), sys.argv[2]
retention._IMAGES_AT_ONCE = 4
store = open_store(RecordsSettings(home=home, keep_images_days=30, keep_predictions_days=60))

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

deleted = []
remove = BlobStore.delete
def delete(self, blob_id):
    remove(self, blob_id)
    deleted.append(blob_id)
    if place == "among blobs" and len(deleted) == 6:
        die()
BlobStore.delete = delete
retention.apply_retention(
    store, actor="killed", now=datetime.fromisoformat(sys.argv[3]),
    forget=lambda ids: die() if place == "before the blobs" and deleted else None,
    advance=lambda done, total: die() if (place, done) in (("between parts", 8), ("before predictions", 10)) else None,
)
"""


@pytest.mark.parametrize(
    ("place", "told_of"),
    [("before the blobs", 4), ("among blobs", 4), ("between parts", 8), ("before predictions", 10)],
)
def test_a_killed_run_gets_its_event_from_the_next_run_which_finishes_it(
    keeping: Store,
    serve: Callable[..., str],
    run_python: Callable[..., subprocess.Popen[str]],
    place: str,
    told_of: int,
) -> None:
    for number in range(10):
        serve(keeping, str(number), OLD)
    kept = serve(keeping, "kept", OLD, asked=ReviewState.NEW)
    process = run_python(KILLED, keeping.home.root, place, NOW.isoformat())
    assert process.wait(600) == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    done = run(keeping)
    first, second = events(keeping)
    assert (first.details["finished"], second.details["finished"]) == (False, True)
    assert first.details["images"] == told_of
    assert first.details["images"] + second.details["images"] == 10
    assert first.details["predictions"] + done.predictions == 10
    with keeping.ledger.read() as tx:
        overlay = tx.require(ReviewItem, "kept").overlay_blob
        assert tx.count(Image, where={"erased_at": None}) == 1
        assert {prediction.image_id for prediction in tx.find(Prediction)} == {kept}
    assert set(keeping.blobs.ids()) == {kept, overlay}
