"""Pages and batches cost a fixed number of statements, whatever their size; no server."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from images.overlay import overlay_png
from labeling.batches import Beside, prepare
from labeling.cases import AboutTask, TaskCase
from labeling.client import LabelStudioClient
from labeling.project import Project, ProjectKey, settle_address
from labeling.pull import _Pass
from labeling.push import PushReport, _mark_pushed, push
from labeling.reads import note_sent, stale_items
from labeling.rows import AnnotationRow, TaskRow
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result
from records.ids import utc_now
from records.store import Store
from records.types import Annotation, ReviewItem, ReviewState
from tests.labeling.conftest import drawing_of
from tests.records.plans import sent

AddItems = Callable[..., list[ReviewItem]]


class Unreached(LabelStudioClient):
    """A client whose every request is an error."""

    def request(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no request is sent")


def _answered(item: ReviewItem, task_id: int) -> TaskRow:
    annotation = AnnotationRow(task_id, annotation_result("mel"), 1, False, utc_now(), 2.0)
    return TaskRow(task_id, {"relook_item": item.id}, utc_now(), (annotation,))


def _record(store: Store, rows: list[TaskRow], **known: Any) -> tuple[_Pass, int]:
    reading = _Pass(store, None, 1, ProjectKey(), "local", None, annotators={1: "anna"}, **known)  # type: ignore[arg-type]
    with sent(store.ledger) as statements:
        reading.record(rows)
    return reading, len(statements)


@pytest.mark.parametrize("size", [3, 40])
def test_a_page_of_annotations_is_written_together(store: Store, add_items: AddItems, size: int) -> None:
    items = add_items(size, overlays=False)
    with sent(store.ledger) as statements, store.ledger.begin() as tx:
        _mark_pushed(tx, 1, dict(enumerate(items, start=1)))
    assert len(statements) == 3
    rows = [_answered(item, number) for number, item in enumerate(items, start=1)]
    reading, number = _record(store, rows)
    assert number <= 8
    assert reading.report().new_labels == size
    with store.ledger.read() as tx:
        assert tx.count(ReviewItem, {"state": ReviewState.ANSWERED}) == size
        assert {label.annotator for label in tx.find(Annotation)} == {"anna"}
    assert _record(store, rows)[0].report().new_labels == 0


def test_a_task_that_cannot_be_recorded_is_the_only_one(store: Store, add_items: AddItems) -> None:
    items = add_items(5, overlays=False)
    rows = [_answered(item, number) for number, item in enumerate(items, start=1)]
    # The same annotation in two tasks: the ledger refuses the second row, whichever it is written beside.
    rows[3] = TaskRow(4, rows[3].meta, rows[3].updated_at, rows[1].annotations)
    rows[4] = TaskRow(5, rows[4].meta, rows[4].updated_at, fault="an annotation cannot be read")
    reading, _ = _record(store, rows)
    assert reading.report().new_labels == 3
    assert [sentence.partition(":")[0] for sentence in reading.failed] == ["task 5", "task 4"]
    with store.ledger.read() as tx:
        assert {item.id for item in tx.find(ReviewItem, {"state": ReviewState.ANSWERED})} == {i.id for i in items[:3]}


def test_the_heat_map_of_a_task_is_drawn_and_encoded_once(
    store: Store, add_items: AddItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("no PNG is made on the way to the JPEG")

    monkeypatch.setattr("images.overlay.image_png", refuse)
    with pytest.raises(AssertionError):
        overlay_png(np.zeros((4, 4, 3), np.uint8), np.ones((2, 2)))
    items = [item.model_copy(update={"heat_map": [[0, 255]]}) for item in add_items(3, overlays=False)]
    batch = prepare(store, items, Project(1, "[relook:x]"), LabelingSettings(image_side_px=64), Beside())
    assert [drawing_of(document["data"]["heatmap"])[1][:15] for document in batch.documents] == ["data:image/jpeg"] * 3
    assert batch.unreadable == []


def test_an_image_is_read_once_and_a_batch_looked_up_once(
    store: Store, add_items: AddItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = list[str](), list[int]()
    whole = type(store.blobs).get

    def get(blobs: Any, blob_id: str) -> bytes:
        read.append(blob_id)
        return whole(blobs, blob_id)

    def no_cases(about: Sequence[AboutTask]) -> list[list[TaskCase]]:
        asked.append(len(about))
        return [[] for _ in about]

    monkeypatch.setattr(type(store.blobs), "get", get)
    items = [item.model_copy(update={"heat_map": [[0, 255]]}) for item in add_items(70, overlays=False)]
    project, beside = Project(1, "[relook:x]", cases=True), Beside(cases=no_cases)
    statements = []
    for some in (items[:5], items):
        read.clear(), asked.clear()
        with sent(store.ledger) as found:
            batch = prepare(store, some, project, LabelingSettings(image_side_px=64), beside)
        assert (len(batch.documents), batch.unreadable) == (len(some), [])
        assert sorted(read) == sorted(item.image_id for item in some)
        assert sum(asked) == len(some)
        statements.append(len(found))
    assert statements == [2, 2]
    assert asked == [32, 32, 6], "no more images than these are in memory"


def test_a_push_reads_no_item_whose_task_shows_it_as_it_is(store: Store, add_items: AddItems) -> None:
    items = add_items(40, overlays=False)
    with store.ledger.begin() as tx:
        _mark_pushed(tx, 1, dict(enumerate(items, start=1)))
    client = Unreached("http://127.0.0.1:9", "token", server="local")
    settle_address(store, client)
    with sent(store.ledger) as statements:
        assert push(store, client, LabelingSettings()) == PushReport()
        assert stale_items(store) == []
    about = [(text, values) for text, values in statements if "sent_hash IN" in text]
    assert len(about) == 2
    with store.ledger.read() as tx:
        for text, values in about:
            plan = tx.connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values).all()
            assert "ix_review_items_state_sent_hash (state=? AND sent_hash=?)" in str(plan), "only marked ones are read"
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, items[7].id, priority=500.0)
    assert [item.id for item in stale_items(store)] == [items[7].id]


def test_an_item_that_changes_while_its_task_is_sent_is_sent_again(store: Store, add_items: AddItems) -> None:
    first, second = add_items(2, overlays=False)
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, second.id, comment="it grows")
        _mark_pushed(tx, 1, {1: first, 2: second})
    assert [item.id for item in stale_items(store)] == [second.id]
    with store.ledger.begin() as tx:
        note_sent(tx, {}, stale_items(store))
    assert stale_items(store) == []
