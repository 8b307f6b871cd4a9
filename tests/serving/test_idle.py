"""What a service does that nobody asked for: how often its parts wake up, and what a garbage collection looks at."""

import asyncio
import contextlib
import gc
import time
from pathlib import Path

import pytest

from records.settings import RecordsSettings
from records.store import Store, open_store
from serving.collector import freeze_what_stays
from serving.page.layout import QUEUE_POLL_S, build_page
from serving.page.toolkit import gr
from serving.page.uploads import PageFiles
from serving.settings import ServingSettings


def test_an_idle_page_looks_for_events_a_few_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, settings = open_store(RecordsSettings(home=tmp_path / "home")), ServingSettings()
    looks: list[float] = []
    queue = gr.queueing.Queue
    waiting = queue.__len__
    monkeypatch.setattr(queue, "__len__", lambda self: looks.append(time.monotonic()) or waiting(self))

    async def idle() -> float:
        # Gradio opens event loops of its own where none runs.
        queue = build_page(settings, store, PageFiles(settings, tmp_path))._queue
        looks.clear()
        began_s = time.monotonic()
        loops = [asyncio.create_task(loop) for loop in (queue.start_processing(), queue.start_progress_updates())]
        await asyncio.sleep(0.5)
        for task in loops:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return time.monotonic() - began_s

    lasted_s = asyncio.run(idle())
    store.close()
    assert 1 <= len(looks) <= 1 + lasted_s / QUEUE_POLL_S


def test_a_full_collection_looks_at_what_requests_left_behind_only() -> None:
    stays = [[number] for number in range(100_000)]
    before = len(gc.get_objects())
    freeze_what_stays()
    assert gc.get_freeze_count() > len(stays)
    ring: list[object] = []
    ring.append(ring)
    del ring
    assert gc.collect() >= 1, "garbage of later requests is still found"
    assert len(gc.get_objects()) < before - len(stays)


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
@pytest.mark.parametrize("name", ["PredictorReplica", "ExplainerReplica"])
def test_replicas_do_so_before_they_load_a_model(store: Store, name: str) -> None:
    import serving.deployments

    gc.unfreeze()
    made = getattr(serving.deployments, name)
    # Without its asynchronous `__del__`, which Ray Serve awaits.
    type(name, (made,), {"__del__": lambda self: None})(ServingSettings(), store.settings)
    assert gc.get_freeze_count() > 10_000
