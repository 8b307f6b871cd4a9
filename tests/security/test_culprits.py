"""One member of a batch or of a loop fails: only the culprit does, whatever it fails at."""

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.labels import group_labelled_images
from cluster.selection import select_images, take_in_folder
from images.decode import decode_frame
from images.importer import import_folder
from images.synth import render
from records.errors import DataError, RelookError
from records.frames import Frame
from records.ids import new_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Annotation, Consent, Image, ModelRecord, Prediction, Quarantined, ReviewItem
from serving.bulk import predict_folder
from serving.holder import verify_models
from serving.images import take_in
from serving.messages import PredictionRequest, StoredPrediction
from serving.predictor import Predictor, _QueuedJob
from serving.recording import Job
from serving.schemas import Context
from serving.settings import ServingSettings

SETTINGS = ServingSettings(model_poll_s=0.05, audit_share=0.0)
FAR_EAST, FAR_WEST = timezone(timedelta(hours=23, minutes=59)), timezone(-timedelta(hours=23))

# Past the types of the API, as an entrance that somebody forgets would take them.
CULPRITS: dict[str, dict[str, Any]] = {
    "U+0000 in a text": {"lesion_id": "a\x00"},
    "half a surrogate pair": {"site": "a\ud800"},
    "a moment before the year 1 in UTC": {"acquired_at": datetime(1, 1, 1, tzinfo=FAR_EAST)},
    "a moment after the year 9999 in UTC": {"acquired_at": datetime(9999, 12, 31, 23, tzinfo=FAR_WEST)},
    "an age that is no number": {"age": float("nan")},
    "an age out of range": {"age": 1e9},
    "a text that is none": {"sex": ["x"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tools: Any,
    new_database: Callable[..., str],
) -> Iterator[Store]:
    """A store with a champion, on both databases."""
    database = new_database() if request.param == "postgresql" else None
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("culprits"), database=database))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


def request_of(image: bytes, organisation: str = "honest", **context: Any) -> PredictionRequest:
    given = Context.model_construct(**{**Context(consent=Consent.TRAINING).model_dump(), **context})
    return PredictionRequest(image, new_id(), given, caller=organisation, organisation=organisation)


def run(store: Store, use: Callable[[Predictor], Any]) -> Any:
    async def started() -> Any:
        predictor = Predictor(store, SETTINGS)
        await predictor.start()
        try:
            return await use(predictor)
        finally:
            await predictor.stop()

    return asyncio.run(started())


# ---------------------------------------------------------------- batches of the predictor


