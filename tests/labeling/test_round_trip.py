"""Push, annotate, edit, delete and pull against a real Label Studio: the ledger equals it afterwards."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest

from labeling.batches import item_key
from labeling.client import LabelStudioClient
from labeling.consensus import resolve
from labeling.project import Project, open_project
from labeling.pull import pull
from labeling.push import adopt, push
from labeling.settings import LabelingSettings
from labeling.simulated_annotator import EMAIL, annotate
from labeling.tasks import CANT_TELL, OTHER, annotation_result
from records.errors import LabelStudioError
from records.store import Store
from records.types import Annotation, AnnotationKind, ReviewItem, ReviewState

AddItems = Callable[..., list[ReviewItem]]


def _annotate(client: LabelStudioClient, task_id: int, label: str) -> int:
    made = client.create_annotation(task_id, annotation_result(label), key=uuid.uuid4())
    assert made is not None
    return made


def _edit(client: LabelStudioClient, annotation_id: int, **changes: object) -> None:
    client.request("PATCH", f"api/annotations/{annotation_id}/", "edit", body=changes)


def _delete(client: LabelStudioClient, annotation_id: int) -> None:
    client.request("DELETE", f"api/annotations/{annotation_id}/", "delete")


def _post(client: LabelStudioClient, task_id: int, body: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = client.request("POST", f"api/tasks/{task_id}/annotations/", "annotate", body=body)
    return made


def _items(store: Store) -> list[ReviewItem]:
    with store.ledger.read() as tx:
        return tx.find(ReviewItem, order_by=("-priority",))


def _labels(store: Store) -> list[Annotation]:
    with store.ledger.read() as tx:
        return tx.find(Annotation, order_by=("created_at", "id"))


def _said(client: LabelStudioClient, project_id: int) -> dict[int, dict[str, Any]]:
    """Task id -> item and annotations of everything in a project, from Label Studio's own export."""
    params = {"exportType": "JSON", "download_all_tasks": "true"}
    return {
        task["id"]: {
            "item": task["meta"]["relook_item"],
            "annotations": {
                one["id"]: (one["result"][0]["value"]["choices"][0], datetime.fromisoformat(one["updated_at"]))
                for one in task["annotations"]
                if not one["was_cancelled"]
            },
        }
        for task in client.request("GET", f"api/projects/{project_id}/export", "export", params=params)
    }


def _held(store: Store, project_id: int) -> dict[int, dict[str, Any]]:
    """The same from the ledger; an item is answered if and only if its task has an annotation that is not deleted."""
    newest = {label.annotation_id: label for label in _labels(store)}
    held = {}
    for item in _items(store):
        assert item.project_id == project_id
        assert item.task_id is not None
        mine = [one for one in newest.values() if one.task_id == item.task_id and not one.deleted]
        assert {(one.review_item_id, one.image_id) for one in mine} <= {(item.id, item.image_id)}
        assert item.state is (ReviewState.ANSWERED if mine else ReviewState.PUSHED)
        annotations = {one.annotation_id: (one.label, one.annotated_at) for one in mine}
        held[item.task_id] = {"item": item.id, "annotations": annotations}
    return held


@pytest.mark.slow
@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.soak)])
def test_the_ledger_equals_label_studio_after_edits_deletions_and_skips(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems, count: int
) -> None:
    add_items(count)
    report = push(store, client, settings, "c" * 64)
    assert (report.pushed, report.unreadable) == (count, [])
    project_id = report.project_id or 0
    items = _items(store)
    assert [item.task_id for item in items] == sorted(item.task_id or 0 for item in items), "the most urgent first"

    part = count // 12
    annotated = count - 4 * part
    made = [_annotate(client, item.task_id or 0, "mel" if n % 2 else "nv") for n, item in enumerate(items[:annotated])]
    first = pull(store, client, settings)
    assert (first.new_labels, first.annotations, first.edited, first.deleted) == (annotated, annotated, 0, 0)
    assert _held(store, project_id) == _said(client, project_id)

    for number in made[: 4 * part]:
        _edit(client, number, result=annotation_result("bcc"))
    for number in made[4 * part : 6 * part]:
        _delete(client, number)
    for number in made[6 * part : 7 * part]:  # annotations that are turned into skips, and tasks that were only skipped
        _edit(client, number, was_cancelled=True)
    skip = {"result": [], "was_cancelled": True}
    skips = [_post(client, items[n].task_id or 0, skip)["id"] for n in range(annotated, annotated + part)]
    second = pull(store, client, settings)
    assert (second.new_labels, second.edited, second.deleted) == (4 * part, 4 * part, 3 * part)
    assert set(skips).isdisjoint(label.annotation_id for label in _labels(store)), "a skip is no annotation"
    said = _said(client, project_id)
    assert sum(len(task["annotations"]) for task in said.values()) == annotated - 3 * part
    assert _held(store, project_id) == said

    again = pull(store, client, settings)
    assert (again.new_labels, again.deleted, again.idle) == (0, 0, False)
    assert _held(store, project_id) == said == _said(client, project_id)
    assert pull(store, client, settings).idle
    assert push(store, client, settings).pushed == 0
    assert len(_labels(store)) == annotated + 7 * part


