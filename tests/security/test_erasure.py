"""Erasure and consent through the real service: nothing comes back, and nobody sees what is another's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from images.cache import PixelCache
from records import audit
from records.blobs import BlobStore
from records.erasure import PERSONAL, erase_images
from records.errors import RefusedError, UnknownIdError
from records.frames import Frame
from records.ids import utc_now
from records.images import strip_metadata
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, Consent, Image, Outcome, Prediction, ReviewItem, Scope, SourceLabel
from serving.access.keys import admin_token
from serving.client import Client
from serving.erasure import serving_places
from serving.page.uploads import PageFiles
from serving.schemas import Context, FlagRequest, OutcomeRequest
from serving.settings import ServingSettings

WORDS = Context(
    lesion_id="L-17", patient_id="P-17", age=61, sex="female", localization="back", device="scope", site="clinic",
    acquired_at=utc_now(), consent=Consent.TRAINING,
)  # fmt: skip
ClientOf = Callable[[str], Client]


@pytest.fixture(scope="module")
def tokens(kept: Store, tools: Any) -> dict[str, str]:
    return {
        "north": tools.make_key(kept, "north", Scope.PREDICT, Scope.FLAG),
        "south": tools.make_key(kept, "south", Scope.PREDICT, Scope.FLAG),
        "sandbox": tools.make_key(kept, "sandbox", Scope.PREDICT, organisation="north", sandbox=True),
        "auditor": tools.make_key(kept, "auditor", Scope.AUDIT, organisation="hospital"),
        "admin": admin_token(kept.home),
    }


@pytest.fixture(scope="module")
def running(kept: Store, tokens: dict[str, str], tools: Any) -> Iterator[Any]:
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1, audit_share=1.0, rate_limit_per_minute=0)
    with tools.run_service(kept, settings) as found:
        yield found


@pytest.fixture
def client_of(running: Any, tokens: dict[str, str]) -> Iterator[ClientOf]:
    opened: list[Client] = []

    def make(name: str) -> Client:
        opened.append(Client(running.url, tokens[name], retry_s=0.0))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


def rows(store: Store, image_id: str) -> tuple[Image | None, list[Prediction], list[ReviewItem]]:
    with store.ledger.read() as tx:
        found = {"image_id": image_id}
        return tx.get(Image, image_id), tx.find(Prediction, where=found), tx.find(ReviewItem, where=found)


def assert_nothing_is_kept(store: Store, image_id: str) -> None:
    image, predictions, items = rows(store, image_id)
    assert image is not None
    assert {getattr(image, name) for name in PERSONAL} == {None}
    assert {str(prediction.context) for prediction in predictions} <= {"{}"}
    assert {item.state.value for item in items} <= {"withdrawn", "answered"}
    assert not store.blobs.has(image_id)


def test_an_erased_image_that_is_sent_again_brings_no_word_back(
    kept: Store, client_of: ClientOf, make_image: Any
) -> None:
    north = client_of("north")
    image_id = north.predict(make_image(0), context=WORDS).image_id
    client_of("admin").erase(image_id)
    assert_nothing_is_kept(kept, image_id)
    again = north.predict(make_image(0), context=WORDS)
    assert again.image_id == image_id
    assert_nothing_is_kept(kept, image_id)
    with pytest.raises(RefusedError):
        north.flag(again.id, FlagRequest(reason="unsure", comment="says who it is"))
    outcome = OutcomeRequest(diagnosis="mel", confirmation="histopathology", observed_at=utc_now())
    for prediction in rows(kept, image_id)[1]:
        with pytest.raises(RefusedError, match="nothing may be kept"):
            north.outcome(prediction.id, outcome)
    with kept.ledger.read() as tx:
        assert not tx.find(Outcome, where={"image_id": image_id})
        assert not tx.find(SourceLabel, where={"image_id": image_id})
    assert audit.verify(kept.ledger, kept.home) == []


@pytest.mark.parametrize(("who", "consent"), [("north", Consent.NONE), ("sandbox", Consent.TRAINING)])
def test_without_consent_the_context_is_not_kept(
    kept: Store, client_of: ClientOf, make_image: Any, who: str, consent: Consent
) -> None:
    prediction = client_of(who).predict(make_image(1), context=WORDS.model_copy(update={"consent": consent}))
    image, predictions, _ = rows(kept, prediction.image_id)
    assert image is None
    assert [p.context for p in predictions if p.id == prediction.id] == [{}]


@pytest.mark.parametrize("known", [False, True])
def test_an_upload_during_an_erasure_brings_no_bytes_back(
    kept: Store, client_of: ClientOf, make_image: Any, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The erasure runs between the moment when the bytes are stored and the transaction that writes their row."""
    data, put = make_image(2 + known), BlobStore.put
    if known:
        client_of("north").predict(data, context=WORDS)
    erased: list[str] = []

    def put_then_erase(blobs: BlobStore, content: bytes) -> str:
        blob_id = put(blobs, content)
        if not erased:
            erased.append(blob_id)
            erase_images(kept, [blob_id], actor="test", places=serving_places(ServingSettings()))
            assert put(blobs, content) == blob_id
        return blob_id

    monkeypatch.setattr(BlobStore, "put", put_then_erase)
    prediction = client_of("north").predict(data, context=WORDS)
    assert erased == [prediction.image_id]
    assert prediction.review is None
    assert_nothing_is_kept(kept, prediction.image_id)


