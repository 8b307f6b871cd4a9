"""A DICOM file on the page: the upload becomes an image that a browser shows, and no tag of it reaches the disk."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from images.dicom import read_dicom
from records.settings import RecordsSettings
from records.store import open_store
from serving.access.keys import KeyRing
from serving.page.access import PageAccess
from serving.page.uploads import PageFiles
from serving.settings import ServingSettings
from tests.dicoms import dicom, disk, shipped

MARK = "MARKERZZ"
PIXELS = disk((60, 40, 30), 11)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyRing]:
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("home")))
    yield KeyRing(store)
    store.close()


@pytest.fixture
def files(tmp_path: Path) -> PageFiles:
    return PageFiles(ServingSettings(page_folder=tmp_path / "page"), tmp_path)


def upload(files: PageFiles, keys: KeyRing, data: bytes, name: str) -> httpx.Response:
    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("an upload never reaches Gradio")

    async def send() -> httpx.Response:
        app = PageAccess(gradio, {}, files, keys, max_upload_bytes=1_000_000, max_json_bytes=1000)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as client:
            return await client.post("/gradio_api/upload", files={"files": (name, data, "application/octet-stream")})

    return asyncio.run(send())


def test_a_dicom_file_becomes_an_image_without_tags_and_without_its_name(files: PageFiles, keys: KeyRing) -> None:
    data = dicom(PIXELS, PatientName=MARK, PatientID=MARK, InstitutionName=MARK)
    response = upload(files, keys, data, f"{MARK}.dcm")
    assert response.status_code == 200, response.text
    (path,) = response.json()
    assert path.endswith("/dicom.png")
    assert Path(path).read_bytes() == read_dicom(data).png
    assert np.array_equal(np.asarray(PillowImage.open(io.BytesIO(files.find(path).read_bytes()))), PIXELS)
    assert not any(MARK in str(one) or MARK.encode() in one.read_bytes()
                   for one in files.root.rglob("*") if one.is_file())  # fmt: skip


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (shipped("MR_small_jpeg_ls_lossless.dcm"), 415, "JPEG-LS Lossless Image Compression; save it in"),
        (dicom(PIXELS, NumberOfFrames="3", PatientName=MARK), 415, "holds 3 frames"),
        (dicom(PIXELS, PatientName=MARK)[:-900], 422, "fewer pixels"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(
    files: PageFiles, keys: KeyRing, data: bytes, status: int, words: str
) -> None:
    response = upload(files, keys, data, "a.dcm")
    assert (response.status_code, response.json()["status"]) == (status, status)
    assert words in response.json()["detail"]
    assert MARK not in response.text
    assert list(files.uploads.iterdir()) == []
