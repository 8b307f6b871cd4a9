"""A project that people made is linked: review items go there, and it stays theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import run
from labeling.client import LabelStudioClient
from labeling.deletion import pending_items, tasks_place
from labeling.existing.link import link, unlink
from labeling.existing.project_import import import_project
from labeling.local_server import ServerInfo
from labeling.project import known_projects
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.simulated_annotator import annotate
from labeling.status import status
from records.erasure import RECORDS_PLACES, erase_images
from records.errors import DataError, RefusedError, UnknownIdError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Annotation, ReasonCode, ReviewItem, ReviewState
from tests.labeling.conftest import make_image
from tests.labeling.test_existing_project import choose, embedded, make_project

AddItems = Callable[..., list[ReviewItem]]
CHOICES = (
    "akiec", "BCC", "Keratosis-like lesion", "df", "Melanoma", "Muttermal", "Vascular lesion", "Not sure",
    "Something else",
)  # fmt: skip
PAGE = (
    '<View><Header value="$age"/><Text name="note" value="$note"/><Image name="other" value="$overview"/>'
    '<Image name="photo" value="$photo"/><Choices name="dx" toName="photo">'
    + "".join(f'<Choice value="{choice}"/>' for choice in CHOICES)
    + "</Choices></View>"
)
SAID = {"Muttermal": "nv"}


def foreign_tasks(client: LabelStudioClient, project_id: int, count: int = 2) -> list[int]:
    shown = [embedded(make_image(900 + n)) for n in range(count)]
    data = [{"photo": image, "overview": image, "note": "theirs", "age": "7"} for image in shown]
    return client.import_tasks(project_id, [{"data": one} for one in data])


def items_of(store: Store) -> dict[str, ReviewItem]:
    with store.ledger.read() as tx:
        return {item.id: item for item in tx.find(ReviewItem)}


def annotations_of(store: Store) -> list[Annotation]:
    with store.ledger.read() as tx:
        return tx.find(Annotation, order_by=("created_at", "annotation_id"))


def data_of(client: LabelStudioClient, task_id: int) -> dict[str, Any]:
    found: dict[str, Any] = client.request("GET", f"api/tasks/{task_id}", "read")["data"]
    return found


def tasks_in(client: LabelStudioClient, project_id: int) -> set[int]:
    return {row.id for page in client.list_tasks(project_id) for row in page}


@pytest.mark.slow
def test_new_items_go_to_the_linked_project_and_open_ones_are_still_read_elsewhere(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    first = add_items(2)
    own = push(store, client, settings).project_id or 0
    number = make_project(client, PAGE)
    theirs = foreign_tasks(client, number)
    found = link(store, client, settings, number, labels=SAID)
    assert (found.open_elsewhere, found.no_class, found.shows_model) == ({own: 2}, ["Something else"], False)
    assert set(found.classes.values()) == set(store.taxonomy.codes)

    new = add_items(4, first_seed=30)
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, new[3].id, reasons=[ReasonCode.AUDIT_SAMPLE])
    assert push(store, client, settings).pushed == 4
    assert push(store, client, settings).pushed == 0
    items = items_of(store)
    assert [items[one.id].project_id for one in first + new] == [own, own, number, number, number, number]
    at = [items[one.id].task_id or 0 for one in new]
    data = data_of(client, at[0])
    assert set(data) == {"age", "note", "overview", "photo", "relook_item", "relook_key"}
    assert (data["age"], data["note"]) == ("55", "")
    assert data["photo"] != data["overview"]

    user = client.ensure_user("reader@example.org", "Reader", "One")
    for task_id, choice in zip(at[:3], ("Muttermal", "Not sure", "Something else"), strict=True):
        choose(client, task_id, user, choice)
    choose(client, theirs[0], user, "Melanoma")
    annotate(client, store, {first[0].image_id: "mel"})
    read = pull(store, client, settings)
    assert (read.new_labels, read.cant_tell, read.failed) == (4, 1, [])
    assert ["Something else" in sentence for sentence in read.not_understood] == [True]
    rows = annotations_of(store)
    assert {(row.project_id, row.label) for row in rows} == {(own, "mel"), (number, "nv"), (number, None)}
    assert all(row.blind for row in rows if row.project_id == number), "the page does not show the prediction"
    assert [row.annotator for row in rows if row.project_id == number] == ["reader@example.org"] * 3
    shown = status(store, client_settings(client, settings))
    assert (shown.problems, shown.project_id, shown.linked) == ([], number, True)

    # What they see is refreshed; a task that is deleted there withdraws its item; their tasks stay theirs.
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, new[3].id, priority=99.0)
    assert push(store, client, settings).refreshed == 1
    client.delete_task(at[3])
    assert pull(store, client, settings).tasks_deleted == 1
    place = tasks_place(client_settings(client, settings))
    erase_images(store, [new[0].image_id], actor="test", places=(*RECORDS_PLACES, place))
    assert tasks_in(client, number) == {*theirs, at[1], at[2]}
    brought = import_project(store, client, number, labels=SAID)
    assert (brought.report.images, brought.annotations) == (2, 1), "the import takes their tasks and no others"

    assert unlink(store, client).project_id == number
    assert unlink(store, client).project_id is None
    later = add_items(1, first_seed=60)
    push(store, client, settings)
    assert items_of(store)[later[0].id].project_id == own
    choose(client, at[1], user, "Melanoma")
    assert pull(store, client, settings).new_labels == 1, "what was linked is still read"


@pytest.mark.slow
def test_a_project_of_another_home_is_imported_like_anybody_elses(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems, tmp_path: Path
) -> None:
    items = add_items(3)
    number = push(store, client, settings).project_id or 0
    annotate(client, store, {item.image_id: "bcc" for item in items[:2]})
    with pytest.raises(DataError, match="only tasks that Relook sent there"):
        import_project(store, client, number)
    other = open_store(RecordsSettings(home=tmp_path / "other"))
    found = import_project(other, client, number)
    assert (found.report.images, found.report.classes, found.annotations) == (3, {"bcc": 2}, 2)
    assert not any(row.blind for row in annotations_of(other)), "that page shows the prediction"
    # Erasing what was imported needs no Label Studio, and takes nothing from the other home.
    gone = annotations_of(other)[0].image_id
    erase_images(other, [gone], actor="test", places=(*RECORDS_PLACES, tasks_place(settings)))
    assert pending_items(other) == set()
    assert len(tasks_in(client, number)) == 3
    other.close()


def client_settings(client: LabelStudioClient, settings: LabelingSettings) -> LabelingSettings:
    token = client.transport()[1]["Authorization"].partition(" ")[2]
    return settings.model_validate({**settings.model_dump(), "url": client.url, "token": token})


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (PAGE.replace('"df"', '"x"').replace("Vascular lesion", "y"), "no choice for df, vasc; add them"),
        (PAGE.replace("<Header", '<Audio name="a" value="$sound"/><Header'), r"shows <audio> \$sound"),
        (
            '<View><Image name="i" value="$i"/><Choices name="c" toName="i" value="$own"/></View>',
            "come from the data of each task",
        ),
    ],
)
def test_a_page_that_cannot_ask_for_every_class_is_refused(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, page: str, sentence: str
) -> None:
    number = make_project(client, page)
    with pytest.raises(DataError, match=sentence):
        link(store, client, settings, number, labels=SAID)
    assert known_projects(store, client) == {}
    assert client.descriptions()[number] == ""
    with pytest.raises(UnknownIdError, match="no project 99999"):
        link(store, client, settings, 99999)


@pytest.mark.slow
@pytest.mark.long
def test_a_link_that_breaks_is_said_and_loses_nothing(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    add_items(1)
    own = push(store, client, settings).project_id or 0
    with pytest.raises(RefusedError, match="is Relook's own"):
        link(store, client, settings, own)
    shows = PAGE.replace("$note", "$prediction")
    number, second = make_project(client, shows), make_project(client, PAGE)
    assert link(store, client, settings, number, labels=SAID).shows_model
    blind = add_items(2, first_seed=40)
    with store.ledger.begin() as tx:
        tx.update(ReviewItem, blind[1].id, reasons=[ReasonCode.AUDIT_SAMPLE])
    push(store, client, settings)
    placed = [items_of(store)[one.id].project_id for one in blind]
    assert placed[0] == number
    assert placed[1] not in (number, own), "a blind read does not go to a page that shows the prediction"
    assert "Melanoma 60%" in data_of(client, items_of(store)[blind[0].id].task_id or 0)["prediction"]

    config = {"label_config": shows.replace('<Choice value="df"/>', "")}
    client.request("PATCH", f"api/projects/{number}/", "change", body=config)
    add_items(1, first_seed=50)
    assert "no choice for df" in " ".join(push(store, client, settings).unreadable)
    replaced = link(store, client, settings, second, labels=SAID)
    assert (replaced.unlinked, replaced.open_elsewhere[number]) == (number, 1)
    assert push(store, client, settings).pushed == 1

    client.request("DELETE", f"api/projects/{second}/", "delete")
    assert "relook label unlink" in " ".join(pull(store, client, settings).failed)
    assert "relook label unlink" in " ".join(status(store, client_settings(client, settings)).problems)
    assert unlink(store, client).requeued == 1
    assert pull(store, client, settings).failed == []
    assert push(store, client, settings).pushed == 1
    assert {item.state for item in items_of(store).values()} == {ReviewState.PUSHED}


@pytest.mark.slow
def test_the_verbs_link_and_unlink(
    server: ServerInfo,
    client: LabelStudioClient,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RELOOK_LABELING__TOKEN", server.token.get_secret_value())
    number = make_project(client, PAGE)
    where = ["--set", f"records.home={tmp_path / 'home'}", "--set", f"labeling.url={server.url}"]
    assert run(["label", "link", "--project", str(number), *where]) == 2
    assert "'dx' has no choice for nv; add them" in capsys.readouterr().err
    assert run(["label", "link", "--project", str(number), "--labels", "Muttermal=nv", "--json", *where]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["classes"]["Muttermal"] == "nv"
    assert "does not show the model's prediction" in printed.err
    assert run(["label", "status", *where]) == 0
    assert f"{number} (linked), 0 tasks" in capsys.readouterr().out
    assert run(["label", "unlink", *where]) == 0
    assert f"project {number} is no longer linked" in capsys.readouterr().out
    assert run(["label", "unlink", *where]) == 0
    assert "no project is linked" in capsys.readouterr().out