def test_the_content_of_an_annotation_is_kept(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(4)
    push(store, client, settings)
    tasks = {item.id: item.task_id or 0 for item in _items(store)}
    quality = {"from_name": "image_quality", "to_name": "image", "type": "choices", "value": {"choices": ["usable"]}}
    comment = {"from_name": "comment", "to_name": "image", "type": "textarea", "value": {"text": ["hair"]}}
    client.create_annotation(tasks[items[0].id], [*annotation_result("df"), quality, comment], key=uuid.uuid4())
    _annotate(client, tasks[items[1].id], CANT_TELL)
    other = {"from_name": "other_text", "to_name": "image", "type": "textarea", "value": {"text": ["a wart"]}}
    client.create_annotation(tasks[items[2].id], [*annotation_result(OTHER), other], key=uuid.uuid4())
    _annotate(client, tasks[items[3].id], "no_such_class")

    report = pull(store, client, settings)
    assert (report.new_labels, report.cant_tell, report.other) == (4, 1, 1)
    assert len(report.not_understood) == 1
    assert "no_such_class" in report.not_understood[0]

    said = {label.review_item_id: label for label in _labels(store)}
    df = said[items[0].id]
    assert (df.kind, df.label, df.image_quality, df.comment) == (AnnotationKind.CLASS, "df", "usable", "hair")
    assert df.annotator == "annotator@relook.local"
    assert df.image_id == items[0].image_id
    assert said[items[1].id].kind is AnnotationKind.CANT_TELL
    assert (said[items[2].id].kind, said[items[2].id].other_text) == (AnnotationKind.OTHER, "a wart")
    unknown = said[items[3].id]
    assert (unknown.kind, unknown.label) == (AnnotationKind.OTHER, None), "kept, and never trained on"
    assert "no_such_class" in (unknown.other_text or "")


def test_a_push_killed_after_its_import_duplicates_nothing(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(6)
    small = settings.model_copy(update={"push_batch": 3})
    project = open_project(store, client, small)
    # What a push leaves behind that is killed between the import and the ledger's transaction.
    orphans = [
        {
            "data": {"image": "", "heatmap": "", "why": "", "prediction": "", "about": ""},
            "meta": {"relook_item": item.id, "relook_key": item_key(item.id, project)},
            "predictions": [],
        }
        for item in items[:2]
    ]
    left_behind = client.import_tasks(project.id, orphans)
    report = push(store, client, small)
    assert (report.adopted, report.pushed) == (2, 4)
    assert [item.task_id for item in _items(store)[:2]] == left_behind
    assert client.state(project.id).total == 6

    # The same import arriving once more, after a new attempt was recorded.
    client.import_tasks(project.id, orphans)
    assert adopt(store, client, project) == (0, 2)
    assert client.state(project.id).total == 6


def test_of_imports_that_were_in_flight_together_the_one_that_was_not_recorded_is_found(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems, monkeypatch: Any
) -> None:
    add_items(9)
    small = settings.model_copy(update={"push_batch": 3, "imports_at_once": 2})
    whole, first_id = client.import_tasks, _items(store)[0].id
    first_arrived = threading.Event()

    def lose_the_first(project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        is_first = tasks[0]["meta"]["relook_item"] == first_id
        assert is_first or first_arrived.wait(300)
        found = whole(project_id, tasks)
        if not is_first:
            return found
        first_arrived.set()
        # Its response is lost after the second batch was recorded, whose tasks have larger ids.
        while not any(item.task_id for item in _items(store)):
            time.sleep(0.02)
        raise LabelStudioError("the response is lost")

    with monkeypatch.context() as patched:
        patched.setattr(client, "import_tasks", lose_the_first)
        with pytest.raises(LabelStudioError, match="lost"):
            push(store, client, small)
    recorded = [item.task_id for item in _items(store)]
    assert recorded[:3] == [None] * 3
    assert None not in recorded[3:6]
    report = push(store, client, small)
    assert report.adopted >= 3
    assert report.adopted + report.pushed == len([one for one in recorded if one is None])
    items = _items(store)
    assert max(item.task_id or 0 for item in items[:3]) < min(item.task_id or 0 for item in items[3:6])
    assert client.state(report.project_id or 0).total == 9
    assert (pull(store, client, small).doubled, push(store, client, small).pushed) == (0, 0)


def test_second_tasks_of_an_item_are_removed_and_no_annotation_with_them(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    add_items(3)
    project = open_project(store, client, settings)
    push(store, client, settings)
    first = _items(store)
    # The same import arriving twice: of one item the ledger knows the first task, of one the second.
    empty = dict.fromkeys(("image", "heatmap", "why", "prediction", "about"), "")
    again = [
        {"data": empty, "meta": {"relook_item": item.id, "relook_key": item_key(item.id, project)}} for item in first
    ]
    second = client.import_tasks(project.id, again)
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, first[1].id, task_id=second[1])
    _annotate(client, second[2], "mel")
    report = pull(store, client, settings)
    assert (report.doubled, report.new_labels, report.tasks_deleted) == (3, 1, 0)
    items = _items(store)
    assert [item.task_id for item in items] == [first[0].task_id, second[1], second[2]]
    assert [item.state for item in items] == [ReviewState.PUSHED, ReviewState.PUSHED, ReviewState.ANSWERED]
    assert {row.id for page in client.list_tasks(project.id) for row in page} == {item.task_id for item in items}
    assert (pull(store, client, settings).doubled, len(_labels(store))) == (0, 1)


def test_a_deleted_task_withdraws_its_item_and_annotation(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(3)
    push(store, client, settings)
    first, second, third = _items(store)
    _annotate(client, first.task_id or 0, "mel")
    assert pull(store, client, settings).new_labels == 1
    client.delete_task(first.task_id or 0)
    client.delete_task(second.task_id or 0)
    report = pull(store, client, settings)
    assert (report.tasks_deleted, report.deleted) == (2, 1)
    states = {item.id: item.state for item in _items(store)}
    assert [states[item.id] for item in items] == [ReviewState.WITHDRAWN, ReviewState.WITHDRAWN, ReviewState.PUSHED]
    assert resolve(_labels(store)) == []
    assert pull(store, client, settings).tasks_deleted == 0
    assert third.state is ReviewState.PUSHED


def test_a_deleted_project_is_made_anew_and_keeps_its_annotations(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    add_items(3)
    old = push(store, client, settings).project_id
    answered = _items(store)[0]
    _annotate(client, answered.task_id or 0, "mel")
    pull(store, client, settings)
    client.request("DELETE", f"api/projects/{old}", "delete the project")
    assert pull(store, client, settings).requeued == 2
    report = push(store, client, settings)
    assert report.pushed == 2
    assert report.project_id != old
    assert [label.label for label in resolve(_labels(store))] == ["mel"]


def test_the_simulated_annotator_annotates_once_and_reproducibly(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(24)
    push(store, client, settings)
    truth = {item.image_id: "bkl" for item in items[:20]}
    given = annotate(client, store, truth, error_rate=0.3, cant_tell_rate=0.2, seed=3)
    assert len(given) == 20
    assert {one.image_id for one in given} == set(truth)
    wrong = [one for one in given if one.label not in (None, "bkl")]
    unsure = [one for one in given if one.label is None]
    assert 1 <= len(wrong) <= 12
    assert 1 <= len(unsure) <= 10
    assert annotate(client, store, truth, error_rate=0.3, cant_tell_rate=0.2, seed=3) == [], "each task once"

    report = pull(store, client, settings)
    assert (report.new_labels, report.cant_tell) == (20, len(unsure))
    labels = _labels(store)
    assert {label.annotator for label in labels} == {EMAIL}
    assert {label.image_id: label.label for label in labels} == {one.image_id: one.label for one in given}


def test_a_project_is_found_again_and_its_page_set_back(
    store: Store, client: LabelStudioClient, settings: LabelingSettings
) -> None:
    project = open_project(store, client, settings)
    assert open_project(store, client, settings) == project
    row = client.project(project.id)
    assert row is not None
    body = {"label_config": row.label_config.replace("Can't tell", "Pass")}
    client.request("PATCH", f"api/projects/{project.id}/", "change", body=body)
    assert open_project(store, client, settings) == project
    assert client.project(project.id) == row


def test_two_stores_at_one_server_have_projects_of_their_own(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from records.settings import RecordsSettings
    from records.store import open_store

    other = open_store(RecordsSettings(home=tmp_path_factory.mktemp("other")))
    try:
        ids: set[int] = {open_project(one, client, settings).id for one in (store, other, store)}
        assert len(ids) == 2
        assert isinstance(open_project(other, client, settings), Project)
    finally:
        other.close()