def test_other_organisations_get_their_predictions_beside_every_kind_of_culprit(
    store: Store, make_image: Callable[..., bytes]
) -> None:
    requests = []
    for number in range(15 * len(CULPRITS)):
        requests.append(request_of(make_image(number % 12), f"org-{number % 3}", lesion_id=f"l{number}"))
        if number % 3 == 0:
            context = list(CULPRITS.values())[number // 3 % len(CULPRITS)]
            # Images of their own: what is said about an image that is known already is not written again.
            requests.append(request_of(make_image(100 + number), "culprit", **context))

    async def together(predictor: Predictor) -> list[Any]:
        return await asyncio.gather(*map(predictor.predict, requests), return_exceptions=True)

    found = run(store, together)
    stored = {result.prediction.id for result in found if isinstance(result, StoredPrediction)}
    for request, result in zip(requests, found, strict=True):
        assert isinstance(result, StoredPrediction) == (request.organisation != "culprit"), (request.context, result)
    with store.ledger.read() as tx:
        assert {one.id for one in tx.find(Prediction, where={"caller": ["org-0", "org-1", "org-2"]})} == stored
        assert tx.count(Prediction, where={"caller": "culprit"}) == 0
        reviewed = tx.find(ReviewItem)
        assert {item.prediction_id for item in reviewed} <= stored


def test_a_value_that_no_database_holds_is_the_callers_fault(store: Store, make_image: Callable[..., bytes]) -> None:
    async def predict(predictor: Predictor) -> list[Any]:
        kinds = ("U+0000 in a text", "half a surrogate pair", "a moment before the year 1 in UTC")
        requests = [request_of(make_image(400 + n), **CULPRITS[kind]) for n, kind in enumerate(kinds)]
        return await asyncio.gather(*map(predictor.predict, requests), return_exceptions=True)

    for error in run(store, predict):
        assert isinstance(error, DataError), repr(error)
    # A condition is checked like a row.
    with pytest.raises(DataError, match=r"U\+0000"), store.ledger.read() as tx:
        tx.find(Prediction, where={"caller": "a\x00"})


def test_a_job_that_fails_in_the_network_in_drawing_or_in_writing_fails_alone(
    store: Store, make_image: Callable[..., bytes]
) -> None:
    async def batch(predictor: Predictor) -> list[Any]:
        model = predictor._holder.current
        jobs = []
        for number in range(9):
            request = replace(request_of(make_image(number), lesion_id=f"l{number}"), explain=True)
            image = take_in(store, request.image, SETTINGS.max_pixels)
            pixels = decode_frame(image.data, model.document.geometry.frame)
            jobs.append(Job(request, image, Consent.TRAINING, model, pixels, time.perf_counter()))
            store.blobs.put(image.data)
        jobs[1] = replace(jobs[1], pixels=jobs[1].pixels[:32])
        jobs[4] = replace(jobs[4], image=replace(jobs[4].image, data=b"\xff\xd8\xffcut off"))
        jobs[7] = replace(jobs[7], request=replace(jobs[7].request, request_id="\x00"))
        queued = [_QueuedJob(job, asyncio.get_running_loop().create_future()) for job in jobs]
        for one in queued:
            predictor._queue.put_nowait(one)
        return await asyncio.gather(*(one.done for one in queued), return_exceptions=True)

    found = run(store, batch)
    assert [number for number, result in enumerate(found) if isinstance(result, Exception)] == [1, 4, 7]
    assert all(result.heat_map for result in found if isinstance(result, StoredPrediction))


@pytest.mark.parametrize("store", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)], indirect=True)
def test_requests_over_http_are_all_answered_while_culprits_come_in(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    settings = ServingSettings(port=tools.free_port(), rate_limit_per_minute=100_000)
    contexts = ['{"acquired_at": "0001-01-01T00:00:00+23:59"}', '{"lesion_id": "a\\u0000"}', '{"site": "\\ud800"}']
    contexts += ['{"age": NaN}', '{"acquired_at": "9999-12-31T23:59:59-23:59"}', "[" * 500, '{"sex": 1e400}']
    refused: list[int] = []
    done = threading.Event()

    def attack(url: str) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=600) as http:
            number = 0
            while not done.is_set():
                form = {"image": ("a.jpg", make_image(1)), "context": (None, contexts[number % len(contexts)])}
                refused.append(http.post("/v1/predictions", files=form).status_code)
                number += 1

    with tools.run_service(store, settings) as running, httpx.Client(base_url=running.url, trust_env=False) as http:
        attackers = [threading.Thread(target=attack, args=(running.url,)) for _ in range(2)]
        for attacker in attackers:
            attacker.start()
        try:
            honest = []
            for number in range(60):
                form = {"image": ("a.jpg", make_image(number % 12)), "context": (None, json.dumps({"age": number}))}
                honest.append(http.post("/v1/predictions", files=form, timeout=600).status_code)
        finally:
            done.set()
            for attacker in attackers:
                attacker.join()
    assert set(honest) == {200}
    assert len(refused) > len(contexts)
    assert set(refused) == {422}


