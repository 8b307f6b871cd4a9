"""Malformed requests: the published contract holds, no upload breaks the service, odd images are predicted."""

import base64
import http.client
import io
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from bench.serve.malformed import CONTENT_TYPES, ROUTES, images, malformed_upload, png_of
from records.arrays import IntArray
from records.settings import RecordsSettings
from records.store import open_store
from serving.access.keys import admin_token
from serving.client import Client
from serving.settings import ServingSettings

EXIF_ORIENTATION = 0x0112
# How the upright image is stored so that a viewer who follows orientation 1 to 8 sees it upright again.
TRANSPOSES = {
    1: None,
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_90,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Any]:
    """A service of its own: these tests may erase images and end rollouts."""
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("abused")))
    tools.serve_bundle(store, tools.make_bundle(store, 0, bias={"bcc": -2.0}))
    settings = ServingSettings(port=tools.free_port(), max_upload_mb=1.0)
    with tools.run_service(store, settings) as running:
        yield running
    store.close()


def send(http: httpx.Client, number: int) -> httpx.Response:
    upload = malformed_upload(11, number)
    headers = {"Content-Type": upload.content_type} if upload.content_type else {}
    return http.post(upload.path, content=upload.body, headers=headers)


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    "phases", ["fuzzing", pytest.param("examples,coverage,fuzzing,stateful", marks=pytest.mark.long)]
)
def test_what_schemathesis_tries_fits_the_published_contract(abused: Any, phases: str) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file", str(Path(__file__).with_name("schemathesis.toml")),
        "run", f"{abused.url}/openapi.json", "--header", f"Authorization: Bearer {admin_token(abused.store.home)}",
        "--phases", phases, "--seed", "1", "--max-examples", "1", "--no-color", "--continue-on-failure",
        "--workers", "1", "--suppress-health-check", "all", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=abused.store.home.root)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Tested: 43" in done.stdout


def test_a_forms_unknown_part_is_refused_since_it_may_be_a_misspelt_consent(
    abused: Any, make_image: Callable[..., bytes]
) -> None:
    image = ("image", ("a.jpg", make_image(0), "image/jpeg"))
    consent = (None, '{"consent": "none"}', "application/json")
    with httpx.Client(base_url=abused.url, trust_env=False) as http:
        for path in ("/v1/predictions", "/v1/predictions/batch", "/v1/explanations"):
            misspelt = http.post(path, files=[image, ("contxt", consent)])
            assert (misspelt.status_code, "contxt" in misspelt.json()["detail"]) == (422, True)
            twice = http.post(path, files=[image, ("context", consent), ("context", consent)])
            assert twice.status_code == 422
        assert "batch" in http.post("/v1/predictions", files=[image, image]).json()["detail"]


def test_numbers_are_no_moments_and_words_are_no_numbers(abused: Any, make_image: Callable[..., bytes]) -> None:
    with Client(abused.url, retry_s=0.0) as client, httpx.Client(base_url=abused.url, trust_env=False) as http:
        path = f"/v1/predictions/{client.predict(make_image(0)).id}/outcomes"
        outcome = {"diagnosis": "nv", "confirmation": "histopathology"}
        for moment in (0, 1.5e9, "0", "-1", True, "2026-03-01T12:00:00"):
            assert http.post(path, json=outcome | {"observed_at": moment}).status_code == 422, moment
        assert http.post(path, json=outcome | {"observed_at": "2026-03-01T12:00:00Z"}).status_code == 200
        for age in ('"61"', "true"):
            files = {"image": ("a.jpg", make_image(0)), "context": (None, f'{{"age": {age}}}')}
            assert http.post("/v1/predictions", files=files).status_code == 422, age


def test_every_path_names_the_verbs_it_takes_and_no_others(abused: Any) -> None:
    with httpx.Client(base_url=abused.url, trust_env=False) as http:
        for path, verbs in (("/v1/predictions/batch", "POST"), (f"/v1/predictions/{'0' * 32}", "GET")):
            for verb in ("OPTIONS", "DELETE", *(["GET"] if verbs == "POST" else [])):
                response = http.request(verb, path)
                assert (response.status_code, response.headers["allow"]) == (405, verbs)


# ---------------------------------------------------------------- malformed uploads


def test_uploads_are_drawn_from_their_seed_and_cover_every_route() -> None:
    drawn = [malformed_upload(11, number) for number in range(300)]
    assert drawn[7] == malformed_upload(11, 7)
    assert drawn[7] != malformed_upload(12, 7)
    assert {upload.path for upload in drawn} == set(ROUTES)
    assert {upload.content_type for upload in drawn} > set(CONTENT_TYPES)


