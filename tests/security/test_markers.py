"""Erasure, looked for everywhere: two people are planted in every place and searched for after `relook erase`.

What is searched: every file of the home (also inside of gzip, Parquet and SQLite files), every image in it, in data
URIs and in pixel caches, every row of the database, every object of the bucket, and Label Studio through its API.
Only hashes of the images may be found.
"""

import base64
import gzip
import io
import os
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from cluster.cli import run
from images.importer import import_folder
from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result
from records import audit
from records.backup import back_up, restore
from records.erasure import erase_images
from records.ledger.tables import LEDGER_TYPES
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Annotation, Consent, Image, Quarantined, ReviewItem
from serving.client import Client
from serving.erasure import serving_places
from serving.schemas import Context, FlagRequest, OutcomeRequest
from serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

MARK = "ZQ7XMARKER"
# Read here, since the tests run with a closed environment.
ENVIRONMENT, BUCKET = os.environ.get("RELOOK_LABELING__ENVIRONMENT"), os.environ.get("RELOOK_TEST_S3")
_URI = re.compile(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]{40,})")


def person(seed: int, **save: Any) -> bytes:
    """A JPEG that looks like no other, with the marker in its comment and EXIF."""
    chance = np.random.default_rng(seed)
    coarse = PillowImage.fromarray(chance.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    exif = PillowImage.Exif()
    exif[0x010E] = f"{MARK} description"
    buffer = io.BytesIO()
    coarse.resize((120, 96), PillowImage.Resampling.NEAREST).save(
        buffer, "JPEG", quality=90, comment=MARK.encode(), exif=exif, **save
    )
    return buffer.getvalue()


def look(image: PillowImage.Image) -> np.ndarray[Any, Any]:
    """The centre square of an image as 8 x 8 grey values around 0, of length 1."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("L").crop((left, top, left + side, top + side))
    grey = np.asarray(square.resize((8, 8), PillowImage.Resampling.BOX), dtype=np.float64)
    grey -= grey.mean()
    return grey / (np.linalg.norm(grey) or 1.0)


@dataclass
class Search:
    """Finds the people in bytes: the marker as text, and images that look like theirs."""

    looks: list[np.ndarray[Any, Any]]

    def finds(self, data: bytes) -> bool:
        """Whether bytes hold the marker, or an image of them."""
        if MARK.encode() in data or any(
            self._shows(base64.b64decode(uri[: len(uri) // 4 * 4])) for uri in _URI.findall(data)
        ):
            return True
        return self._shows(data)

    def in_file(self, path: Path) -> bool:
        """Whether a file holds them, also compressed, in a table, or as decoded pixels."""
        data = path.read_bytes()
        if path.suffix == ".gz":
            data += gzip.decompress(data)
        if path.suffix == ".parquet":
            data += str(pq.read_table(path).to_pylist()).encode()
        if data.startswith(b"SQLite format 3"):
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                data += "\n".join(connection.iterdump()).encode()
        if path.suffix == ".u8":
            side = int(path.parent.name.split("px")[0])
            pixels = np.frombuffer(data, dtype=np.uint8).reshape(-1, side, side, 3)
            return any(self._resembles(PillowImage.fromarray(one)) for one in pixels)
        return self.finds(data)

    def in_home(self, home: Path) -> set[str]:
        """The folders and files of a home that hold them.

        Files come and go while it is read, such as SQLite's -wal and -shm beside a database that Label Studio closes.
        What stood in one that went may stand in another by then, so all are read again.
        """
        for _ in range(20):
            files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
            try:
                return {str(path.relative_to(home).parts[0]) for path in files if self.in_file(path)}
            except FileNotFoundError:
                continue
        pytest.fail(f"the files of {home} never came to rest")

    def _shows(self, data: bytes) -> bool:
        try:
            with PillowImage.open(io.BytesIO(data), formats=("jpeg", "png", "webp")) as image:
                return self._resembles(image)
        except (OSError, ValueError, SyntaxError):
            return False

    def _resembles(self, image: PillowImage.Image) -> bool:
        return any(float((look(image) * wanted).sum()) > 0.8 for wanted in self.looks)


def _bucket() -> str | None:
    if BUCKET is None:
        return None
    base, _, query = BUCKET.partition("?")
    return f"{base}/{uuid.uuid4().hex}?{query}"


@dataclass
class Places:
    """A store with everything around it."""

    store: Store
    settings: RecordsSettings
    client: LabelStudioClient


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.soak)])
def places(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    new_database: Callable[..., str],
) -> Iterator[Places]:
    """A store on SQLite and files, or on PostgreSQL and the bucket of RELOOK_TEST_S3 if it names one.

    Each has a Label Studio of its own.
    """
    home = tmp_path_factory.mktemp("marked") / "home"
    settings = RecordsSettings(home=home)
    if request.param == "postgresql":
        database = new_database()
        settings = RecordsSettings(home=home, database=database, blobs=_bucket())
        monkeypatch.setenv("RELOOK_DATABASE", database)
        if settings.blobs:
            monkeypatch.setenv("RELOOK_BLOBS", settings.blobs)
    monkeypatch.setenv("RELOOK_HOME", str(home))
    store = open_store(settings)
    labeling = LabelingSettings(port=0, environment=Path(ENVIRONMENT) if ENVIRONMENT else None, start_timeout_s=600)
    local = LocalLabelStudio(store.home, labeling)
    server = local.up(lambda line: None)
    try:
        with LabelStudioClient(server.url, server.token) as client:
            yield Places(store, settings, client)
    finally:
        local.down()
        store.close()


def plant(places: Places, folder: Path, tools: Any) -> list[str]:
    """Put two people, one imported and one served, into every place, and a third without words into some.

    Returns the ids of their images.
    """
    store = places.store
    (folder / "in").mkdir(parents=True)
    (folder / "in" / f"{MARK}-imported.jpg").write_bytes(person(1))
    for number in range(3, 12):
        (folder / "in" / f"other-{number}.jpg").write_bytes(person(number).replace(MARK.encode(), b"O" * len(MARK)))
    others = [(f"other-{n}", "nv" if n % 2 else "mel", f"lesion-{n}") for n in range(3, 12)]
    table = [(f"{MARK}-imported", "mel", f"{MARK}-lesion"), (f"{MARK}-lost", "mel", f"{MARK}-lesion"), *others]
    frame = pd.DataFrame(table, columns=["image_id", "dx", "lesion_id"])
    frame.assign(site=f"{MARK} site", device=f"{MARK} device", patient=f"{MARK} patient").iloc[:1].to_csv(
        folder / "in" / "table.csv", index=False
    )
    rest = frame.iloc[1:].assign(site="s", device="d", patient=[f"p{n}" for n in range(len(frame) - 1)])
    rest.to_csv(folder / "in" / "table.csv", index=False, mode="a", header=False)
    report = import_folder(
        store, folder / "in", columns={"image": "image_id", "patient": "patient"}, withhold_share=0.0
    )
    assert [q.code for q in report.quarantined] == ["missing"]
    tools.serve_bundle(store, tools.make_bundle(store, 0, bias={"bcc": -2.0}))
    served, third = _serve(store, tools)
    with store.ledger.read() as tx:
        imported = next(i.id for i in tx.find(Image) if i.source_id == f"{MARK}-imported")
        (model_id,) = tx.connection.exec_driver_sql("SELECT id FROM models").scalars()
        assert tx.count(Quarantined) == 1
    _annotate(places, {served: f"{MARK} said", third: "nothing"})
    page = store.home.bundles / model_id / "report" / "report.html"
    page.parent.mkdir()
    uri = base64.b64encode(store.blobs.get(imported)).decode()
    page.write_text(f'<img alt="{MARK}" src="data:image/jpeg;base64,{uri}">')
    truth = [{"image_id": imported, "source_id": f"{MARK}-imported", "group_id": "g", "label": "mel"}]
    pd.DataFrame(truth).to_parquet(store.home.demo / "truth.parquet", index=False)
    _plant_earlier_demo(store, imported)
    return [imported, served, third]


def _serve(store: Store, tools: Any) -> list[str]:
    settings = ServingSettings(port=tools.free_port(), audit_share=1.0)
    words = Context(
        lesion_id=f"{MARK} lesion", patient_id=f"{MARK} patient 2", age=61, sex=f"{MARK} sex",
        localization=f"{MARK} place", device=f"{MARK} device", site=f"{MARK} site", consent=Consent.TRAINING,
    )  # fmt: skip
    with tools.run_service(store, settings) as running, Client(running.url, retry_s=0.0) as client:
        made = client.predict(person(2), context=words, idempotency_key=f"{MARK} key", explain="gradcam")
        client.flag(made.id, FlagRequest(reason="other", suggested_label="mel", comment=f"{MARK} comment"))
        moment = made.created_at
        client.outcome(made.id, OutcomeRequest(diagnosis="mel", confirmation="histopathology", observed_at=moment))
        assert client.events().items
        third = client.predict(person(20), context=Context(consent=Consent.REVIEW))
        client.flag(third.id, FlagRequest(reason="unsure"))
    return [made.image_id, third.image_id]


def _annotate(places: Places, words: dict[str, str]) -> None:
    """Push the served images, annotate them with words about the people, leave drafts, and pull."""
    labeling = LabelingSettings()
    push(places.store, places.client, labeling)
    with places.store.ledger.read() as tx:
        items = tx.find(ReviewItem, where={"image_id": list(words)})
    assert all(item.task_id for item in items)
    for item in items:
        said = {"text": [words[item.image_id]]}
        comment = {"from_name": "comment", "to_name": "image", "type": "textarea", "value": said}
        result = [*annotation_result("mel"), comment]
        assert places.client.create_annotation(item.task_id or 0, result, key=uuid.uuid4())
        places.client.request(
            "POST", f"api/tasks/{item.task_id}/drafts", "leave a draft", body={"result": result, "lead_time": 1}
        )
    pull(places.store, places.client, labeling)
    with places.store.ledger.read() as tx:
        assert any(MARK in (label.comment or "") for label in tx.find(Annotation))


def _plant_earlier_demo(store: Store, image_id: str) -> None:
    earlier = store.home.demo / "earlier" / "20260101T000000"
    opened = open_store(RecordsSettings(home=earlier))
    with store.ledger.read() as tx:
        row = tx.require(Image, image_id)
    opened.blobs.put(store.blobs.get(image_id))
    with opened.ledger.begin() as tx:
        tx.add(row.model_copy(update={"uri": opened.blobs.uri(image_id)}))
    opened.close()


def outside(places: Places, search: Search) -> set[str]:
    """The places outside of the home that hold the people: rows, blobs, and what Label Studio tells."""
    found = set()
    with places.store.ledger.read() as tx:
        for record_type in LEDGER_TYPES:
            found |= {record_type.table for row in tx.find(record_type) if MARK in row.model_dump_json()}
    if any(search.finds(places.store.blobs.get(blob_id)) for blob_id in places.store.blobs.ids()):
        found.add("blob store")
    for project in places.client.request("GET", "api/projects/", "list projects")["results"]:
        params = {"exportType": "JSON", "download_all_tasks": "true"}
        for task in places.client.request("GET", f"api/projects/{project['id']}/export", "export", params=params):
            if search.finds(str(task).encode()):
                found.add("Label Studio")
    return found


def test_nothing_of_the_people_is_found_after_their_erasure(
    places: Places, tmp_path: Path, tools: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    *image_ids, third = plant(places, tmp_path, tools)
    looks = [look(PillowImage.open(io.BytesIO(person(seed)))) for seed in (1, 2, 20)]
    search, search_third = Search(looks[:2]), Search(looks[2:])
    back_up(places.store, tmp_path / "backup")
    planted = search.in_home(places.store.home.root)
    assert planted >= {"cache", "bundles", "demo", "label-studio"} | ({"blobs"} if places.store.blobs.local else set())
    assert outside(places, search) >= {
        "images", "quarantine", "predictions", "review_items", "flags", "annotations", "blob store",
        "Label Studio",
    }  # fmt: skip

    with capsys.disabled():
        # The row of an image that was never stored is found by its name only.
        assert run(["erase", *image_ids, "--name", f"{MARK}-lost", "--json"]) == 0

    assert outside(places, search) == set()
    assert search.in_home(places.store.home.root) == set()
    assert audit.verify(places.store.ledger, places.store.home) == []
    # A backup keeps what it holds; what is restored from it does not have them.
    restored = tmp_path / "restored"
    restore(tmp_path / "backup", RecordsSettings(home=restored))
    assert search.in_home(restored) == set()
    # What the service erases, the next pull deletes in Label Studio.
    erase_images(places.store, [third], actor="test", places=serving_places(ServingSettings()))
    assert outside(places, search_third) == {"Label Studio"}
    pull(places.store, places.client, LabelingSettings())
    assert outside(places, search_third) == set()
    assert search_third.in_home(places.store.home.root) == set()
    # An erasure that has nothing left to do says so and changes nothing.
    assert run(["erase", *image_ids, "--json"]) == 0
