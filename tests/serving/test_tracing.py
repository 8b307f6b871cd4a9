"""Traces: one from request to commit, task and round, by the ids that they have anyway."""

import gzip
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError

from cluster.round import _run_step, _traced
from cluster.round_steps import RoundContext
from cluster.settings import Settings, settings_hash
from labeling.push import _mark_pushed
from records import tracing
from records.errors import ImageError
from records.ids import new_id, utc_now
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ReviewItem, RoundRecord
from serving.client import Client
from serving.settings import ServingSettings


@pytest.fixture
def spans() -> Iterator[Callable[[str], dict[str, Any]]]:
    """Record spans in memory; returns those of a trace by name, once the first of them has ended."""
    exporter = InMemorySpanExporter()
    tracing.start("http://127.0.0.1:1/v1/traces", exporter=exporter)

    def of(trace_id: str) -> dict[str, Any]:
        # A service ends the span of a request after its caller has read the last byte of the response.
        ends_at = time.monotonic() + 30.0
        found: list[Any] = []
        while not any(span.parent is None for span in found) and time.monotonic() < ends_at:
            found = [span for span in exporter.get_finished_spans() if f"{span.context.trace_id:032x}" == trace_id]
            time.sleep(0.01)
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}

    yield of
    tracing.stop()


@pytest.fixture
def running(kept: Store, tools: Any) -> Iterator[Any]:
    with tools.run_service(kept, ServingSettings(port=tools.free_port(), model_poll_s=0.1)) as found:
        yield found


def test_a_request_is_one_trace_from_the_listener_to_the_commit_and_its_task(
    running: Any, spans: Callable[[str], dict[str, Any]], make_image: Callable[..., bytes]
) -> None:
    with Client(running.url, retry_s=0.0) as client:
        predictions = [client.predict(make_image(number)) for number in range(4)]
    reviewed = next(found for found in predictions if found.review is not None)
    store: Store = running.store
    with store.ledger.begin() as tx:
        (item,) = tx.find(ReviewItem, where={"prediction_id": reviewed.id})
        _mark_pushed(tx, 1, {1: item})
    found = spans(reviewed.request_id)
    assert set(found) == {"request", "decode", "forward", "commit", "task"}
    root = found.pop("request")
    assert root.parent is None
    assert dict(root.attributes) == {
        "http.request.method": "POST", "http.route": "/v1/predictions", "http.response.status_code": 200,
    }  # fmt: skip
    assert {span.parent.span_id for span in found.values()} == {root.context.span_id}
    order = [found[name].start_time for name in ("decode", "forward", "commit", "task")]
    assert [root.start_time, *order] == sorted([root.start_time, *order])
    assert found["commit"].end_time <= root.end_time <= found["task"].start_time
    assert found["forward"].attributes["images"] >= 1


def test_a_refused_image_leaves_the_kind_of_its_error_and_no_word_of_it(
    running: Any, spans: Callable[[str], dict[str, Any]]
) -> None:
    with Client(running.url, retry_s=0.0) as client:
        with pytest.raises(ImageError):
            client.predict(b"Mrs. Miller's photograph")
        response = client._http.post("/v1/predictions", content=b"x", headers={"Content-Type": "image/jpeg"})
        client._http.get("/healthz")
        lost = client._http.get("/v1/predictions/" + "0" * 32)
    found = spans(response.headers["X-Request-Id"])
    assert found["request"].attributes["http.response.status_code"] == response.status_code == 415
    assert found["decode"].attributes["error.type"] == "ImageError"
    assert found["decode"].events == ()
    assert spans(lost.headers["X-Request-Id"])["request"].attributes["http.route"] == "/v1/predictions/{prediction_id}"


