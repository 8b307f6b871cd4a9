"""The script of the documentation uses every published operation of a running service."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from cluster.incidents.figures import incident_report
from records.ids import new_id, utc_now
from records.keys import key_of
from records.models import register
from records.notifications import SECRET_FILE
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Incident, ModelStatus
from serving.access.keys import admin_token
from serving.settings import ServingSettings
from tests.serving.label_values import measured_labels

SCRIPT = Path(__file__).parents[2] / "docs" / "serve_api.sh"


def test_every_line_of_the_api_works_from_curl(tmp_path: Path, tools: Any, make_image: Callable[..., bytes]) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    champion = tools.make_bundle(store, 0)
    tools.serve_bundle(store, champion)
    (champion.path / "report").mkdir()
    (champion.path / "report" / "report.html").write_text("<h1>A report</h1>")
    candidate = tools.make_bundle(store, 1)
    with store.ledger.begin() as tx:
        register(tx, candidate, status=ModelStatus.CANDIDATE)
        named = {"prediction_id": new_id(), "image_id": "0" * 64, "model_id": champion.id, "truth": "mel"}
        tx.add(Incident(id=new_id(), created_at=utc_now(), actor="test", **named), measured_labels())
    incident_report(store, audit_share=0.02)
    file = tmp_path / "lesion.jpg"
    file.write_bytes(make_image(1))
    with tools.run_service(store, ServingSettings(port=tools.free_port())) as running:
        environ = {**os.environ, "URL": running.url, "KEY": admin_token(store.home)}
        environ["WEBHOOK_SECRET"] = key_of(store.home, SECRET_FILE)
        done = subprocess.run(
            ["bash", str(SCRIPT), str(file), candidate.id],
            env=environ, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        published = httpx.get(f"{running.url}/openapi.json", trust_env=False).json()["paths"]
    store.close()
    assert done.returncode == 0, done.stderr
    called = {tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("20")}
    for path, verbs in published.items():
        pattern = re.compile(re.sub(r"\{[^}]*\}", "[^/]+", path) + r"(\?.*)?")
        for verb in verbs:
            assert any(v == verb.upper() and pattern.fullmatch(p) for v, p in called), f"{verb} {path}"
