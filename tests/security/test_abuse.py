"""Honest callers beside abusers, as `python -m bench abuse` measures them, in a short seeded form without figures.

What is checked here is the mechanism: nobody honest is refused, and memory and uploads stay within their bounds. How
much slower honest callers get is a figure of the bench, since it depends on the machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.serve.abuse import abusers, broken_bounds, measure
from bench.serve.honest import Honest
from records.memory import return_freed_memory
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Scope
from serving.access.keys import create_key
from serving.explainer import Explainer
from serving.settings import ServingSettings

GROWTH_BYTES = 400_000_000
"""What the service may grow by. Without limits two JSON bombs take more."""


@pytest.mark.slow
def test_nobody_honest_is_refused_while_others_abuse(
    tools: Any, tmp_path: Path, make_image: Callable[..., bytes]
) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    tools.serve_bundle(store, tools.make_bundle(store, 0, bias={"bcc": -2.0}))

    def token(name: str) -> str:
        scopes = [Scope.PREDICT, Scope.FLAG]
        return create_key(store, name=name, organisation=name, scopes=scopes, actor="test")[1]

    honest_keys, greedy = [token("one"), token("two")], token("greedy")
    settings = ServingSettings(port=tools.free_port(), page_folder=tmp_path / "page", page_uploads_mb=20.0)

    process = psutil.Process()
    with tools.run_service(store, settings, page=True) as running:
        honest = Honest(running.url, honest_keys, [make_image(number) for number in range(4)], pause_s=0.2)
        figures = measure(
            honest,
            lambda: abusers(settings.port, greedy, seed=7),
            lambda: (process.memory_info().rss, 0),
            tmp_path / "page",
            seconds=8.0,
            settle_s=1.0,
        )
    store.close()
    assert figures["quiet_requests"] > 0
    assert figures["abused_requests"] > 0
    assert (figures["abused_refused"], figures["abused_refusals"]) == (0, [])
    grown = figures["memory_growth"] * figures["memory_quiet_mb"] * 1e6
    assert grown < GROWTH_BYTES
    assert figures["uploads_mb"] <= 20.0


def test_each_bound_that_is_exceeded_is_named() -> None:
    good = {"honest_p99_ratio": 2.9, "abused_refused": 0, "memory_growth": 0.09, "memory_peak_growth": 0.09}
    good["uploads_mb"] = 500.0
    assert broken_bounds(good, 500.0) == []
    bad = {"honest_p99_ratio": 3.1, "abused_refused": 1, "memory_growth": 0.11, "memory_peak_growth": 0.11}
    for name, value in {**bad, "uploads_mb": 501}.items():
        assert len(broken_bounds({**good, name: value}, 500.0)) == 1, name


def test_what_was_freed_goes_back_to_the_kernel() -> None:
    process = psutil.Process()
    blocks = [bytes([1]) * 64_000 for _ in range(2000)]
    pinned, full = blocks[-1], process.memory_info().rss
    del blocks
    return_freed_memory()
    assert full - process.memory_info().rss > 0.8 * 128e6
    assert len(pinned) == 64_000


def test_memory_goes_back_after_a_slow_heat_map(
    kept: Store, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[bool] = []
    monkeypatch.setattr("serving.explainer.return_freed_memory", lambda: returned.append(True))
    explainer = Explainer(kept, ServingSettings())
    explainer.explain_image(make_image(1), "gradcam", None, None)
    assert returned == []
    explainer.explain_image(make_image(1), "integrated_gradients", None, None)
    assert returned == [True]
