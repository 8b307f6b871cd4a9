"""What a prediction costs: nothing is done twice, and nothing that nobody waits for is done before the response."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import images.decode
from records.blobs import BlobStore
from records.errors import UnavailableError
from records.ledger import Ledger
from records.store import Store
from records.types import Consent, Image, Prediction, ReviewItem
from serving.messages import StoredPrediction
from serving.predictor import Predictor
from serving.recording import Recorder
from serving.schemas import Context
from tests.serving.test_predictor import SETTINGS, request, with_predictor

N = 16


@pytest.fixture
def ready(store: Store, tools: Any) -> Store:
    tools.serve_bundle(store, tools.make_bundle(store, bias={"bcc": -2.0}))
    return store


def predict_all(store: Store, bodies: list[bytes], **changes: Any) -> list[Any]:
    async def use(predictor: Predictor) -> list[Any]:
        # Together: the first image computes alone, and the others wait and share batches.
        asked = (predictor.predict(request(body, **changes)) for body in bodies)
        return await asyncio.gather(*asked, return_exceptions=True)

    return with_predictor(store, use, SETTINGS.model_copy(update={"predictor_cpus": 1.0, "audit_share": 1.0}))


def test_an_image_is_decoded_once_and_nothing_is_drawn_before_the_response(
    ready: Store, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, ...]] = []
    decode = images.decode.decode_here

    def counted(data: bytes, wanted: Any) -> Any:
        decoded.append(tuple(frame.side_px for frame in wanted.frames))
        return decode(data, wanted)

    monkeypatch.setattr(images.decode, "decode_here", counted)
    stored = predict_all(ready, [make_image(number) for number in range(N)])
    assert all(isinstance(each, StoredPrediction) and each.review is not None for each in stored)
    assert decoded == [(64,)] * N
    with ready.ledger.read() as tx:
        assert tx.count(ReviewItem) == tx.count(Image) == N
    assert len(list(ready.blobs.ids())) == N, "an image is a blob, and its heat map is none"


def test_consents_are_read_once_for_all_images_of_a_call(
    ready: Store, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    stored: list[int] = []
    read, keep = Ledger.read, Recorder.keep

    def counted(self: Ledger) -> Any:
        if self is ready.ledger:  # services of other tests of this process may still look for events
            opened.append(1)
        return read(self)

    monkeypatch.setattr(Ledger, "read", counted)
    monkeypatch.setattr(Recorder, "keep", lambda self, jobs: stored.append(len(jobs)) or keep(self, jobs))
    settings = SETTINGS.model_copy(update={"model_poll_s": 60.0, "decode_threads": 1})

    async def use(predictor: Predictor) -> None:
        opened.clear()
        await asyncio.gather(*(predictor.predict(request(make_image(number))) for number in range(4 * N)))

    with_predictor(ready, use, settings)
    assert sum(stored) == 4 * N
    assert len(opened) == len(stored), "one for each call, not one for each of its images"


@pytest.mark.parametrize("culprits", [{0}, {3, 4}, {N - 1}])
def test_an_image_that_cannot_be_stored_fails_alone(
    ready: Store, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, culprits: set[int]
) -> None:
    bodies = [make_image(number) for number in range(N)]
    put = BlobStore.put

    def fails(self: BlobStore, data: bytes) -> str:
        if data in {bodies[number] for number in culprits}:
            raise UnavailableError("blob store is full")
        return put(self, data)

    monkeypatch.setattr(BlobStore, "put", fails)
    found = predict_all(ready, bodies)
    assert {number for number, each in enumerate(found) if isinstance(each, UnavailableError)} == culprits
    with ready.ledger.read() as tx:
        assert tx.count(Prediction) == tx.count(Image) == N - len(culprits)


@pytest.mark.parametrize("consent", list(Consent))
def test_what_a_consent_allows_is_stored_before_the_response(
    ready: Store, make_image: Callable[..., bytes], consent: Consent
) -> None:
    bodies = [make_image(number) for number in range(4)]

    async def use(predictor: Predictor) -> list[str]:
        ids = []
        for body in bodies:
            asked = request(body)
            answer = await predictor.predict(replace(asked, context=Context(consent=consent)))
            assert ready.blobs.has(answer.prediction.image_id) is (consent is not Consent.NONE)
            ids.append(answer.prediction.image_id)
        return ids

    assert len(set(with_predictor(ready, use))) == len(bodies)