# Of a form that is cut off, Starlette leaves closing the part under way to the collector, which then warns.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*:pytest.PytestUnraisableExceptionWarning")
def test_no_upload_is_the_services_own_fault(abused: Any, make_image: Callable[..., bytes]) -> None:
    with Client(abused.url, retry_s=0.0) as client, httpx.Client(base_url=abused.url, trust_env=False) as http:
        before = client.predict(make_image(0)).probabilities
        seen: Counter[int] = Counter()
        for number in range(150):
            response = send(http, number)
            seen[response.status_code] += 1
            assert response.status_code < 500, f"upload {number}: {response.text}"
            if response.status_code >= 400:
                assert response.headers["content-type"] == "application/problem+json", f"upload {number}"
        assert client.predict(make_image(0)).probabilities == before
    # The test means nothing if the middleware refuses everything.
    assert set(seen) == {200, 400, 413, 415, 422}


def test_a_body_of_100_mb_is_refused_before_it_is_sent(abused: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", abused.settings.port, timeout=600)
    connection.putrequest("POST", "/v1/predictions")
    connection.putheader("Content-Type", "image/jpeg")
    connection.putheader("Content-Length", str(100_000_000))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert b"too_large" in response.read()
    connection.close()


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(lambda: png_of(64, 64, zlib.compress(bytes(80_000_000))), id="more rows than it says"),
        pytest.param(lambda: png_of(7000, 7000, zlib.compress(bytes(7000 * 7001))[:2000], colour=0), id="cut off"),
        pytest.param(lambda: png_of(50_000, 50_000, zlib.compress(b"\0")), id="50,000 x 50,000 in its header"),
    ],
)
def test_a_small_file_with_a_huge_image_is_predicted_or_refused(abused: Any, bomb: Callable[[], bytes]) -> None:
    with httpx.Client(base_url=abused.url, trust_env=False, timeout=600) as http:
        response = http.post("/v1/predictions", content=bomb(), headers={"Content-Type": "image/png"})
    assert response.status_code in (200, 413, 422), response.text


# ---------------------------------------------------------------- odd images


@pytest.mark.parametrize("kind", sorted(images()))
def test_every_kind_of_image_is_predicted_with_a_map(abused: Any, kind: str) -> None:
    with Client(abused.url, retry_s=0.0) as client:
        prediction = client.predict(images()[kind], explain="gradcam")
    assert prediction.probabilities is not None
    assert prediction.explanation is not None
    assert np.isfinite(prediction.explanation.values).all()


def test_the_first_frame_of_an_animation_is_predicted(abused: Any) -> None:
    with Client(abused.url, retry_s=0.0) as client:
        assert client.predict(images()["png_animated"]).probabilities == client.predict(images()["png"]).probabilities


def test_all_eight_orientations_give_one_prediction_and_one_map(abused: Any, make_image: Callable[..., bytes]) -> None:
    # Of the model's own side length: a reduced image may differ by one grey level of rounding if it is rotated.
    upright = PillowImage.open(io.BytesIO(make_image(3))).convert("RGB").resize((96, 64))
    predictions = []
    with Client(abused.url, retry_s=0.0) as client:
        for orientation, transpose in TRANSPOSES.items():
            exif, buffer = PillowImage.Exif(), io.BytesIO()
            exif[EXIF_ORIENTATION] = orientation
            turned = upright if transpose is None else upright.transpose(transpose)
            turned.save(buffer, "PNG", exif=exif)
            predictions.append(client.predict(buffer.getvalue(), explain="gradcam"))
    first, *others = predictions
    assert first.explanation is not None
    assert np.ptp(first.explanation.values) > 0
    assert len({prediction.image_id for prediction in predictions}) == len(TRANSPOSES)
    for prediction in others:
        assert prediction.explanation is not None
        assert prediction.probabilities == pytest.approx(first.probabilities, abs=1e-6)
        np.testing.assert_allclose(prediction.explanation.values, first.explanation.values, atol=1e-5)
        drawn, expected = overlay(prediction.explanation.png_base64), overlay(first.explanation.png_base64)
        assert np.abs(drawn - expected).max() <= 2


def overlay(png_base64: str) -> IntArray:
    return np.asarray(PillowImage.open(io.BytesIO(base64.b64decode(png_base64))).convert("RGB"), dtype=np.int64)
