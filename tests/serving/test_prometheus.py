"""What operators watch: the shipped rules by promtool, and a real Prometheus that scrapes the service and alerts."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from records.ids import new_id, utc_now
from records.store import Store
from records.types import ReasonCode, ReviewItem, Scope
from serving.access.keys import create_key, revoke_key
from serving.settings import ServingSettings

DEPLOY = Path(__file__).parents[2] / "cluster" / "deploy"
RULES = DEPLOY / "alerts.yaml"
UNIT_TESTS = Path(__file__).parents[1] / "cluster" / "alerts_test.yaml"
PROMETHEUS = os.environ.get("RELOOK_TEST_PROMETHEUS") or shutil.which("prometheus")


@pytest.fixture(scope="module")
def program() -> str:
    if PROMETHEUS is None:
        pytest.skip("no Prometheus on this machine; RELOOK_TEST_PROMETHEUS names one, Debian packages it")
    return PROMETHEUS


def promtool(program: str, *arguments: str) -> str:
    """Run the tool beside Prometheus and return what it printed; it has to succeed."""
    command = [str(Path(program).with_name("promtool")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_are_valid_and_fire_when_they_should(program: str, tmp_path: Path) -> None:
    assert re.search(r"SUCCESS: \d+ rules found", promtool(program, "check", "rules", str(RULES)))
    shutil.copy(RULES, tmp_path / "alerts.yaml")
    shutil.copy(UNIT_TESTS, tmp_path / "alerts_test.yaml")
    assert "SUCCESS" in promtool(program, "test", "rules", str(tmp_path / "alerts_test.yaml"))


@dataclass(frozen=True)
class Watched:
    """A service, and the Prometheus that scrapes it with a key."""

    service: Any
    url: str
    key_id: str

    def ask(self, path: str, **query: str) -> Any:
        """Return the data of a response of Prometheus; None while it does not respond."""
        try:
            response = httpx.get(f"{self.url}/api/v1/{path}", params=query, trust_env=False, timeout=600)
        except httpx.TransportError:
            return None
        return response.json().get("data") if response.is_success else None

    def alerts(self, name: str) -> list[str]:
        """Return the states of an alert."""
        found = (self.ask("alerts") or {"alerts": []})["alerts"]
        return [alert["state"] for alert in found if alert["labels"]["alertname"] == name]

    def value(self, query: str) -> float | None:
        """Return the only value of a query, or None."""
        found = (self.ask("query", query=query) or {"result": []})["result"]
        return float(found[0]["value"][1]) if len(found) == 1 else None


def until(holds: Callable[[], object], what: str) -> None:
    """Wait until a condition holds, generously."""
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(program: str, kept: Store, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, port = tmp_path_factory.mktemp("prometheus"), tools.free_port()
    record, token = create_key(kept, name="prometheus", organisation="operations", scopes=[Scope.METRICS], actor="test")
    (folder / "key").write_text(token)
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1)
    shipped = (DEPLOY / "prometheus.yaml").read_text()
    for old, new in (
        ("15s", "1s"),
        ("/run/secrets/metrics-key", str(folder / "key")),
        ("service:8000", f"127.0.0.1:{settings.port}"),
    ):
        assert old in shipped
        shipped = shipped.replace(old, new)
    (folder / "prometheus.yml").write_text(shipped)
    shutil.copy(RULES, folder / "alerts.yaml")
    promtool(program, "check", "config", str(folder / "prometheus.yml"))
    command = [
        program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    with tools.run_service(kept, settings) as running, (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            yield Watched(running, f"http://127.0.0.1:{port}", record.id)
        finally:
            process.terminate()
            process.wait(600)


def test_a_real_prometheus_scrapes_the_service_and_an_alert_fires(
    watched: Watched, make_image: Callable[..., bytes], tools: Any
) -> None:
    store: Store = watched.service.store
    headers = {
        "Authorization": f"Bearer {tools.make_key(store, 'caller', Scope.PREDICT)}",
        "Content-Type": "image/jpeg",
    }
    predicted = httpx.post(
        f"{watched.service.url}/v1/predictions", content=make_image(0), headers=headers, trust_env=False, timeout=600
    )
    assert predicted.status_code == 200
    until(lambda: watched.value('up{job="relook"}') == 1, "Prometheus does not scrape the service")
    until(lambda: watched.value("sum(relook_predictions_total)") == 1, "the prediction is not counted")
    until(lambda: (watched.value('relook_responses_total{status="503"}')) == 0, "failures are counted from zero")
    rules = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) >= 20
    until(
        lambda: all(r["health"] == "ok" for g in watched.ask("rules")["groups"] for r in g["rules"]),
        "a rule cannot be evaluated",
    )
    assert watched.alerts("RelookUrgentOverdue") == []
    now = utc_now()
    item = ReviewItem(
        id=new_id(), created_at=now, image_id=predicted.json()["image_id"], reasons=[ReasonCode.LOW_CONFIDENCE],
        priority=9.0, due=now - timedelta(hours=1),
    )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(item)
    until(lambda: watched.alerts("RelookUrgentOverdue") == ["firing"], "the alert does not fire")


def test_a_prometheus_without_a_valid_key_says_so_and_is_an_alert(watched: Watched) -> None:
    until(lambda: watched.value('up{job="relook"}') == 1, "Prometheus does not scrape the service")
    revoke_key(watched.service.store, watched.key_id, actor="test")
    until(lambda: watched.value('up{job="relook"}') == 0, "a revoked key still reads the metrics")
    (target,) = watched.ask("targets")["activeTargets"]
    assert "401" in target["lastError"]
    until(lambda: watched.alerts("RelookDown"), "a service that cannot be scraped is no alert")
