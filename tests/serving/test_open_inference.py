"""The Open Inference Protocol, with NVIDIA's client and by hand: the same predictions as those of the API."""

import base64
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from records.frames import Crop
from records.models import serving_id
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Arm, Consent, Image, Prediction, Scope
from serving.client import Client
from serving.messages import HeatMap, StoredPrediction
from serving.open_inference import OUTPUTS, Inference, response_body
from serving.settings import ServingSettings

INFER = "/v2/models/relook/infer"
NUMBERS = ("confidence", "probabilities")


@pytest.fixture
def http(service: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=600) as opened:
        yield opened


@pytest.fixture
def triton(service: Any) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(service.url.removeprefix("http://")) as opened:
        yield opened


def image_input(*images: bytes, binary: bool = True, shape: list[int] | None = None) -> InferInput:
    tensor = InferInput("image", shape or [len(images)], "BYTES")
    elements = images if binary else tuple(base64.b64encode(image) for image in images)
    tensor.set_data_from_numpy(np.array(elements, dtype=np.object_).reshape(shape or [-1]), binary_data=binary)
    return tensor


def texts(result: Any, name: str) -> list[str]:
    return [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy(name).ravel()]


def assert_error(response: httpx.Response, status: int, words: str) -> None:
    assert (response.status_code, list(response.json())) == (status, ["error"]), response.text
    assert words in response.json()["error"]
    assert "\n" not in response.json()["error"]


# ---------------------------------------------------------------- server and model


