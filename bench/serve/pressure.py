"""The service under pressure: tail latency, a flood of explanations, five times its capacity, many requests.

In: a running service. Out: figures. Capacity is measured just before each comparison with it, because the machine's
speed may change within minutes.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
from rich.progress import Progress

from bench.serve.load import Images, Load, Target, ask, closed_loop, open_loop
from records.errors import DataError

CALLERS = 32
MANY_CALLERS = 160
FLOODERS = 4
PAIRS = 2
OVERLOAD = 5.0
Figures = dict[str, Any]


@dataclass(frozen=True)
class Pressure:
    """Measurements of one running service.

    Args:
        target: its predictions.
        port: where it listens.
        images: to send.
        seconds: per stretch.
        bar: progress is shown on it.
    """

    target: Target
    port: int
    images: Images
    seconds: float
    bar: Progress

    def figures(self, requests: int) -> Figures:
        """Measure everything.

        Args:
            requests: with explanations, to see whether memory grows.
        Returns:
            The figures, by key.
        """
        ask(self.target, self.images, 2 * CALLERS, CALLERS)
        return {**self.at_70_percent(), **self.under_flood(), **self.overload(), **self.memory(requests)}

    def capacity(self) -> float:
        """Return replies per second at saturation; DataError without any, since all rates are relative to it."""
        load = closed_loop(self.target, self.images, CALLERS, self.seconds / 2)
        if not load.answered:
            raise DataError(f"no request succeeded within {load.seconds:g} s; measure longer (--seconds)")
        return load.per_second

    def at_70_percent(self) -> Figures:
        """Return the latencies at 70 % of capacity, requests at random moments."""
        load = open_loop(self.target, self.images, 0.7 * self.capacity(), 2 * self.seconds, MANY_CALLERS)
        return {"p99_ms": _ms(load, 99), "p50_at_70_percent_ms": _ms(load, 50), "failed_at_70_percent": _failed(load)}

    def under_flood(self) -> Figures:
        """Return how much longer predictions take at half load under uninterrupted requests for gradients."""
        rate = self.capacity() / 2
        quiet, flooded, maps = [], [], []
        for pair in range(PAIRS):
            quiet.append(self._half_load(rate, seed=pair).percentile_ms(99))
            with self._flood() as explained:
                flooded.append(self._half_load(rate, seed=pair).percentile_ms(99))
            maps.append(len(explained) / self.seconds)
        ratios = [after / before for before, after in zip(quiet, flooded, strict=True) if before and after]
        return {
            "p99_under_explain_flood_ratio": round(median(ratios), 3) if ratios else None,
            "p99_at_half_load_ms": round(median(p for p in quiet if p), 1) if any(quiet) else None,
            "flood_maps_s": round(median(maps), 2),
        }

    def overload(self) -> Figures:
        """Return the goodput at five times the capacity, and after it, as shares of the capacity."""
        capacity = self.capacity()
        load = open_loop(self.target, self.images, OVERLOAD * capacity, self.seconds, MANY_CALLERS)
        refused = [reply for reply in load.replies if reply.status == 429]
        last_s = max(reply.done_s for reply in load.replies)
        first_s = min(reply.due_s for reply in load.replies)
        goodput = len(load.answered) / (last_s - first_s)
        return {
            "goodput_at_5x": round(goodput / capacity, 3),
            "refused_share_at_5x": round(load.share_of(429), 3),
            "refused_without_retry_after": sum(not reply.retry_after for reply in refused),
            "neither_answered_nor_refused_at_5x": len(load.replies) - len(load.answered) - len(refused),
            "capacity_after_5x": round(self.capacity() / capacity, 3),
        }

    def memory(self, requests: int) -> Figures:
        """Return how much the replicas' memory grew between a fifth of the requests and their end."""
        explained = Target(self.port, "/v1/predictions?explain=gradcam")
        task = self.bar.add_task("requests with maps", total=requests)
        parts, sizes, failed = 5, [], 0
        for _ in range(parts):
            failed += _failed(ask(explained, self.images, requests // parts, CALLERS // 2))
            sizes.append(replicas_mb())
            self.bar.advance(task, requests // parts)
        return {
            "memory_growth": round(sizes[-1] / sizes[0] - 1, 4),
            "memory_mb": [round(size) for size in sizes],
            "memory_requests": requests,
            "failed_of_memory_requests": failed,
        }

    def _half_load(self, rate: float, seed: int) -> Load:
        return open_loop(self.target, self.images, rate, self.seconds, MANY_CALLERS, seed)

    @contextlib.contextmanager
    def _flood(self) -> Iterator[list[float]]:
        """Request Integrated Gradients without a pause; the times of the replies are collected in the list."""
        target = Target(self.port, "/v1/explanations?method=integrated_gradients")
        over, moments = threading.Event(), list[float]()

        def flood() -> None:
            while not over.is_set():
                if ask(target, self.images, 1, 1).answered:
                    moments.append(time.perf_counter())

        threads = [threading.Thread(target=flood, daemon=True) for _ in range(FLOODERS)]
        for thread in threads:
            thread.start()
        try:
            yield moments
        finally:
            over.set()
            for thread in threads:
                thread.join()


def replicas_mb() -> float:
    """Return the memory of all replicas below this process, megabytes; pages that they share count in parts."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "ServeReplica:" in " ".join(process.cmdline()):
                total += process.memory_full_info().pss / 1e6
    return total


def _failed(load: Load) -> int:
    return len(load.replies) - len(load.answered)


def _ms(load: Load, percent: float) -> float | None:
    found = load.percentile_ms(percent)
    return None if found is None else round(found, 1)
