"""Pages and batches cost a fixed number of statements, whatever their size; no server."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from images.overlay import overlay_png
from labeling.project import Project, ProjectKey
from labeling.pull import _Pass
from labeling.push import _Beside, _mark_pushed, _prepare
from labeling.rows import AnnotationRow, TaskRow
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result
from records.ids import utc_now
from records.store import Store
from records.types import Annotation, ReviewItem, ReviewState
from tests.records.plans import sent

AddItems = Callable[..., list[ReviewItem]]


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
    assert len(statements) == 2
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
    batch = _prepare(store, items, Project(1, "[relook:x]"), LabelingSettings(image_side_px=64), _Beside())
    assert [document["data"]["heatmap"][:15] for document in batch.documents] == ["data:image/jpeg"] * 3
    assert batch.unreadable == []