def test_health_and_metadata_as_a_client_reads_them(service: Any, triton: InferenceServerClient) -> None:
    with service.store.ledger.read() as tx:
        serving = serving_id(tx)
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("relook")
    assert triton.is_model_ready("relook", serving)
    assert not triton.is_model_ready("resnet")
    assert not triton.is_model_ready("relook", "0" * 64)
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    found = triton.get_model_metadata("relook")
    assert found == triton.get_model_metadata("relook", serving[:12])
    assert found["versions"] == [serving]
    assert [tensor["name"] for tensor in found["inputs"]] == ["image", "context"]
    assert {tensor["name"]: tensor["datatype"] for tensor in found["outputs"]}["probabilities"] == "FP64"


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_images_are_predicted_and_stored_as_by_the_api(
    service: Any, client: Client, triton: InferenceServerClient, make_image: Callable[..., bytes], binary: bool
) -> None:
    images = [make_image(number) for number in (30, 31, 32)]
    outputs = [InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
    result = triton.infer("relook", [image_input(*images, binary=binary)], outputs=outputs, request_id="mine")
    assert result.get_response()["id"] == "mine"
    for row, image in enumerate(images):
        stored = client.prediction(texts(result, "prediction_id")[row])
        same = client.predict(image, explain="gradcam")
        # A batch sums in another order than one image.
        assert stored.probabilities == pytest.approx(same.probabilities, abs=1e-5)
        assert list(result.as_numpy("probabilities")[row]) == list((stored.probabilities or {}).values())
        assert (texts(result, "label")[row], texts(result, "decision")[row]) == (stored.label, stored.decision)
        assert texts(result, "model_version")[row] == result.get_response()["model_version"] == stored.model.id
        codes = texts(result, "classes")
        chosen = [code for code, is_in in zip(codes, result.as_numpy("prediction_set")[row], strict=True) if is_in]
        assert sorted(chosen) == sorted(stored.prediction_set)
        assert same.explanation is not None
        assert result.as_numpy("heat_map")[row] == pytest.approx(np.array(same.explanation.values), rel=1e-3, abs=1e-6)
        assert result.as_numpy("confidence")[row] == stored.confidence
        with service.store.ledger.read() as tx:
            assert tx.require(Prediction, stored.id).image_id == same.image_id


def test_without_outputs_all_come_and_the_clients_default_is_binary(
    triton: InferenceServerClient, make_image: Callable[..., bytes]
) -> None:
    result = triton.infer("relook", [image_input(make_image(33), shape=[1, 1])])
    assert [output["name"] for output in result.get_response()["outputs"]] == list(OUTPUTS)
    assert all("binary_data_size" in output["parameters"] for output in result.get_response()["outputs"])
    assert result.as_numpy("prediction_set").dtype == np.bool_


def test_an_image_without_probabilities_has_no_numbers(
    tmp_path: Path, tools: Any, make_image: Callable[..., bytes]
) -> None:
    store = open_store(RecordsSettings(home=tmp_path))
    tools.serve_bundle(store, tools.make_bundle(store, 0, status_of_images="overflow"))
    with tools.run_service(store, ServingSettings(port=tools.free_port())) as running:
        with InferenceServerClient(running.url.removeprefix("http://")) as triton:
            # The network of this model is finite for black images only.
            result = triton.infer("relook", [image_input(_black_jpeg(), make_image(34))])
        body = {"inputs": [_json_image(make_image(34))], "outputs": [{"name": name} for name in NUMBERS]}
        found = httpx.post(running.url + INFER, json=body, trust_env=False).json()["outputs"]
    store.close()
    assert texts(result, "label")[1] == ""
    for name in (*NUMBERS, "heat_map"):
        values = result.as_numpy(name)
        assert np.isnan(values[1]).all()
        assert np.isfinite(values[0]).all()
    assert [value for output in found for value in output["data"]] == [None] * 8


def test_images_that_two_models_predicted_say_which(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    first = client.predict(make_image(39))
    with service.store.ledger.read() as tx:
        champion = tx.require(Prediction, first.id)
    canary = champion.model_copy(update={"arm": Arm.CANDIDATE, "model_id": "c" * 64})
    maps = [
        HeatMap("gradcam", True, None, "mel", np.ones((side, side), np.float32), b"", Crop.CENTER) for side in (3, 2)
    ]
    stored = [StoredPrediction(canary, None, maps[0]), StoredPrediction(champion, None, maps[1])]
    asked = Inference(None, [], dict.fromkeys(("model_version", "heat_map"), False))
    body = json.loads(response_body(stored, asked, service.store.taxonomy.codes)[0])
    # Clients of one version get that of the champion; a map of another size is left out, not stretched.
    assert body["model_version"] == champion.model_id
    assert body["outputs"][0]["data"] == ["c" * 64, champion.model_id]
    assert body["outputs"][1]["shape"] == [2, 3, 3]
    assert body["outputs"][1]["data"] == [1.0] * 9 + [None] * 9


def test_a_context_and_an_idempotency_key_are_those_of_the_api(
    service: Any, client: Client, http: httpx.Client, make_image: Callable[..., bytes]
) -> None:
    context = {"name": "context", "datatype": "BYTES", "shape": [1], "data": ['{"consent": "none", "age": 61}']}
    body = {"inputs": [_json_image(make_image(35)), context], "outputs": [{"name": "prediction_id"}]}
    first, second = (http.post(INFER, json=body, headers={"Idempotency-Key": "oip-1"}).json() for _ in range(2))
    assert first == second
    with service.store.ledger.read() as tx:
        stored = tx.require(Prediction, first["outputs"][0]["data"][0])
        assert stored.consent is Consent.NONE
        assert tx.get(Image, stored.image_id) is None
    same = client.predict(make_image(35), idempotency_key="oip-1")
    assert same.id == stored.id


# ---------------------------------------------------------------- refusals


def _json_image(image: bytes) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(image).decode()]}


