"""Honest callers beside abusers: `python -m bench abuse --minutes 5 --json`.

In: a served deployment. Out: latency of honest callers while it is quiet and under abuse, how many of them were
refused, growth of the service's memory, bytes of the page's uploads, and how often each kind of abuse was done.

Before the quiet phase an honest caller asks once for what the abusers ask for: a heat map by every method and an image
that is decoded in a decoder process. What a part loads at its first use, models and kernels, is no growth. Decoder
processes are counted apart, since each has a limit of its own (`images.decoder_memory_mb`) and ends with its service.

Abusers and honest callers are a process each, in a session of its own: they stand for other machines, whose cores they
have. The abusers' session comes behind all others, since over a network they cannot take the cores of the service or
of the honest callers; the honest callers' session comes before all others, since their own wait for a core is no
latency of the service. What either makes the service do has the service's own priorities.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer

from bench.figures import figures_table
from bench.serve.abusers import KINDS, costly_image
from bench.serve.honest import Honest
from records.command import Call, verb
from records.progress import status
from records.types import Scope

app = typer.Typer()

MAX_LATENCY_RATIO = 3.0
MAX_MEMORY_GROWTH = 0.10
HONEST_CALLERS = 3
SETTLE_S = 15.0
STOP_TIMEOUT_S = 600.0
WARM_SETS = ("serving.page=true", "serving.model_poll_s=1")


def measure(
    honest: Honest,
    abusing: Callable[[], AbstractContextManager[dict[str, int]]],
    memory_bytes: Callable[[], tuple[int, int]],
    uploads: Path,
    seconds: float,
    settle_s: float = SETTLE_S,
) -> dict[str, Any]:
    """Measure a service while it is quiet, and then under abuse.

    Args:
        honest: the honest callers.
        abusing: returns a context manager during which the service is abused, and which yields the counts.
        memory_bytes: returns the memory of the service, and that of its decoder processes.
        uploads: folder of the page's uploads.
        seconds: of each of the two phases.
        settle_s: how long the service may take to give memory back, seconds.
    Returns:
        The figures.
    """
    figures: dict[str, Any] = {}
    warm_s = min(5.0, seconds)
    with honest.calling(warm_s):
        time.sleep(warm_s + seconds)
    figures |= _latencies("quiet", honest)
    before, decoders = memory_bytes()
    peak = before
    disk = 0
    with abusing() as done, honest.calling():
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(0.5)
            now, now_decoders = memory_bytes()
            peak, decoders = max(peak, now), max(decoders, now_decoders)
            disk = max(disk, sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file()))
    figures |= _latencies("abused", honest)
    figures["abuses"] = done
    time.sleep(settle_s)
    figures["honest_callers_first"] = honest.first
    figures["honest_p99_ratio"] = figures["abused_p99_ms"] / figures["quiet_p99_ms"]
    figures["memory_quiet_mb"] = before / 1e6
    figures["memory_peak_growth"] = peak / before - 1
    after, decoders_after = memory_bytes()
    figures["memory_growth"] = after / before - 1
    figures["decoders_peak_mb"], figures["decoders_mb"] = decoders / 1e6, decoders_after / 1e6
    figures["uploads_mb"] = disk / 1e6
    return figures


def broken_bounds(figures: dict[str, Any], quota_mb: float) -> list[str]:
    """Return one sentence for each bound that the figures exceed."""
    broken = []
    if figures["honest_p99_ratio"] > MAX_LATENCY_RATIO:
        broken.append(
            f"honest p99 is {figures['honest_p99_ratio']:.1f} times its quiet value, over {MAX_LATENCY_RATIO:g}"
        )
    if figures["abused_refused"]:
        broken.append(f"{figures['abused_refused']} honest requests were refused")
    for name, when in (("memory_peak_growth", "at its peak"), ("memory_growth", "to stay")):
        if figures[name] > MAX_MEMORY_GROWTH:
            broken.append(f"memory grew by {figures[name]:.1%} {when}, over {MAX_MEMORY_GROWTH:.0%}")
    if figures["uploads_mb"] > quota_mb:
        broken.append(f"the page kept {figures['uploads_mb']:.0f} MB of uploads, over {quota_mb:g}")
    return broken


@contextmanager
def abusers(port: int, key: str, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[dict[str, int]]:
    """Abuse a service from another process during the block; after it, what it was given counts each kind of abuse."""
    command = [sys.executable, "-m", "bench.serve.abusers", str(port), str(seed)]
    done: dict[str, int] = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"key": key, "kinds": list(kinds)}) + "\n")
        process.stdin.flush()
        try:
            yield done
            done.update(json.loads(process.communicate(timeout=STOP_TIMEOUT_S)[0]))
        finally:
            process.kill()


@verb(app, "abuse")
def bench_abuse(
    call: Call,
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the quiet phase and of the abuse, each.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of what the abusers send.")] = 0,
) -> None:
    """Measure honest callers beside abusers on a real deployment; exit code 1 if a bound is exceeded."""
    from bench.drills.live_service import live_service, trained_champion
    from images.synth import render
    from serving.access.keys import create_key

    with TemporaryDirectory(prefix="relook-abuse-") as name:
        folder = Path(name)
        with status("training a small model"):
            trained_champion(folder / "home", folder / "images", lesions=40)
        sets = (*WARM_SETS, f"serving.page_folder={folder / 'page'}")
        with status("quiet callers, then abuse"), live_service(folder / "home", *sets) as service:

            def token(user: str) -> str:
                scopes = [Scope.PREDICT, Scope.FLAG]
                return create_key(service.store, name=user, organisation=user, scopes=scopes, actor="bench")[1]

            def memory_bytes() -> tuple[int, int]:
                replicas = [p for d in ("ingress", "predictor", "explainer", "page") for p in service.replicas(d)]
                decoders = [child for p in replicas for child in p.children(recursive=True)]
                return _resident(replicas), _resident(decoders)

            honest = Honest(
                service.url, [token(f"honest-{n}") for n in range(HONEST_CALLERS)],
                [render("nv", seed=seed, number=number) for number in range(20)],
            )  # fmt: skip
            port, greedy = int(service.url.rpartition(":")[2]), token("greedy")
            _use_once(service.url, honest)
            figures = measure(
                honest, lambda: abusers(port, greedy, seed), memory_bytes, folder / "page", 60 * minutes
            )  # fmt: skip
    broken = broken_bounds(figures, call.settings.serving.page_uploads_mb)
    figures = {"minutes": minutes, **figures, "broken": broken}
    call.emit(figures, figures_table("python -m bench abuse", figures))
    if broken:
        raise typer.Exit(1)


def _use_once(url: str, honest: Honest) -> None:
    """Ask once for a heat map by every method, and for a prediction of an image of 12 megapixels."""
    from vision.explanations.methods import METHODS

    headers = {"Authorization": f"Bearer {honest.keys[0]}", "Content-Type": "image/jpeg"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=300) as client:
        for method in METHODS:
            client.post(f"/v1/explanations?method={method}", content=honest.images[0]).raise_for_status()
        client.post("/v1/predictions", content=costly_image(3500, "jpeg")).raise_for_status()


def _resident(processes: Sequence[psutil.Process]) -> int:
    """Return the resident memory of processes that may end meanwhile, bytes."""
    found = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += process.memory_info().rss
    return found


def _latencies(phase: str, honest: Honest) -> dict[str, Any]:
    p50, p99 = np.percentile(honest.latencies_s, [50, 99]) * 1000
    found = {f"{phase}_requests": len(honest.latencies_s), f"{phase}_p50_ms": float(p50), f"{phase}_p99_ms": float(p99)}
    return found | {f"{phase}_refused": len(honest.refused), f"{phase}_refusals": sorted(set(honest.refused))[:5]}
