"""DICOM files at the entrances of the service: as a body, as parts, in a folder, and with a heat map."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from images.decode import decode_frame
from images.dicom import read_dicom
from images.given import image_bytes
from records.frames import Frame
from records.ids import sha256_hex
from records.models import find_bundle
from records.store import Store
from records.types import Image
from serving.bulk import predict_folder
from serving.client import Client
from serving.settings import ServingSettings
from tests.dicoms import dicom, disk, jpeg_of, shipped, with_jpeg

DICOM = {"Content-Type": "application/dicom"}
MARK = "MARKERZZ"
PIXELS = disk((60, 40, 30), 11)
FILE = dicom(PIXELS, PatientName=MARK, PatientID=MARK, InstitutionName=MARK, PatientAge="050Y")


@pytest.fixture
def http(service: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=600) as opened:
        yield opened


def test_a_file_is_predicted_as_its_image_is(http: httpx.Client, client: Client) -> None:
    as_png = http.post("/v1/predictions", content=read_dicom(FILE).png, headers={"Content-Type": "image/png"}).json()
    part = ("image", ("a.dcm", FILE, "application/dicom"))
    responses = [
        http.post("/v1/predictions", content=FILE, headers=DICOM),
        http.post("/v1/predictions", content=FILE, headers={"Content-Type": "application/octet-stream"}),
        http.post("/v1/predictions", files=[part]),
    ]
    for response in responses:
        assert response.status_code == 200, response.text
        assert response.json()["probabilities"] == as_png["probabilities"]
    parts = [part, ("image", ("b.jpg", jpeg_of(PIXELS), "image/jpeg"))]
    batch = http.post("/v1/predictions/batch", files=parts).json()
    assert batch["items"][0]["prediction"]["probabilities"] == as_png["probabilities"], batch
    assert batch["items"][1]["prediction"] is not None
    explained = http.post("/v1/explanations", content=FILE, headers=DICOM)
    assert explained.status_code == 200, explained.text
    assert client.predict(FILE).probabilities == as_png["probabilities"]
    assert image_bytes(FILE) == read_dicom(FILE).png


def test_what_is_stored_is_the_image_and_no_tag(http: httpx.Client, service_store: Store) -> None:
    sent = [FILE, with_jpeg(PIXELS, jpeg_of(PIXELS, comment=MARK.encode()), PatientName=MARK)]
    for data in sent:
        form = {"context": (None, '{"consent": "training"}', "application/json"), "image": ("a", data, "text/plain")}
        assert http.post("/v1/predictions", files=form).status_code == 200
    png = read_dicom(FILE).png
    with service_store.ledger.read() as tx:
        image = tx.require(Image, sha256_hex(png))
    assert (image.format, image.age_years, image.patient_hash) == ("png", None, None)
    assert service_store.blobs.get(image.id) == png
    assert np.array_equal(decode_frame(png, Frame(48)), PIXELS)
    for path in service_store.home.root.rglob("*"):
        assert not path.is_file() or MARK.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("data", "status", "code", "words"),
    [
        (dicom(PIXELS, NumberOfFrames="3"), 415, "not_an_image", "holds 3 frames"),
        (dicom(PIXELS)[:-900], 422, "damaged", "fewer pixels"),
        (dicom(PIXELS, Rows=60000, Columns=60000), 413, "too_many_pixels", "60000 x 60000"),
        (shipped("MR_small_jpeg_ls_lossless.dcm"), 415, "not_an_image", "JPEG-LS Lossless"),
        (shipped("reportsi.dcm"), 415, "not_an_image", "no image"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_problem(
    http: httpx.Client, data: bytes, status: int, code: str, words: str
) -> None:
    response = http.post("/v1/predictions", content=data, headers=DICOM)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert words in response.json()["detail"]


def test_the_api_names_the_type(http: httpx.Client) -> None:
    operation = http.get("/openapi.json").json()["paths"]["/v1/predictions"]["post"]
    assert "application/dicom" in operation["requestBody"]["content"]
    refused = http.post("/v1/predictions", content=FILE, headers={"Content-Type": "image/tiff"})
    assert "application/dicom" in refused.json()["detail"]


def test_a_folder_of_files_is_predicted_and_refused_ones_are_rows(service_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "IM1").write_bytes(FILE)
    (folder / "two.dcm").write_bytes(with_jpeg(PIXELS, jpeg_of(PIXELS)))
    (folder / "frames.dcm").write_bytes(dicom(PIXELS, NumberOfFrames="9"))
    (folder / "same.png").write_bytes(read_dicom(FILE).png)
    result = predict_folder(find_bundle(service_store, "champion"), folder, tmp_path / "t.csv", ServingSettings(),
                            explain=True)  # fmt: skip
    assert (len(result.rows), result.failed) == (4, 1)
    with (tmp_path / "t.csv").open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert "holds 9 frames" in rows["frames.dcm"]["error"]
    assert rows["IM1"]["confidence"] == rows["same.png"]["confidence"]
    assert rows["two.dcm"]["label"]
