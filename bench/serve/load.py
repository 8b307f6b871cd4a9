"""The load generator for every server: threads with a persistent connection each, and images that all differ.

    with the server running:
    closed_loop(target, images, callers=24, seconds=10)        # the next request follows a response
    open_loop(target, images, per_second=30, seconds=10)       # requests at fixed times, whether responses come or not

In: where to send images, and images. Out: a `Load`, one `Reply` per request. Requests are written with
`http.client`, which costs a third of a millisecond each: it shares the cores with what is measured.
"""

import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from records.errors import DataError

TIMEOUT_S = 60.0
_TABLE = b"\xff\xdb"
_FINE_ENTRIES = 24
"""Number of a JPEG's 64 quantization steps, those of the finest detail, that are varied to make copies differ."""


@dataclass(frozen=True)
class Target:
    """Where images are sent, and how.

    Args:
        port: on 127.0.0.1.
        path: with its query.
        body: makes a request's body of an image.
        content_type: of that body.
    """

    port: int
    path: str
    body: Callable[[bytes], bytes] = bytes
    content_type: str = "image/jpeg"


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of one request."""

    due_s: float
    """when it should be sent, `time.perf_counter`"""
    done_s: float
    status: int
    """0: the connection broke"""
    retry_after: bool = False

    @property
    def latency_ms(self) -> float:
        """Measured from the time it should have been sent."""
        return (self.done_s - self.due_s) * 1000


@dataclass(frozen=True)
class Load:
    """The results of all requests in a period."""

    replies: Sequence[Reply]
    seconds: float

    @cached_property
    def answered(self) -> list[Reply]:
        """Replies with a result."""
        return [reply for reply in self.replies if 200 <= reply.status < 300]

    @property
    def per_second(self) -> float:
        """Successful replies per second."""
        return len(self.answered) / self.seconds

    def share_of(self, status: int) -> float:
        """Return the share of all requests that got this status."""
        return sum(reply.status == status for reply in self.replies) / max(1, len(self.replies))

    def percentile_ms(self, percent: float) -> float | None:
        """Return a percentile of the latency of successful replies, milliseconds; None without any."""
        if not self.answered:
            return None
        return float(np.percentile([reply.latency_ms for reply in self.answered], percent))

    def require_success(self, what: str) -> "Load":
        """Return this load; DataError if a request failed, since its figures would not be comparable."""
        failed = [reply.status for reply in self.replies if not 200 <= reply.status < 300]
        if failed or not self.replies:
            raise DataError(f"{what} failed {len(failed)} of {len(self.replies)} requests (status {failed[:1]})")
        return self


class Images:
    """An endless row of images, no two of the same bytes. Safe from several threads.

    Args:
        files: JPEG files to make them of.
    """

    def __init__(self, files: Sequence[bytes]) -> None:
        self._files = files
        self._number = 0
        self._lock = threading.Lock()

    def __next__(self) -> bytes:
        """Return the next image."""
        with self._lock:
            number = self._number
            self._number += 1
        return unlike(self._files[number % len(self._files)], number // len(self._files))


def unlike(image: bytes, number: int) -> bytes:
    """Return an image that looks the same and is another file: its finest quantization steps differ by at most one.

    Args:
        image: a JPEG file.
        number: 0 is the image itself; below 2 ** 24 no two are the same.
    Returns:
        A JPEG file of the same length.
    Raises:
        DataError: it has no quantization table of 8 bits.
    """
    at = image.find(_TABLE)
    if at < 0 or image[at + 4] >> 4:
        raise DataError("only baseline JPEG files can be varied; give a folder of such images")
    changed = bytearray(image)
    last = at + 5 + 63
    for bit in range(_FINE_ENTRIES):
        if number >> bit & 1:
            changed[last - bit] += 1 if changed[last - bit] < 255 else -1
    return bytes(changed)


def closed_loop(target: Target, images: Images, callers: int, seconds: float) -> Load:
    """Let callers ask without a pause.

    Args:
        target: whom they ask.
        images: what they send.
        callers: how many ask at once.
        seconds: for how long.
    Returns:
        The replies that came within that time.
    """
    began_s = time.perf_counter()
    ends_s = began_s + seconds

    def due() -> Iterator[float]:
        while (now_s := time.perf_counter()) < ends_s:
            yield now_s

    replies = _run(target, images, [due() for _ in range(callers)])
    return Load([reply for reply in replies if reply.done_s <= ends_s], seconds)


def open_loop(target: Target, images: Images, per_second: float, seconds: float, callers: int, seed: int = 0) -> Load:
    """Send requests at random moments of a given rate, and wait for all replies.

    Args:
        target: whom they ask.
        images: what they send.
        per_second: mean rate; the gaps are exponential.
        seconds: for how long.
        callers: how many may wait at once; a request that finds none free is late, and its latency counts from
            when it was due.
        seed: of the gaps.
    Returns:
        All replies.
    """
    gaps_s = np.random.default_rng(seed).exponential(1 / per_second, max(1, round(per_second * seconds)))
    moments_s = time.perf_counter() + np.cumsum(gaps_s)
    left, lock = iter(moments_s.tolist()), threading.Lock()

    def due() -> Iterator[float]:
        while True:
            with lock:
                moment_s = next(left, None)
            if moment_s is None:
                return
            time.sleep(max(0.0, moment_s - time.perf_counter()))
            yield moment_s

    replies = _run(target, images, [due() for _ in range(callers)])
    return Load(replies, seconds)


def ask(target: Target, images: Images, requests: int, callers: int) -> Load:
    """Send so many requests as fast as the server replies.

    Args:
        target: whom they ask.
        images: what they send.
        requests: how many in all.
        callers: how many ask at once.
    Returns:
        All replies.
    """
    began_s = time.perf_counter()
    left, lock = iter(range(requests)), threading.Lock()

    def due() -> Iterator[float]:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            yield time.perf_counter()

    replies = _run(target, images, [due() for _ in range(callers)])
    return Load(replies, time.perf_counter() - began_s)


@dataclass
class _Caller:
    """One thread's connection."""

    target: Target
    images: Images
    connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.target.port, timeout=TIMEOUT_S)

    def send(self, due_s: float) -> Reply:
        body = self.target.body(next(self.images))
        headers = {"Content-Type": self.target.content_type}
        try:
            self.connection.request("POST", self.target.path, body, headers)
            response = self.connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            return Reply(due_s, time.perf_counter(), 0)
        asked_to_wait = response.getheader("Retry-After") is not None
        return Reply(due_s, time.perf_counter(), response.status, asked_to_wait)


def _run(target: Target, images: Images, schedules: Sequence[Iterator[float]]) -> list[Reply]:
    """Make every caller send one request at each time of its schedule."""
    replies: list[Reply] = []

    def work(schedule: Iterator[float]) -> None:
        caller = _Caller(target, images)
        # Appending is atomic; the order does not matter.
        replies.extend(caller.send(due_s) for due_s in schedule)
        caller.connection.close()

    threads = [threading.Thread(target=work, args=(schedule,), daemon=True) for schedule in schedules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies
