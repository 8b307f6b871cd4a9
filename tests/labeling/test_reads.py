"""Reads: blind items, projects per reader, refreshed tasks, and adjudication."""

import uuid
from collections.abc import Callable

import numpy as np
import pytest

from labeling.agreement import read_agreement
from labeling.client import LabelStudioClient
from labeling.consensus import resolve
from labeling.project import ProjectKey, known_projects
from labeling.pull import pull
from labeling.push import push
from labeling.reads import CURRENT, add_adjudications, is_blind, plan_reads, stale_items
from labeling.settings import LabelingSettings
from labeling.sync import sync
from labeling.tasks import annotation_result, label_config, task_document
from records.store import Store
from records.types import Annotation, ReasonCode, ReviewItem, ReviewState

AddItems = Callable[..., list[ReviewItem]]
READERS = ("ada@clinic.org", "bo@clinic.org")


def _items(store: Store) -> list[ReviewItem]:
    with store.ledger.read() as tx:
        return tx.find(ReviewItem, order_by=("-priority", "id"))


def _change(store: Store, item: ReviewItem, **changes: object) -> None:
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, item.id, **changes)


def test_the_audit_sample_is_always_blind_and_a_flag_never(store: Store, add_items: AddItems) -> None:
    (item,) = add_items(1)
    of = item.model_copy
    assert is_blind(of(update={"reasons": [ReasonCode.AUDIT_SAMPLE]}), 0.0)
    assert is_blind(of(update={"reasons": [ReasonCode.REFER, ReasonCode.AUDIT_SAMPLE]}), 0.0)
    for reason in (ReasonCode.FLAGGED, ReasonCode.URGENT, ReasonCode.ADJUDICATION):
        assert not is_blind(of(update={"reasons": [reason]}), 1.0)
        assert not is_blind(of(update={"reasons": [ReasonCode.AUDIT_SAMPLE, reason]}), 1.0)
    share = sum(is_blind(of(update={"id": f"{n:032x}"}), 0.1) for n in range(4000)) / 4000
    assert share == pytest.approx(0.1, abs=0.02)


def test_further_reads_are_planned_once(store: Store, settings: LabelingSettings, add_items: AddItems) -> None:
    first, *_ = add_items(3)
    _change(store, first, reasons=[ReasonCode.FLAGGED], comment="surely a melanoma")
    wanted = settings.model_copy(update={"readers": READERS, "reads_per_item": 3})
    assert plan_reads(store, wanted) == 2
    assert plan_reads(store, wanted) == 0
    reads = [item for item in _items(store) if item.reader is not None]
    assert {item.reader for item in reads} == set(READERS)
    assert all(item.blind and item.comment is None and item.image_id == first.image_id for item in reads)


@pytest.mark.parametrize("reason", [ReasonCode.FLAGGED, ReasonCode.URGENT])
def test_a_drawn_item_that_is_not_blind_gets_one_blind_read(
    store: Store, settings: LabelingSettings, add_items: AddItems, reason: ReasonCode
) -> None:
    drawn, other = add_items(2)
    _change(store, drawn, reasons=[reason, ReasonCode.AUDIT_SAMPLE])
    _change(store, other, reasons=[reason])
    assert plan_reads(store, settings) == 1
    assert plan_reads(store, settings) == 0
    (read,) = (item for item in _items(store) if item.blind)
    assert (read.image_id, read.reader) == (drawn.image_id, None)
    assert ReasonCode.AUDIT_SAMPLE in read.reasons


def test_a_blind_task_shows_nothing_of_the_model(store: Store, settings: LabelingSettings, add_items: AddItems) -> None:
    (item,) = add_items(1)
    config = label_config(store.taxonomy, blind=True)
    assert "$heatmap" not in config
    assert "$answer" not in config
    with store.ledger.read() as tx:
        from records.types import Image, Prediction

        image, prediction = tx.require(Image, item.image_id), tx.require(Prediction, item.prediction_id or "")
    blind = item.model_copy(update={"blind": True, "comment": "mel?", "suggested_label": "mel"})
    made = task_document(
        blind, image, store.blobs.get(image.id), np.zeros((8, 8, 3), np.uint8), prediction,
        taxonomy=store.taxonomy, settings=settings, key="k",
    )  # fmt: skip
    assert set(made["data"]) == {"image", "why", "about", "relook_item", "relook_key"}
    assert "mel" not in made["data"]["why"]


