"""A project that people labelled by hand: imported with its annotators, and linked as the place of new review items."""

import base64
import io
import json
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PillowImage

from cluster.cli import run
from cluster.labels import resolved_labels
from labeling.client import LabelStudioClient
from labeling.connection import connect_to
from labeling.existing.annotations import ForeignTask, read_annotations
from labeling.existing.files import TaskFiles
from labeling.existing.page import read_page
from labeling.existing.project_import import import_project
from labeling.local_server import ServerInfo
from labeling.reads import add_adjudications
from labeling.rows import AnnotationRow, TaskRow
from labeling.settings import LabelingSettings
from records.datasets import load_dataset
from records.erasure import RECORDS_PLACES, erase_images
from records.errors import ConfigError, DataError, LabelStudioError, TaxonomyError, UnknownIdError
from records.home import open_home
from records.ids import utc_now
from records.store import Store
from records.types import Annotation, AnnotationKind, Image, ReviewItem, ReviewState
from tests.labeling.conftest import make_image

PAGE = """<View><Style><![CDATA[.a{color:red}]]></Style>
<Image name="photo" value="$photo"/><RectangleLabels name="box" toName="photo"><Label value="Melanoma"/>
</RectangleLabels><Choices name="dx" toName="photo" choice="single"><Choice value="Melanoma"/>
<Choice value="Muttermal"/><Choice value="Basal" alias="Bcc"/><Choice value="Not sure"/>
<Choice value="Something else"/></Choices><Choices name="light" toName="photo"><Choice value="good"/>
<Choice value="poor"/></Choices></View>"""
SAID = {"Muttermal": "nv"}


def make_project(client: LabelStudioClient, page: str = PAGE) -> int:
    body = {"title": "by hand", "label_config": page}
    return int(client.request("POST", "api/projects/", "create", body=body)["id"])


def upload(client: LabelStudioClient, project_id: int, name: str, data: bytes) -> None:
    """Upload a file to a project, as its page does; it becomes a task."""
    http, headers = client.transport()
    headers.pop("Content-Type", None)
    files = {name: (name, data, "image/png")}
    http.post(f"{client.url}/api/projects/{project_id}/import", headers=headers, files=files).raise_for_status()