def test_a_round_is_a_trace_of_its_steps_also_when_it_is_resumed(
    kept: Store, spans: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    with kept.ledger.begin() as tx:
        record = RoundRecord(id=new_id(), number=1, started_at=utc_now(), seed=0, settings_hash="s")
        tx.add(record)
    context = RoundContext(kept, Settings(), record, tmp_path, {})
    with _traced(record, False):
        _run_step(context, "collect", lambda context: {"text": "done"}, lambda event: None)
    resumed = replace(context, results={"collect": {"text": "done"}})

    def fail(context: RoundContext) -> dict[str, Any]:
        raise RuntimeError("the disk is full")

    with _traced(record, True):
        _run_step(resumed, "collect", fail, lambda event: None)
        with pytest.raises(RuntimeError):
            _run_step(resumed, "version", fail, lambda event: None)
    found = spans(record.id)
    assert set(found) == {"round", "collect", "resumed round", "version"}
    assert found["round"].attributes["number"] == 1
    assert found["version"].attributes["error.type"] == "RuntimeError"
    assert all(span.parent.span_id == found["round"].context.span_id for n, span in found.items() if n != "round")


@contextmanager
def collector(status: int) -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Run an HTTP server that takes spans, or refuses them."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collector_gets_spans_in_its_own_format(tmp_path: Path) -> None:
    request_id = new_id()
    with collector(200) as (endpoint, received):
        store = open_store(RecordsSettings(home=tmp_path, trace_endpoint=endpoint))
        with tracing.trace("request", request_id, share=0.5) as found, tracing.span("decode", request_id):
            found["images"] = 3
        tracing.stop()
        store.close()
    assert not tracing.is_on()
    (message,) = received
    ((scope,),) = ([*resource.scope_spans] for resource in message.resource_spans)
    spans = {span.name: span for span in scope.spans}
    root = spans["request"]
    assert root.trace_id.hex() == spans["decode"].trace_id.hex() == request_id
    assert spans["decode"].parent_span_id == root.span_id == bytes.fromhex(request_id[:16])
    assert {each.key: each.value.WhichOneof("value") for each in root.attributes} == {
        "share": "double_value", "images": "int_value",
    }  # fmt: skip


@pytest.mark.parametrize("status", [503, None])
def test_the_service_works_without_its_collector(
    kept: Store, tools: Any, make_image: Callable[..., bytes], status: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with collector(status or 200) as (endpoint, _):
        if status is None:
            endpoint = f"http://127.0.0.1:{tools.free_port()}/v1/traces"
        tracing.start(endpoint)
        try:
            settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1)
            with tools.run_service(kept, settings) as found, Client(found.url, retry_s=0.0) as client:
                assert client.predict(make_image(0)).id
        finally:
            tracing.stop()
    assert any(record.name.startswith("opentelemetry.exporter") for record in caplog.records), "that is logged"


def test_a_share_of_traces_is_whole() -> None:
    exporter = InMemorySpanExporter()
    tracing.start("http://127.0.0.1:1/v1/traces", 0.5, exporter)
    ids = [new_id() for _ in range(200)]
    for one in ids:
        with tracing.trace("request", one):
            tracing.record("commit", [one, one], 1, 2)
    with tracing.trace("request", "a name that is no id"):
        pass
    tracing.stop()
    found = [f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()]
    kept_ids = [one for one in ids if one in found]
    assert 50 < len(kept_ids) < 150
    assert all(found.count(one) == 2 for one in kept_ids)


def test_without_an_endpoint_nothing_is_recorded_and_results_are_the_same(tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path))
    store.close()
    assert not tracing.is_on()
    with tracing.trace("request", new_id()) as found, tracing.span("decode", new_id()):
        found["images"] = 1
    tracing.record("commit", [new_id()], 1, 2)
    traced = Settings(records=RecordsSettings(trace_endpoint="https://traces.example.org/v1/traces"))
    assert settings_hash(traced) == settings_hash(Settings())
    for wrong in ("127.0.0.1:4318", "file:///tmp/x", "https://me:secret@traces.example.org/", ""):
        with pytest.raises(ValidationError, match="is not a URL"):
            RecordsSettings(trace_endpoint=wrong)