def test_blind_items_go_to_their_readers_and_come_back_blind(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    audit, flagged, plain = add_items(3)
    _change(store, audit, reasons=[ReasonCode.AUDIT_SAMPLE])
    _change(store, flagged, reasons=[ReasonCode.FLAGGED])
    wanted = settings.model_copy(update={"readers": READERS, "reads_per_item": 2})
    report = sync(store, client, wanted).push
    assert (report.pushed, report.blind) == (4, 2)
    projects = known_projects(store, client)
    assert ProjectKey() in projects.values()
    assert {project_key.reader for project_key in projects.values() if project_key.blind} <= set(READERS)
    in_project = {item.id: item.project_id for item in _items(store)}
    assert in_project[plain.id] == in_project[flagged.id] == report.project_id
    assert in_project[audit.id] != report.project_id
    for item in _items(store):
        client.create_annotation(item.task_id or 0, annotation_result("mel"), key=uuid.uuid4())
    assert pull(store, client, wanted).new_labels == 4
    with store.ledger.read() as tx:
        labels = {label.review_item_id: label.blind for label in tx.find(Annotation)}
    assert (labels[audit.id], labels[flagged.id], labels[plain.id]) == (True, False, False)
    assert sum(labels.values()) == 2
    found = read_agreement(store).anchoring
    assert found.shown + found.blind == 3, "one annotator did all, and of an annotator the newest annotation counts"
    pull(store, client, wanted)
    assert pull(store, client, wanted).idle


def test_a_changed_item_moves_up_and_its_task_says_so(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    add_items(3)
    project_id = push(store, client, settings).project_id or 0
    last = _items(store)[-1]
    assert stale_items(store) == []
    _change(store, last, priority=200.0, reasons=[*last.reasons, ReasonCode.FLAGGED], comment="it grows")
    assert [item.id for item in stale_items(store)] == [last.id]
    report = push(store, client, settings)
    assert (report.refreshed, report.pushed) == (1, 0)
    task = client.request("GET", f"api/tasks/{last.task_id}/", "read")
    assert "it grows" in task["data"]["why"]
    assert task["data"]["image"].startswith("data:image/jpeg")
    assert [p["score"] for p in task["predictions"]] == [-200.0]
    assert push(store, client, settings).refreshed == 0
    assert client.state(project_id).total == 3
    query = {"project": project_id, "query": '{"ordering": ["tasks:predictions_score"]}', "fields": "all"}
    tasks = client.request("GET", "api/tasks/", "list", params={**query, "include": "id"})["tasks"]
    assert tasks[0]["id"] == last.task_id, "the most urgent first"
    assert _items(store)[0].sent_hash == CURRENT


def test_disagreement_adds_one_adjudication_that_resolves_it(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    (item,) = add_items(1)
    sync(store, client, settings)
    task_id = _items(store)[0].task_id or 0
    annotators = [client.ensure_user(f"{name}@relook.local", name, "Reader") for name in ("one", "two", "chief")]
    for annotator, label in zip(annotators, ("mel", "nv"), strict=False):
        client.create_annotation(task_id, annotation_result(label), key=uuid.uuid4(), completed_by=annotator)
    report = sync(store, client, settings)
    assert (report.adjudications, report.push.pushed) == (1, 1)
    assert add_adjudications(store, settings.adjudicate_below) == 0
    with store.ledger.read() as tx:
        labels = tx.find(Annotation)
    assert resolve(labels)[0].label is None
    decision = next(one for one in _items(store) if ReasonCode.ADJUDICATION in one.reasons)
    assert decision.state is ReviewState.PUSHED
    client.create_annotation(
        decision.task_id or 0, annotation_result("mel"), key=uuid.uuid4(), completed_by=annotators[2]
    )
    assert sync(store, client, settings).adjudications == 0
    with store.ledger.read() as tx:
        labels = tx.find(Annotation)
    (found,) = resolve(labels, adjudications={decision.id})
    assert (found.image_id, found.label, found.method) == (item.image_id, "mel", "adjudication")