def test_heat_maps_of_two_models_are_erased_with_their_image(tmp_path: Path, tools: Any, make_image: Any) -> None:
    """The second model's heat map is not that of the open item, which keeps its own; none of them is a file."""
    store = open_store(RecordsSettings(home=tmp_path / "two"))
    first, second = (tools.make_bundle(store, seed, bias={"bcc": -2.0}) for seed in (0, 1))
    tools.serve_bundle(store, first)
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.05, audit_share=1.0)
    with tools.run_service(store, settings) as found, Client(found.url, retry_s=0.0) as client:
        predicted = [client.predict(make_image(0), context=WORDS)]
        tools.serve_bundle(store, second)
        while client.model().id != second.id:
            pass
        predicted.append(client.predict(make_image(0), context=WORDS))
        client.flag(predicted[1].id, FlagRequest(reason="unsure"))
    assert len({one.model.id for one in predicted}) == 2
    _, _, items = rows(store, predicted[0].image_id)
    assert any(item.heat_map for item in items)
    assert list(store.blobs.ids()) == [predicted[0].image_id]
    erase_images(store, [predicted[0].image_id], actor="test", places=serving_places(settings))
    assert list(store.blobs.ids()) == []
    _, _, items = rows(store, predicted[0].image_id)
    assert [item.heat_map for item in items] == [None] * len(items)
    store.close()


def test_an_upload_of_the_page_is_erased_with_its_image(kept: Store, tmp_path: Path, make_image: Any) -> None:
    settings = ServingSettings(page_folder=tmp_path)
    files = PageFiles(settings, kept.home.root)
    with_exif = make_image(7)[:2] + b"\xff\xfe\x00\x07MARK!" + make_image(7)[2:]
    theirs, other = files.store("north", "Jane Doe.jpg", with_exif), files.store("north", "b.jpg", make_image(8))
    image = kept.blobs.put(strip_metadata(with_exif))
    erase_images(kept, [image], actor="test", places=serving_places(settings))
    assert not theirs.parent.exists()
    assert other.exists()


def test_consent_is_taken_back_by_those_who_gave_it(kept: Store, client_of: ClientOf, make_image: Any) -> None:
    north, south = client_of("north"), client_of("south")
    image_id = north.predict(make_image(4), context=WORDS).image_id
    with pytest.raises(UnknownIdError):
        south.take_back_consent(image_id, Consent.REVIEW)
    assert north.take_back_consent(image_id, Consent.REVIEW).consent is Consent.REVIEW
    # No request raises it again, and an outcome is no label.
    prediction = north.predict(make_image(4), context=WORDS)
    outcome = OutcomeRequest(diagnosis="mel", confirmation="histopathology", observed_at=utc_now())
    assert "No model learns from it" in north.outcome(prediction.id, outcome).text
    assert rows(kept, image_id)[0].consent is Consent.REVIEW  # type: ignore[union-attr]
    with kept.ledger.read() as tx:
        assert not tx.find(SourceLabel, where={"image_id": image_id})
        assert tx.count(AuditEvent, where={"action": "consent.lowered", "subject": image_id}) == 1
    # Another organisation has the same file: neither takes it from the other.
    south.predict(make_image(4), context=WORDS)
    for each in (north, south):
        with pytest.raises(UnknownIdError):
            each.take_back_consent(image_id, Consent.NONE)
    client_of("admin").take_back_consent(image_id, Consent.NONE)
    assert_nothing_is_kept(kept, image_id)


def test_consent_cannot_be_raised(running: Any, tokens: dict[str, str], client_of: ClientOf, make_image: Any) -> None:
    image_id = (
        client_of("north").predict(make_image(5), context=WORDS.model_copy(update={"consent": Consent.REVIEW})).image_id
    )
    headers = {"Authorization": f"Bearer {tokens['north']}"}
    with httpx.Client(base_url=running.url, trust_env=False, headers=headers) as http:
        raised = http.patch(f"/v1/images/{image_id}", json={"consent": "training"})
        highest = http.patch(f"/v1/images/{image_id}", json={"consent": "display"})
    assert (raised.status_code, raised.json()["code"]) == (409, "refused")
    assert (highest.status_code, highest.json()["code"]) == (422, "invalid")


def test_images_in_a_report_are_only_for_those_who_may_see_all(kept: Store, client_of: ClientOf) -> None:
    with kept.ledger.read() as tx:
        model_id = tx.connection.exec_driver_sql("SELECT id FROM models").scalar_one()
    folder = kept.home.bundles / model_id / "report"
    folder.mkdir()
    (folder / "report.html").write_text(
        '<h1>A report</h1><img src="data:image/png;base64,AAAA" alt="ISIC_0024306"><img src="data:image/svg+xml,C">'
    )
    for name in ("north", "south"):
        html = client_of(name).report(model_id)
        assert "ISIC_0024306" not in html
        assert "AAAA" not in html
        assert "svg+xml,C" in html
    assert "ISIC_0024306" in client_of("auditor").report(model_id)


def test_the_cache_of_another_node_drops_what_was_erased(kept: Store, tmp_path: Path, make_image: Any) -> None:
    image = kept.blobs.put(make_image(6))
    PixelCache(tmp_path, Frame(8)).append([image], np.full((1, 8, 8, 3), 7, dtype=np.uint8))
    erase_images(kept, [image], actor="test", places=serving_places(ServingSettings()))
    cache = PixelCache(tmp_path, Frame(8))
    assert image in cache
    assert cache.ensure(kept, []) == 0
    assert image not in cache
    assert set(next(tmp_path.glob("*/*.u8")).read_bytes()) == {0}
