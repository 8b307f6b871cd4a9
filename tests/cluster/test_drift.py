"""Drift: false alarms are as rare as stated, changes are found, and the service then samples that source more."""

import json
import math
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.cli import run
from cluster.drift import LEASE, accept_drift, check_drift, drift_html
from records.errors import RefusedError, UnavailableError, UnknownIdError
from records.ids import new_id, utc_now
from records.lease import hold
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, Consent, Cursor, Decision, Image, Prediction, ReasonCode
from serving.drift import BLOCK, STATISTICS, Source, Watched, drifting_sources, key_of
from serving.recording import Job, Recorder
from serving.settings import ServingSettings
from serving.triage import audit_chance
from tests.labeling.conftest import make_image
from tests.service import make_bundle, serve_bundle

RATE = 1e-3


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("drift") / "home"))
    bundle = make_bundle(store)
    serve_bundle(store, bundle)
    yield store, bundle
    store.close()


def predictions(
    store: Store, model_id: str, scores: Any, *, device: str, malignant: Any = None, image_id: str = "f" * 64
) -> None:
    """Write served predictions of one source with these distances from the training images."""
    now, codes = utc_now(), store.taxonomy.codes
    is_malignant = [code in store.taxonomy.malignant_codes for code in codes]
    rows = []
    for number, score in enumerate(scores):
        part = 0.1 if malignant is None else float(malignant[number])
        shares = [
            part / sum(is_malignant) if bad else (1 - part) / (len(codes) - sum(is_malignant)) for bad in is_malignant
        ]
        rows.append(
            Prediction(
                id=new_id(), request_id=new_id(), created_at=now + timedelta(seconds=number), caller="local",
                image_id=image_id, model_id=model_id, model_status="champion", engine="torch", precision="fp32",
                num_threads=1, settings_hash="b" * 64, label="nv", confidence=max(shares), consent=Consent.REVIEW,
                probabilities=dict(zip(codes, shares, strict=True)), decision=Decision.ANSWERED, latency_ms=1.0,
                out_of_distribution_score=float(score), context={"device": device},
            )
        )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(*rows)


def first_alarm(values: Any, limit: float) -> int | None:
    """Return after how many values a statistic reaches a limit."""
    one = Watched()
    draws = np.random.default_rng(1).random(len(values))
    for number, (value, draw) in enumerate(zip(values, draws, strict=True), start=1):
        if one.see(float(value), float(draw)) >= limit:
            return number
        one.shorten(str(number))
    return None


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "few values"])
def test_false_alarms_are_as_rare_as_stated_whatever_the_distribution(kind: str) -> None:
    chance = np.random.default_rng(3)
    draw = {
        "normal": lambda: chance.normal(size=250),
        "heavy tails": lambda: chance.standard_cauchy(size=250),
        "few values": lambda: chance.integers(0, 3, 250),
    }[kind]
    streams = 60
    false = sum(first_alarm(draw(), 1 / RATE) is not None for _ in range(streams))
    # At most 250 images times the rate, which is 0.25 of the streams; three standard deviations above.
    assert false <= streams * 0.25 + 3 * math.sqrt(streams * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda x: x + 8, 40),
        (lambda x: x - 8, 40),
        (lambda x: x + 1, 200),
        (lambda x: np.sign(x) * 5 + x, 250),  # the spread changes and the mean does not
    ],
)
def test_a_change_is_found_soon(change: Any, most: int) -> None:
    chance = np.random.default_rng(4)
    before, after = chance.normal(size=400), change(chance.normal(size=400))
    limit = len(STATISTICS) / 1e-5
    assert first_alarm(before, limit) is None
    found = first_alarm(np.concatenate([before, after]), limit)
    assert found is not None
    assert 400 < found <= 400 + most


