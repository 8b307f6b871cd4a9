"""Compare the service with its bare network and with other servers (`python -m bench serve`).

A round measures: bare network, the service with everything on, the service that keeps nothing, each peer, bare network
again. Ratios are formed within a round, and their median over the rounds is reported, because other load on a machine
changes from minute to minute. The service under pressure follows (see `pressure`).
"""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
from rich.progress import Progress

from bench.serve.load import Images, Target, ask, closed_loop
from bench.serve.peers import Peer, Peers
from bench.serve.pressure import Pressure
from bench.serve.subject import Bare
from records.settings import RecordsSettings
from serving.client import Client
from serving.launch import run_service
from serving.settings import ServingSettings

CALLERS = 32
WARM_UP = 64
FULL, KEEPS_NOTHING, WITH_MAPS = "served", "bare", "maps"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        rounds: of all servers.
        seconds: per server and round.
        requests: with explanations, to see whether memory grows.
    """

    rounds: int = 3
    seconds: float = 15.0
    requests: int = 20_000


@dataclass
class ServeBench:
    """One run of the measurements.

    Args:
        settings: of the service; its port has to be free.
        records: a home with a serving model.
        bare: the same model's forward pass.
        peers: other servers.
        images: to send.
        plan: how long to measure.
        bar: progress is shown on it.
    """

    settings: ServingSettings
    records: RecordsSettings
    bare: Bare
    peers: Peers
    images: Images
    plan: Plan
    bar: Progress
    _rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _over_raw: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _cpu_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _single_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self) -> Figures:
        """Measure everything; what cannot be measured is None, with its reason under `reasons`."""
        load_before = os.getloadavg()[0]
        task = self.bar.add_task("rounds", total=self.plan.rounds)
        with self.peers.running(self.images) as peers:
            for _ in range(self.plan.rounds):
                self._round(peers)
                self.bar.advance(task)
        with self._service() as target:
            pressure = Pressure(target, self.settings.port, self.images, self.plan.seconds, self.bar)
            pressed = pressure.figures(self.plan.requests)
            decisions = self._decisions()
        return {**self._ratios(), **pressed, **self._latencies(), "decisions": decisions} | {
            "load_average_before": round(load_before, 1),
            "load_average_after": round(os.getloadavg()[0], 1),
            "reasons": self.peers.reasons,
        }

    def _round(self, peers: dict[str, Peer]) -> None:
        rates: dict[str, float] = {}
        before, cpu_ms = self.bare.rate(self.plan.seconds / 3)
        self._cpu_ms["raw"].append(cpu_ms)
        single_ms = self.bare.single_ms(self.plan.seconds / 6)
        for name, keep in ((FULL, True), (KEEPS_NOTHING, False)):
            with self._service(keep=keep) as target:
                rates[name] = self._measure(name, target)
                if keep:
                    explained = Target(target.port, f"{target.path}?explain=gradcam")
                    rates[WITH_MAPS] = self._measure(WITH_MAPS, explained, single=False)
        for name, peer in peers.items():
            with peer.awake() as target:
                rates[name] = self._measure(name, target, peer.process)
        raw = (before + self.bare.rate(self.plan.seconds / 3)[0]) / 2
        self._single_ms["raw"].append(single_ms)
        self._rates["raw"].append(raw)
        for name, rate in rates.items():
            self._rates[name].append(rate)
            self._over_raw[name].append(rate / raw)

    def _measure(
        self, name: str, target: Target, server: psutil.Process | None = None, *, single: bool = True
    ) -> float:
        """Return the rate at saturation; note the CPU time of a request and the latency of one request alone."""
        ask(target, self.images, WARM_UP, CALLERS).require_success(name)
        before_s = _cpu_s(server)
        load = closed_loop(target, self.images, CALLERS, self.plan.seconds).require_success(name)
        self._cpu_ms[name].append(1000 * (_cpu_s(server) - before_s) / len(load.answered))
        if single:
            alone = closed_loop(target, self.images, 1, self.plan.seconds / 3).require_success(name)
            self._single_ms[name].append(alone.percentile_ms(50) or 0.0)
        return load.per_second

    @contextlib.contextmanager
    def _service(self, *, keep: bool = True) -> Iterator[Target]:
        settings = self.settings.model_copy(update={"keep": keep})
        with run_service(settings, self.records):
            yield Target(settings.port, "/v1/predictions")

    def _decisions(self) -> dict[str, int]:
        """Return the decisions about some of the images: those that go to annotators cost more."""
        with Client(self.settings.url) as client:
            return dict(Counter(client.predict(next(self.images)).decision for _ in range(50)))

    def _ratios(self) -> Figures:
        def over_raw(name: str) -> float | None:
            return round(median(self._over_raw[name]), 3)

        def over(name: str, other: str) -> float | None:
            pairs = list(zip(self._rates[name], self._rates[other], strict=False))
            return round(median(ours / theirs for ours, theirs in pairs), 3) if pairs else None

        rates = {f"{name}_s": round(median(found), 1) for name, found in self._rates.items() if name != "raw"}
        return {
            "raw_images_s": round(median(self._rates["raw"]), 1),
            "served_over_raw": over_raw(FULL),
            "served_over_raw_bare": over_raw(KEEPS_NOTHING),
            **{f"served_over_{peer}": over(FULL, peer) for peer in ("litserve", "bentoml", "fastapi")},
            **{f"bare_over_{peer}": over(KEEPS_NOTHING, peer) for peer in ("litserve", "bentoml", "fastapi")},
            "served_maps_over_served": over(WITH_MAPS, FULL),
            **rates,
            **self._cpu_times(),
            "rounds_served_over_raw": [round(share, 3) for share in self._over_raw[FULL]],
        }

    def _cpu_times(self) -> Figures:
        """Return the CPU time of a request, client included, and the ratios that CPU time alone would give."""
        found = {name: median(times) for name, times in self._cpu_ms.items()}
        return {f"{name}_cpu_ms": round(value, 2) for name, value in found.items()} | {
            f"{name}_over_raw_by_cpu": round(found["raw"] / found[name], 3) for name in (FULL, KEEPS_NOTHING)
        }

    def _latencies(self) -> Figures:
        found = {name: round(median(times), 1) for name, times in self._single_ms.items()}
        return {"p50_ms": found.pop(FULL), **{f"{name}_p50_ms": value for name, value in found.items()}}


def _cpu_s(server: psutil.Process | None) -> float:
    """Return the CPU time that this process and a server's processes took so far, seconds; None is our own service."""
    ours = psutil.Process()
    below = ours.children(recursive=True) if server is None else [server, *server.children(recursive=True)]
    total = 0.0
    for process in [ours, *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