def test_a_broken_bundle_stops_neither_the_service_nor_the_check_of_the_others(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    broken = tools.make_bundle(store, 7)
    whole = tools.make_bundle(store, 8)
    served = [tools.serve_bundle(store, bundle) for bundle in (broken, whole)]
    assert len(served) == 2
    (broken.path / "weights.safetensors").write_bytes(b"\xff" * 64)
    with store.ledger.read() as tx:
        records = [tx.require(ModelRecord, bundle.id) for bundle in (broken, whole)]
    problems = [found.problem for found in verify_models(store, records, "auto")]
    assert problems[0]
    assert problems[1] is None

    async def goes_on(predictor: Predictor) -> Any:
        tools.serve_bundle(store, broken)
        await asyncio.sleep(0.5)
        predictor.check()
        return await predictor.predict(request_of(make_image(1)))

    assert run(store, goes_on).prediction.model_id == whole.id


# ---------------------------------------------------------------- loops over rows and images


def test_rows_of_a_table_that_cannot_be_stored_are_quarantined(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["image_id,dx,lesion_id,acquired_at,age,site"]
    for number in range(40):
        (folder / f"i{number}.jpg").write_bytes(render("nv" if number % 2 else "mel", seed=3, number=number))
        rows.append(f"i{number},{'nv' if number % 2 else 'mel'},l{number},2026-03-01,40,clinic")
    bad = {5: "l\x1b[2J", 11: "\u202egnp", 17: "l" * 300, 23: "l\x85x", 26: "a\x00b"}
    for number, lesion in bad.items():
        rows[number + 1] = f"i{number},nv,{lesion},2026-03-01,40,clinic"
    rows[30] = rows[30].replace("2026-03-01", "0001-01-01T00:00:00+23:59")
    rows[31] = rows[31].replace("40", "1e400")
    rows.append(f"{'x' * 400}/a,nv,l,,,")
    (folder / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, folder)
    with store.ledger.read() as tx:
        images, refused = tx.find(Image), tx.find(Quarantined)
    assert {image.source_id for image in images} == {f"i{n}" for n in range(40) if n not in bad}
    assert {one.source_id for one in refused} == {*(f"i{n}" for n in bad), "x" * 400 + "/a"}
    assert all(one.reason.isprintable() for one in refused)
    assert any("1900" in note for note in report.notes)
    store.close()


def test_a_damaged_image_of_the_pool_does_not_stop_the_selection(tmp_path: Path, tools: Any) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    folder = tmp_path / "pool"
    folder.mkdir()
    for number in range(12):
        (folder / f"p{number}.jpg").write_bytes(render("nv", seed=5, number=number))
    # A name that is no UTF-8, as an old disk has them.
    os.rename(folder / "p3.jpg", os.fsencode(folder) + b"/p\xff3.jpg")
    (folder / "p4.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    usable, refused = take_in_folder(store, folder, Frame(32))
    assert (len(usable), len(refused)) == (11, 1)
    # Altered, cut off and gone.
    for image_id, damage in zip(usable[:3], (b"other bytes", b"", None), strict=True):
        blob = Path(store.blobs.root) / image_id[:2] / image_id
        blob.unlink()
        if damage is not None:
            blob.write_bytes(damage)
    shutil.rmtree(store.home.cache)
    bundle = tools.make_bundle(store, 0)
    assert select_images(store, bundle, {"margin": 12}) == 8
    with store.ledger.read() as tx:
        assert {item.image_id for item in tx.find(ReviewItem)} == set(usable[3:])
    store.close()


def test_times_in_the_ledger_stay_what_they_are(store: Store) -> None:
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    with pytest.raises(RelookError), store.ledger.read() as tx:
        tx.find(Prediction, where={"created_at": datetime(1, 1, 1, tzinfo=FAR_EAST)})
    with store.ledger.read() as tx:
        assert tx.find(Prediction, where={"created_at": moment}) == []


def test_an_annotated_image_that_is_gone_does_not_stop_the_groups_of_others(tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    now = datetime(2026, 3, 1, tzinfo=UTC)
    image_ids = [store.blobs.put(render("nv", seed=9, number=number)) for number in range(9)]
    with store.ledger.begin() as tx:
        for number, image_id in enumerate(image_ids):
            where = {"uri": store.blobs.uri(image_id), "format": "jpeg", "width_px": 64, "height_px": 64}
            tx.add(Image(id=image_id, provenance="served", consent=Consent.TRAINING, created_at=now, **where))
            told = {"kind": "class", "label": "nv", "annotator": "a", "annotated_at": now, "server": "local"}
            at = {"project_id": 1, "task_id": number, "annotation_id": number, "revision": str(number)}
            tx.add(Annotation(id=new_id(), created_at=now, review_item_id="r", image_id=image_id, **told, **at))
    for image_id in (image_ids[0], image_ids[4], image_ids[8]):
        (Path(store.blobs.root) / image_id[:2] / image_id).write_bytes(b"other bytes")
    assert group_labelled_images(store) == 6
    with store.ledger.read() as tx:
        waiting = {image.id for image in tx.find(Image, where={"group_id": None})}
    assert waiting == {image_ids[0], image_ids[4], image_ids[8]}
    store.close()


def test_a_folder_is_predicted_without_the_files_that_cannot_be_read(tmp_path: Path, tools: Any) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    bundle = tools.make_bundle(store, 0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        (folder / f"p{number}.jpg").write_bytes(render("mel", seed=5, number=number))
    os.rename(folder / "p3.jpg", os.fsencode(folder) + b"/p\xff3.jpg")
    (folder / "p4.jpg").write_bytes((folder / "p4.jpg").read_bytes()[:300])
    (folder / "p5.jpg").write_bytes(b"")
    (folder / "p6.jpg").unlink()
    (folder / "p6.jpg").symlink_to("/proc/self/mem")  # opens, and fails when it is read
    result = predict_folder(bundle, folder, tmp_path / "out.csv", SETTINGS, explain=True)
    assert [row["image"] for row in result.rows if row["error"]] == ["p4.jpg", "p5.jpg", "p6.jpg"]
    assert result.failed == 3
    assert "p\\xff3.jpg" in (tmp_path / "out.csv").read_text(encoding="utf-8")
    store.close()
