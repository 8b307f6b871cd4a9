"""Traces: OpenTelemetry spans of requests, batches, commits, tasks and rounds, sent to a collector by a setting.

The id of a request, or of a round, is the id of its trace, and the first half of it is the id of its first span. So
every process adds its spans to the trace of a request by the id alone, also a push hours later: nothing is passed on
and nothing is stored. Spans have names, times, counts and kinds of errors; no id of an image or a caller, no message of
an error, no path with an id in it. Without an endpoint nothing of OpenTelemetry is imported.
"""

import re
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from records.errors import ConfigError
from records.ids import sha256_hex

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

SCOPE = "relook"
EXPORT_TIMEOUT_S = 10.0
_ID = re.compile("[0-9a-f]{32}")

_lock = threading.Lock()
_provider: "TracerProvider | None" = None
_first: ContextVar[str | None] = ContextVar("first", default=None)
"""Id of the trace whose first span is being made."""


def is_on() -> bool:
    """Return whether spans are recorded in this process."""
    return _provider is not None


def start(endpoint: str, share: float = 1.0, exporter: "SpanExporter | None" = None) -> None:
    """Record spans in this process from now on; a second call changes nothing.

    Args:
        endpoint: URL of the collector, OTLP over HTTP.
        share: of the traces that are recorded; every process draws the same ones.
        exporter: takes the spans in place of the collector, each as it ends.
    Raises:
        ConfigError: OpenTelemetry's packages are not installed.
    """
    global _provider
    try:
        collector = None if exporter else _collector(endpoint)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            "records.trace_endpoint needs OpenTelemetry, which is not installed; pip install 'relook[traces]'"
        ) from error

    class Ids(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            first = _first.get()
            return super().generate_trace_id() if first is None else _trace_number(first)

        def generate_span_id(self) -> int:
            first = _first.get()
            return super().generate_span_id() if first is None else _root_number(first)

    with _lock:
        if _provider is not None:
            return
        # By the id alone and not by the parent's choice, which another process made.
        provider = TracerProvider(
            sampler=TraceIdRatioBased(share), resource=Resource.create({"service.name": SCOPE}), id_generator=Ids()
        )
        if exporter is not None:
            provider.add_span_processor(SimpleSpanProcessor(exporter))
        if collector is not None:
            provider.add_span_processor(BatchSpanProcessor(collector))
        _provider = provider


def stop() -> None:
    """Send what was recorded, and record no more."""
    global _provider
    with _lock:
        provider, _provider = _provider, None
    if provider is not None:
        provider.shutdown()


@contextmanager
def trace(name: str, trace_id: str, **attributes: str | int | float) -> Generator[dict[str, Any]]:
    """Record the first span of a trace.

    Args:
        name: of the span.
        trace_id: of a request or a round, 32 hex characters.
        attributes: of the span.
    Yields:
        Further attributes, to be filled in while the block runs.
    """
    found: dict[str, Any] = {}
    if _provider is None:
        yield found
        return
    token = _first.set(trace_id)
    try:
        span = _provider.get_tracer(SCOPE).start_span(name, context=_no_parent(), attributes=attributes)
    finally:
        _first.reset(token)
    yield from _ended(span, found)


@contextmanager
def span(name: str, trace_id: str, **attributes: str | int | float) -> Generator[dict[str, Any]]:
    """Record a span below the first one of a trace; see `trace`."""
    found: dict[str, Any] = {}
    if _provider is None:
        yield found
        return
    started = _provider.get_tracer(SCOPE).start_span(name, context=_below(trace_id), attributes=attributes)
    yield from _ended(started, found)


def record(name: str, trace_ids: Iterable[str], began_ns: int, ended_ns: int, **attributes: str | int | float) -> None:
    """Record what was done for several requests at once, as a span in each of their traces.

    Args:
        name: of the spans.
        trace_ids: of the requests; each gets one span.
        began_ns: of `time.time_ns`.
        ended_ns: the same.
        attributes: of each span.
    """
    provider = _provider
    if provider is None:
        return
    tracer = provider.get_tracer(SCOPE)
    for trace_id in dict.fromkeys(trace_ids):
        made = tracer.start_span(name, context=_below(trace_id), start_time=began_ns, attributes=attributes)
        made.end(ended_ns)


def _ended(span: Any, found: dict[str, Any]) -> Generator[dict[str, Any]]:
    from opentelemetry.trace import Status, StatusCode

    try:
        yield found
    except BaseException as error:
        # Without its message, which may quote what a caller sent.
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        span.set_attributes(found)
        span.end()


def _trace_number(trace_id: str) -> int:
    return int(_hex(trace_id), 16)


def _root_number(trace_id: str) -> int:
    return int(_hex(trace_id)[:16], 16)


def _hex(trace_id: str) -> str:
    # Programs that use the predictor without HTTP name their requests as they like.
    return trace_id if _ID.fullmatch(trace_id) else sha256_hex(trace_id.encode())[:32]


def _no_parent() -> Any:
    from opentelemetry.context import Context

    return Context()


def _below(trace_id: str) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    parent = SpanContext(
        _trace_number(trace_id), _root_number(trace_id), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
    )
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _collector(endpoint: str) -> "SpanExporter":
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    session = requests.Session()
    session.trust_env = False  # no proxy of the environment: the setting alone says where spans go
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S, session=session)
