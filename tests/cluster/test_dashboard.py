"""Dashboard and alerts: every metric and label that it queries is published by the service."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import cluster
from records.ids import utc_now
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Decision, Prediction, ReasonCode
from serving.hooks.settings import HookSettings
from serving.metrics import Metrics

FOLDER = Path(cluster.__file__).parent / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboards" / "relook.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
GROUPS: list[dict[str, Any]] = yaml.safe_load((FOLDER.parent / "alerts.yaml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Name of every series that a service in use publishes, to the labels that it has."""
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("metrics")))
    metrics = Metrics(store)
    metrics.hooks = (HookSettings(name="pacs", url="https://hooks.example.org/", organisation="a"),)
    codes = store.taxonomy.codes
    prediction = Prediction(
        id="p", request_id="r", created_at=utc_now(), caller="local", image_id="i", model_id="m" * 64,
        model_status="champion", engine="torch", precision="fp32", num_threads=1, settings_hash="s", label=codes[0],
        confidence=0.5, probabilities=dict.fromkeys(codes, 1 / len(codes)), decision=Decision.REVIEW, latency_ms=1.0,
        reasons=[ReasonCode.LOW_CONFIDENCE], out_of_distribution_score=0.5,
    )  # fmt: skip
    metrics.predicted(prediction)
    metrics.explained.labels(method="gradcam").inc()
    metrics.flagged.labels(reason="other").inc()
    families = text_string_to_metric_families(metrics.text().decode())
    found = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    store.close()
    return found


def test_there_is_a_panel_for_what_matters() -> None:
    assert len(QUERIES) >= 13
    text = " ".join(QUERIES)
    for name in (
        "relook_predictions_total",
        "relook_tasks_overdue",
        "relook_prediction_seconds_bucket",
        "relook_flags_total",
    ):
        assert name in text
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])


@pytest.mark.parametrize("query", QUERIES)
def test_every_figure_is_published_with_its_labels(query: str, published: dict[str, set[str]]) -> None:
    for name, expression in RECORDED.items():
        query = query.replace(name, expression)
    names = re.findall(r"relook_\w+", query)
    assert names
    assert set(names) <= set(published)
    (grouped,) = re.findall(r"by \(([^)]*)\)", query) or [""]
    assert {label.strip() for label in grouped.split(",") if label.strip()} <= published[names[0]]
    assert query.count("(") == query.count(")")


def test_what_a_legend_names_is_grouped_by() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), target


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.get("alert", rule.get("record"))))
def test_every_rule_reads_published_metrics_with_the_labels_that_they_have(
    rule: dict[str, Any], published: dict[str, set[str]]
) -> None:
    expression = rule["expr"]
    recorded = re.findall(r"relook:[\w:]+", expression)
    assert set(recorded) <= set(RECORDED)
    selected = re.findall(r"\b(relook_\w+|up)(?:\{([^}]*)\})?", expression)
    assert recorded or selected
    for name, labels in selected:
        if name == "up":
            continue
        assert name in published
        assert set(re.findall(r"(\w+)=", labels)) <= published[name], expression


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) >= 10
    for rule in alerts:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "action"}
    # A threshold on a histogram reads one of its limits.
    limits = {limit for rule in RULES for limit in re.findall(r'le="([^"]*)"', rule["expr"])}
    assert limits <= {f"{limit:.1f}" for limit in (0.5, 1.0, 2.5, 5.0)}
