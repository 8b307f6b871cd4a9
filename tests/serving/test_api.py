"""The API over real HTTP, in this process: predictions, their rows, limits, and a problem document for every error."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from records.errors import ImageError, RefusedError, UnknownIdError
from records.ids import sha256_hex
from records.models import find_bundle
from records.types import Consent, Decision, FlagReason, Image, Prediction, ReviewItem, ReviewState
from serving.client import Client
from serving.schemas import Context, FlagRequest

JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture
def http(service: Any) -> Any:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=600) as opened:
        yield opened


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return body


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims many pixels and that holds almost none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- predictions


def test_a_prediction_has_the_documented_fields_and_is_in_the_ledger(
    service: Any, http: httpx.Client, make_image: Callable[..., bytes]
) -> None:
    response = http.post("/v1/predictions?explain=gradcam", content=make_image(0), headers=JPEG)
    assert response.status_code == 200
    body = response.json()
    assert list(body) == [
        "id", "request_id", "created_at", "image_id", "model", "engine", "label", "confidence", "probabilities",
        "prediction_set", "label_in_set", "decision", "reasons", "review", "explanation", "context_effect",
    ]  # fmt: skip
    assert body["engine"] == "torch"
    taxonomy = service.store.taxonomy
    assert list(body["probabilities"]) == list(taxonomy.codes)
    assert sum(body["probabilities"].values()) == pytest.approx(1.0)
    assert body["confidence"] == max(body["probabilities"].values()) == body["probabilities"][body["label"]]
    assert body["model"]["status"] == "champion"
    assert body["request_id"] == response.headers["x-request-id"]
    explanation = body["explanation"]
    assert (explanation["method"], explanation["exact"], explanation["target"]) == ("gradcam", True, body["label"])
    assert np.array(explanation["values"]).shape == tuple(explanation["shape"]) == (2, 2)

    with service.store.ledger.read() as tx:
        stored = tx.require(Prediction, body["id"])
        image = tx.require(Image, body["image_id"])
    assert stored.probabilities == body["probabilities"]
    assert (stored.caller, stored.engine, stored.served) == ("local", "torch", True)
    assert stored.latency_ms > 0
    assert image.provenance == "served"
    assert service.store.blobs.get(image.id)


def test_a_raw_body_and_a_form_give_the_same_prediction(client: Client, make_image: Callable[..., bytes]) -> None:
    raw = client.predict(make_image(1))
    form = client.predict(make_image(1), context=Context(age=61, localization="back", patient_id="p-17"))
    assert raw.image_id == form.image_id
    assert raw.probabilities == form.probabilities
    assert raw.id != form.id


def test_context_is_stored_and_a_patients_id_only_as_hash(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    context = Context(lesion_id="L-9", patient_id="patient-secret", age=44, sex="female", consent=Consent.REVIEW)
    prediction = client.predict(make_image(2), context=context)
    with service.store.ledger.read() as tx:
        stored, image = tx.require(Prediction, prediction.id), tx.require(Image, prediction.image_id)
    assert stored.consent is Consent.REVIEW
    assert stored.context == {"lesion_id": "L-9", "age": 44.0, "sex": "female"}
    assert (image.lesion_id, image.age_years, image.consent) == ("L-9", 44.0, Consent.REVIEW)
    assert image.patient_hash is not None
    assert "patient-secret" not in stored.model_dump_json() + image.model_dump_json()


def test_a_prediction_read_again_is_the_same(client: Client, make_image: Callable[..., bytes]) -> None:
    prediction = client.predict(make_image(3))
    assert client.prediction(prediction.id) == prediction


def test_metadata_is_not_stored_and_does_not_change_the_prediction(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    exif = PillowImage.Exif()
    exif[0x010E] = "name of a patient"
    block = exif.tobytes()
    plain = make_image(4)
    tagged = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert PillowImage.open(io.BytesIO(tagged)).getexif()[0x010E] == "name of a patient"
    with_metadata = client.predict(tagged)
    assert with_metadata.probabilities == client.predict(plain).probabilities
    assert b"name of a patient" not in service.store.blobs.get(with_metadata.image_id)


def test_an_uncertain_image_gets_one_review_item_with_its_overlay(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    predictions = [client.predict(make_image(number)) for number in range(20)]
    decisions = {prediction.decision for prediction in predictions}
    assert {Decision.ANSWERED, Decision.REVIEW} <= decisions
    with service.store.ledger.read() as tx:
        for prediction in predictions:
            waiting = tx.find(ReviewItem, where={"image_id": prediction.image_id, "state": ReviewState.NEW})
            assert (prediction.review is None) == (prediction.decision is Decision.ANSWERED)
            if prediction.decision is Decision.ANSWERED:
                assert prediction.reasons == []
            else:
                (item,) = waiting
                assert np.max(item.heat_map) == 255
                assert {reason.code for reason in prediction.reasons} <= set(item.reasons)


def test_an_image_with_an_open_review_item_gets_no_second_one(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    doubtful = next(n for n in range(20) if client.predict(make_image(n)).decision is Decision.REVIEW)
    first, second = client.predict(make_image(doubtful)), client.predict(make_image(doubtful))
    with service.store.ledger.read() as tx:
        assert tx.count(ReviewItem, where={"image_id": first.image_id, "state": ReviewState.NEW}) == 1
    assert first.review == second.review == client.prediction(second.id).review


def test_without_consent_nothing_is_stored_or_reviewed(service: Any, client: Client) -> None:
    from images.synth import render

    private = [render("mel", seed=77, number=number) for number in range(6)]
    predictions = [client.predict(data, context=Context(consent=Consent.NONE), explain="gradcam") for data in private]
    assert any(prediction.decision is not Decision.ANSWERED for prediction in predictions)
    for prediction in predictions:
        assert prediction.review is None
        assert prediction.explanation is not None
        assert not service.store.blobs.has(prediction.image_id)
        with pytest.raises(RefusedError, match="not stored"):
            client.explanation(prediction.id)
        with pytest.raises(RefusedError, match="consent"):
            client.flag(prediction.id, FlagRequest(reason=FlagReason.UNSURE))
    with service.store.ledger.read() as tx:
        assert tx.find(ReviewItem, where={"image_id": [prediction.image_id for prediction in predictions]}) == []


def test_predictions_are_listed_newest_first_in_pages(client: Client, make_image: Callable[..., bytes]) -> None:
    made = [client.predict(make_image(number)).id for number in range(5)]
    first = client.predictions(limit=3)
    assert [prediction.id for prediction in first.items] == made[::-1][:3]
    second = client.predictions(limit=2, after=first.next)
    assert [prediction.id for prediction in second.items] == made[::-1][3:]
    reviewed = client.predictions(decision="review", limit=200)
    assert reviewed.items
    assert {prediction.decision for prediction in reviewed.items} == {Decision.REVIEW}


# ---------------------------------------------------------------- idempotency


def test_a_repeated_key_gives_the_same_prediction(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    first = client.predict(make_image(6), idempotency_key="again-1", explain="gradcam")
    second = client.predict(make_image(6), idempotency_key="again-1", explain="gradcam")
    assert second == first
    with service.store.ledger.read() as tx:
        assert tx.count(Prediction, where={"idempotency_key": "again-1"}) == 1


def test_a_key_of_another_image_is_refused(client: Client, make_image: Callable[..., bytes]) -> None:
    client.predict(make_image(6), idempotency_key="again-2")
    with pytest.raises(RefusedError, match="another image"):
        client.predict(make_image(7), idempotency_key="again-2")


# ---------------------------------------------------------------- explanations


def test_a_stored_prediction_is_explained_by_its_own_model(client: Client, make_image: Callable[..., bytes]) -> None:
    prediction = client.predict(make_image(8), explain="gradcam")
    assert client.explanation(prediction.id) == prediction.explanation


def test_any_class_can_be_explained_in_three_forms(http: httpx.Client, client: Client, make_image: Any) -> None:
    prediction = client.predict(make_image(8))
    path = f"/v1/predictions/{prediction.id}/explanation?method=gradcam&target=mel"
    as_json = client.explanation(prediction.id, target="mel")
    assert as_json.target == "mel"
    png = http.get(f"{path}&format=png")
    assert png.headers["content-type"] == "image/png"
    assert PillowImage.open(io.BytesIO(png.content)).size == (224, 224)
    assert png.content == client.explanation_png(prediction.id, target="mel")
    npy = np.load(io.BytesIO(http.get(f"{path}&format=npy").content), allow_pickle=False)
    assert npy.tolist() == as_json.values


def test_explanations_that_cannot_be_are_refused(http: httpx.Client, client: Client, make_image: Any) -> None:
    prediction = client.predict(make_image(8))
    path = f"/v1/predictions/{prediction.id}/explanation"
    assert "unknown class" in assert_problem(http.get(f"{path}?target=wart"), 422, "invalid")["detail"]
    assert_problem(http.get(f"{path}?method=tea_leaves"), 422, "invalid")
    assert_problem(http.get(f"{path}?format=gif"), 422, "invalid")


# ---------------------------------------------------------------- flags


def test_a_flag_becomes_a_review_item_with_overlay_and_comment(service: Any, client: Client, make_image: Any) -> None:
    answered = next(a for a in map(client.predict, map(make_image, range(20))) if a.decision is Decision.ANSWERED)
    request = FlagRequest(reason=FlagReason.WRONG_LABEL, suggested_label="mel", comment="irregular border")
    flagged = client.flag(answered.id, request)
    assert flagged.review.state is ReviewState.NEW
    assert "annotator" in flagged.text
    assert client.flag(answered.id, request) == flagged
    with service.store.ledger.read() as tx:
        (item,) = tx.find(ReviewItem, where={"image_id": answered.image_id})
    assert ([reason.value for reason in item.reasons], item.comment) == (["flagged"], "irregular border")
    assert item.suggested_label == "mel"
    assert np.max(item.heat_map) == 255
    assert client.prediction(answered.id).review is not None


def test_a_flag_on_an_open_review_item_raises_its_priority(service: Any, client: Client, make_image: Any) -> None:
    prediction = next(a for a in map(client.predict, map(make_image, range(20))) if a.decision is Decision.REVIEW)
    with service.store.ledger.read() as tx:
        (before,) = tx.find(ReviewItem, where={"image_id": prediction.image_id})
    client.flag(prediction.id, FlagRequest(reason=FlagReason.UNSURE, comment="please look"))
    with service.store.ledger.read() as tx:
        (after,) = tx.find(ReviewItem, where={"image_id": prediction.image_id})
    assert after.id == before.id
    assert after.priority > before.priority
    assert "flagged" in after.reasons
    assert after.comment == "please look"


def test_flags_that_do_not_fit_are_refused(http: httpx.Client, client: Client, make_image: Any) -> None:
    path = f"/v1/predictions/{client.predict(make_image(0)).id}/flags"
    assert_problem(http.post(path, json={"reason": "wrong_label", "suggested_label": "wart"}), 422, "invalid")
    body = assert_problem(http.post(path, json={"reason": "because"}), 422, "invalid")
    assert body["errors"][0]["field"] == "body.reason"
    assert_problem(http.post(path, json={"reason": "other", "comment": "x" * 2001}), 422, "invalid")
    assert_problem(http.post(path, json={"reason": "other", "surprise": 1}), 422, "invalid")
    assert_problem(http.post(path, content=b"{", headers={"Content-Type": "application/json"}), 422, "invalid")


# ---------------------------------------------------------------- images that cannot be used


def test_bodies_that_are_no_usable_image(http: httpx.Client, make_image: Callable[..., bytes]) -> None:
    def post(data: bytes, media_type: str = "image/jpeg") -> httpx.Response:
        return http.post("/v1/predictions", content=data, headers={"Content-Type": media_type})

    assert_problem(post(b""), 422, "empty")
    assert_problem(post(b"hello, I am text"), 415, "not_an_image")
    assert_problem(post(b"GIF89a" + bytes(100)), 415, "not_an_image")
    assert_problem(post(make_image(0)[:900]), 422, "damaged")
    assert_problem(post(b"\xff\xd8\xff"), 422, "damaged")
    assert_problem(post(huge_png(50_000, 50_000), "image/png"), 413, "too_many_pixels")
    assert_problem(post(huge_png(8_000, 8_000), "image/png"), 413, "too_many_pixels")
    assert_problem(post(make_image(0), "text/plain"), 415, "unsupported_type")
    assert_problem(post(make_image(0), ""), 415, "unsupported_type")


def test_a_body_over_the_limit_is_refused(http: httpx.Client, make_image: Callable[..., bytes]) -> None:
    too_large = make_image(0) + bytes(1_200_000)
    assert_problem(http.post("/v1/predictions", content=too_large, headers=JPEG), 413, "too_large")

    def without_length() -> Any:
        for start in range(0, len(too_large), 65_536):
            yield too_large[start : start + 65_536]

    assert_problem(http.post("/v1/predictions", content=without_length(), headers=JPEG), 413, "too_large")
    assert http.get("/healthz").status_code == 200


def test_content_decides_the_format_not_the_name(client: Client, http: httpx.Client, make_image: Any) -> None:
    jpeg_called_png = http.post("/v1/predictions", content=make_image(0), headers={"Content-Type": "image/png"})
    assert jpeg_called_png.status_code == 200
    for form in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        PillowImage.open(io.BytesIO(make_image(0))).save(buffer, form, lossless=True)
        assert client.predict(buffer.getvalue()).label == client.predict(make_image(0)).label


def test_forms_that_do_not_fit(http: httpx.Client, make_image: Callable[..., bytes]) -> None:
    def post(**parts: Any) -> httpx.Response:
        return http.post("/v1/predictions", files=parts)

    assert "`image`" in assert_problem(post(photo=("a", make_image(0))), 422, "invalid")["detail"]
    assert_problem(post(image=("a", b"text")), 415, "not_an_image")
    image = ("a.jpg", make_image(0), "image/jpeg")
    assert "context" in assert_problem(post(image=image, context=(None, "{")), 422, "invalid")["detail"]
    assert (
        "age" in assert_problem(post(image=image, context=(None, json.dumps({"age": 400}))), 422, "invalid")["detail"]
    )
    assert_problem(post(image=image, context=(None, json.dumps({"consent": "maybe"}))), 422, "invalid")
    broken = http.post("/v1/predictions", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert_problem(broken, 400, "invalid")


def test_parameters_that_do_not_fit(http: httpx.Client, make_image: Callable[..., bytes]) -> None:
    assert_problem(http.post("/v1/predictions?explain=magic", content=make_image(0), headers=JPEG), 422, "invalid")
    long_key = JPEG | {"Idempotency-Key": "k" * 201}
    assert_problem(http.post("/v1/predictions", content=make_image(0), headers=long_key), 422, "invalid")
    assert_problem(http.get("/v1/predictions?decision=perhaps"), 422, "invalid")
    assert_problem(http.get("/v1/predictions?limit=0"), 422, "invalid")


# ---------------------------------------------------------------- doors


def test_paths_ids_and_verbs_that_do_not_exist(http: httpx.Client, client: Client) -> None:
    assert_problem(http.get("/v1/nothing"), 404, "not_found")
    assert_problem(http.get(f"/v1/predictions/{'0' * 32}"), 404, "not_found")
    assert_problem(http.get("/v1/predictions/not-an-id"), 422, "invalid")
    response = http.delete("/v1/predictions")
    assert_problem(response, 405, "method_not_allowed")
    assert "GET" in response.headers["allow"]
    with pytest.raises(UnknownIdError):
        client.prediction("0" * 32)


def test_only_this_machine_and_this_origin_may_ask(service: Any, http: httpx.Client) -> None:
    assert_problem(http.get("/v1/model", headers={"Host": "evil.example"}), 403, "foreign_host")
    assert_problem(http.get("/v1/model", headers={"Host": "127.0.0.1.evil.example"}), 403, "foreign_host")
    assert_problem(http.get("/v1/model", headers={"Origin": "http://evil.example"}), 403, "foreign_origin")
    assert_problem(http.get("/v1/model", headers={"Origin": "null"}), 403, "foreign_origin")
    assert_problem(http.get("/v1/model", headers={"Origin": "http://127.0.0.1:1"}), 403, "foreign_origin")
    assert http.get("/v1/model", headers={"Origin": service.url}).status_code == 200
    assert http.get("/v1/model", headers={"Host": f"localhost:{service.settings.port}"}).status_code == 200


def test_the_model_is_named_with_what_its_status_means(service: Any, client: Client) -> None:
    model = client.model()
    assert model.status == "champion"
    assert [c.code for c in model.classes] == list(service.store.taxonomy.codes)
    golden = find_bundle(service.store, "champion").golden()
    # Whatever the hardware computes in, the predictions are those that were stored with the model.
    assert 0 <= model.golden_difference <= 0.1 * max(1.0, np.abs(golden["logits"]).max())
    assert client.models().items[0].id == model.id
    assert client.ready().ready


def test_the_document_says_what_routes_read_and_what_problems_are(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    problems = schema["paths"]["/v1/predictions"]["post"]["responses"]["415"]["content"]
    assert list(problems) == ["application/problem+json"]
    assert "image/webp" in schema["paths"]["/v1/predictions"]["post"]["requestBody"]["content"]


def test_an_image_error_reaches_the_client_as_one(client: Client) -> None:
    with pytest.raises(ImageError, match="JPEG, PNG or WebP") as caught:
        client.predict(b"not an image")
    assert caught.value.code == "not_an_image"


def test_equal_images_have_one_id_whoever_sends_them(client: Client, make_image: Callable[..., bytes]) -> None:
    assert client.predict(make_image(9)).image_id == sha256_hex(make_image(9))