def test_memory_is_bounded_and_a_change_at_that_moment_is_found() -> None:
    chance = np.random.default_rng(5)
    values = np.concatenate([chance.normal(size=BLOCK), chance.normal(size=200) + 3])
    found = first_alarm(values, len(STATISTICS) / 1e-5)
    assert found is not None
    assert BLOCK < found < BLOCK + 100
    one = Watched()
    for number in range(BLOCK + 10):
        one.see(float(number % 7), 0.5)
        one.shorten(str(number))
    assert len(one.values) == BLOCK // 2 + 10


def test_a_source_that_changed_is_named_and_others_are_not(watched: Any, tmp_path: Path) -> None:
    store, bundle = watched
    settings = ServingSettings(drift_false_alarm=1e-4)
    chance = np.random.default_rng(6)
    data = make_image(1)
    image = Image(
        id=store.blobs.put(data), uri="", format="jpeg", width_px=96, height_px=72, provenance="served",
        created_at=utc_now(), consent=Consent.REVIEW,
    )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(image.model_copy(update={"uri": store.blobs.uri(image.id)}))
    predictions(store, bundle.id, chance.normal(0.5, 0.1, 150), device="old", image_id=image.id)
    predictions(store, bundle.id, chance.normal(0.5, 0.1, 150), device="steady")
    assert [one.alarm for one in check_drift(store, settings).sources] == [None, None]
    assert drifting_sources(store) == frozenset()
    # In three parts: what was seen is kept between checks, and nothing is read twice.
    for _ in range(3):
        predictions(store, bundle.id, chance.normal(0.9, 0.1, 20), device="old", image_id=image.id)
        predictions(store, bundle.id, chance.normal(0.5, 0.1, 20), device="steady")
        found = check_drift(store, settings)
    first, second = found.sources
    assert (first.source, second.source, second.alarm) == ("local · old", "local · steady", None)
    assert first.alarm is not None
    assert first.alarm.statistic == "out_of_distribution_score"
    assert 150 < first.alarm.images <= 210
    assert first.alarm.before[1] == pytest.approx(0.5, abs=0.1)
    assert first.alarm.after[1] == pytest.approx(0.9, abs=0.1)
    assert first.alarm.before[2] < 0.75 < first.alarm.after[0], "the change is dated to where it began"
    assert drifting_sources(store) == {key_of("local · old")}
    assert second.images == 210
    with store.ledger.read() as tx:
        assert [event.subject for event in tx.find(AuditEvent, where={"action": "drift.found"})] == [
            key_of("local · old")
        ]
        # An erasure could not find the name of a device there.
        assert "old" not in str([cursor.position for cursor in tx.find(Cursor)])
    html = drift_html(store, found)
    assert "Inputs: distance from the training images" in html
    assert html.count("data:image/png") == 2, "the image of before and of after, which is one here"
    _sampled(store, bundle, settings)
    accept_drift(store, "local · old", actor="test")
    assert drifting_sources(store) == frozenset()
    predictions(store, bundle.id, chance.normal(0.9, 0.1, 100), device="old")
    assert [one.alarm for one in check_drift(store, settings).sources] == [None, None]
    with pytest.raises(UnknownIdError, match="`relook drift` lists them"):
        accept_drift(store, "nobody", actor="test")


