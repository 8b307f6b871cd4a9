"""Prometheus metrics of the HTTP ingress.

Each service has its own registry, so two services in one process do not share counts. Gauges of open review items
are read from the ledger at each scrape. What several ingress replicas counted is added up. No label contains data of a
caller or a patient.
"""

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from records.errors import RelookError
from records.ids import utc_now
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Prediction, ReviewItem, ReviewState
from serving.hooks.delivery import state_of
from serving.hooks.settings import HookSettings

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ITEM = TABLES[ReviewItem].c
_SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 11))


@dataclass(frozen=True, slots=True)
class SampleName:
    """One figure of a metric."""

    metric: str
    name: str
    labels: tuple[tuple[str, str], ...]
    counts: bool
    """whether it only grows, and therefore remains when its process has ended"""


Samples = dict[SampleName, float]
"""The figures of one ingress, to be added to those of others."""


async def _alone() -> list[Samples]:
    return []


class Metrics:
    """All metrics of one ingress.

    Args:
        store: with the ledger.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.parts: Callable[[], Awaitable[list[Samples]]] = _alone
        """returns what all ingress replicas of the service counted; empty if there is one"""
        self.hooks: Sequence[HookSettings] = ()
        self.registry = CollectorRegistry()
        labels = ("decision", "label", "model", "arm")
        self._predictions = Counter("relook_predictions", "Predictions", labels, registry=self.registry)
        self._reasons = Counter("relook_reasons", "Reasons for review", ("reason",), registry=self.registry)
        self._latency = Histogram(
            "relook_prediction_seconds", "From decoding to the stored prediction", buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )  # fmt: skip
        self._confidence = Histogram(
            "relook_confidence", "Probability of the label: drift of scores", buckets=_SHARES, registry=self.registry
        )
        self._malignant = Histogram(
            "relook_malignant_probability", "p(malignant): drift of scores", buckets=_SHARES, registry=self.registry
        )
        self._unlike = Histogram(
            "relook_out_of_distribution", "How unlike the training images: drift of inputs",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0, 2.0, 5.0), registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge("relook_images_in_flight", "Images in flight", registry=self.registry)
        self.explained = Counter("relook_explanations", "Heat maps computed", ("method",), registry=self.registry)
        self.flagged = Counter("relook_flags", "Flags", ("reason",), registry=self.registry)
        self._responses = Counter("relook_responses", "HTTP responses", ("status",), registry=self.registry)
        # From zero: a rate is only known of a series that was there before.
        for status in ("200", "500", "503"):
            self._responses.labels(status=status)
        # Apart from the others: every ingress reads the same from the ledger.
        self._of_ledger = CollectorRegistry()
        self._waiting = Gauge("relook_tasks_waiting", "Open review items", ("state",), registry=self._of_ledger)
        self._overdue = Gauge(
            "relook_tasks_overdue", "Urgent review items past their due date", registry=self._of_ledger
        )
        self._hook_failures = Gauge(
            "relook_hook_failures", "Failed deliveries in a row", ("hook",), registry=self._of_ledger
        )

    def responded(self, status: int) -> None:
        """Count an HTTP response by its status; 499 is a caller who hung up before it."""
        self._responses.labels(status=str(status)).inc()

    def predicted(self, prediction: Prediction) -> None:
        """Count a prediction."""
        self._predictions.labels(
            decision=prediction.decision.value,
            label=prediction.label or "none",
            # Twelve characters, as wherever people read model ids.
            model=prediction.model_id[:12],
            arm=prediction.arm.value,
        ).inc()
        for reason in prediction.reasons:
            self._reasons.labels(reason=reason.value).inc()
        self._latency.observe(prediction.latency_ms / 1000)
        if prediction.confidence is not None and prediction.probabilities is not None:
            self._confidence.observe(prediction.confidence)
            malignant = sum(prediction.probabilities[c] for c in self._store.taxonomy.malignant_codes)
            self._malignant.observe(malignant)
        if prediction.out_of_distribution_score is not None:
            self._unlike.observe(prediction.out_of_distribution_score)

    def samples(self) -> Samples:
        """Return what was counted here."""
        return {
            SampleName(metric.name, sample.name, tuple(sample.labels.items()), metric.type != "gauge"): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
        }

    def text(self, parts: Sequence[Samples] = ()) -> bytes:
        """Return all metrics in Prometheus' text format.

        Without the ledger, what is read from it is not a number.

        Args:
            parts: what all ingress replicas counted, to be added up; empty for what was counted here.
        Returns:
            The text, UTF-8.
        """
        try:
            self._read_ledger()
        except RelookError:
            for state in (ReviewState.NEW, ReviewState.PUSHED):
                self._waiting.labels(state=state.value).set(math.nan)
            self._overdue.set(math.nan)
        counted = _Summed(self.registry, added(parts)) if parts else self.registry
        return generate_latest(counted) + generate_latest(self._of_ledger)

    def _read_ledger(self) -> None:
        with self._store.ledger.read() as tx:
            for state in (ReviewState.NEW, ReviewState.PUSHED):
                self._waiting.labels(state=state.value).set(tx.count(ReviewItem, {"state": state}))
            # Due dates pass without any event, so this gauge is computed at each scrape and not counted.
            is_open = _ITEM.state.in_([ReviewState.NEW, ReviewState.PUSHED])
            overdue = tx.connection.scalar(sa.select(sa.func.count()).where(is_open, _ITEM.due < utc_now()))
        for hook in self.hooks:
            self._hook_failures.labels(hook=hook.name).set(state_of(self._store, hook).failures)
        self._overdue.set(overdue or 0)


class _Summed:
    """The metrics of a registry with other figures.

    Args:
        described: names, help texts and types.
        samples: the figures.
    """

    def __init__(self, described: CollectorRegistry, samples: Samples) -> None:
        self._described = described
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        """Yield each metric once."""
        by_metric: dict[str, list[SampleName]] = {}
        for sample in self._samples:
            by_metric.setdefault(sample.metric, []).append(sample)
        for described in self._described.collect():
            metric = Metric(described.name, described.documentation, described.type, described.unit)
            for sample in by_metric.get(described.name, []):
                metric.add_sample(sample.name, dict(sample.labels), self._samples[sample])
            yield metric


def added(parts: Sequence[Samples]) -> Samples:
    """Return the sums of the figures of several ingress replicas."""
    sums: Samples = {}
    for part in parts:
        for sample, value in part.items():
            # When counting began is a time; the first one holds for all of them.
            is_time = sample.name.endswith("_created")
            sums[sample] = min(sums.get(sample, value), value) if is_time else sums.get(sample, 0.0) + value
    return sums