def embedded(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def result_of(*choices: str, control: str = "dx") -> list[dict[str, Any]]:
    return [{"from_name": control, "to_name": "photo", "type": "choices", "value": {"choices": list(choices)}}]


def choose(client: LabelStudioClient, task_id: int, user_id: int | None, *choices: str) -> int:
    """Annotate a task as somebody; no choice is a skip."""
    result = [*result_of(*choices), *result_of("good", control="light")] if choices else []
    body = {"result": result, "was_cancelled": not choices, "unique_id": str(uuid.uuid4())}
    body |= {} if user_id is None else {"completed_by": user_id}
    return int(client.request("POST", f"api/tasks/{task_id}/annotations/", "annotate", body=body)["id"])


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def annotations_of(store: Store) -> list[Annotation]:
    with store.ledger.read() as tx:
        return tx.find(Annotation, order_by=("created_at", "id"))


@pytest.fixture(scope="module")
def readers(client: LabelStudioClient) -> list[int]:
    return [client.ensure_user(f"reader{n}@example.org", "Reader", str(n)) for n in range(3)]


@pytest.fixture(scope="module")
def by_hand(client: LabelStudioClient, readers: list[int]) -> tuple[int, list[int]]:
    """A project with 12 embedded images that three people labelled, and files in every other place."""
    project_id = make_project(client)
    pictures = [make_image(seed) for seed in range(12)]
    tasks: list[dict[str, Any]] = [
        {"photo": embedded(data), "note": "a", "lesion_id": f"L{n // 2}", "years": 40 + n}
        for n, data in enumerate(pictures)
    ]
    ids = client.import_tasks(project_id, [{"data": data} for data in tasks])
    for name in ("drawn.png", "hidden.png"):
        upload(client, project_id, name, make_image(50 + len(name), "PNG"))
    elsewhere = ["http://127.0.0.1:1/a.png", "s3://bucket/a.png", "/data/../admin", "data:,x", " "]
    client.import_tasks(project_id, [{"data": {"photo": value, "note": "b"}} for value in elsewhere])
    predicted = {"result": result_of("Melanoma"), "score": 0.9, "model_version": "theirs"}
    client.import_tasks(
        project_id, [{"data": tasks[0] | {"photo": embedded(make_image(70))}, "predictions": [predicted]}]
    )
    for number, task_id in enumerate(ids[:8]):
        for reader in readers[:2]:
            choose(client, task_id, reader, "Melanoma" if number < 4 else "Muttermal")
    choose(client, ids[8], readers[0], "Melanoma")
    choose(client, ids[8], readers[1], "Muttermal")
    choose(client, ids[9], readers[0])
    choose(client, ids[10], readers[2], "Not sure")
    choose(client, ids[11], readers[2], "Something else")
    choose(client, ids[11], readers[0], "Melanoma", "Muttermal")
    draft = {"result": result_of("Melanoma"), "lead_time": 1.0}
    client.request("POST", f"api/tasks/{ids[9]}/drafts", "draft", body=draft)
    return project_id, ids


@pytest.mark.slow
def test_images_and_annotations_come_in_with_their_annotators(
    store: Store, client: LabelStudioClient, by_hand: tuple[int, list[int]]
) -> None:
    project_id, _ids = by_hand
    found = import_project(store, client, project_id, labels=SAID, columns={"age": "years"})
    assert (found.report.images, found.report.unlabelled) == (15, 7)
    assert found.report.classes == {"mel": 4, "nv": 4}
    assert found.annotations == 8 * 2 + 2 + 1 + 2
    assert found.annotators == tuple(f"reader{n}@example.org" for n in range(3))
    assert ["Something else" in found.not_understood[0], "several classes" in found.not_understood[1]] == [True, True]
    refused = [one.reason for one in found.report.quarantined]
    assert len(refused) == 5, refused
    assert sum("not fetched" in reason for reason in refused) == 2
    assert [note.split(" ")[:3] for note in found.notes] == [
        ["1", "annotations", "are"], ["1", "tasks", "have"], ["not", "read:", "<rectanglelabels>"]
    ]  # fmt: skip
    rows = annotations_of(store)
    assert Counter(row.label for row in rows) == {"mel": 9, "nv": 9, None: 3}
    assert Counter(row.kind for row in rows)[AnnotationKind.CANT_TELL] == 1
    assert all(row.blind for row in rows)
    assert len(load_dataset(store, found.report.dataset_id).rows) == 8
    with store.ledger.read() as tx:
        images = {image.id: image for image in tx.find(Image)}
        items = {item.id: item for item in tx.find(ReviewItem)}
    assert {item.state for item in items.values()} == {ReviewState.ANSWERED}
    assert {row.review_item_id for row in rows} == set(items)
    assert {image.lesion_id for image in images.values()} == {None, *(f"L{n}" for n in range(6))}
    assert sorted(image.age_years for image in images.values() if image.age_years) == [40, *(40 + n for n in range(12))]
    assert {image.source_id.rpartition("-")[2] for image in images.values() if "-" in (image.source_id or "")} == {
        "drawn.png", "hidden.png"
    }  # fmt: skip
    resolved = {one.image_id: one for one in resolved_labels(store)}
    assert Counter(one.label for one in resolved.values()) == {"mel": 4, "nv": 4, None: 3}
    assert add_adjudications(store, 0.67) == 1, "whoever disagrees is asked again"


@pytest.mark.slow
@pytest.mark.long
def test_an_import_again_adds_what_is_new_and_repeats_nothing(
    store: Store, client: LabelStudioClient, readers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id = make_project(client)
    ids = client.import_tasks(
        project_id, [{"data": {"photo": embedded(make_image(seed)), "note": "a"}} for seed in range(100, 106)]
    )
    made = [
        choose(client, task_id, readers[n % 2], "Melanoma" if n % 2 else "Muttermal") for n, task_id in enumerate(ids)
    ]
    with monkeypatch.context() as patched:
        patched.setattr("labeling.existing.project_import.write_annotations", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_project(store, client, project_id)
    assert annotations_of(store) == []
    first = import_project(store, client, project_id)
    assert (first.annotations, first.report.images, first.report.new_images) == (6, 6, 0)
    assert first.report.classes == {"mel": 3}
    assert len(first.not_understood) == 3, "without --labels, Muttermal is no class"
    second = import_project(store, client, project_id, labels=SAID)
    assert (second.report.classes, second.report.new_images) == ({"mel": 3, "nv": 3}, 0)
    assert (second.annotations, second.withdrawn) == (3, 0), "the same choices, understood now"
    third = import_project(store, client, project_id, labels=SAID)
    assert (third.annotations, third.withdrawn, third.report.dataset_id) == (0, 0, second.report.dataset_id)

    edited = {"result": result_of("Bcc")}
    client.request("PATCH", f"api/annotations/{made[0]}/", "edit", body=edited)
    client.request("DELETE", f"api/annotations/{made[1]}/", "delete")
    choose(client, ids[2], None, "Muttermal")
    gone = next(row.image_id for row in annotations_of(store) if row.task_id == ids[3])
    erase_images(store, [gone], actor="test", places=RECORDS_PLACES)
    before = len(annotations_of(store))
    fourth = import_project(store, client, project_id, labels=SAID)
    assert (fourth.annotations, fourth.withdrawn) == (2, 1)
    assert [one.code for one in fourth.report.quarantined] == ["erased", "label_conflict"]
    assert not any(row.image_id == gone for row in annotations_of(store)[before:])
    # The token's owner is who annotates through the API without naming anybody.
    assert len(fourth.annotators) == 3
    corrected = import_project(store, client, project_id, labels=SAID, correct=True)
    assert corrected.report.classes == {"mel": 2, "nv": 2, "bcc": 1}
    assert list(store.home.cache.glob("importing*")) == []


@pytest.mark.slow
def test_an_import_that_was_interrupted_fetches_only_what_is_missing(
    store: Store, client: LabelStudioClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id = make_project(client)
    http, headers = client.transport()
    headers.pop("Content-Type", None)
    files = {f"{seed}.png": (f"{seed}.png", make_image(seed, "PNG"), "image/png") for seed in range(300, 340)}
    http.post(f"{client.url}/api/projects/{project_id}/import", headers=headers, files=files).raise_for_status()
    read, asked, lost_after = TaskFiles.read, list[str](), 28

    def counted(files: TaskFiles, value: Any) -> bytes:
        if len(asked) >= lost_after:
            raise LabelStudioError("the connection was lost")
        asked.append(value)
        return read(files, value)

    monkeypatch.setattr(TaskFiles, "read", counted)
    with pytest.raises(LabelStudioError, match="was lost"):
        import_project(store, client, project_id)
    before, asked, lost_after = asked, [], 1000
    found = import_project(store, client, project_id)
    assert (found.report.images, found.report.quarantined) == (40, [])
    assert (len(before) + len(asked), set(before) & set(asked)) == (40, set())
    assert f"{len(before)} images were there from a run that was interrupted and were not fetched again" in found.notes
    assert list(store.home.cache.glob("importing*")) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_tasks_come_in_page_by_page(store: Store, client: LabelStudioClient, readers: list[int]) -> None:
    count, project_id = 10_000, make_project(client)
    noise = np.random.default_rng(7)
    for first in range(0, count, 500):
        tasks = []
        for number in range(first, first + 500):
            image = embedded(photo_of(noise.integers(0, 255, (72, 96, 3), dtype=np.uint8)))
            said = {"result": result_of("Melanoma" if number % 3 else "Bcc"), "completed_by": readers[number % 3]}
            tasks.append({"data": {"photo": image, "lesion_id": f"L{number}"}, "annotations": [said]})
        client.request("POST", f"api/projects/{project_id}/import", "fill", body=tasks, repeat=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _peak_mb()
    found = import_project(store, client, project_id)
    grown = _peak_mb() - before
    assert (found.report.images, found.annotations, found.report.quarantined) == (count, count, [])
    assert sum(found.report.classes.values()) == len(load_dataset(store, found.report.dataset_id).rows) == count
    assert grown < 500, f"{grown} MB for {count} tasks of about 20 kB"


def photo_of(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def _peak_mb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1000


def test_annotations_of_deleted_users_and_odd_tasks_are_said(store: Store) -> None:
    page = read_page(PAGE, store.taxonomy)
    at = utc_now()
    rows = [
        AnnotationRow(n, result_of("Melanoma"), user, n == 4, at, None) for n, user in enumerate((None, None, 7, 1, 1))
    ]
    task = ForeignTask(TaskRow(5, {}, at, tuple(rows), predictions=1), "1/5", Path("x"), "a" * 64)
    read_annotations(task, page, store.taxonomy, {1: "one@example.org"}, "http://x", 3)
    assert [one.annotator for one in task.said] == ["unknown", "unknown", "user 7", "one@example.org"]
    assert not any(one.blind for one in task.said), "somebody who saw a prediction did not read blind"
    assert task.skips == 1
    faulty = ForeignTask(TaskRow(6, {}, at, fault="its annotations cannot be listed"), "1/6", Path("y"), "b" * 64)
    read_annotations(faulty, page, store.taxonomy, {}, "http://x", 3)
    assert (faulty.path, faulty.problem) == (None, "task 6 is not taken: its annotations cannot be listed")


@pytest.mark.parametrize(
    ("page", "choices", "sentence"),
    [
        ("<View><Text name='t' value='$t'/></View>", None, "no <Choices> about an <Image>"),
        (
            "<View><Image name='i' value='$i'/><Taxonomy name='t' toName='i'/></View>",
            None,
            "it has <taxonomy> 't', whose results are no class",
        ),
        (PAGE.replace('name="dx"', 'name="dx" perRegion="true"').replace("good", "x"), None, "map them with --labels"),
        (PAGE, "colour", "it has dx, light"),
        (PAGE.replace("Melanoma", "A").replace("Bcc", "B").replace("Not sure", "C"), None, "--labels 'A=akiec'"),
        (PAGE.replace("good", "nv"), None, "dx and light .* name one with --choices"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]>" + PAGE, None, "document type"),
        ("<View>", None, "not XML"),
        (PAGE.replace("$photo", "https://x"), None, "no value of the form"),
    ],
)
def test_a_page_that_names_no_class_is_refused(store: Store, page: str, choices: str | None, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_page(page, store.taxonomy, choices=choices)


def test_choices_are_read_as_labels_of_tables_are(store: Store) -> None:
    tree = """<View><Image name="i" valueList="$scans"/><choices name="dx" toName="t,i" layout="tree">
    <Choice value="skin"><Choice value="MEL"/></Choice><Choice value="Melanocytic nevus"/><Choice value="weiss nicht"/>
    </choices></View>"""
    page = read_page(tree, store.taxonomy, said={"skin/mel": "mel", "weiss nicht": "cant-tell"})
    assert (page.image_key, page.lists, page.from_name, page.to_name) == ("scans", {"scans"}, "dx", "i")

    def parsed(choices: list[Any]) -> tuple[str, str | None]:
        found = page.parse([{"from_name": "dx", "value": {"choices": choices}}], store.taxonomy)
        return found.kind.value, found.label

    assert parsed(["melanocytic  NEVUS"]) == ("class", "nv")
    assert parsed([["skin", "MEL"]]) == ("class", "mel")
    assert parsed(["weiss nicht"]) == ("cant_tell", None)
    assert parsed(["skin"]) == parsed(["mel", "nv"]) == parsed([]) == ("other", None)
    two = tree.replace('<Image name="i"', '<Image name="t" value="$t"/><Image name="i"')
    with pytest.raises(DataError, match="no <Choices> about an <Image>"):
        read_page(two, store.taxonomy)
    with pytest.raises(TaxonomyError):
        read_page(PAGE, store.taxonomy, said={"Melanoma": "no such class"})


def test_an_unknown_project_is_named(store: Store, client: LabelStudioClient) -> None:
    with pytest.raises(UnknownIdError, match="no project 99999"):
        import_project(store, client, 99999)
    with pytest.raises(DataError, match="has no tasks"):
        import_project(store, client, make_project(client))


def test_a_token_goes_to_the_address_that_it_is_for(
    server: ServerInfo, settings: LabelingSettings, tmp_path: Path
) -> None:
    home = open_home(tmp_path / "home")
    elsewhere = settings.model_copy(update={"url": "http://a.example", "token": server.token})
    for url in (
        "ftp://x",
        "labels.example",
        "http://me:secret@x.example",
        "http://x.example/?token=secret",
        "http://[",
    ):
        with pytest.raises(ConfigError, match="takes the base URL") as error:
            connect_to(home, settings, url)
        assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="there is no token"):
        connect_to(home, settings, server.url)
    with pytest.raises(ConfigError, match=r"is for labeling\.url"):
        connect_to(home, elsewhere, server.url)
    kept = tmp_path / "token"
    with pytest.raises(ConfigError, match="cannot be read"):
        connect_to(home, elsewhere, server.url, kept)
    for text in ("", "two words", "ü"):
        kept.write_text(text)
        with pytest.raises(ConfigError, match="one access token"):
            connect_to(home, elsewhere, server.url, kept)
    kept.write_text(server.token.get_secret_value() + "\n")
    with connect_to(home, elsewhere, f"{server.url}/", kept) as client:
        assert client.version().startswith("1.")
        assert client.server == server.url
        assert server.token.get_secret_value() not in repr(client)


@pytest.mark.slow
def test_the_verb_imports_a_project(
    server: ServerInfo, by_hand: tuple[int, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, home = tmp_path / "token", f"records.home={tmp_path / 'home'}"
    kept.write_text(server.token.get_secret_value())
    where = ["data", "import", "--label-studio", server.url, "--project", str(by_hand[0]), "--set", home]
    assert run([*where, "--token-file", str(kept), "--labels", "Muttermal=nv", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["classes"], found["annotations"], len(found["annotators"])) == ({"mel": 4, "nv": 4}, 21, 3)
    assert "project" in found["layout"]
    assert "not used (missing)" in printed.err
    assert "kept, not trained on" in printed.err
    assert server.token.get_secret_value() not in printed.out + printed.err
    assert run([*where, "--token-file", str(kept), "--choices", "light"]) == 2
    assert "is a class of the taxonomy" in capsys.readouterr().err
    for wrong in (
        ["data", "import"],
        [*where, "--in-place"],
        [*where, str(tmp_path)],
        where[:4],
        ["data", "import", "."],
    ):
        assert run([*wrong, "--choices", "dx"]) == 2
        assert "name a folder to import; or a project" in capsys.readouterr().err