def test_the_command_names_the_source_writes_a_page_and_begins_anew(
    watched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, bundle = watched
    chance = np.random.default_rng(7)
    monkeypatch.setenv("RELOOK_HOME", str(store.home.root))
    predictions(store, bundle.id, chance.normal(0.5, 0.1, 150), device="lamp")
    assert run(["drift"]) == 0
    assert "local · lamp" in capsys.readouterr().out
    predictions(store, bundle.id, chance.normal(0.9, 0.1, 150), device="lamp")
    page = tmp_path / "page.html"
    assert run(["drift", "--report", str(page), "--json"]) == 0
    found = {one["source"]: one["alarm"] for one in json.loads(capsys.readouterr().out)["sources"]}
    assert found["local · lamp"]["statistic"] == "out_of_distribution_score"
    assert "Inputs: distance from the training images" in page.read_text()
    assert run(["drift"]) == 0
    assert STATISTICS["out_of_distribution_score"] in capsys.readouterr().out

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.drift_verbs.time", SimpleNamespace(sleep=stop))
    assert run(["drift", "--accept", "local · lamp", "--watch", "--json"]) == 0
    captured = capsys.readouterr()
    assert "local · lamp begins anew" in captured.err
    assert "local · lamp" not in [one["source"] for one in json.loads(captured.out)["sources"]], "nothing came since"


def _sampled(store: Store, bundle: Any, settings: ServingSettings) -> None:
    """The recorder draws more of that source, says why, and keeps the probability by which an image counts."""
    from concurrent.futures import ThreadPoolExecutor

    from serving.messages import PredictionRequest
    from serving.schemas import Context

    with ThreadPoolExecutor(1) as pool:
        recorder = Recorder(store, settings, pool)
        recorder.follow_drift()
        rules = {}
        for device in ("old", "steady"):
            request = PredictionRequest(
                image=b"", request_id=new_id(), context=Context(device=device), caller="local", organisation="local",
                idempotency_key=None, explain=False,
            )  # fmt: skip
            job: Any = Job.__new__(Job)
            object.__setattr__(job, "request", request)
            rules[device] = recorder._rules_of(job)
    assert rules["steady"].audit_share == settings.audit_share
    assert rules["old"].audit_share == pytest.approx(settings.audit_share * settings.drift_sampling)
    drawn = _verdict(store, bundle, rules["old"], 0.0)
    assert drawn.reasons[-2:] == (ReasonCode.AUDIT_SAMPLE, ReasonCode.DRIFT)
    assert drawn.selection_probability == pytest.approx(audit_chance(0.02, 0.1))
    assert ReasonCode.DRIFT not in _verdict(store, bundle, rules["steady"], 0.0).reasons
    assert ReasonCode.AUDIT_SAMPLE not in _verdict(store, bundle, rules["old"], 0.99).reasons


def _verdict(store: Store, bundle: Any, rules: Any, draw: float) -> Any:
    from serving.triage import triage

    codes = store.taxonomy.codes
    values = np.full(len(codes), 0.02 / len(store.taxonomy.malignant_codes))
    benign = [number for number, code in enumerate(codes) if code not in store.taxonomy.malignant_codes]
    values[benign] = 0.98 / len(benign)
    return triage(values, store.taxonomy, bundle.document.operating, rules, draw)


def test_another_model_begins_anew_and_two_checks_do_not_mix(watched: Any) -> None:
    store, bundle = watched
    settings = ServingSettings()
    before = check_drift(store, settings)
    other = make_bundle(store, 1)
    serve_bundle(store, other)
    predictions(store, other.id, np.linspace(0.1, 0.2, 20), device="old")
    found = check_drift(store, settings)
    assert (before.model_id, found.model_id) == (bundle.id, other.id)
    assert [(one.source, one.images) for one in found.sources] == [("local · old", 20)]
    with hold(store.ledger, LEASE), pytest.raises(RefusedError):
        check_drift(store, settings, wait_s=0.0)


def test_without_a_model_there_is_nothing_to_compare(store: Store) -> None:
    with pytest.raises(UnavailableError, match="no model serves yet"):
        check_drift(store, ServingSettings())


def test_values_of_no_use_change_nothing(store: Store) -> None:
    source = Source(1e-5)
    prediction: Any = Prediction(
        id=new_id(), request_id=new_id(), created_at=utc_now(), caller="local", image_id="f" * 64, model_id="m",
        model_status="champion", engine="torch", precision="fp32", num_threads=1, settings_hash="b",
        decision=Decision.RETAKE, latency_ms=1.0, out_of_distribution_score=None, quality_score=None,
    )  # fmt: skip
    for _ in range(200):
        assert not source.see(prediction, store.taxonomy)
    assert Source(1e-5, source.state()).images == 200
