"""Traffic for the demo: threads that send images to the running service over HTTP and flag some predictions."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from records.errors import RelookError
from records.types import FlagReason
from serving.client import Client
from serving.schemas import Context, FlagRequest, PredictionResponse


@dataclass(frozen=True)
class TrafficImage:
    """An image to send.

    Args:
        image_id: its id in the ledger.
        name: in the data source.
        data: the encoded file.
        truth: its diagnosis, which the service does not get.
    """

    image_id: str
    name: str
    data: bytes = field(repr=False)
    truth: str


@dataclass
class Tally:
    """Counts of the requests so far. Any thread may read them; only `Traffic` writes them."""

    requests: int = 0
    failed: int = 0
    flagged: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    flagged_predictions: list[str] = field(default_factory=list)
    last: str = ""

    def figures(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "flagged": self.flagged,
            "decisions": dict(self.decisions),
            "by_model": dict(self.models),
            "failures": self.failures[:5],
        }


class Traffic:
    """Sends images in a cycle until enough are sent or it is stopped.

    It flags predictions that differ from the truth, as an attentive user would.

    Args:
        url: of the service.
        images: to send, in order, starting again when they run out.
        tally: gets the counts.
        requests: how many to send; None sends until `stop`.
        concurrency: threads.
        rate_per_s: requests per second of all threads together; None sends without a pause.
        flags: how many predictions to flag at most.
        retry_s: how long a failed request is repeated, seconds; 0 counts every failure.
    """

    def __init__(
        self,
        url: str,
        images: Sequence[TrafficImage],
        tally: Tally,
        *,
        requests: int | None,
        concurrency: int,
        rate_per_s: float | None = None,
        flags: int = 0,
        retry_s: float = 0.0,
    ) -> None:
        self._url = url
        self._tally = tally
        self._flags = flags
        self._retry_s = retry_s
        self._pause_s = concurrency / rate_per_s if rate_per_s else 0.0
        self._images = itertools.islice(itertools.cycle(images), requests)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, name=f"traffic-{i}", daemon=True) for i in range(concurrency)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the requests in flight."""
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """Wait until everything is sent."""
        for thread in self._threads:
            thread.join()

    @property
    def running(self) -> bool:
        """Whether a thread is still sending."""
        return any(thread.is_alive() for thread in self._threads)

    def _send(self) -> None:
        with Client(self._url, retry_s=self._retry_s) as client:
            while not self._stop.is_set():
                # All threads draw from one iterator, which is not thread-safe.
                with self._lock:
                    image = next(self._images, None)
                if image is None:
                    return
                self._send_one(client, image)
                self._stop.wait(self._pause_s)

    def _send_one(self, client: Client, image: TrafficImage) -> None:
        started = time.perf_counter()
        try:
            response = client.predict(image.data, context=Context(localization=None))
        except RelookError as error:
            with self._lock:
                self._tally.requests += 1
                self._tally.failed += 1
                self._tally.failures.append(str(error))
            return
        with self._lock:
            self._tally.requests += 1
            self._tally.decisions[response.decision] += 1
            self._tally.models[response.model.id] += 1
            said = (
                f"{response.label} {response.confidence:.2f}" if response.label and response.confidence else "no label"
            )
            elapsed_ms = (time.perf_counter() - started) * 1000
            self._tally.last = f"{image.name}: {said}, {response.decision}, {elapsed_ms:.0f} ms"
            # Counted here, before the flag is sent, so that threads together do not exceed the limit.
            wanted = response.label != image.truth and self._tally.flagged < self._flags
            self._tally.flagged += wanted
        if wanted:
            self._flag(client, response)

    def _flag(self, client: Client, response: PredictionResponse) -> None:
        request = FlagRequest(reason=FlagReason.WRONG_LABEL, comment="This does not look right to me.")
        try:
            client.flag(response.id, request)
        except RelookError as error:
            with self._lock:
                self._tally.flagged -= 1
                self._tally.failed += 1
                self._tally.failures.append(str(error))
            return
        with self._lock:
            self._tally.flagged_predictions.append(response.id)