def _black_jpeg() -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (300, 300)).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGE = _json_image(b"x")
BINARY = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 8}}
BAD_BODIES = {
    "no JSON": ("{", "JSON"),
    "another kind": ([], "object"),
    "no inputs": ({"inputs": []}, "inputs"),
    "an unknown input": ({"inputs": [{**IMAGE, "name": "picture"}]}, "the inputs are image and context"),
    "an input twice": ({"inputs": [IMAGE, IMAGE]}, "twice"),
    "no image": ({"inputs": [{**IMAGE, "name": "context", "data": ["{}"]}]}, "no input `image`"),
    "a datatype": ({"inputs": [{**IMAGE, "datatype": "UINT8"}]}, "must be BYTES"),
    "a shape": ({"inputs": [{**IMAGE, "shape": [1, 224, 224, 3]}]}, "shape"),
    "a shape as text": ({"inputs": [{**IMAGE, "shape": ["1"]}]}, "shape"),
    "a shape without end": (json.dumps({"inputs": [IMAGE]}).replace("[1]", "[" + "9" * 4000 + "]"), "shape"),
    "half a character": ('{"id": "\\ud800", "inputs": []}', "JSON"),
    "an empty batch": ({"inputs": [{**IMAGE, "shape": [0], "data": []}]}, "N from 1 to 32"),
    "too many": ({"inputs": [{**IMAGE, "shape": [33], "data": ["eA=="] * 33}]}, "N from 1 to 32"),
    "fewer than the shape": ({"inputs": [{**IMAGE, "shape": [2]}]}, "needs 2 texts"),
    "numbers as data": ({"inputs": [{**IMAGE, "data": [255]}]}, "needs 1 texts"),
    "neither": ({"inputs": [{**IMAGE, "data": None}]}, "either"),
    "both": ({"inputs": [{**IMAGE, "parameters": {"binary_data_size": 1}}]}, "either"),
    "binary that is not there": ({"inputs": [BINARY]}, "0 bytes"),
    "no base64": ({"inputs": [{**IMAGE, "data": ["data:image/png;base64,eA=="]}]}, "not base64"),
    "an unknown output": ({"inputs": [IMAGE], "outputs": [{"name": "logits"}]}, "the outputs are prediction_id"),
    "a classification": (
        {"inputs": [IMAGE], "outputs": [{"name": "label", "parameters": {"classification": 3}}]}, "not supported",
    ),
    "a flag as text": (
        {"inputs": [IMAGE], "outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]}, "true or false",
    ),
    "contexts for others": (
        {"inputs": [IMAGE, {"name": "context", "datatype": "BYTES", "shape": [2], "data": ["{}", "{}"]}]},
        "2 elements for 1",
    ),
    "a misspelt consent": (
        {"inputs": [IMAGE, {"name": "context", "datatype": "BYTES", "shape": [1], "data": ['{"consnt": "none"}']}]},
        "consnt",
    ),
    "a flood of values": ({"inputs": [{**IMAGE, "data": [1] * 20_000}]}, "more than 10000 values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_what_does_not_fit_is_one_sentence(http: httpx.Client, name: str) -> None:
    body, words = BAD_BODIES[name]
    content = body if isinstance(body, str) else json.dumps(body)
    assert_error(http.post(INFER, content=content), 422, words)


@pytest.mark.parametrize(
    ("binary", "size", "head", "words"),
    [
        (b"\x05\0\0\0abc", 7, None, "should have 5 bytes, and 3 are left"),
        (b"\x01\0\0\0abc", 7, None, "2 bytes are left"),
        (b"\x01\0", 2, None, "ends before element 1"),
        (b"\x01\0\0\0a", 9, None, "5 bytes are there"),
        (b"\x01\0\0\0aXX", 5, None, "2 bytes behind the JSON"),
        (b"", 0, "0", "must be 1 to"),
        (b"", 0, "-4", "must be 1 to"),
        (b"", 0, "9999999", "must be 1 to"),
        (struct.pack("<I", 2**32 - 1), 4, None, "should have 4294967295 bytes"),
    ],
)
def test_a_binary_part_that_does_not_fit(
    http: httpx.Client, binary: bytes, size: int, head: str | None, words: str
) -> None:
    document = json.dumps({"inputs": [{**BINARY, "parameters": {"binary_data_size": size}}]}).encode()
    headers = {"Inference-Header-Content-Length": head or str(len(document))}
    assert_error(http.post(INFER, content=document + binary, headers=headers), 422, words)


def test_every_error_has_the_form_of_the_protocol(service: Any, http: httpx.Client, triton: Any) -> None:
    with pytest.raises(InferenceServerException, match="JPEG"):
        triton.infer("relook", [image_input(b"a text")])
    with pytest.raises(InferenceServerException, match="image 2 of 2"):
        triton.infer("relook", [image_input(_black_jpeg(), b"a text")])
    with pytest.raises(InferenceServerException, match="the model is called 'relook'"):
        triton.infer("resnet", [image_input(_black_jpeg())])
    with pytest.raises(InferenceServerException, match="does not serve; the one that serves is"):
        triton.infer("relook", [image_input(_black_jpeg())], model_version="1")
    assert_error(http.get("/v2/repository/index"), 404, "nothing is at /v2/repository/index")
    assert_error(http.get(INFER), 405, "GET is not possible")
    assert_error(http.post(INFER, content=b"x" * 1_200_000), 413, "larger than")
    assert_error(http.get("/v2", headers={"Host": "evil.example"}), 403, "host names")


def test_keys_and_limits_are_those_of_the_api(tools: Any, kept: Any, make_image: Callable[..., bytes]) -> None:
    settings = ServingSettings(port=tools.free_port(), rate_limit_per_minute=4)
    reader, writer = tools.make_key(kept, "reader", Scope.FLAG), tools.make_key(kept, "writer", Scope.PREDICT)
    with tools.run_service(kept, settings) as running, httpx.Client(base_url=running.url, trust_env=False) as http:
        body = {"inputs": [_json_image(make_image(0))], "outputs": [{"name": "label"}]}
        assert http.get("/v2/health/ready").status_code == http.get("/v2/models/relook/ready").status_code == 200
        assert_error(http.post(INFER, json=body), 401, "key")
        assert_error(http.post(INFER, json=body, headers={"Authorization": f"Bearer {reader}"}), 403, "`predict`")
        mine = {"Authorization": f"Bearer {writer}"}
        statuses = [http.post(INFER, json=body, headers=mine).status_code for _ in range(5)]
        assert statuses == [200] * 4 + [429]
        assert_error(http.post(INFER, json=body, headers=mine), 429, "units a minute")


# ---------------------------------------------------------------- other forms of POST /v1/predictions


def test_a_form_may_call_its_image_file(http: httpx.Client, make_image: Callable[..., bytes]) -> None:
    named = {
        name: http.post("/v1/predictions", files={name: ("a.jpg", make_image(36), "image/jpeg")}).json()
        for name in ("image", "file")
    }
    assert named["image"]["probabilities"] == named["file"]["probabilities"]
    several = [("file", ("a.jpg", make_image(number), "image/jpeg")) for number in (36, 37)]
    batch = http.post("/v1/predictions/batch", files=several).json()
    assert batch["items"][0]["prediction"]["image_id"] == named["file"]["image_id"]
    both = [("file", several[0][1]), ("image", several[1][1])]
    for path in ("/v1/predictions", "/v1/predictions/batch", "/v1/explanations"):
        refused = http.post(path, files=both)
        assert (refused.status_code, "one of these names" in refused.json()["detail"]) == (422, True)


def test_json_may_hold_the_image_as_base64(
    service: Any, http: httpx.Client, client: Client, make_image: Callable[..., bytes]
) -> None:
    wrapped = base64.encodebytes(make_image(38)).decode()
    # Larger than what JSON of other routes may have.
    body = {"image_base64": wrapped + "\n" * 70_000, "context": {"age": 44, "consent": "review"}}
    response = http.post("/v1/predictions?explain=gradcam", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["probabilities"] == client.predict(make_image(38)).probabilities
    assert response.json()["explanation"]["method"] == "gradcam"
    with service.store.ledger.read() as tx:
        assert tx.require(Prediction, response.json()["id"]).consent is Consent.REVIEW
    assert http.post("/v1/explanations", json={"image_base64": wrapped}).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ("{", 400, "not JSON"),
        ("[]", 422, "object"),
        ("[" * 9000, 400, "not JSON"),
        ('{"image_base64": "' + "," * 10_001 + '"}', 422, "more than 10000 values"),
        ('{"image": "eA=="}', 422, "image"),
        ('{"image_base64": "eA==", "contxt": {"consent": "none"}}', 422, "contxt"),
        ('{"image_base64": "eA==", "context": {"age": "61"}}', 422, "age"),
        ('{"image_base64": "data:image/png;base64,eA=="}', 422, "not base64"),
        ('{"image_base64": "\u00e9\u00e9\u00e9\u00e9"}', 422, "not base64"),
        ('{"image_base64": ""}', 422, "empty"),
        ('{"image_base64": "' + "A " * 400_000 + '"}', 415, "image"),
        ('{"image_base64": "eHh4eA=="}', 415, "image"),
        ('{"image_base64": "' + "A" * 1_200_000 + '"}', 413, "larger than"),
    ],
    ids=range(13),
)
def test_json_that_does_not_fit_is_one_sentence(http: httpx.Client, content: str, status: int, words: str) -> None:
    response = http.post("/v1/predictions", content=content.encode(), headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
