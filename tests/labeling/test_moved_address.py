"""A Label Studio whose address changes: followed where it is the same one, refused where open tasks would be lost."""

import uuid
from collections.abc import Callable

import pytest

from labeling.client import LabelStudioClient
from labeling.deletion import tasks_place
from labeling.local_server import ServerInfo
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.status import status
from labeling.sync import sync
from labeling.tasks import annotation_result
from records.erasure import RECORDS_PLACES, erase_images
from records.errors import RefusedError
from records.store import Store
from records.types import Annotation, ReviewItem, ReviewState
from tests.labeling.test_culprits import proxied, sent_items

AddItems = Callable[..., list[ReviewItem]]


def items_of(store: Store) -> dict[str, ReviewItem]:
    with store.ledger.read() as tx:
        return {item.id: item for item in tx.find(ReviewItem)}


def annotations_of(store: Store) -> list[tuple[str, int, str]]:
    with store.ledger.read() as tx:
        return [(row.review_item_id, row.annotation_id, row.server) for row in tx.find(Annotation)]


def annotate(client: LabelStudioClient, item: ReviewItem, label: str) -> None:
    assert client.create_annotation(item.task_id or 0, annotation_result(label), key=uuid.uuid4()) is not None


def describe(client: LabelStudioClient, project_id: int, text: str) -> str:
    """Give a project another description, as if another Label Studio had it; return the one before."""
    before = client.descriptions()[project_id]
    client.request("PATCH", f"api/projects/{project_id}/", "describe", body={"description": text})
    return before


@pytest.mark.slow
def test_the_same_label_studio_at_another_address_is_followed(
    store: Store, server: ServerInfo, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(5)
    project_id = push(store, client, settings).project_id or 0
    annotate(client, items_of(store)[items[0].id], "mel")
    assert pull(store, client, settings).new_labels == 1
    sent = items_of(store)
    annotate(client, sent[items[1].id], "nv")
    for round_number in range(2):  # there, and back again
        with proxied(server) as (_, moved):
            at = moved if round_number == 0 else client
            report = sync(store, at, settings)
            assert (report.push.pushed, report.pull.requeued, report.push.adopted) == (0, 0, 0)
            assert report.pull.new_labels == (1 if round_number == 0 else 0)
            assert sync(store, at, settings).pull.moved is None
    after = items_of(store)
    assert {key: (item.project_id, item.task_id) for key, item in after.items()} == {
        key: (item.project_id, item.task_id) for key, item in sent.items()
    }
    read = annotations_of(store)
    assert sorted(item for item, _, _ in read) == sorted(item.id for item in items[:2]), "none twice"
    assert len({name for _, _, name in read}) == 1
    assert sent_items(client, project_id) == sorted(item.id for item in items)


@pytest.mark.slow
@pytest.mark.long
def test_open_items_at_an_old_address_are_refused_and_sent_again_on_request(
    store: Store, server: ServerInfo, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(6)
    first = push(store, client, settings).project_id or 0
    before = items_of(store)
    annotate(client, before[items[0].id], "mel")
    pull(store, client, settings)
    annotate(client, before[items[1].id], "bcc")  # nobody reads it before the move
    marked = describe(client, first, "somebody else's")
    with proxied(server) as (_, moved):
        for verb in (pull, push, sync):
            with pytest.raises(RefusedError, match=r"^5 open review items are in .* `relook label sync --moved`"):
                verb(store, moved, settings)
        assert sum(item.state is ReviewState.PUSHED for item in items_of(store).values()) == 5
        report = sync(store, moved, settings, moved=True)
        assert report.pull.moved is not None
        assert report.pull.moved.startswith("5 open review items of")
        second = report.push.project_id or 0
        assert report.push.pushed == 5
        assert second != first
        assert sent_items(client, second) == sorted(item.id for item in items[1:])
        annotated = items_of(store)[items[0].id]
        assert (annotated.state, annotated.task_id) == (ReviewState.ANSWERED, None), "its annotation was read"
        annotate(client, items_of(store)[items[2].id], "nv")
        report = sync(store, moved, settings)
        assert (report.pull.new_labels, report.pull.deleted, report.pull.tasks_deleted) == (1, 0, 0)
        assert items_of(store)[items[0].id].state is ReviewState.ANSWERED
    # Back again: what was annotated there meanwhile is read, and nothing is sent twice.
    describe(client, first, marked)
    describe(client, second, "gone")
    report = sync(store, client, settings, moved=True)
    assert (report.pull.new_labels, report.push.pushed) == (1, 0)
    states = {key: item.state for key, item in items_of(store).items()}
    assert [states[item.id] for item in items] == [ReviewState.ANSWERED] * 3 + [ReviewState.PUSHED] * 3
    assert sent_items(client, first) == sorted(item.id for item in items)
    assert len(annotations_of(store)) == 3


@pytest.mark.slow
def test_nothing_is_refused_without_open_items_and_erased_images_are_not_forgotten(
    store: Store, server: ServerInfo, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(2)
    project_id = push(store, client, settings).project_id or 0
    erase_images(store, [items[0].image_id], actor="test", places=RECORDS_PLACES)
    annotate(client, items_of(store)[items[1].id], "mel")
    describe(client, project_id, "somebody else's")
    with proxied(server) as (_, moved):
        elsewhere = settings.model_copy(update={"url": moved.url, "token": server.token})
        with pytest.raises(RefusedError, match="tasks of 1 erased images"):
            pull(store, moved, settings)
        with pytest.raises(RefusedError, match="tasks of 1 erased images"):
            tasks_place(elsewhere).erase(store, [])
        problems = status(store, elsewhere).problems
        assert any("tasks of 1 erased images" in problem for problem in problems)
        assert not any("makes it anew" in problem for problem in problems), "it would be refused"
        assert sent_items(client, project_id) == sorted(item.id for item in items)
