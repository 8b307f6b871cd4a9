"""The files that a real Label Studio exports, beside the images, are read as a layout."""

from pathlib import Path

import pytest

from images.layouts import read_source
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from tests.labeling.conftest import make_image
from tests.labeling.test_existing_project import choose, make_project, upload

NAMES = ("1.png", "two.png", "drei vier.png", "skipped.png")


@pytest.fixture(scope="module")
def exported(server: ServerInfo, client: LabelStudioClient) -> int:
    project_id = make_project(client)
    for seed, name in enumerate(NAMES):
        upload(client, project_id, name, make_image(seed, "PNG"))
    people = [client.ensure_user(f"exporter{n}@example.org", "Exporter", str(n)) for n in range(2)]
    ids = [task["id"] for task in client.request("GET", f"api/projects/{project_id}/tasks/", "list")]
    first, second, third, skipped = sorted(ids)
    for person in people:
        choose(client, first, person, "Melanoma")
    choose(client, second, people[0], "Melanoma")
    choose(client, second, people[1], "Muttermal")
    choose(client, third, people[0], "Muttermal")
    choose(client, skipped, people[0])
    return project_id


@pytest.mark.parametrize("kind", ["JSON", "JSON_MIN", "CSV"])
def test_an_export_beside_the_images(kind: str, exported: int, client: LabelStudioClient, tmp_path: Path) -> None:
    http, headers = client.transport()
    params = {"exportType": kind, "download_all_tasks": "true"}
    response = http.get(f"{client.url}/api/projects/{exported}/export", params=params, headers=headers)
    response.raise_for_status()
    (tmp_path / f"export.{'csv' if kind == 'CSV' else 'json'}").write_bytes(response.content)
    for seed, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(make_image(seed, "PNG"))
    source = read_source(tmp_path, {"dx": "dx"})
    assert source.layout.startswith("layout: Label Studio")
    said = {row.path.name if row.path else row.source_id: row.label if row.problem is None else row.code
            for row in source.rows}  # fmt: skip
    conflict = [code for code in said.values() if code == "label_conflict"]
    assert said["1.png"] == "Melanoma"
    assert said["drei vier.png"] == "Muttermal"
    assert len(conflict) == 1
    assert said.get("skipped.png") is None
